"""Laws on the plane of which everything is known: for looking at generators."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Toy:
    """A law of points (N, 2), most of them within [-1.5, 1.5].

    Args:
        name: what it is called.
        draw: points (N, 2) from a CPU generator.
        centres: of its modes (K, 2), or None where it has none.
        sigma: standard deviation around them.
    """

    name: str
    draw: Callable[[int, torch.Generator], Tensor]
    centres: Tensor | None = None
    sigma: float = 0.0


def gaussians(name: str, centres: Tensor, sigma: float) -> Toy:
    """Equal Gaussians around `centres` (K, 2)."""

    def draw(count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(centres), (count,), generator=generator)
        return centres[chosen] + sigma * torch.randn(count, 2, generator=generator)

    return Toy(name, draw, centres, sigma)


def ring(count: int = 8, *, radius: float = 2.0, sigma: float = 0.02, scale: float = 1.414) -> Toy:
    """Gaussians on a circle, all divided by `scale`."""
    angles = 2 * math.pi * torch.arange(count) / count
    return gaussians(f"{count}-gaussians", radius * torch.stack([angles.cos(), angles.sin()], 1) / scale, sigma / scale)


def lattice(side: int = 5, *, step: float = 2.0, sigma: float = 0.05, scale: float = 2.828) -> Toy:
    """Gaussians on a square lattice around the origin, all divided by `scale`."""
    ticks = step * (torch.arange(side) - (side - 1) / 2)
    return gaussians(f"{side**2}-gaussians", torch.cartesian_prod(ticks, ticks) / scale, sigma / scale)


def swiss_roll(*, noise: float = 0.25, scale: float = 7.5) -> Toy:
    """A spiral t (cos t, sin t), t uniform on [1.5 pi, 4.5 pi], with noise, divided by `scale`."""

    def draw(count: int, generator: torch.Generator) -> Tensor:
        t = 1.5 * math.pi * (1 + 2 * torch.rand(count, generator=generator))
        points = torch.stack([t * t.cos(), t * t.sin()], 1) + noise * torch.randn(count, 2, generator=generator)
        return points / scale

    return Toy("swiss-roll", draw)


TOYS: dict[str, Callable[[], Toy]] = {"8-gaussians": ring, "25-gaussians": lattice, "swiss-roll": swiss_roll}
