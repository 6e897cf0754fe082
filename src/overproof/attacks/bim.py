"""Basic iterative method (I-FGSM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from overproof.attacks.base import BudgetAttack
from overproof.attacks.pgd import PGD
from overproof.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class BIM(BudgetAttack):
    """Iterated FGSM: small steps along the steepest direction of the cross-entropy, from the image itself.

    x <- project(x + step_size * sign(grad CE(f(x), y))), `steps` times.

    Args:
        eps, norm, targeted: see `BudgetAttack`.
        steps: gradient steps, at least 1.
        step_size: pixel units; None means 1.25 * eps / steps: at 8/255 the paper's ten steps of 1/255.
        early_stop: an image is left alone as soon as it is misclassified (a target: reached).

    Raises:
        UsageError: steps below 1.

    Reference: Kurakin, Goodfellow, Bengio, ICLR workshop 2017, arXiv 1607.02533.

    Differences from the paper: there the step is always one grey level and min(eps + 4, 1.25 eps) steps are made (eps in
    grey levels); here their number is given and the step follows from it. `early_stop`, and norms other than Linf.
    """

    logits_only: ClassVar[bool] = True

    steps: int = 10
    step_size: float | None = None
    early_stop: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise UsageError(f"BIM(steps={self.steps}): at least 1 step is needed.")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        attack = PGD(
            eps=self.eps,
            norm=self.norm,
            targeted=self.targeted,
            steps=self.steps,
            step_size=1.25 * self.eps / self.steps if self.step_size is None else self.step_size,
            random_start=False,
            early_stop=self.early_stop,
        )
        return attack(model, images, labels, generator)
