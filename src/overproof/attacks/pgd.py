"""Projected gradient descent attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from overproof.attacks.ascent import ascend
from overproof.attacks.base import BudgetAttack, logits_of, predictions, won
from overproof.attacks.objectives import AttackLoss, attack_value, check_loss, departure
from overproof.attacks.randomness import Streams
from overproof.attacks.threats import per_image
from overproof.errors import UsageError
from overproof.networks import in_mode


@dataclass(frozen=True, kw_only=True)
class PGD(BudgetAttack):
    """Projected steepest ascent of a loss from a random start.

    x <- project(x + step_size * steepest(grad L(f(x), y))), `steps` times.

    Args:
        eps, norm, targeted: see `BudgetAttack`.
        loss: L; "ce" cross-entropy, "margin" best other logit minus the label's, "dlr" that margin divided by the spread of
            the largest logits. Towards a target, "ce" and "margin" change their sign and "dlr" is the difference of the
            target's logit and that of the class predicted on the untouched image, divided likewise.
        steps: gradient steps per start, at least 1.
        step_size: pixel units; None means eps / 4 (2/255 at 8/255).
        random_start: begin at a uniform point of the ball instead of the image.
        restarts: number of starts, at least 1. With `early_stop` later ones are only for images that still hold; without, all images
            take all of them, and the last iterate with the largest margin is kept.
        early_stop: an image is left alone as soon as it is misclassified (a target: reached), untouched if it is so from the
            beginning. The verdict can only get stronger, since any point on the path counts, and the batch shrinks.

    Raises:
        UsageError: steps or restarts below 1, or an unknown loss.

    Reference: Madry et al., ICLR 2018, arXiv 1706.06083; margin: Carlini and Wagner, S&P 2017, arXiv 1608.04644; dlr: Croce
    and Hein, ICML 2020, arXiv 2003.01690.

    Differences from the paper: `early_stop` (off reproduces the paper's last iterate).
    """

    logits_only: ClassVar[bool] = True

    loss: AttackLoss = "ce"
    steps: int = 20
    step_size: float | None = None
    random_start: bool = True
    restarts: int = 1
    early_stop: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self, self.loss)
        if self.steps < 1 or self.restarts < 1:
            raise UsageError(f"PGD(steps={self.steps}, restarts={self.restarts}): both must be at least 1.")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        streams, found = Streams.of(generator, images), images.clone()
        if not self.early_stop:
            return self._best(model, images, labels, streams)
        holds = torch.ones_like(labels, dtype=torch.bool)
        with in_mode(model):
            for restart in range(self.restarts):
                # Without a random start the first step looks at the images themselves anyway.
                if restart > 0 or self.random_start:
                    holds = ~won(predictions(model, found), labels, self.targeted)
                if not bool(holds.any()):
                    break
                found[holds] = self._once(model, images[holds], labels[holds], streams.fork(restart).rows(holds))
        return found

    def _best(self, model: nn.Module, images: Tensor, labels: Tensor, streams: Streams) -> Tensor:
        """Every start for every image. The margin and not the loss chooses: its sign is the verdict, and no threshold waits for luck."""
        with in_mode(model):
            found = self._once(model, images, labels, streams.fork(0))
            if self.restarts == 1:
                return found
            best = self._margin(model, found, labels)
            for restart in range(1, self.restarts):
                tried = self._once(model, images, labels, streams.fork(restart))
                margin = self._margin(model, tried, labels)
                found = torch.where(per_image(margin > best, images), tried, found)
                best = torch.maximum(margin, best)
        return found

    def _margin(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            return attack_value("margin", logits_of(model, images), labels, labels if self.targeted else None)

    def _once(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        leave = departure(self.loss, model, images, labels, self.targeted)

        def loss(x: Tensor, rows: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            logits = logits_of(model, x)
            values = attack_value(self.loss, logits, labels[rows], None if leave is None else leave[rows])
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
