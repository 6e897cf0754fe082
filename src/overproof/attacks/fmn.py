"""FMN: a minimum-norm attack for L0, L1, L2 and Linf that adapts the radius of a ball to the decision boundary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from overproof.attacks.base import MinimumNormAttack
from overproof.attacks.boundary import Look, begin, look
from overproof.attacks.threats import AnyNorm, per_image
from overproof.errors import UsageError
from overproof.networks import in_mode

_DUAL = {"Linf": 1.0, "L2": 2.0, "L1": math.inf}


@dataclass(frozen=True, kw_only=True)
class FMN(MinimumNormAttack):
    """Gradient steps inside a ball whose radius closes in on the decision boundary.

    d <- clip(x + project(d + alpha_k g / ||g||_2, r)) - x,  g = grad L(x + d)
    r <- min(r (1 - gamma_k), best) where x + d is adversarial;  r (1 + gamma_k) where it is not though such an image is known;
    else max(r (1 + gamma_k), ||d|| + |L| / ||g||_dual), the way to the boundary of the linearised model

    where L is the log odds log((1 - p_y) / p_y) for a third of the steps, then the margin max_{j != y} z_j - z_y.
    alpha_k falls from alpha to alpha / 100 and gamma_k from gamma to gamma / 50 along a cosine. For L0 the radius is a number
    of values that changes by at least 1 and begins at 1.

    Args:
        eps, norm, targeted: see `MinimumNormAttack`; all norms.
        steps: gradients per image, at least 1.
        alpha: first step size, pixel units (Euclidean), above 0.
        gamma: first relative change of the radius, between 0 and 1.

    Raises:
        UsageError: an option out of its range.

    Reference: Pintor et al., NeurIPS 2021, arXiv 2102.12827.

    Differences from the paper: L, there the margin throughout, which keeps aiming at the first class it meets. Values at the end
    of the box whose gradient pushes them out take no part in step and slope, and the radius never shrinks before a success
    (there it is the linearised way alone): without either, nothing is found for many images on which the box is active.
    """

    logits_only: ClassVar[bool] = True

    steps: int = 100
    alpha: float = 1.0
    gamma: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or not self.alpha > 0 or not 0 < self.gamma < 1:
            given = f"steps={self.steps}, alpha={self.alpha}, gamma={self.gamma}"
            raise UsageError(f"FMN({given}): steps at least 1, alpha above 0, gamma between 0 and 1.")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Nearest adversarial images found; the images themselves where none was found within eps."""
        with in_mode(model):
            nearest, rows = begin(self, model, images, labels)
            origin, labels = nearest.origin[rows], labels[rows]
            points, radii = origin, torch.full_like(nearest.sizes[rows], 1.0 if self.norm == "L0" else 0.0)
            widest = self.threat.size(torch.maximum(origin, 1 - origin))
            for step in range(self.steps if len(rows) else 0):
                cosine = (1 + math.cos(math.pi * step / self.steps)) / 2
                seen = look(model, points, labels, self.targeted, wide=3 * step < self.steps, inward=True)
                nearest.offer(points, seen.crossed, rows)
                radii = self._radii(radii, seen, points - origin, nearest.sizes[rows], self.gamma * (0.02 + 0.98 * cosine))
                radii = torch.minimum(radii, widest)
                length = seen.gradient.flatten(1).norm(dim=1).clamp(min=torch.finfo(points.dtype).tiny)
                move = self.alpha * (0.01 + 0.99 * cosine) * seen.gradient / per_image(length, points)
                delta = project((points - origin + move).flatten(1), radii[:, None], self.norm)
                points = (origin + delta.view_as(origin)).clamp(0, 1)
        return nearest.within(self.eps)

    def _radii(self, radii: Tensor, seen: Look, delta: Tensor, best: Tensor, gamma: float) -> Tensor:
        """The next radius (M,) of each image."""
        if self.norm == "L0":
            fewer = torch.minimum(torch.minimum(radii - 1, (radii * (1 - gamma)).floor()), best)
            more = torch.maximum(radii + 1, (radii * (1 + gamma)).floor())
            return torch.where(seen.crossed, fewer, more).clamp(min=0)
        slope = torch.linalg.vector_norm(seen.gradient.flatten(1), _DUAL[self.norm], dim=1)
        boundary = self.threat.size(delta) + seen.values.abs() / slope.clamp(min=torch.finfo(slope.dtype).tiny)
        grown = torch.where(best.isfinite(), radii * (1 + gamma), torch.maximum(boundary, radii * (1 + gamma)))
        return torch.where(seen.crossed, torch.minimum(radii * (1 - gamma), best), grown)


def project(delta: Tensor, radii: Tensor, norm: AnyNorm) -> Tensor:
    """The points nearest to `delta` (N, D) in balls of `radii` (N, 1) around 0."""
    if norm == "Linf":
        return torch.minimum(torch.maximum(delta, -radii), radii)
    if norm == "L2":
        length = torch.linalg.vector_norm(delta, dim=1, keepdim=True)
        shrink: Tensor = (radii / length.clamp(min=torch.finfo(delta.dtype).tiny)).clamp(max=1)
        return delta * shrink
    sizes, order = delta.abs().sort(dim=1, descending=True, stable=True)
    count = torch.arange(1, delta.shape[1] + 1, device=delta.device)
    if norm == "L0":
        return delta * torch.zeros_like(delta).scatter_(1, order, (count <= radii).to(delta.dtype))
    # The threshold t with sum max(|d| - t, 0) = r is the largest of the thresholds that keep 1, 2, ... values.
    threshold = ((sizes.cumsum(dim=1) - radii) / count).amax(dim=1, keepdim=True).clamp(min=0)
    return delta.sign() * (delta.abs() - threshold).clamp(min=0)
