"""The attack of Carlini and Wagner: distance and success weighed in one objective, the weight found by bisection."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from overproof.attacks.ascent import differentiable, input_gradient
from overproof.attacks.base import MinimumNormAttack, Nearest, logits_of
from overproof.attacks.boundary import advance, begin, crossed, tighten
from overproof.attacks.threats import AnyNorm
from overproof.errors import UsageError
from overproof.networks import in_mode

_INWARD = 1 - 1e-6  # tanh reaches the ends of the box only at infinity


@dataclass(frozen=True, kw_only=True)
class CarliniWagner(MinimumNormAttack):
    """Adam on the weighted sum of distance and lack of success, in a variable that cannot leave the box.

    min_w ||x' - x||_2^2 + c max(kappa - m(x'), 0),  x' = (tanh(w) + 1) / 2,  m = max_{j != y} z_j - z_y

    For each image the weight c grows tenfold until an attack succeeds and is then found by bisection.

    Args:
        eps, norm, targeted: see `MinimumNormAttack`; norm L2.
        confidence: kappa, the margin in logit units that counts as success, at least 0.
        searches: values of c that are tried, at least 1.
        steps: Adam steps for each c, at least 1.
        learning_rate: of Adam, above 0.
        weight: the first c, above 0.
        abort_early: an image leaves a search when a tenth of the steps has not lowered its least objective by 0.01 %.

    Raises:
        UsageError: an option out of its range.

    Reference: Carlini and Wagner, S&P 2017, arXiv 1608.04644.

    Differences from the paper: 9 values of c and 1,000 steps at most instead of 20 and 10,000; `abort_early`, which their
    later code has for the whole batch, holds for each image by itself; at the end the way back to the image is halved ten
    times.
    """

    logits_only: ClassVar[bool] = True
    norms: ClassVar[tuple[AnyNorm, ...]] = ("L2",)

    confidence: float = 0.0
    searches: int = 9
    steps: int = 1000
    learning_rate: float = 0.01
    weight: float = 1e-3
    abort_early: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.searches < 1 or self.steps < 1 or not self.confidence >= 0:
            given = f"searches={self.searches}, steps={self.steps}, confidence={self.confidence}"
            raise UsageError(f"CarliniWagner({given}): searches and steps at least 1, confidence at least 0.")
        if not self.learning_rate > 0 or not self.weight > 0:
            given = f"learning_rate={self.learning_rate}, weight={self.weight}"
            raise UsageError(f"CarliniWagner({given}): both must be above 0.")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Nearest adversarial images found; the images themselves where none was found within eps."""
        with in_mode(model):
            nearest, rows = begin(self, model, images, labels)
            low = torch.zeros_like(nearest.sizes[rows])
            weights, high = torch.full_like(low, self.weight), torch.full_like(low, math.inf)
            for _ in range(self.searches if len(rows) else 0):
                succeeded = self._descend(model, nearest, labels[rows], rows, weights)
                low, high = torch.where(succeeded, low, weights), torch.where(succeeded, weights, high)
                weights = torch.where(high.isfinite(), (low + high) / 2, 10 * weights)
            tighten(model, nearest, labels, self.targeted, confidence=self.confidence)
        return nearest.within(self.eps)

    def _descend(self, model: nn.Module, nearest: Nearest, labels: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        """Minimise with fixed weights (M,), starting from the images `rows` (M,); whether each succeeded on the way."""
        succeeded, places = torch.zeros_like(rows, dtype=torch.bool), torch.arange(len(rows), device=rows.device)
        point = torch.atanh((2 * nearest.origin[rows] - 1) * _INWARD)
        first, second = torch.zeros_like(point), torch.zeros_like(point)
        before = lowest = torch.full_like(weights, math.inf)
        for step in range(1, self.steps + 1):
            images, values, gradient, success = self._look(model, point, nearest.origin[rows], labels, weights)
            nearest.offer(images, success, rows)
            succeeded[places[success]] = True
            lowest = torch.minimum(lowest, values)
            if self.abort_early and step % max(self.steps // 10, 1) == 1:
                moving = lowest < before * 0.9999
                if not bool(moving.any()):
                    break
                before = lowest
                if not bool(moving.all()):
                    point, first, second, gradient = (t[moving] for t in (point, first, second, gradient))
                    labels, weights, rows, places = (t[moving] for t in (labels, weights, rows, places))
                    before = lowest = lowest[moving]
            first = first.lerp(gradient, 0.1)
            second = second.mul(0.999).addcmul(gradient, gradient, value=0.001)
            size = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
            point = point.addcdiv(first, size, value=-self.learning_rate / (1 - 0.9**step))
        return succeeded

    def _look(
        self, model: nn.Module, point: Tensor, origin: Tensor, labels: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The images at `point`, the objective there, its gradient, and which images succeed."""
        with differentiable(point) as w:
            labels, weights, origin = labels.clone(), weights.clone(), origin.clone()
            images = (w.tanh() + 1) / 2
            logits = logits_of(model, images)
            ahead = advance(logits, labels, self.targeted)
            distance = (images - origin).square().flatten(1).sum(dim=1)
            values = distance + weights * (self.confidence - ahead).clamp(min=0)
            # Of a model without gradient the distance alone would be minimised, silently.
            gradient = input_gradient(values if logits.requires_grad else ahead, w).nan_to_num(0, 0, 0)
            success = crossed(logits.detach(), labels, self.targeted, self.confidence)
            return images.detach(), values.detach(), gradient, success
