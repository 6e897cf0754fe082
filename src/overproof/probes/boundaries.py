"""How far is it to the other classes, and in which direction?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from overproof.attacks.bss import Walk, walk_to_boundary
from overproof.attacks.randomness import uniform
from overproof.evaluation.boundaries import walk_similarities
from overproof.probes.base import Probe, Result, SkipProbe
from overproof.probes.lab import Lab


@dataclass(frozen=True, kw_only=True)
class BoundarySimilarity(Probe):
    """Do the boundaries lie equally far, and in the same direction, as the teacher's?

    MagSim = mean min(||u||, ||v||) / max(||u||, ||v||),  AngSim = mean <u, v> / (||u|| ||v||)

    u and v are the changes from an image to the boundary of another class, found by walks on teacher and student (see
    `walk_to_boundary`, with Newton's steps). All models start from the same images, those that all get right, towards the same classes.

    Args:
        images: at most so many, at least 1.
        targets: other classes for each image, drawn uniformly, at least 1; None: all.
        steps: of a walk, at most.
        seed, resamples: see `Probe`.

    Reference: Heo, Lee, Yun, Choi, AAAI 2019, arXiv 1805.05532.

    Differences from the paper: see `overproof.boundary_similarity`, which compares two models.
    """

    name: ClassVar[str] = "boundary-similarity"
    question: ClassVar[str] = "How far is it to the other classes, and in which direction?"

    images: int = 100
    targets: int | None = 3
    steps: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = (self.images, self.steps, 1 if self.targets is None else self.targets)
        self.require(min(counts) >= 1, f"images, steps and targets must be at least 1, not {counts}")

    def measure(self, lab: Lab) -> Result:
        """AngSim, then MagSim, of every judged model with the teacher."""
        order = lab.streams("boundary", self.seed).bits((), lab.index.device).argsort(stable=True)
        right = {name: lab.clean(name) == lab.labels for name in (lab.teacher, *lab.judged)}
        rows = order[right[lab.teacher][order]][: self.images].sort().values  # the same for every student, so walked from once
        common = torch.stack([hits[rows] for hits in right.values()]).all(dim=0)
        if not bool(common.any()):
            raise SkipProbe(
                "There is no image that the teacher and all students get right, from which to walk to their boundaries."
            )
        goals = self._goals(lab, rows)
        each, at = common.repeat_interleave(goals.shape[1]), rows[common]
        taught = {key: ends[each] for key, ends in self._walks(lab, lab.teacher, rows, goals).items()}
        starts = lab.images[at].repeat_interleave(goals.shape[1], dim=0)
        found = {
            name: self._alike(starts, taught, self._walks(lab, name, at, goals[common]), goals.shape[1]) for name in lab.judged
        }
        angles, lengths = ({name: parts[i] for name, parts in found.items()} for i in (1, 0))
        kept = {name: float(parts[2].mean()) for name, parts in found.items()}
        facts = {"images": len(at), "targets": goals.shape[1], "crossed": kept}
        both = (self.row(lab, "AngSim (direction)", angles), self.row(lab, "MagSim (distance)", lengths))
        return self.found(*both, share=False, facts=facts)

    def _goals(self, lab: Lab, rows: Tensor) -> Tensor:
        """Other classes (M, targets)."""
        streams = lab.streams("goals", self.seed, rows)
        order = uniform(torch.empty(len(rows), lab.classes - 1), streams).argsort(dim=1)
        return (lab.labels[rows][:, None] + 1 + order[:, : self.targets]) % lab.classes

    def _walks(self, lab: Lab, name: str, rows: Tensor, goals: Tensor) -> dict[str, Tensor]:
        parts = lab.about(name, "walks", rows.tolist(), goals.tolist(), self.steps)
        return lab.store.get(parts, lambda: self._walked(lab, name, rows, goals), lasting=lab.lasting(name))

    def _walked(self, lab: Lab, name: str, rows: Tensor, goals: Tensor) -> dict[str, Tensor]:
        at, targets = torch.arange(len(rows)).repeat_interleave(goals.shape[1]), goals.flatten()
        ends, crossed = [], []
        with lab.running(name) as (model, device):
            for part in torch.split(torch.arange(len(at)), lab.batch_size):
                starts, base = lab.images[rows[at[part]]].to(device), lab.labels[rows[at[part]]].to(device)
                goal = targets[part].to(device)
                walk = walk_to_boundary(model, starts, base, goal, step_size="newton", steps=self.steps, clamp=False)
                ends.append(walk.images.cpu())
                crossed.append(walk.crossed.cpu())
        return {"images": torch.cat(ends), "crossed": torch.cat(crossed)}

    @staticmethod
    def _alike(
        starts: Tensor, taught: dict[str, Tensor], own: dict[str, Tensor], targets: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """For each image the mean of both similarities over its walks that crossed in both networks, and the share of these."""
        first, second = (Walk(walk["images"], walk["images"], walk["crossed"], walk["crossed"]) for walk in (taught, own))
        crossed, length, angle = walk_similarities(starts, first, second).view(-1, targets, 3).unbind(dim=2)
        total = crossed.sum(dim=1)
        return length.sum(dim=1) / total, angle.sum(dim=1) / total, crossed.mean(dim=1)
