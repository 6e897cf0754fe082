"""Which of its layers sees the images as the teacher's layers do?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from overproof.errors import OverproofError
from overproof.features import Tap, penultimate, stages
from overproof.probes.base import Probe, Result, SkipProbe
from overproof.probes.lab import Lab

BLOCKS = 20


@dataclass(frozen=True, kw_only=True)
class CKA(Probe):
    """How alike are the representations of corresponding layers?

    CKA(X, Y) = ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F), columns centred

    It does not change under rotations and scalings of either side. Layers are the feature stages and the vector before the head; a
    layer's counterpart is the teacher's at the same share of the depth. Intervals come from the jackknife over blocks of images: images
    drawn twice would look alike to any network.

    Args:
        images: at most so many, at least 4.
        seed, resamples: see `Probe`.

    Reference: Kornblith, Norouzi, Lee, Hinton, ICML 2019, arXiv 1905.00414; Ojha et al., NeurIPS 2023, arXiv 2205.16004.

    Differences from the paper: networks are compared at the stages they publish, not on a grid of seven chosen layers.
    """

    name: ClassVar[str] = "cka"
    question: ClassVar[str] = "Which layers see the images as the teacher's do?"

    images: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.images >= 4, f"images={self.images} must be at least 4")

    def measure(self, lab: Lab) -> Result:
        """Mean similarity of corresponding layers, and the grid of all pairs of layers."""
        rows = lab.some(self.images, self.seed)
        if len(rows) < 4:
            raise SkipProbe(f"Representations of {len(rows)} images are alike in any two networks; give at least 4.")
        grams = {name: self._grams(lab, name, rows) for name in (lab.teacher, *lab.judged)}
        taught = grams[lab.teacher]
        count = min(BLOCKS, len(rows) // 2)
        blocks = tuple(
            torch.arange(start, len(rows), count) for start in range(count)
        )  # each across a set that is sorted by class
        columns = {name: jackknife(taught, grams[name], blocks) for name in lab.judged}
        grids: dict[str, np.ndarray] = {
            f"grid/{name}": grid(taught, grams[name]).numpy() for name in (*lab.students, *lab.independents)
        }
        facts = {"images": len(rows), "layers": {name: len(found) for name, found in grams.items()}}
        row = self.row(lab, "similarity of corresponding layers", columns)
        return self.found(row, share=False, facts=facts, pictures=grids)

    def _grams(self, lab: Lab, name: str, rows: Tensor) -> Tensor:
        parts = lab.about(name, "grams", len(rows), self.seed)
        return lab.store.tensor(parts, lambda: self._made(lab, name, rows), lasting=lab.lasting(name))

    @staticmethod
    def _made(lab: Lab, name: str, rows: Tensor) -> Tensor:
        with lab.running(name) as (model, device), torch.no_grad():
            try:
                names = tuple(dict.fromkeys((*stages(model), penultimate(model))))
                _, found = Tap(model, names)(lab.images[rows].to(device))
            except OverproofError as reason:
                raise SkipProbe(f"{name!r}: {reason}") from reason
            return torch.stack([gram(feature) for feature in found.values()]).cpu()


def gram(feature: Tensor) -> Tensor:
    """Inner products of the images' features (n, ...), (n, n) in float64."""
    flat = feature.flatten(1).double()
    return flat @ flat.T


def centred(grams: Tensor) -> Tensor:
    """H K H with H = 1 - 11^T / n, for Gram matrices (..., n, n)."""
    inner = grams - grams.mean(dim=-1, keepdim=True)
    return inner - inner.mean(dim=-2, keepdim=True)


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """CKA of two representations (n, ...) of the same n images, a number in [0, 1]; NaN where one of them is constant."""
    return grid(gram(x)[None], gram(y)[None])[0, 0]


def grid(first: Tensor, second: Tensor) -> Tensor:
    """CKA of every pair of Gram matrices, (A, n, n) and (B, n, n) -> (A, B)."""
    ours, theirs = (centred(grams).flatten(1) for grams in (first, second))
    cosines: Tensor = (ours @ theirs.T) / (ours.norm(dim=1)[:, None] * theirs.norm(dim=1))
    return cosines


def counterparts(first: int, second: int) -> list[tuple[int, int]]:
    """Pairs of layers at the same share of the depth, as many as the shallower network has."""
    few = min(first, second)
    return [tuple(round(i * (count - 1) / max(few - 1, 1)) for count in (first, second)) for i in range(few)]  # type: ignore[misc]


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """Mean CKA of corresponding layers; those that are constant are left out."""
    pairs, found = counterparts(len(first), len(second)), grid(first, second)
    return torch.stack([found[a, b] for a, b in pairs]).nanmean()


def jackknife(first: Tensor, second: Tensor, blocks: tuple[Tensor, ...]) -> Tensor:
    """Pseudo-values of `similarity`, one for each block of images that is left out; their mean is the similarity itself."""
    whole, every = similarity(first, second), torch.arange(first.shape[-1])
    left_out = []
    for block in blocks:
        kept = every[~torch.isin(every, block)]
        left_out.append(similarity(first[:, kept][:, :, kept], second[:, kept][:, :, kept]))
    spread = torch.stack(left_out)
    return whole - (len(blocks) - 1) * (spread - spread.mean())
