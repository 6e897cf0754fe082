"""DDN: a minimum-norm attack that keeps the direction of the change apart from its length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from overproof.attacks.base import MinimumNormAttack
from overproof.attacks.boundary import begin, look, tighten
from overproof.attacks.threats import AnyNorm, per_image
from overproof.errors import UsageError
from overproof.networks import in_mode


@dataclass(frozen=True, kw_only=True)
class DDN(MinimumNormAttack):
    """Walks in the gradient's direction on a sphere that shrinks after a success and grows after a failure.

    d <- d + alpha_k g / ||g||_2,  g = grad L(x + d),  alpha_k from 1 to 0.01 along a cosine
    r <- r (1 - gamma) where x + d is adversarial, else r (1 + gamma);  d <- clip(x + r d / ||d||_2) - x

    where L is the log odds log((1 - p_y) / p_y) for a third of the steps, then the margin max_{j != y} z_j - z_y.

    Args:
        eps, norm, targeted: see `MinimumNormAttack`; norm L2.
        steps: gradients per image, at least 1.
        gamma: relative change of the radius per step, between 0 and 1.
        radius: the first r, pixel units, above 0.
        levels: found images hold only multiples of 1 / (levels - 1), 256 for 8 bits; None: any value. At least 2.

    Raises:
        UsageError: an option out of its range.

    Reference: Rony et al., CVPR 2019, arXiv 1811.09600.

    Differences from the paper: L, there the cross-entropy. The log odds have the same direction, which does not vanish for
    confident models; the margin aims at one class, once it is found. Where the gradient is 0 the direction stays. No rounding
    to 8 bits unless asked for; without it the way back to the image is halved ten times at the end.
    """

    logits_only: ClassVar[bool] = True
    norms: ClassVar[tuple[AnyNorm, ...]] = ("L2",)

    steps: int = 100
    gamma: float = 0.05
    radius: float = 1.0
    levels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or not 0 < self.gamma < 1 or not self.radius > 0:
            given = f"steps={self.steps}, gamma={self.gamma}, radius={self.radius}"
            raise UsageError(f"DDN({given}): steps at least 1, gamma between 0 and 1, radius above 0.")
        if self.levels is not None and self.levels < 2:
            raise UsageError(f"DDN(levels={self.levels}): at least 2, such as 256 for 8-bit images; None for any value.")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Nearest adversarial images found; the images themselves where none was found within eps."""
        with in_mode(model):
            nearest, rows = begin(self, model, images, labels)
            origin, every, labels = nearest.origin[rows], labels, labels[rows]
            points, radii = origin, torch.full_like(nearest.sizes[rows], self.radius)
            widest = self.threat.size(torch.maximum(origin, 1 - origin))
            for step in range(self.steps if len(rows) else 0):
                seen = look(model, points, labels, self.targeted, wide=3 * step < self.steps)
                nearest.offer(points, seen.crossed, rows)
                radii = torch.minimum(radii * torch.where(seen.crossed, 1 - self.gamma, 1 + self.gamma), widest)
                alpha = 0.01 + 0.99 * (1 + math.cos(math.pi * step / self.steps)) / 2
                delta = points - origin + alpha * self._unit(seen.gradient)
                points = self._rounded((origin + per_image(radii, delta) * self._unit(delta)).clamp(0, 1))
            if self.levels is None:
                tighten(model, nearest, every, self.targeted)
        return nearest.within(self.eps)

    def _unit(self, delta: Tensor) -> Tensor:
        return delta / per_image(self.threat.size(delta).clamp(min=torch.finfo(delta.dtype).tiny), delta)

    def _rounded(self, points: Tensor) -> Tensor:
        return points if self.levels is None else (points * (self.levels - 1)).round() / (self.levels - 1)
