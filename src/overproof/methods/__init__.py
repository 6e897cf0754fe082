"""One paper, one file: what a method adds to training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from overproof.registry import Registry

if TYPE_CHECKING:
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

__all__ = ["METHODS", "Objective", "RobustObjective"]


def __getattr__(name: str) -> Any:
    if name in ("Objective", "RobustObjective"):
        from overproof.methods import objective

        return getattr(objective, name)
    raise AttributeError(f"module 'overproof.methods' has no attribute {name!r}")
