"""Random noise: the floor that every attack has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from overproof.attacks.base import BudgetAttack, logits_of
from overproof.attacks.randomness import Streams
from overproof.errors import UsageError
from overproof.losses.margins import margin
from overproof.networks import in_mode


@dataclass(frozen=True, kw_only=True)
class Noise(BudgetAttack):
    """The worst of several uniform points of the ball.

    x~ = argmax_{i = 1..samples} margin(f(x_i), y),  x_i uniform in the ball around x, cut to the box

    Args:
        eps, norm, targeted: see `BudgetAttack`.
        samples: points tried for each image, at least 1; an image is left alone as soon as one succeeds.

    Raises:
        UsageError: samples below 1.

    Reference: Gilmer et al., ICML 2019, arXiv 1901.10513 (why errors in noise bound the distance to the nearest error).

    Differences from the paper: none in what is sampled; the paper draws Gaussian noise, this the uniform noise of the threat.
    """

    logits_only: ClassVar[bool] = True

    samples: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise UsageError(f"Noise(samples={self.samples}): must be at least 1.")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        streams = Streams.of(generator, images)
        with in_mode(model), torch.no_grad():
            best, value = images.detach().clone(), self._progress(model, images, labels)
            for sample in range(self.samples):
                rows = (~(value > 0)).nonzero().flatten()
                if len(rows) == 0:
                    break
                candidates = self.threat.random(images[rows], streams.fork(sample).rows(rows))
                reached = self._progress(model, candidates, labels[rows])
                # A tie of logits counts as no success, so that the last word is the margin's strict sign.
                better = (reached > value[rows]) | value[rows].isnan()
                best[rows[better]], value[rows[better]] = candidates[better], reached[better]
        return best

    def _progress(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        values = margin(logits_of(model, images), labels)
        return -values if self.targeted else values
