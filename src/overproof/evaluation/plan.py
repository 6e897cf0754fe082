"""What is going to be measured: attacks with their members, and the radii of the curve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from overproof.attacks.base import Attack
from overproof.evaluation.curves import members_at, members_of
from overproof.evaluation.findings import Column

CURVE = "_curve"


@dataclass(frozen=True)
class Stage:
    """One member of one attack; on the curve also at one radius."""

    lane: str
    number: int
    name: str
    member: str
    attack: Attack
    eps: float | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """What names its randomness."""
        return (self.name, self.member) if self.eps is None else (self.name, f"{self.eps:.6g}", self.member)


@dataclass(frozen=True)
class Plan:
    """Attacks by name, radii at which the first is repeated, the seed of their randomness, and whether flatness is measured too."""

    attacks: Mapping[str, Attack]
    curve: tuple[float, ...] = ()
    seed: int = 0
    fisher: bool = False

    @cached_property
    def lanes(self) -> dict[str, tuple[Stage, ...]]:
        """The stages of every attack, and under `CURVE` those of the curve if it has to be computed."""
        found = {}
        for name, attack in self.attacks.items():
            members = members_of(attack).items()
            found[name] = tuple(Stage(name, n, name, member, part) for n, (member, part) in enumerate(members))
        swept = [(eps, *pair) for eps in self._radii for pair in members_at(self._first[1], eps).items()]
        if swept:
            name = self._first[0]
            found[CURVE] = tuple(Stage(CURVE, n, name, member, part, eps) for n, (eps, member, part) in enumerate(swept))
        return found

    @property
    def _first(self) -> tuple[str, Attack]:
        return next(iter(self.attacks.items()))

    @property
    def _radii(self) -> tuple[float, ...]:
        """Radii that need work: a minimum-norm attack's curve is read off its sizes, and radius 0 is the clean accuracy."""
        return tuple(eps for eps in self.curve if eps > 0 and not self.unbounded(self._first[0]))

    def unbounded(self, name: str) -> bool:
        """Whether the attack looks for the smallest change, whatever its size."""
        return name in self.attacks and math.isinf(self.attacks[name].threat.eps)

    @property
    def bounded(self) -> list[str]:
        """The attacks with a radius: those that a worst case can be taken over."""
        return [name for name in self.attacks if not self.unbounded(name)]

    @property
    def of_curve(self) -> str | None:
        """The attack of the curve: the first if radii are given, else the first minimum-norm one."""
        if self.curve:
            return self._first[0]
        return next((name for name in self.attacks if self.unbounded(name)), None)


def columns_of(plan: Plan, teacher: bool) -> dict[str, Column]:
    """What is recorded of each sample."""
    number, real = np.int64, np.float32
    columns: dict[str, Column] = {"index": (number, 0), "label": (number, 0), "prediction": (number, -1)}
    columns |= {"confidence": (real, 0), "_row": (number, 0), "_nll": (real, 0), "_pixels": (np.float64, 0)}
    columns |= {"fisher/trace": (real, np.nan), "fisher/lambda_max": (real, np.nan)} if plan.fisher else {}
    columns |= {"teacher_prediction": (number, -1)} if teacher else {}
    for lane, stages in plan.lanes.items():
        if lane != CURVE:
            columns |= {f"{lane}/prediction": (number, -1), f"{lane}/size": (real, 0)}
            columns |= {f"{lane}/target": (number, -1)} if any(stage.attack.targeted for stage in stages) else {}
        # Which stage broke the image, and how many have had their turn with it.
        columns |= {f"_by/{lane}": (np.int16, -1), f"_passed/{lane}": (np.int16, 0)}
    return columns
