"""Registry entries of the methods without data, which play one game by different rules."""

from __future__ import annotations

from typing import Any

WITHOUT_DATA: dict[str, dict[str, Any]] = {
    "dfad": {
        "target": "overproof.methods.dfad:DFAD",
        "summary": "Without data: a generator looks for images on which student and teacher differ.",
        "paper": "Fang, Song, Shen, Wang, Chen, Song: Data-Free Adversarial Distillation, 2019",
        "url": "https://arxiv.org/abs/1912.11006",
        "tags": ("distillation", "data-free"),
    },
    "zskt": {
        "target": "overproof.methods.zskt:ZSKT",
        "summary": "Without data: the generator looks for images on which the predictions differ.",
        "paper": "Micaelli, Storkey: Zero-shot Knowledge Transfer via Adversarial Belief Matching, NeurIPS 2019",
        "url": "https://arxiv.org/abs/1905.09768",
        "tags": ("distillation", "data-free"),
    },
    "dafl": {
        "target": "overproof.methods.dafl:DAFL",
        "summary": "Without data: the generator makes images about which the teacher is sure, of all classes alike.",
        "paper": "Chen et al.: Data-Free Learning of Student Networks, ICCV 2019",
        "url": "https://arxiv.org/abs/1904.01186",
        "tags": ("distillation", "data-free"),
    },
    "dfq": {
        "target": "overproof.methods.dfq:DFQ",
        "summary": "Without data: hard images that look to the teacher's BatchNorm as its training images did.",
        "paper": "Choi, Choi, El-Khamy, Lee: Data-Free Network Quantization With Adversarial Knowledge Distillation, CVPR Workshops 2020",
        "url": "https://arxiv.org/abs/2005.04136",
        "tags": ("distillation", "data-free"),
    },
    "fast-dfkd": {
        "target": "overproof.methods.fast_dfkd:FastDFKD",
        "summary": "Without data, quickly: a generator that has learned where to begin fills a pool of images in a few steps a batch.",
        "paper": "Fang et al.: Up to 100x Faster Data-free Knowledge Distillation, AAAI 2022",
        "url": "https://arxiv.org/abs/2112.06253",
        "tags": ("distillation", "data-free"),
    },
}
