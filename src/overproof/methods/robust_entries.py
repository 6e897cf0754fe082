"""Registry entries of methods that attack their own student."""

from __future__ import annotations

from typing import Any

ROBUST: dict[str, dict[str, Any]] = {
    "pgd-at": {
        "target": "overproof.methods.pgd_at:PGDAT",
        "summary": "Adversarial training: cross-entropy on PGD images of the student itself.",
        "paper": "Madry, Makelov, Schmidt, Tsipras, Vladu: Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018",
        "url": "https://arxiv.org/abs/1706.06083",
        "tags": ("robust",),
    },
    "trades": {
        "target": "overproof.methods.trades:TRADES",
        "summary": "Clean cross-entropy plus the divergence between clean and adversarial predictions.",
        "paper": "Zhang et al.: Theoretically Principled Trade-off between Robustness and Accuracy, ICML 2019",
        "url": "https://arxiv.org/abs/1901.08573",
        "tags": ("robust",),
    },
    "ard": {
        "target": "overproof.methods.ard:ARD",
        "summary": "The student on adversarial images imitates the robust teacher on clean ones.",
        "paper": "Goldblum, Fowl, Feizi, Goldstein: Adversarially Robust Distillation, AAAI 2020",
        "url": "https://arxiv.org/abs/1905.09747",
        "tags": ("distillation", "robust"),
    },
    "rslad": {
        "target": "overproof.methods.rslad:RSLAD",
        "summary": "Robust soft labels of the teacher everywhere: in the attack and in both loss terms.",
        "paper": "Zi, Zhao, Ma, Jiang: Revisiting Adversarial Robustness Distillation, ICCV 2021",
        "url": "https://arxiv.org/abs/2108.07969",
        "tags": ("distillation", "robust"),
    },
    "akd2": {
        "target": "overproof.methods.akd2:AKD2",
        "summary": "Labels, a robust and a standard teacher, all three on the student's adversarial images.",
        "paper": "Chen, Zhang, Liu, Chang, Wang: Robust Overfitting May Be Mitigated by Properly Learned Smoothening, ICLR 2021",
        "tags": ("distillation", "robust"),
    },
    "iad-1": {
        "target": "overproof.methods.iad:IAD1",
        "summary": "ARD whose student trusts the teacher as far as it is right on the attacked image, and itself for the rest.",
        "paper": "Zhu et al.: Reliable Adversarial Distillation with Unreliable Teachers, ICLR 2022",
        "url": "https://arxiv.org/abs/2106.04928",
        "tags": ("distillation", "robust"),
    },
    "iad-2": {
        "target": "overproof.methods.iad:IAD2",
        "summary": "AKD2 whose student trusts the robust teacher as far as it is right on the attacked image.",
        "paper": "Zhu et al.: Reliable Adversarial Distillation with Unreliable Teachers, ICLR 2022",
        "url": "https://arxiv.org/abs/2106.04928",
        "tags": ("distillation", "robust"),
    },
    "adaad": {
        "target": "overproof.methods.adaad:AdaAD",
        "summary": "The student agrees with the teacher where both, looking at one perturbed image, differ most.",
        "paper": "Huang, Chen, Wang, Lu, Cheng, Wang: Boosting Accuracy and Robustness of Student Models via Adaptive "
        "Adversarial Distillation, CVPR 2023",
        "tags": ("distillation", "robust"),
    },
    "adaiad": {
        "target": "overproof.methods.adaad:AdaIAD",
        "summary": "IAD-I on the images of AdaAD, where student and teacher differ most.",
        "paper": "Huang, Chen, Wang, Lu, Cheng, Wang: Boosting Accuracy and Robustness of Student Models via Adaptive "
        "Adversarial Distillation, CVPR 2023",
        "tags": ("distillation", "robust"),
    },
    "gacd": {
        "target": "overproof.methods.gacd:GACD",
        "summary": "Features of adversarial images find the robust teacher's features of the same images.",
        "paper": "Bai, Chen, Zhao, Wen, Jiang, Kot: Guided Adversarial Contrastive Distillation for Robust Students, 2020",
        "url": "https://arxiv.org/abs/2009.09922",
        "tags": ("distillation", "features", "robust"),
    },
    "linear-probe": {
        "target": "overproof.methods.linear_probe:LinearProbe",
        "summary": "Only the last linear layer learns: what are the features below it worth, and how robust are they?",
        "paper": "Alain, Bengio: Understanding Intermediate Layers using Linear Classifier Probes, 2016",
        "url": "https://arxiv.org/abs/1610.01644",
        "tags": ("baseline", "robust"),
    },
}
