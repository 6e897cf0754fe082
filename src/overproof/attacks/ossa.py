"""One-step spectral attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from overproof.attacks.base import BudgetAttack, logits_of, predictions, won
from overproof.attacks.boundary import advance
from overproof.attacks.threats import Norm, per_image
from overproof.errors import UsageError
from overproof.losses.fisher import leading
from overproof.losses.fisher_eigen import Eigensolver
from overproof.networks import in_mode


@dataclass(frozen=True, kw_only=True)
class OSSA(BudgetAttack):
    """One or two steps along the direction in which the network's answer changes most.

    x~ = clip(x + s eps u),  u the eigenvector of the largest eigenvalue of G(x) = sum_k p_k s_k s_k^T, s_k = grad_x log p_k
    two steps: first_share of eps along u(x), the rest along u of the point reached, turned the same way

    The sign s is the one that takes the image further past the decision boundary. No label is needed but for that; with the
    label's score alone in place of the sum u would be the gradient of the cross-entropy.

    Args:
        eps: radius, pixel units.
        norm: "L2", the only one.
        targeted: labels are classes to be reached.
        steps: 1 or 2.
        first_share: of eps, in (0, 1), for the first of two steps.
        estimator: how u is found, see `fisher.leading`; None: exactly, and by iteration beyond 200 classes.
        iterations: of the power iteration, at least 1.

    Raises:
        UsageError: another norm, or an option out of range.

    Reference: Zhao, Fletcher, Yu, Peng, Zhang, Shen, AAAI 2019, arXiv 1810.03806; two steps: after the code of E. Tron's
    CurvNetAttack, in which 60 % of the radius are the first.

    Differences from the paper: the expectation over classes is exact, not sampled, through a K x K matrix. The sign is chosen
    by the margin at both ends, which tells whether the image is misclassified there. The point with the largest margin is
    returned, the image itself included, and images that are misclassified already are left alone.
    """

    logits_only: ClassVar[bool] = True

    eps: float = 0.5
    norm: Norm = "L2"
    steps: int = 1
    first_share: float = 0.6
    estimator: Eigensolver | None = None
    iterations: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm != "L2":
            raise UsageError(f"OSSA(norm={self.norm!r}): an eigenvector has an L2 length; use norm='L2'.")
        if self.steps not in (1, 2) or not 0 < self.first_share < 1 or self.iterations < 1:
            raise UsageError(
                f"OSSA(steps={self.steps}, first_share={self.first_share}, iterations={self.iterations}): steps must be 1 or 2, "
                "first_share in (0, 1), iterations at least 1."
            )

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        found = images.detach().clone()
        with in_mode(model):
            rows = (~won(predictions(model, images), labels, self.targeted)).nonzero().flatten()
            if len(rows):
                found[rows] = self._walk(model, found[rows], labels[rows])
        return found

    def _walk(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        every = torch.arange(len(images), device=images.device)
        best, at, way = images.clone(), images, torch.zeros_like(images)
        value = self._reached(model, images, labels)
        for share in (1.0,) if self.steps == 1 else (self.first_share, 1 - self.first_share):
            u = share * self.eps * leading(model, at, estimator=self.estimator, steps=self.iterations)[1]
            along = (u * way).flatten(1).sum(dim=1)
            # The first step may go either way, the second goes on as the first did.
            ends = [at + u, at - u] if at is images else [at + per_image(torch.where(along < 0, -1, 1), u) * u]
            points = torch.stack([self.threat.project(end, images) for end in ends])
            values = torch.stack([self._reached(model, end, labels) for end in points])
            chosen = values.argmax(dim=0)
            way, at = points[chosen, every] - at, points[chosen, every]
            better = values[chosen, every] > value
            best[better], value = at[better], torch.maximum(values[chosen, every], value)
        return best

    def _reached(self, model: nn.Module, points: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            return advance(logits_of(model, points), labels, self.targeted)
