"""DeepFool: a minimum-norm attack that steps onto the nearest boundary of the linearised model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from overproof.attacks.ascent import differentiable, input_gradient
from overproof.attacks.base import MinimumNormAttack, logits_of
from overproof.attacks.boundary import advance, begin, crossed
from overproof.attacks.threats import AnyNorm, per_image
from overproof.errors import UsageError
from overproof.networks import in_mode


@dataclass(frozen=True, kw_only=True)
class DeepFool(MinimumNormAttack):
    """Repeats the step that would reach the nearest other class if the model were linear, until the class changes.

    w_k = grad (z_k - z_y),  d_k = |z_k - z_y| / ||w_k||_q,  l = argmin_k d_k,  q = 2 for L2 and 1 for Linf
    x <- clip(x + max((1 + o) d_l, o d_first) v),  v = w_l / ||w_l||_2 (L2) or sign(w_l) (Linf),  o = overshoot

    Args:
        eps, norm, targeted: see `MinimumNormAttack`; norms L2 and Linf.
        steps: linearisations per image at most, at least 1.
        candidates: other classes that are linearised, those with the largest logits, at least 1.
        overshoot: o, above 0.

    Raises:
        UsageError: an option out of its range.

    Reference: Moosavi-Dezfooli, Fawzi, Frossard, CVPR 2016, arXiv 1511.04599.

    Differences from the paper: every step ends inside the box and is prolonged by the overshoot, not the sum of all; no step is
    shorter than o times the distance at the image, without which images at the box come ever nearer to the boundary and never
    cross; the class that is left is the label; only `candidates` classes. Targeted: the boundary between the class to be
    reached and the largest other logit.
    """

    logits_only: ClassVar[bool] = True
    norms: ClassVar[tuple[AnyNorm, ...]] = ("L2", "Linf")

    steps: int = 50
    candidates: int = 10
    overshoot: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.candidates < 1 or not self.overshoot > 0:
            given = f"steps={self.steps}, candidates={self.candidates}, overshoot={self.overshoot}"
            raise UsageError(f"DeepFool({given}): steps and candidates at least 1, overshoot above 0.")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images; the images themselves where none was found within eps."""
        with in_mode(model):
            nearest, rows = begin(self, model, images, labels)
            points, labels = nearest.origin[rows], labels[rows]
            shortest = torch.zeros_like(nearest.sizes[rows])
            for step in range(self.steps):
                if len(rows) == 0:
                    break
                lengths, ways = self._nearest_boundary(model, points, labels)
                shortest = self.overshoot * lengths if step == 0 else shortest
                lengths = torch.maximum((1 + self.overshoot) * lengths, shortest)
                points = (points + per_image(lengths, points) * ways).clamp(0, 1)
                with torch.no_grad():
                    hit = crossed(logits_of(model, points), labels, self.targeted)
                nearest.offer(points, hit, rows)
                rows, labels, points, shortest = (t[~hit] for t in (rows, labels, points, shortest))
        return nearest.within(self.eps)

    def _nearest_boundary(self, model: nn.Module, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Distance (M,) of the nearest boundary of the linearised model, and the way of size 1 to it (M, C, H, W)."""
        gaps, normals = self._linearised(model, points, labels)
        # Only the direction matters: a largest entry of 1 keeps the squares of tiny gradients above the smallest float.
        tiny = torch.finfo(normals.dtype).tiny
        scale = normals.flatten(2).abs().amax(dim=2).clamp(min=tiny)
        normals = normals / scale.view(*scale.shape, *[1] * (points.dim() - 1))
        slopes = torch.linalg.vector_norm(normals.flatten(2), 1 if self.norm == "Linf" else 2, dim=2).clamp(min=tiny)
        lengths = gaps / scale / slopes
        best = lengths.argmin(dim=1)
        chosen = torch.arange(len(best), device=best.device), best
        ways = normals[chosen].sign() if self.norm == "Linf" else normals[chosen] / per_image(slopes[chosen], points)
        return lengths[chosen].nan_to_num(0, 0, 0), ways

    def _linearised(self, model: nn.Module, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What each candidate class still lacks (M, k), and the gradient of what it has (M, k, C, H, W)."""
        with differentiable(points) as x:
            labels = labels.clone()
            logits = logits_of(model, x)
            if self.targeted:
                ahead = advance(logits, labels, True)[:, None]
            else:
                others = logits.scatter(1, labels[:, None], -math.inf)
                count = min(self.candidates, logits.shape[1] - 1)
                ahead = others.topk(count, dim=1).values - logits.gather(1, labels[:, None])
            last = ahead.shape[1] - 1
            rows = [input_gradient(ahead[:, k], x, keep_graph=k < last) for k in range(last + 1)]
        return ahead.detach().abs(), torch.stack(rows, dim=1).nan_to_num_(0, 0, 0)
