"""The contract of a probe: models and images in, figures with intervals and controls out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from overproof.errors import NoGradientError, OverproofError, UsageError
from overproof.probes.intervals import RESAMPLES, Number, Table
from overproof.probes.lab import Lab
from overproof.probes.store import Store

SEEDS = "independent seeds"
FEWER = "fewer than two independent students: nobody knows how much two seeds differ, so believe the figure only if it is large"


class SkipProbe(OverproofError):
    """This probe cannot say anything about these models and images; the message says why."""


@dataclass(frozen=True)
class Row:
    """One quantity under one condition.

    Attributes:
        quantity: what it is.
        condition: under which it was measured; "" if there is only one.
        scores: of each model.
        gap: students less independent students; None without the latter.
        controls: gaps that ought to be small, by name: `SEEDS` is one independent student less the others.
    """

    quantity: str
    condition: str = ""
    scores: Mapping[str, Number] = field(default_factory=dict)
    gap: Number | None = None
    controls: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What a probe found.

    Attributes:
        probe: its name.
        question: what it asks.
        rows: the first is the one that counts.
        chance: of the gap, if nothing was passed on: 0, or 0.5 for shares of wins.
        share: whether the figures are shares, told in per cent.
        accuracy: of each model on the untouched images; a gap between students of unlike accuracy may be nothing but that.
        notes: what a reader must know, images that were left out among it.
        facts: further figures.
        pictures: arrays for the report.
        skipped: why there is nothing else; "" if there is.
    """

    probe: str
    question: str
    rows: tuple[Row, ...] = ()
    chance: float = 0.0
    share: bool = True
    accuracy: Mapping[str, Number] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, np.ndarray] = field(default_factory=dict)
    skipped: str = ""

    @property
    def number(self) -> Number | None:
        """The headline: the first row's gap, with its interval."""
        return self.rows[0].gap if self.rows else None

    @property
    def controls(self) -> Mapping[str, Number]:
        """The headline's controls."""
        return self.rows[0].controls if self.rows else {}

    @property
    def controlled(self) -> bool:
        """Whether independent students were compared with each other."""
        return SEEDS in self.controls

    @property
    def summary(self) -> dict[str, Any]:
        """All but the pictures in plain values, as written to JSON."""
        number = None if self.number is None else asdict(self.number)
        kept = ("probe", "question", "chance", "share", "notes", "facts", "skipped")
        rows = [
            {
                "quantity": row.quantity,
                "condition": row.condition,
                "scores": _plain(row.scores),
                "controls": _plain(row.controls),
            }
            | {"gap": None if row.gap is None else asdict(row.gap)}
            for row in self.rows
        ]
        told: dict[str, Any] = {key: getattr(self, key) for key in kept}
        return {**told, "number": number, "controlled": self.controlled, "accuracy": _plain(self.accuracy), "rows": rows}


def _plain(numbers: Mapping[str, Number]) -> dict[str, dict[str, float]]:
    return {name: asdict(number) for name, number in numbers.items()}


@dataclass(frozen=True, kw_only=True)
class Probe(ABC):
    """One question about what a student has taken over from its teacher.

    Args:
        seed: of all that is drawn.
        resamples: draws of the bootstrap, at least 1.

    Raises:
        UsageError: an option out of its range.
    """

    name: ClassVar[str]
    question: ClassVar[str]

    seed: int = 0
    resamples: int = RESAMPLES

    def __post_init__(self) -> None:
        self.require(self.resamples >= 1, f"resamples={self.resamples} must be at least 1")

    def run(self, models: Mapping[str, nn.Module], data: Any, *, store: Store | None = None) -> Result:
        """What the probe finds; see `Lab` for the arguments and their errors. A probe that cannot answer says why in `skipped`."""
        return self.result(Lab(models, data, store))

    def result(self, lab: Lab) -> Result:
        """The same in a lab that stands already."""
        try:
            found = self.measure(lab)
        except (SkipProbe, NoGradientError) as reason:
            return Result(self.name, self.question, skipped=str(reason))
        notes = found.notes if len(lab.independents) >= 2 else (FEWER, *found.notes)
        accuracy = self.table({name: lab.clean(name) == lab.labels for name in lab.watched})
        told = {name: accuracy.mean(name) for name in lab.watched}
        return Result(**{**vars(found), "accuracy": told, "notes": notes})

    @abstractmethod
    def measure(self, lab: Lab) -> Result:
        """What is found, without accuracies.

        Raises:
            SkipProbe: nothing can be said.
        """

    def require(self, holds: bool, what: str) -> None:
        """Refuse an option unless `holds`."""
        if not holds:
            raise UsageError(f"The probe {self.name!r}: {what}.")

    def found(self, *rows: Row, **more: Any) -> Result:
        """The result with these rows."""
        return Result(self.name, self.question, rows, **more)

    def table(self, columns: Mapping[str, Tensor]) -> Table:
        """Columns with this probe's draws."""
        return Table(columns, resamples=self.resamples, seed=self.seed)

    def row(self, lab: Lab, quantity: str, columns: Mapping[str, Tensor], *, condition: str = "") -> Row:
        """Scores of all models that have a column, the gap between students and independent students, and its controls."""
        table = self.table(columns)
        return Row(
            quantity, condition, {name: table.mean(name) for name in columns}, gap_of(lab, table), controls_of(lab, table)
        )


def gap_of(lab: Lab, table: Table) -> Number | None:
    """Students less independent students."""
    return table.difference(lab.students, minus=lab.independents) if lab.independents else None


def controls_of(lab: Lab, table: Table) -> dict[str, Number]:
    """One independent student less the others, and each control less the independent students."""
    found = {}
    if len(lab.independents) >= 2:
        found[SEEDS] = table.difference(lab.independents[:1], minus=lab.independents[1:])
    if lab.independents:
        found |= {name: table.difference([name], minus=lab.independents) for name in lab.roles["control"]}
    return found
