"""Where do its classes end?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from overproof.attacks.threats import per_image
from overproof.data.order import generator_for
from overproof.probes.base import Probe, Result, SkipProbe
from overproof.probes.lab import Lab
from overproof.probes.store import fingerprint

BEYOND = 0.1  # share of the extent by which a plane reaches beyond its images, on every side
SHOWN = 2


class Planes:
    """Planes through three images each, as a grid of images that are made when they are asked for.

    x = x_1 + alpha a + beta b, with a along x_2 - x_1 and b along the part of x_3 - x_1 that is orthogonal to a, both of length 1

    Args:
        images: (T, 3, C, H, W). Points are not cut to [0, 1].
        side: points per side, at least 2.

    Attributes:
        a, b: the directions (T, C, H, W).
        places: coordinates (alpha, beta) of the three images (T, 3, 2).
        axes: values of alpha and of beta on the grid (T, 2, side).
    """

    def __init__(self, images: Tensor, side: int) -> None:
        self.images, self.side = images, side
        first, second, third = images.unbind(dim=1)
        along, aside = second - first, third - first
        tiny = torch.finfo(along.dtype).tiny
        reach = along.flatten(1).norm(dim=1)
        self.a = a = along / per_image(reach.clamp(min=tiny), along)
        shift = (a * aside).flatten(1).sum(dim=1)
        rest = aside - per_image(shift, a) * a
        height = rest.flatten(1).norm(dim=1)
        self.b = rest / per_image(height.clamp(min=tiny), rest)
        zero = torch.zeros_like(reach)
        self.places = torch.stack(
            [torch.stack([zero, zero], 1), torch.stack([reach, zero], 1), torch.stack([shift, height], 1)], dim=1
        )
        low, high = self.places.amin(dim=1), self.places.amax(dim=1)
        margin = BEYOND * (high - low)
        steps = torch.linspace(0, 1, side, dtype=along.dtype)
        self.axes = (low - margin)[:, :, None] + (high - low + 2 * margin)[:, :, None] * steps

    def __len__(self) -> int:
        return len(self.images) * self.side**2

    def __getitem__(self, rows: slice) -> Tensor:
        """Points number `rows`, plane by plane, beta by beta."""
        number = torch.arange(*rows.indices(len(self)))
        plane, cell = number // self.side**2, number % self.side**2
        alpha, beta = self.axes[plane, 0, cell % self.side], self.axes[plane, 1, cell // self.side]
        return self.at(plane, alpha, beta)

    def at(self, plane: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        """The points (alpha, beta) of the planes `plane`, (M,) each: (M, C, H, W)."""
        first = self.images[plane, 0]
        return first + per_image(alpha, first) * self.a[plane] + per_image(beta, first) * self.b[plane]


@dataclass(frozen=True, kw_only=True)
class DecisionPlanes(Probe):
    """On planes through three images: on what share of the points does the student predict the teacher's class?

    Two networks that always say the same class score 1, however little they know: look at the accuracies beside.

    Args:
        planes: for each domain, at least 1.
        side: points per side, at least 2.
        seed, resamples: see `Probe`; planes are drawn again, not images.

    Reference: Somepalli et al., CVPR 2022, arXiv 2203.08124; Ojha et al., NeurIPS 2023, arXiv 2205.16004.

    Differences from the papers: intervals.
    """

    name: ClassVar[str] = "decision-planes"
    question: ClassVar[str] = "Where do its classes end?"

    planes: int = 50
    side: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.planes >= 1 and self.side >= 2, f"planes={self.planes} must be at least 1 and side={self.side} at least 2"
        )

    def measure(self, lab: Lab) -> Result:
        """Agreement with the teacher on the planes of the images and of every unseen domain."""
        if len(lab.images) < 3:
            raise SkipProbe(f"A plane goes through three images; there are {len(lab.images)}.")
        domains = {name: images for name, (images, _) in lab.material.domains.items()}
        sets = {"": lab.images, **{name: images for name, images in domains.items() if len(images) >= 3}}
        notes = tuple(
            f"{name}: {len(images)} images, through which no plane goes."
            for name, images in domains.items()
            if name not in sets
        )
        rows, pictures = [], dict[str, np.ndarray]()
        for domain, images in sets.items():
            drawn = self.drawn(images)
            key = ("planes", fingerprint(drawn.images), self.side)
            shape = (len(drawn.images), self.side, self.side)
            maps = {name: lab.predictions(name, *key, of=drawn).view(shape) for name in (lab.teacher, *lab.judged)}
            agreement = {name: (maps[name] == maps[lab.teacher]).double().mean(dim=(1, 2)) for name in lab.judged}
            rows.append(self.row(lab, "same class on planes", agreement, condition=domain))
            pictures = pictures or _pictures(lab, maps, drawn)
        facts = {"planes": self.planes, "points": self.side**2}
        return self.found(*rows, notes=notes, facts=facts, pictures=pictures)

    def drawn(self, images: Tensor) -> Planes:
        """Planes through three different images each, drawn from the seed."""
        generator = generator_for("planes", self.seed)
        rows = torch.stack([torch.randperm(len(images), generator=generator)[:3] for _ in range(self.planes)])
        return Planes(images[rows], self.side)


def _pictures(lab: Lab, maps: dict[str, Tensor], drawn: Planes) -> dict[str, np.ndarray]:
    """The classes on the first planes, and where their images lie in them."""
    shown = {f"plane/{name}": maps[name][:SHOWN].numpy() for name in (lab.teacher, *lab.students[:1], *lab.independents[:1])}
    return {**shown, "places": drawn.places[:SHOWN].float().numpy(), "axes": drawn.axes[:SHOWN].float().numpy()}
