"""Fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from overproof.attacks.ascent import Start, ascend
from overproof.attacks.base import BudgetAttack, logits_of
from overproof.attacks.randomness import Streams
from overproof.losses.divergences import cross_entropy
from overproof.networks import in_mode


@dataclass(frozen=True, kw_only=True)
class FGSM(BudgetAttack):
    """One step of full length along the steepest direction of the cross-entropy.

    x~ = project(x0 + eps * sign(grad CE(f(x0), y))), x0 = x or a random start.

    Args:
        eps, norm, targeted: see `BudgetAttack`.
        random_start: begin at a uniform point of the ball instead of the image.

    Reference: Goodfellow, Shlens, Szegedy, ICLR 2015, arXiv 1412.6572.

    Differences from the paper: none with the defaults; `random_start` and norms other than Linf are common additions.
    """

    logits_only: ClassVar[bool] = True

    random_start: bool = False

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        sign = -1.0 if self.targeted else 1.0

        def loss(x: Tensor, rows: Tensor) -> Tensor:
            return sign * cross_entropy(logits_of(model, x), labels[rows])

        start: Start = "uniform" if self.random_start else "image"
        with in_mode(model):
            return ascend(
                loss, images, self.threat, steps=1, step_size=self.eps, start=start, generator=Streams.of(generator, images)
            )
