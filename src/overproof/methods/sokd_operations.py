"""SoKD's nine operations on feature maps: a level in [0, 1] is turned into a strength, and the strength applied to the map."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from overproof.losses.feature_distances import wide

Apply = Callable[[Tensor, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Operation:
    """An operation with the strengths of levels 0 and 1.

    Args:
        low, high: strength at level 0 and level 1.
        apply: (map (N, C, H, W), strength as a 0-d tensor, generator) -> map of the same shape. One draw serves the whole batch.
    """

    low: float
    high: float
    apply: Apply

    def __call__(self, feature: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
        """The operation at `level`, which is clamped to [0, 1]."""
        strength = self.low + level.clamp(0, 1) * (self.high - self.low)
        return self.apply(feature, strength.to(feature.device), generator)


def warp(feature: Tensor, rows: list[list[Tensor | float]]) -> Tensor:
    """The map resampled at theta (x, y, 1), bilinearly, zeros outside; coordinates in [-1, 1] over the map."""
    flat = [torch.as_tensor(entry, device=feature.device).to(wide(feature).dtype) for row in rows for entry in row]
    theta = torch.stack(flat).view(1, 2, 3).expand(len(feature), 2, 3)
    grid = F.affine_grid(theta, list(feature.shape), align_corners=False)
    return F.grid_sample(wide(feature), grid, align_corners=False).to(feature.dtype)


def shear_x(feature: Tensor, v: Tensor, generator: torch.Generator) -> Tensor:
    """Rows move by v times their height."""
    return warp(feature, [[1.0, v, 0.0], [0.0, 1.0, 0.0]])


def shear_y(feature: Tensor, v: Tensor, generator: torch.Generator) -> Tensor:
    """Columns move by v times their place."""
    return warp(feature, [[1.0, 0.0, 0.0], [v, 1.0, 0.0]])


def translate_x(feature: Tensor, v: Tensor, generator: torch.Generator) -> Tensor:
    """A shift by the share v of the width; [-1, 1] is the whole width, hence the factor 2."""
    return warp(feature, [[1.0, 0.0, 2 * v], [0.0, 1.0, 0.0]])


def translate_y(feature: Tensor, v: Tensor, generator: torch.Generator) -> Tensor:
    """A shift by the share v of the height."""
    return warp(feature, [[1.0, 0.0, 0.0], [0.0, 1.0, 2 * v]])


def rotate(feature: Tensor, v: Tensor, generator: torch.Generator) -> Tensor:
    """A rotation by v degrees, rigid also where the map is not square."""
    angle, (height, width) = v * (torch.pi / 180), feature.shape[2:]
    sine, cosine = angle.sin(), angle.cos()
    return warp(feature, [[cosine, sine * (height / width), 0.0], [-sine * (width / height), cosine, 0.0]])


def cutout(feature: Tensor, v: Tensor, generator: torch.Generator) -> Tensor:
    """Zeros in one rectangle with sides v H and v W, rounded, at least one cell as soon as v > 0; the same for all images."""
    place = torch.rand(2, generator=generator, device=feature.device)
    inside = []
    for axis, size in enumerate(feature.shape[2:]):
        side = (v * size).round().clamp(min=1) * (v > 0)
        first = (place[axis] * (size - side + 1)).floor()
        cells = torch.arange(size, device=feature.device)
        inside.append((cells >= first) & (cells < first + side))
    return torch.where(inside[0][:, None] & inside[1][None], torch.zeros_like(feature), feature)


def noise(feature: Tensor, v: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise of standard deviation v on every element."""
    drawn = torch.randn(feature.shape, generator=generator, device=feature.device, dtype=feature.dtype)
    return feature + v.to(feature.dtype) * drawn


def channel_shuffle(feature: Tensor, v: Tensor, generator: torch.Generator) -> Tensor:
    """One permutation of the channels; v is not used."""
    return feature[:, torch.randperm(feature.shape[1], generator=generator, device=feature.device)]


def channel_drop(feature: Tensor, v: Tensor, generator: torch.Generator) -> Tensor:
    """Zeros in each channel with probability v, the others untouched; the same channels for all images."""
    dropped = torch.rand(feature.shape[1], generator=generator, device=feature.device) < v
    return torch.where(dropped[:, None, None], torch.zeros_like(feature), feature)


OPERATIONS: dict[str, Operation] = {
    "shear-x": Operation(-0.3, 0.3, shear_x),
    "shear-y": Operation(-0.3, 0.3, shear_y),
    "translate-x": Operation(-0.45, 0.45, translate_x),
    "translate-y": Operation(-0.45, 0.45, translate_y),
    "rotate": Operation(-30.0, 30.0, rotate),
    "cutout": Operation(0.0, 0.2, cutout),
    "noise": Operation(0.0, 0.1, noise),
    "channel-shuffle": Operation(0.0, 1.0, channel_shuffle),
    "channel-drop": Operation(0.0, 0.5, channel_drop),
}
PAIRS: tuple[tuple[str, str], ...] = tuple(itertools.combinations(OPERATIONS, 2))
