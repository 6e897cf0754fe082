"""Adam on the pixels, projected after each step: an attack that does not stop at the boundary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof.attacks.ascent import differentiable, input_gradient
from overproof.attacks.base import BudgetAttack, logits_of, won
from overproof.attacks.objectives import check_loss
from overproof.attacks.randomness import Streams, other_classes
from overproof.attacks.threats import per_image
from overproof.errors import UsageError
from overproof.losses.divergences import cross_entropy
from overproof.losses.margins import margin
from overproof.networks import in_mode


@dataclass(frozen=True)
class Aim:
    """Where the images of a batch are to go.

    Attributes:
        target: the classes to be reached (N,).
        swapped: probabilities of the untouched images (N, K), those of the class to leave and of the target exchanged.
        streams: what is drawn on the way comes from here.
    """

    target: Tensor
    swapped: Tensor
    streams: Streams


@dataclass(frozen=True, kw_only=True)
class AdamAttack(BudgetAttack):
    """Descent towards a wrong class that goes on when it has won: deep, confident adversarial images.

    x <- project(x - Adam(grad L(x))), `steps` times, with

        "swap"    L = -sum_k s_k log h_k(x), s = h(x_0) with the entries of the true class and the target t exchanged
                  (where t is predicted already, s is 1 at t)
        "ce"      L = -log h_t(x)
        "margin"  L = max(0, max_{j != t} z_j(x) - z_t(x) + confidence)

    Args:
        eps, norm, targeted: see `BudgetAttack`. Without `targeted` every image gets a wrong class drawn uniformly as its target.
        loss: L.
        steps: gradient steps, at least 1.
        learning_rate: of Adam, in pixel units, above 0.
        confidence: margin in logit units that is enough for "margin", at least 0.

    Raises:
        UsageError: an option out of its range, or an unknown loss.

    Reference: Yu, Hu, Guo, Chao, Weinberger, NeurIPS 2019, arXiv 1910.07629 (there the gray-box attacks "PGD" and "CW").

    Differences from the paper: of all points visited the last one that wins is returned; the loss "ce".
    """

    logits_only: ClassVar[bool] = True

    loss: Literal["swap", "ce", "margin"] = "swap"
    steps: int = 50
    learning_rate: float = 0.03
    confidence: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self, self.loss, ("swap", "ce", "margin"))
        if self.steps < 1 or not self.learning_rate > 0 or not self.confidence >= 0:
            given = f"steps={self.steps}, learning_rate={self.learning_rate}, confidence={self.confidence}"
            raise UsageError(f"{type(self).__name__}({given}): steps at least 1, learning_rate above 0, confidence at least 0.")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        streams = Streams.of(generator, images)
        with in_mode(model), torch.inference_mode(False), torch.no_grad():
            images, labels = images.clone(), labels.clone()
            logits = logits_of(model, images)
            leave = logits.argmax(dim=1) if self.targeted else labels
            target = labels if self.targeted else other_classes(labels, logits.shape[1], streams)
            wanted = swapped(logits.softmax(dim=1), leave, target)
            # Where the target is predicted already there is nothing to exchange, and the image only goes deeper.
            there = F.one_hot(target, logits.shape[1]).to(wanted)
            aim = Aim(target, torch.where((leave == target)[:, None], there, wanted), streams)
            return self._descend(model, images, labels, aim)

    def _descend(self, model: nn.Module, images: Tensor, labels: Tensor, aim: Aim) -> Tensor:
        point, best = images.clone(), images
        ever = torch.zeros_like(labels, dtype=torch.bool)
        optimizer = torch.optim.Adam([point], lr=self.learning_rate)
        for _ in range(self.steps):
            with differentiable(point) as x:
                logits = logits_of(model, x)
                point.grad = input_gradient(self.objective(model, x, logits, aim), x).nan_to_num(0, 0, 0)
            hit = won(logits.detach().argmax(dim=1), labels, self.targeted)
            best, ever = torch.where(per_image(hit, point), point, best), ever | hit
            optimizer.step()
            point.copy_(self.threat.project(point, images))
        hit = won(logits_of(model, point).argmax(dim=1), labels, self.targeted)
        return torch.where(per_image(hit | ~ever, point), point, best)

    def objective(self, model: nn.Module, x: Tensor, logits: Tensor, aim: Aim) -> Tensor:
        """What is minimised at the points `x`, of which the model gives `logits`, (N,)."""
        return cross_entropy(logits, aim.swapped) if self.loss == "swap" else self.lack(logits, aim.target)

    def lack(self, logits: Tensor, target: Tensor) -> Tensor:
        """What is missing to the classes `target` (N,): a hinge of the margin, or cross-entropy, (N,)."""
        if self.loss == "margin":
            return (margin(logits, target) + self.confidence).clamp(min=0)
        return cross_entropy(logits, target)


def swapped(probabilities: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`probabilities` (N, K) with the entries of the classes `first` (N,) and `second` (N,) exchanged."""
    pair = torch.stack((first, second), dim=1)
    return probabilities.scatter(1, pair, probabilities.gather(1, pair.flip(1)))
