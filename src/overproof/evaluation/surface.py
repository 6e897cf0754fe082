"""How the loss lies around an image: smooth where a gradient can be trusted, broken where it is masked."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from overproof.attacks.ascent import differentiable, input_gradient
from overproof.attacks.base import logits_of
from overproof.attacks.randomness import Streams, normal
from overproof.attacks.threats import Threat
from overproof.errors import NoGradientError
from overproof.losses.margins import margin
from overproof.networks import full_precision, in_mode

POINTS = 25
CHUNK = 512


def loss_surface(
    model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, *, seed: int = 0, points: int = POINTS
) -> dict[str, np.ndarray]:
    """The margin max_{k != y} z_k - z_y on a plane through each image: x + a g + b r, |a|, |b| <= 2 eps, cut to [0, 1].

    g is the steepest direction of the margin (a random one if the model gives no gradient), r a random direction; both have
    size 1 in the threat's norm. One backward pass in all, points^2 forward passes per image.

    Args:
        model: images -> logits (N, K).
        images: (k, C, H, W) in [0, 1].
        labels: true classes (k,).
        threat: gives the directions their size; its radius is finite.
        seed: of the random directions.
        points: of the grid, per side.

    Returns:
        "surface" (k, points, points): margins, rows along b, columns along a; "surface_size" likewise: the size of the change
        before it is cut; "surface_radius" (points,): the values of a and b; "surface_label" (k,).
    """
    with in_mode(model), full_precision(images.device):
        first, second = _directions(model, images, labels, threat, seed)
        offsets = torch.linspace(-2 * threat.eps, 2 * threat.eps, points, dtype=images.dtype, device=images.device)
        b, a = (t.reshape(-1, 1, 1, 1) for t in torch.meshgrid(offsets, offsets, indexing="ij"))
        margins, sizes = [], []
        for x, y, g, r in zip(images, labels, first, second, strict=True):
            change = a * g + b * r
            sizes.append(threat.size(change))
            margins.append(_margins(model, (x + change).clamp(0, 1), y))
    shape = (len(images), points, points)
    return {
        "surface": torch.cat(margins).view(shape).float().cpu().numpy(),
        "surface_size": torch.cat(sizes).view(shape).float().cpu().numpy(),
        "surface_radius": offsets.float().cpu().numpy(),
        "surface_label": labels.cpu().numpy(),
    }


def _directions(model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, seed: int) -> tuple[Tensor, Tensor]:
    streams = Streams.named(torch.arange(len(images), device=images.device), seed, "surface")
    spare, second = (threat.steepest(normal(images, streams), images) for _ in range(2))
    try:
        with differentiable(images) as x:
            first = threat.steepest(input_gradient(margin(logits_of(model, x), labels), x), images)
    except NoGradientError:
        return spare, second
    usable = first.isfinite().flatten(1).all(dim=1) & (first != 0).flatten(1).any(dim=1)
    return torch.where(usable.view(-1, 1, 1, 1), first, spare), second


def _margins(model: nn.Module, grid: Tensor, label: Tensor) -> Tensor:
    with torch.no_grad():
        parts = [margin(logits_of(model, part), label.expand(len(part))) for part in torch.split(grid, CHUNK)]
    return torch.cat(parts)
