"""Registry entries of noisy image modelling, its baseline, and the fine-tuning behind both."""

from __future__ import annotations

from typing import Any

_NIM = {
    "paper": "You, Liu, Han, Xu: Beyond Pretrained Features: Noisy Image Modeling Provides Adversarial Defense, NeurIPS 2023",
    "url": "https://arxiv.org/abs/2302.01056",
}

NOISY_IMAGES: dict[str, dict[str, Any]] = {
    "nim": {
        "target": "overproof.methods.nim:NIM",
        "summary": "Pre-training: an autoencoder removes strong noise from whole images; no labels needed.",
        "tags": ("pre-training", "autoencoder"),
        **_NIM,
    },
    "mim": {
        "target": "overproof.methods.nim:MIM",
        "summary": "Pre-training: an autoencoder guesses masked patches; no labels needed.",
        "paper": "He, Chen, Xie, Li, Dollar, Girshick: Masked Autoencoders Are Scalable Vision Learners, CVPR 2022",
        "url": "https://arxiv.org/abs/2111.06377",
        "tags": ("pre-training", "autoencoder"),
    },
    "nim-tune": {
        "target": "overproof.methods.nim_tuning:NIMTuning",
        "summary": "A classifier learns from noisy images that a pre-trained autoencoder, its teacher, has denoised.",
        "tags": ("purifier", "autoencoder"),
        **_NIM,
    },
}
