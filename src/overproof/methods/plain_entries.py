"""Registry entries of baselines, distillers and penalties."""

from __future__ import annotations

from typing import Any

PLAIN: dict[str, dict[str, Any]] = {
    "ce": {
        "target": "overproof.methods.ce:CE",
        "summary": "Cross-entropy with the labels: the student alone.",
        "paper": "",
        "tags": ("baseline",),
    },
    "noisy-labels": {
        "target": "overproof.methods.noisy_labels:NoisyLabels",
        "summary": "Labels softened by noise instead of a teacher: a control for probes.",
        "paper": "Ojha, Li, Sundara Rajan, Liang, Lee: What Knowledge Gets Distilled in Knowledge Distillation?, NeurIPS 2023",
        "tags": ("baseline",),
    },
    "kd": {
        "target": "overproof.methods.kd:KD",
        "summary": "The student imitates the teacher's softened class probabilities.",
        "paper": "Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015",
        "url": "https://arxiv.org/abs/1503.02531",
        "tags": ("distillation", "logits"),
    },
    "fitnet": {
        "target": "overproof.methods.fitnet:FitNet",
        "summary": "The student's middle map, through a regressor, equals the teacher's.",
        "paper": "Romero, Ballas, Kahou, Chassang, Gatta, Bengio: FitNets: Hints for Thin Deep Nets, ICLR 2015",
        "url": "https://arxiv.org/abs/1412.6550",
        "tags": ("distillation", "features"),
    },
    "at": {
        "target": "overproof.methods.attention_transfer:AttentionTransfer",
        "summary": "The student looks where the teacher looks, at every stage.",
        "paper": "Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017",
        "url": "https://arxiv.org/abs/1612.03928",
        "tags": ("distillation", "features"),
    },
    "crd": {
        "target": "overproof.methods.crd:CRD",
        "summary": "Embeddings of one image by both networks find each other among those of other images.",
        "paper": "Tian, Krishnan, Isola: Contrastive Representation Distillation, ICLR 2020",
        "url": "https://arxiv.org/abs/1910.10699",
        "tags": ("distillation", "features"),
    },
    "reviewkd": {
        "target": "overproof.methods.reviewkd:ReviewKD",
        "summary": "Shallow teacher stages are reviewed with what the student has found in deeper ones.",
        "paper": "Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review, CVPR 2021",
        "url": "https://arxiv.org/abs/2104.09044",
        "tags": ("distillation", "features"),
    },
    "rkd": {
        "target": "overproof.methods.rkd:RKD",
        "summary": "Distances and angles between the images of a batch are as the teacher has them.",
        "paper": "Park, Kim, Lu, Cho: Relational Knowledge Distillation, CVPR 2019",
        "url": "https://arxiv.org/abs/1904.05068",
        "tags": ("distillation", "features"),
    },
    "sp": {
        "target": "overproof.methods.similarity:SimilarityPreserving",
        "summary": "Images that excite the teacher alike excite the student alike.",
        "paper": "Tung, Mori: Similarity-Preserving Knowledge Distillation, ICCV 2019",
        "url": "https://arxiv.org/abs/1907.09682",
        "tags": ("distillation", "features"),
    },
    "vid": {
        "target": "overproof.methods.vid:VID",
        "summary": "The student's maps predict the teacher's: a Gaussian with learned variances.",
        "paper": "Ahn, Hu, Damianou, Lawrence, Dai: Variational Information Distillation for Knowledge Transfer, CVPR 2019",
        "url": "https://arxiv.org/abs/1904.05835",
        "tags": ("distillation", "features"),
    },
    "dkd": {
        "target": "overproof.methods.dkd:DKD",
        "summary": "Distillation in two parts: the target class, and the classes beside it.",
        "paper": "Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation, CVPR 2022",
        "url": "https://arxiv.org/abs/2203.08679",
        "tags": ("distillation", "logits"),
    },
    "dist": {
        "target": "overproof.methods.dist:DIST",
        "summary": "Predictions need only correlate with the teacher's, over classes and over images.",
        "paper": "Huang, You, Wang, Qian, Xu: Knowledge Distillation from A Stronger Teacher, NeurIPS 2022",
        "url": "https://arxiv.org/abs/2205.10536",
        "tags": ("distillation", "logits"),
    },
    "logit-standard": {
        "target": "overproof.methods.logit_standard:LogitStandard",
        "summary": "Knowledge distillation of z-scores: how logits relate, not how large they are.",
        "paper": "Sun, Ren, Li, Wang, Cao: Logit Standardization in Knowledge Distillation, CVPR 2024",
        "url": "https://arxiv.org/abs/2403.01427",
        "tags": ("distillation", "logits"),
    },
    "bss": {
        "target": "overproof.methods.bss:BSS",
        "summary": "The student also imitates the teacher on samples just behind the teacher's decision boundaries.",
        "paper": "Heo, Lee, Yun, Choi: Knowledge Distillation with Adversarial Samples Supporting Decision Boundary, AAAI 2019",
        "url": "https://arxiv.org/abs/1805.05532",
        "tags": ("distillation", "logits"),
    },
    "fim": {
        "target": "overproof.methods.fim:FIM",
        "summary": "Cross-entropy plus the trace, or the largest eigenvalue, of the Fisher information with respect to the image.",
        "paper": "Shen, Peng, Zhang, Fan: Defending Against Adversarial Attacks by Suppressing the Largest Eigenvalue of Fisher "
        "Information Matrix, 2019",
        "url": "https://arxiv.org/abs/1909.06137",
        "tags": ("penalty",),
    },
    "ada-alpha": {
        "target": "overproof.methods.ada_alpha:AdaAlpha",
        "summary": "Labels and teacher, mixed by how far it is right about held-out images of the class.",
        "paper": "Lukasik, Bhojanapalli, Menon, Kumar: Teacher's Pet: Understanding and Mitigating Biases in Distillation, TMLR 2022",
        "url": "https://arxiv.org/abs/2106.10494",
        "tags": ("distillation", "logits"),
    },
    "ada-margin": {
        "target": "overproof.methods.ada_margin:AdaMargin",
        "summary": "Distillation whose margins lift classes that the teacher is unreliable about.",
        "paper": "Lukasik, Bhojanapalli, Menon, Kumar: Teacher's Pet: Understanding and Mitigating Biases in Distillation, TMLR 2022",
        "url": "https://arxiv.org/abs/2106.10494",
        "tags": ("distillation", "logits"),
    },
    "composed": {
        "target": "overproof.methods.composed:Composed",
        "summary": "Several methods at once, over one forward pass of each network.",
        "paper": "",
        "tags": ("distillation", "composition"),
    },
    "sokd": {
        "target": "overproof.methods.sokd:SoKD",
        "summary": "A plug-in: the teacher's features are refined by a learned policy and compared where both networks look.",
        "paper": "Shen, Huang, Zhu, Fan, Zhang: Student-Oriented Teacher Knowledge Refinement for Knowledge Distillation, 2024",
        "url": "https://arxiv.org/abs/2409.18785",
        "tags": ("distillation", "features", "plug-in"),
    },
}
