"""What gradient attacks maximise, by name; a value per sample."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from overproof.attacks.base import logits_of
from overproof.errors import UsageError
from overproof.losses.divergences import cross_entropy
from overproof.losses.margins import dlr, margin, targeted_dlr

AttackLoss = Literal["ce", "margin", "dlr"]
LOSSES = ("ce", "margin", "dlr")


def check_loss(attack: object, loss: str, known: tuple[str, ...] = LOSSES) -> None:
    """Refuse a loss that `attack` does not know.

    Raises:
        UsageError: names the known ones.
    """
    if loss not in known:
        raise UsageError(f"{type(attack).__name__}(loss={loss!r}): known losses are {', '.join(known)}.")


def attack_value(loss: AttackLoss, logits: Tensor, labels: Tensor, leave: Tensor | None = None) -> Tensor:
    """How near the attacker is to the goal: grows on the way.

    Args:
        loss: "ce" cross-entropy, "margin" difference of logits (Carlini and Wagner), "dlr" difference of logits ratio.
        logits: (N, K).
        labels: true classes (N,); with `leave`, the classes to be reached.
        leave: None for an untargeted attack, else the classes (N,) from which a targeted one starts; only "dlr" looks at them.

    Returns:
        (N,).
    """
    if loss == "dlr":
        return dlr(logits, labels) if leave is None else targeted_dlr(logits, leave, labels)
    values = cross_entropy(logits, labels) if loss == "ce" else margin(logits, labels)
    return values if leave is None else -values


def departure(loss: str, model: nn.Module, images: Tensor, labels: Tensor, targeted: bool) -> Tensor | None:
    """The `leave` of `attack_value`: None untargeted, else the model's predictions on `images` where the loss needs them."""
    if not targeted or loss != "dlr":
        return labels if targeted else None
    with torch.no_grad():
        return logits_of(model, images).argmax(dim=1)
