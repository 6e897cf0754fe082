"""What the searches for the smallest change share: their beginning, a look at the model from a point, and their end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from overproof.attacks.ascent import differentiable, input_gradient
from overproof.attacks.base import MinimumNormAttack, Nearest, logits_of, predictions, won
from overproof.attacks.threats import movable, per_image
from overproof.losses.margins import margin


@dataclass(frozen=True)
class Look:
    """The model seen from points (M, C, H, W).

    Attributes:
        values: (M,), margins or log odds in logit units; they grow on the attacker's way.
        gradient: (M, C, H, W) of the values; 0 where it is not finite.
        crossed: (M,), whether the attacker has won.
    """

    values: Tensor
    gradient: Tensor
    crossed: Tensor


def begin(attack: MinimumNormAttack, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Nearest, Tensor]:
    """The record of a batch, in which images that already succeed stand with size 0, and the numbers (M,) of the others."""
    nearest = Nearest(images, attack.threat)
    nearest.offer(images, won(predictions(model, images), labels, attack.targeted))
    return nearest, (~nearest.found).nonzero().flatten()


def advance(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """Signed margin (N,): how far past the decision boundary the attacker is, in logit units."""
    return -margin(logits, labels) if targeted else margin(logits, labels)


def log_odds(logits: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """log((1 - p_y) / p_y) for the label's probability p_y, its opposite towards a target, (N,).

    The cross-entropy is softplus of it, so both have gradients of the same direction; this one does not vanish in rounding
    where the model is sure.
    """
    own = logits.gather(1, labels[:, None]).squeeze(1)
    value = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(dim=1) - own
    return -value if targeted else value


def crossed(logits: Tensor, labels: Tensor, targeted: bool, confidence: float = 0.0) -> Tensor:
    """Whether the attacker has won by `confidence` and by more than the rounding that another batch size brings, (N,)."""
    # The nearest point lies on the boundary itself; one told only by the last bits might not count when judged again.
    slack = 64 * torch.finfo(logits.dtype).eps * logits.abs().amax(dim=1)
    ahead = advance(logits, labels, targeted)
    return won(logits.argmax(dim=1), labels, targeted) & (ahead > slack) & (ahead >= confidence)


def tighten(
    model: nn.Module, nearest: Nearest, labels: Tensor, targeted: bool, *, confidence: float = 0.0, halvings: int = 10
) -> None:
    """Halve the straight way from each adversarial image in `nearest` to its original; what still succeeds is kept.

    Args:
        model: images -> logits (N, K), in eval mode.
        nearest: of N images; found ones come nearer.
        labels: (N,).
        targeted: labels are classes to be reached.
        confidence: margin in logit units that counts as success.
        halvings: forward passes; each halves what may be missing to the boundary.
    """
    rows = (nearest.found & (nearest.sizes > 0)).nonzero().flatten()
    origin, labels = nearest.origin[rows], labels[rows]
    change = nearest.images[rows] - origin
    low, high = torch.zeros_like(nearest.sizes[rows]), torch.ones_like(nearest.sizes[rows])
    for _ in range(halvings if len(rows) else 0):
        middle = (low + high) / 2
        points = (origin + per_image(middle, origin) * change).clamp(0, 1)
        with torch.no_grad():
            hit = crossed(logits_of(model, points), labels, targeted, confidence)
        nearest.offer(points, hit, rows)
        low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)


def look(model: nn.Module, points: Tensor, labels: Tensor, targeted: bool, *, wide: bool = False, inward: bool = False) -> Look:
    """The objective at `points`, with its gradient.

    Args:
        model: images -> logits (N, K).
        points: (M, C, H, W) in [0, 1].
        labels: (M,).
        targeted: labels are classes to be reached.
        wide: take the log odds, which see all classes, instead of the margin, which sees the largest and the label's.
        inward: the gradient is 0 where it would only push a value at the end of the box out of it.
    """
    with differentiable(points) as x:
        labels = labels.clone()  # a tensor of the caller's inference mode cannot be saved for the backward pass
        logits = logits_of(model, x)
        values = (log_odds if wide else advance)(logits, labels, targeted)
        gradient = input_gradient(values, x).nan_to_num(0, 0, 0)
    if inward:
        gradient = movable(gradient, points)
    return Look(values.detach(), gradient, crossed(logits.detach(), labels, targeted))
