"""Threats, the one inner maximiser, and attacks as values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from overproof.registry import Registry

if TYPE_CHECKING:
    from overproof.attacks.ascent import ascend
    from overproof.attacks.base import Attack, predictions
    from overproof.attacks.fgsm import FGSM
    from overproof.attacks.pgd import PGD
    from overproof.attacks.threats import L1, L2, Linf, Threat, make_threat

ATTACKS = Registry("attack", "overproof.attacks")

ATTACKS.add(
    "fgsm",
    "overproof.attacks.fgsm:FGSM",
    summary="One step along the sign of the gradient, optionally from a random start.",
    paper="Goodfellow, Shlens, Szegedy: Explaining and Harnessing Adversarial Examples, ICLR 2015",
    url="https://arxiv.org/abs/1412.6572",
    tags=("white-box", "gradient", "single-step"),
)
ATTACKS.add(
    "pgd",
    "overproof.attacks.pgd:PGD",
    summary="Projected gradient ascent with random starts, early exit per image and restarts; also targeted.",
    paper="Madry, Makelov, Schmidt, Tsipras, Vladu: Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018",
    url="https://arxiv.org/abs/1706.06083",
    tags=("white-box", "gradient", "iterative"),
)

_HOMES = {
    "ascend": "ascent",
    "Attack": "base",
    "predictions": "base",
    "FGSM": "fgsm",
    "PGD": "pgd",
    "Linf": "threats",
    "L2": "threats",
    "L1": "threats",
    "Threat": "threats",
    "make_threat": "threats",
}

__all__ = [
    "ATTACKS", "FGSM", "L1", "L2", "PGD", "Attack", "Linf", "Threat", "ascend", "make_threat", "predictions",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"overproof.attacks.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'overproof.attacks' has no attribute {name!r}")
