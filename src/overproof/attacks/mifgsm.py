"""Momentum iterative fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from overproof.attacks.ascent import differentiable, input_gradient
from overproof.attacks.base import BudgetAttack, logits_of, won
from overproof.attacks.threats import per_image
from overproof.errors import UsageError
from overproof.losses.divergences import cross_entropy
from overproof.networks import in_mode


@dataclass(frozen=True, kw_only=True)
class MIFGSM(BudgetAttack):
    """Iterated FGSM along a running sum of gradients, which carries over to other models better than the last gradient.

    g <- decay * g + grad CE(f(x), y) / ||grad CE(f(x), y)||_1,   x <- project(x + step_size * sign(g)), from the image itself.

    Args:
        eps, norm, targeted: see `BudgetAttack`; for L2 the step follows g / ||g||_2, for L1 the largest entry of g.
        steps: gradient steps, at least 1.
        step_size: pixel units; None means eps / steps, as in the paper.
        decay: weight of the running sum, at least 0; 0 is I-FGSM.
        early_stop: an image is left alone as soon as it is misclassified (a target: reached). Switch it off to craft images
            for another model: they transfer the better the longer they are worked on.

    Raises:
        UsageError: steps below 1, or a negative decay.

    Reference: Dong et al., CVPR 2018, arXiv 1710.06081.

    Differences from the paper: `early_stop` (off in the paper), and the L1 ball.
    """

    logits_only: ClassVar[bool] = True

    steps: int = 10
    step_size: float | None = None
    decay: float = 1.0
    early_stop: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or not self.decay >= 0:
            raise UsageError(f"MIFGSM(steps={self.steps}, decay={self.decay}): at least 1 step and a decay of at least 0.")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images; nothing is random, `generator` stays unused."""
        step, threat = self.eps / self.steps if self.step_size is None else self.step_size, self.threat
        with in_mode(model), torch.inference_mode(False), torch.no_grad():
            final, rows = images.clone(), torch.arange(len(images), device=images.device)
            origin, x, summed = images.clone(), images.clone(), torch.zeros_like(images)
            for _ in range(self.steps):
                gradient, done = self._gradient(model, x, labels[rows])
                if self.early_stop and bool(done.any()):
                    final[rows[done]] = x[done]
                    rows, origin, x, summed, gradient = (t[~done] for t in (rows, origin, x, summed, gradient))
                    if len(rows) == 0:
                        return final
                length = gradient.flatten(1).abs().sum(dim=1).clamp(min=1e-12)
                summed = self.decay * summed + gradient / per_image(length, x)
                x = threat.project(x + step * threat.steepest(summed, x), origin)
            final[rows] = x
        return final

    def _gradient(self, model: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        sign = -1.0 if self.targeted else 1.0
        with differentiable(x) as leaf:
            logits = logits_of(model, leaf)
            gradient = input_gradient(sign * cross_entropy(logits, labels), leaf).nan_to_num_(nan=0.0)
        return gradient, won(logits.detach().argmax(dim=1), labels, self.targeted)
