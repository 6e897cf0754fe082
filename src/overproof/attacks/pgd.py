"""Projected gradient descent attack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from overproof.attacks.ascent import ascend
from overproof.attacks.base import BudgetAttack, logits_of, predictions, won
from overproof.attacks.randomness import Streams
from overproof.errors import UsageError
from overproof.losses.divergences import cross_entropy
from overproof.networks import in_mode


@dataclass(frozen=True, kw_only=True)
class PGD(BudgetAttack):
    """Projected steepest ascent of the cross-entropy from a random start.

    x <- project(x + step_size * steepest(grad CE(f(x), y))), `steps` times.

    Args:
        eps, norm, targeted: see `BudgetAttack`.
        steps: gradient steps per start, at least 1.
        step_size: pixel units; None means eps / 4 (2/255 at 8/255).
        random_start: begin at a uniform point of the ball instead of the image.
        restarts: number of starts; later ones only for images that still hold, at least 1.
        early_stop: an image is left alone as soon as it is misclassified (a target: reached). The verdict can only get
            stronger, since any point on the path counts, and the batch shrinks.

    Raises:
        UsageError: steps or restarts below 1.

    Reference: Madry et al., ICLR 2018, arXiv 1706.06083.

    Differences from the paper: `early_stop` (off reproduces the paper's last iterate).
    """

    steps: int = 20
    step_size: float | None = None
    random_start: bool = True
    restarts: int = 1
    early_stop: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.restarts < 1:
            raise UsageError(f"PGD(steps={self.steps}, restarts={self.restarts}): both must be at least 1.")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        streams = Streams.of(generator, images)
        with in_mode(model):
            found = self._once(model, images, labels, streams)
            for restart in range(1, self.restarts):
                holds = ~won(predictions(model, found), labels, self.targeted)
                if not bool(holds.any()):
                    break
                found[holds] = self._once(model, images[holds], labels[holds], streams.fork(restart).rows(holds))
        return found

    def _once(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None) -> Tensor:
        sign = -1.0 if self.targeted else 1.0

        def loss(x: Tensor, rows: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            logits = logits_of(model, x)
            values = sign * cross_entropy(logits, labels[rows])
            return (values, won(logits.detach().argmax(dim=1), labels[rows], self.targeted)) if self.early_stop else values

        return ascend(
            loss,
            images,
            self.threat,
            steps=self.steps,
            step_size=self.eps / 4 if self.step_size is None else self.step_size,
            start="uniform" if self.random_start else "image",
            generator=generator,
        )
