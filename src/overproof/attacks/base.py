"""The contract of an attack, and what gradient attacks have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from overproof.attacks.threats import Norm, Threat, make_threat
from overproof.errors import DataError
from overproof.networks import in_mode


@runtime_checkable
class Attack(Protocol):
    """A value that turns images into adversarial ones.

    `attack(model, images, labels, generator=None)` returns images of the same shape inside [0, 1] and inside `threat`
    around the originals. With `targeted`, `labels` are the classes to be reached, otherwise the true ones. The model's
    modes, parameters, gradients, buffers and hooks are as before when it returns.
    """

    @property
    def threat(self) -> Threat:
        """What the attacker may do."""
        ...

    @property
    def targeted(self) -> bool:
        """Whether `labels` are classes to be reached."""
        ...

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        ...


@dataclass(frozen=True, kw_only=True)
class BudgetAttack:
    """An attack with a radius.

    Args:
        eps: radius in pixel units (8/255 is eight grey levels), at least 0.
        norm: "Linf", "L2" or "L1".
        targeted: labels are classes to be reached.
    """

    eps: float = 8 / 255
    norm: Norm = "Linf"
    targeted: bool = False

    def __post_init__(self) -> None:
        make_threat(self.norm, self.eps)

    @property
    def threat(self) -> Threat:
        """What the attacker may do."""
        return make_threat(self.norm, self.eps)


def predictions(model: nn.Module, images: Tensor) -> Tensor:
    """Predicted classes (N,) in eval mode, without gradients."""
    with in_mode(model), torch.no_grad():
        return logits_of(model, images).argmax(dim=1)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """The model's output, checked to be logits of shape (N, K)."""
    logits: Tensor = model(images)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(f"The model returned {found} for {len(images)} images; a classifier returns logits of shape (N, K).")
    return logits
