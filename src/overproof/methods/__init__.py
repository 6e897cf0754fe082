"""One paper, one file: what a method adds to training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from overproof.registry import Registry

if TYPE_CHECKING:
    from overproof.methods.feature_objective import FeatureObjective
    from overproof.methods.objective import Objective, RobustObjective

METHODS = Registry("method", "overproof.methods")

METHODS.add(
    "ce",
    "overproof.methods.ce:CE",
    summary="Cross-entropy with the labels: the student alone.",
    paper="",
    tags=("baseline",),
)
METHODS.add(
    "noisy-labels",
    "overproof.methods.noisy_labels:NoisyLabels",
    summary="Labels softened by noise instead of a teacher: a control for probes.",
    paper="Ojha, Li, Sundara Rajan, Liang, Lee: What Knowledge Gets Distilled in Knowledge Distillation?, NeurIPS 2023",
    tags=("baseline",),
)
METHODS.add(
    "kd",
    "overproof.methods.kd:KD",
    summary="The student imitates the teacher's softened class probabilities.",
    paper="Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015",
    url="https://arxiv.org/abs/1503.02531",
    tags=("distillation", "logits"),
)
METHODS.add(
    "pgd-at",
    "overproof.methods.pgd_at:PGDAT",
    summary="Adversarial training: cross-entropy on PGD images of the student itself.",
    paper="Madry, Makelov, Schmidt, Tsipras, Vladu: Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018",
    url="https://arxiv.org/abs/1706.06083",
    tags=("robust",),
)
METHODS.add(
    "trades",
    "overproof.methods.trades:TRADES",
    summary="Clean cross-entropy plus the divergence between clean and adversarial predictions.",
    paper="Zhang et al.: Theoretically Principled Trade-off between Robustness and Accuracy, ICML 2019",
    url="https://arxiv.org/abs/1901.08573",
    tags=("robust",),
)
METHODS.add(
    "ard",
    "overproof.methods.ard:ARD",
    summary="The student on adversarial images imitates the robust teacher on clean ones.",
    paper="Goldblum, Fowl, Feizi, Goldstein: Adversarially Robust Distillation, AAAI 2020",
    url="https://arxiv.org/abs/1905.09747",
    tags=("distillation", "robust"),
)
METHODS.add(
    "rslad",
    "overproof.methods.rslad:RSLAD",
    summary="Robust soft labels of the teacher everywhere: in the attack and in both loss terms.",
    paper="Zi, Zhao, Ma, Jiang: Revisiting Adversarial Robustness Distillation, ICCV 2021",
    url="https://arxiv.org/abs/2108.07969",
    tags=("distillation", "robust"),
)
METHODS.add(
    "akd2",
    "overproof.methods.akd2:AKD2",
    summary="Labels, a robust and a standard teacher, all three on the student's adversarial images.",
    paper="Chen, Zhang, Liu, Chang, Wang: Robust Overfitting May Be Mitigated by Properly Learned Smoothening, ICLR 2021",
    tags=("distillation", "robust"),
)
METHODS.add(
    "iad-1",
    "overproof.methods.iad:IAD1",
    summary="ARD whose student trusts the teacher as far as it is right on the attacked image, and itself for the rest.",
    paper="Zhu et al.: Reliable Adversarial Distillation with Unreliable Teachers, ICLR 2022",
    url="https://arxiv.org/abs/2106.04928",
    tags=("distillation", "robust"),
)
METHODS.add(
    "iad-2",
    "overproof.methods.iad:IAD2",
    summary="AKD2 whose student trusts the robust teacher as far as it is right on the attacked image.",
    paper="Zhu et al.: Reliable Adversarial Distillation with Unreliable Teachers, ICLR 2022",
    url="https://arxiv.org/abs/2106.04928",
    tags=("distillation", "robust"),
)
METHODS.add(
    "adaad",
    "overproof.methods.adaad:AdaAD",
    summary="The student agrees with the teacher where both, looking at one perturbed image, differ most.",
    paper="Huang, Chen, Wang, Lu, Cheng, Wang: Boosting Accuracy and Robustness of Student Models via Adaptive Adversarial Distillation, CVPR 2023",
    tags=("distillation", "robust"),
)
METHODS.add(
    "adaiad",
    "overproof.methods.adaad:AdaIAD",
    summary="IAD-I on the images of AdaAD, where student and teacher differ most.",
    paper="Huang, Chen, Wang, Lu, Cheng, Wang: Boosting Accuracy and Robustness of Student Models via Adaptive Adversarial Distillation, CVPR 2023",
    tags=("distillation", "robust"),
)
METHODS.add(
    "fitnet",
    "overproof.methods.fitnet:FitNet",
    summary="The student's middle map, through a regressor, equals the teacher's.",
    paper="Romero, Ballas, Kahou, Chassang, Gatta, Bengio: FitNets: Hints for Thin Deep Nets, ICLR 2015",
    url="https://arxiv.org/abs/1412.6550",
    tags=("distillation", "features"),
)
METHODS.add(
    "at",
    "overproof.methods.attention_transfer:AttentionTransfer",
    summary="The student looks where the teacher looks, at every stage.",
    paper="Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017",
    url="https://arxiv.org/abs/1612.03928",
    tags=("distillation", "features"),
)
METHODS.add(
    "crd",
    "overproof.methods.crd:CRD",
    summary="Embeddings of one image by both networks find each other among those of other images.",
    paper="Tian, Krishnan, Isola: Contrastive Representation Distillation, ICLR 2020",
    url="https://arxiv.org/abs/1910.10699",
    tags=("distillation", "features"),
)
METHODS.add(
    "reviewkd",
    "overproof.methods.reviewkd:ReviewKD",
    summary="Shallow teacher stages are reviewed with what the student has found in deeper ones.",
    paper="Chen, Liu, Zhao, Jia: Distilling Knowledge via Knowledge Review, CVPR 2021",
    url="https://arxiv.org/abs/2104.09044",
    tags=("distillation", "features"),
)
METHODS.add(
    "rkd",
    "overproof.methods.rkd:RKD",
    summary="Distances and angles between the images of a batch are as the teacher has them.",
    paper="Park, Kim, Lu, Cho: Relational Knowledge Distillation, CVPR 2019",
    url="https://arxiv.org/abs/1904.05068",
    tags=("distillation", "features"),
)
METHODS.add(
    "sp",
    "overproof.methods.similarity:SimilarityPreserving",
    summary="Images that excite the teacher alike excite the student alike.",
    paper="Tung, Mori: Similarity-Preserving Knowledge Distillation, ICCV 2019",
    url="https://arxiv.org/abs/1907.09682",
    tags=("distillation", "features"),
)
METHODS.add(
    "vid",
    "overproof.methods.vid:VID",
    summary="The student's maps predict the teacher's: a Gaussian with learned variances.",
    paper="Ahn, Hu, Damianou, Lawrence, Dai: Variational Information Distillation for Knowledge Transfer, CVPR 2019",
    url="https://arxiv.org/abs/1904.05835",
    tags=("distillation", "features"),
)
METHODS.add(
    "dkd",
    "overproof.methods.dkd:DKD",
    summary="Distillation in two parts: the target class, and the classes beside it.",
    paper="Zhao, Cui, Song, Qiu, Liang: Decoupled Knowledge Distillation, CVPR 2022",
    url="https://arxiv.org/abs/2203.08679",
    tags=("distillation", "logits"),
)
METHODS.add(
    "dist",
    "overproof.methods.dist:DIST",
    summary="Predictions need only correlate with the teacher's, over classes and over images.",
    paper="Huang, You, Wang, Qian, Xu: Knowledge Distillation from A Stronger Teacher, NeurIPS 2022",
    url="https://arxiv.org/abs/2205.10536",
    tags=("distillation", "logits"),
)
METHODS.add(
    "logit-standard",
    "overproof.methods.logit_standard:LogitStandard",
    summary="Knowledge distillation of z-scores: how logits relate, not how large they are.",
    paper="Sun, Ren, Li, Wang, Cao: Logit Standardization in Knowledge Distillation, CVPR 2024",
    url="https://arxiv.org/abs/2403.01427",
    tags=("distillation", "logits"),
)
METHODS.add(
    "bss",
    "overproof.methods.bss:BSS",
    summary="The student also imitates the teacher on samples just behind the teacher's decision boundaries.",
    paper="Heo, Lee, Yun, Choi: Knowledge Distillation with Adversarial Samples Supporting Decision Boundary, AAAI 2019",
    url="https://arxiv.org/abs/1805.05532",
    tags=("distillation", "logits"),
)
METHODS.add(
    "gacd",
    "overproof.methods.gacd:GACD",
    summary="Features of adversarial images find the robust teacher's features of the same images.",
    paper="Bai, Chen, Zhao, Wen, Jiang, Kot: Guided Adversarial Contrastive Distillation for Robust Students, 2020",
    url="https://arxiv.org/abs/2009.09922",
    tags=("distillation", "features", "robust"),
)
METHODS.add(
    "linear-probe",
    "overproof.methods.linear_probe:LinearProbe",
    summary="Only the last linear layer learns: what are the features below it worth, and how robust are they?",
    paper="Alain, Bengio: Understanding Intermediate Layers using Linear Classifier Probes, 2016",
    url="https://arxiv.org/abs/1610.01644",
    tags=("baseline", "robust"),
)
METHODS.add(
    "fim",
    "overproof.methods.fim:FIM",
    summary="Cross-entropy plus the trace, or the largest eigenvalue, of the Fisher information with respect to the image.",
    paper="Shen, Peng, Zhang, Fan: Defending Against Adversarial Attacks by Suppressing the Largest Eigenvalue of Fisher Information Matrix, 2019",
    url="https://arxiv.org/abs/1909.06137",
    tags=("penalty",),
)
METHODS.add(
    "composed",
    "overproof.methods.composed:Composed",
    summary="Several methods at once, over one forward pass of each network.",
    paper="",
    tags=("distillation", "composition"),
)
METHODS.add(
    "sokd",
    "overproof.methods.sokd:SoKD",
    summary="A plug-in: the teacher's features are refined by a learned policy and compared where both networks look.",
    paper="Shen, Huang, Zhu, Fan, Zhang: Student-Oriented Teacher Knowledge Refinement for Knowledge Distillation, 2024",
    url="https://arxiv.org/abs/2409.18785",
    tags=("distillation", "features", "plug-in"),
)

__all__ = ["METHODS", "FeatureObjective", "Objective", "RobustObjective"]


def __getattr__(name: str) -> Any:
    if name in ("Objective", "RobustObjective"):
        from overproof.methods import objective

        return getattr(objective, name)
    if name == "FeatureObjective":
        from overproof.methods.feature_objective import FeatureObjective

        return FeatureObjective
    raise AttributeError(f"module 'overproof.methods' has no attribute {name!r}")
