"""Where does it look?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from overproof.errors import OverproofError
from overproof.probes.base import SEEDS, Probe, Result, Row, SkipProbe
from overproof.probes.cam import closed_head, grad_cam, resized, spatial_layer
from overproof.probes.intervals import Table
from overproof.probes.lab import Lab

SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class Localisation(Probe):
    """Whose Grad-CAM is more like the teacher's: the student's, or an independent student's?

    score = share of images with cos(CAM_T, CAM_S) > cos(CAM_T, CAM_I), averaged over all pairs (S, I); ties count half

    Maps are those of the true class at the last stage with a spatial layout, enlarged to a common size.

    Args:
        images: at most so many, at least 1.
        seed, resamples: see `Probe`.

    Reference: Ojha, Li, Sundara Rajan, Liang, Lee, NeurIPS 2023, arXiv 2205.16004.

    Differences from the paper: all pairs of seeds; images with an empty map are left out and counted; intervals.
    """

    name: ClassVar[str] = "localisation"
    question: ClassVar[str] = "Where does it look?"

    images: int = 5000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.images >= 1, f"images={self.images} must be at least 1")

    def measure(self, lab: Lab) -> Result:
        """Win rates of every student over every independent one."""
        if not lab.independents:
            raise SkipProbe("Whose maps are more like the teacher's cannot be asked without an independent student.")
        rows = lab.some(self.images, self.seed)
        maps = {name: self._maps(lab, name, rows) for name in (lab.teacher, *lab.judged)}
        size = _largest(maps.values())
        alike = {name: similarity(resized(maps[lab.teacher], size), resized(maps[name], size)) for name in lab.judged}
        pairs = [
            *product((*lab.students, *lab.roles["control"]), lab.independents),
            *product(lab.independents[:1], lab.independents[1:]),
        ]
        won = {over(a, b): wins(alike[a], alike[b]) for a, b in pairs}
        row = self._row(lab, self.table(won))
        headline = torch.stack([won[over(a, b)] for a, b in product(lab.students, lab.independents)])
        empty = int(headline.isnan().any(dim=0).sum())
        note = f"{empty} of {len(rows)} images left out of one pair at least: a map of the true class is empty everywhere."
        return self.found(row, chance=0.5, notes=(note,) if empty else (), pictures=_pictures(lab, rows, maps, size))

    def _row(self, lab: Lab, table: Table) -> Row:
        def over_all(winners: list[str]) -> list[str]:
            return [over(a, b) for a, b in product(winners, lab.independents)]

        scores = {pair: table.mean(pair) for pair in over_all(lab.students)}
        controls = {name: table.mean(*over_all([name])) for name in lab.roles["control"]}
        if len(lab.independents) >= 2:
            first, *others = lab.independents
            controls = {SEEDS: table.mean(*(over(first, other) for other in others)), **controls}
        return Row("map more like the teacher's", "", scores, table.mean(*over_all(lab.students)), controls)

    def _maps(self, lab: Lab, name: str, rows: Tensor) -> Tensor:
        parts = lab.about(name, "cam", len(rows), self.seed)
        return lab.store.tensor(parts, lambda: self._made(lab, name, rows), lasting=lab.lasting(name))

    def _made(self, lab: Lab, name: str, rows: Tensor) -> Tensor:
        with lab.running(name) as (model, device):
            few = lab.images[rows[:2]].to(device)
            try:
                layer = spatial_layer(model, few[:1])
                closed = closed_head(model, layer, few) is not None
                parts = [
                    grad_cam(model, lab.images[part].to(device), lab.labels[part].to(device), layer=layer, closed=closed).cpu()
                    for part in torch.split(rows, lab.batch_size)
                ]
            except OverproofError as reason:
                raise SkipProbe(f"{name!r}: {reason}") from reason
        return torch.cat(parts)


def over(winner: str, loser: str) -> str:
    """Name of the column of a pair."""
    return f"{winner} over {loser}"


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of two maps (N, h, w) each, (N,); NaN where one of them is empty."""
    flat, other = first.flatten(1), second.flatten(1)
    filled = (flat > 0).any(dim=1) & (other > 0).any(dim=1)
    return F.cosine_similarity(flat, other, dim=1, eps=1e-30).where(filled, torch.nan)


def wins(ours: Tensor, theirs: Tensor) -> Tensor:
    """1 where `ours` is larger, 0 where it is smaller, 1/2 where they are equal, NaN where either is NaN."""
    won = (ours > theirs).double() + 0.5 * (ours == theirs).double()
    return won.where(ours.isfinite() & theirs.isfinite(), torch.nan)


def _largest(maps: Iterable[Tensor]) -> tuple[int, int]:
    heights, widths = zip(*(found.shape[1:] for found in maps), strict=True)
    return max(heights), max(widths)


def _pictures(lab: Lab, rows: Tensor, maps: dict[str, Tensor], size: tuple[int, int]) -> dict[str, np.ndarray]:
    """A few images, spread over the set, with the maps of the teacher, a student and an independent one, each with maximum 1."""
    chosen = torch.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).long()
    shown = {"images": lab.images[rows[chosen]].float().numpy(), "labels": lab.labels[rows[chosen]].numpy()}
    for name in (lab.teacher, lab.students[0], lab.independents[0]):
        few = resized(maps[name][chosen], size).float()
        shown[f"cam/{name}"] = (few / few.amax(dim=(1, 2), keepdim=True).clamp(min=1e-30)).numpy()
    return shown
