"""Whom does it serve less?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from overproof.data.attributes import read_rows
from overproof.errors import DataError
from overproof.probes.base import SEEDS, Probe, Result, Row, SkipProbe
from overproof.probes.intervals import Number, Table
from overproof.probes.lab import Lab
from overproof.probes.material import Groups


@dataclass(frozen=True, kw_only=True)
class GroupBias(Probe):
    """Does a group that the teacher never saw gain less than the others?

    value = gain of the deprived group - mean gain of the other groups,  gain = accuracy of students - of independent students

    Negative values are inherited bias. Without groups (`Material.groups`) the classes are the groups. Rows: the value, then every group.

    Args:
        seed, resamples: see `Probe`.

    Reference: Ojha, Li, Sundara Rajan, Liang, Lee, NeurIPS 2023, arXiv 2205.16004.

    Differences from the paper: where nobody says which group was deprived, it is the one on which the teacher is worst, and the notes
    say so; intervals.
    """

    name: ClassVar[str] = "group-bias"
    question: ClassVar[str] = "Whom does it serve less?"

    def measure(self, lab: Lab) -> Result:
        """The deprived group's gain against the others', and accuracies of every group."""
        groups = lab.material.groups or _by_class(lab)
        counts = torch.bincount(groups.numbers, minlength=len(groups.names)).tolist()
        empty = [name for name, count in zip(groups.names, counts, strict=True) if not count]
        held = {name: number for number, name in enumerate(groups.names) if name not in empty}
        notes = (
            [f"No held-out image of {', '.join(empty)}: nothing is said of {'it' if len(empty) == 1 else 'them'}."]
            if empty
            else []
        )
        if groups.deprived in empty:
            raise SkipProbe(f"No held-out image of the group {groups.deprived!r}, which the teacher never saw, is there.")
        if len(held) < 2:
            raise SkipProbe(f"Held-out images are there of {', '.join(held)} only; one group cannot be compared with others.")
        right = {name: (lab.clean(name) == lab.labels).double() for name in lab.watched}
        columns = {
            f"{name} on {group}": hits.where(groups.numbers == number, torch.nan)
            for name, hits in right.items()
            for group, number in held.items()
        }
        table = self.table(columns)
        deprived = groups.deprived
        if deprived is None:
            deprived = min(held, key=lambda group: table.mean(f"{lab.teacher} on {group}").value)
            notes.append(
                f"Nobody said which group the teacher never saw; {deprived!r}, on which it is worst here, stands for it."
            )
        rows = [_value(lab, table, deprived, list(held)), *(_group(lab, table, group) for group in held)]
        return self.found(
            *rows, notes=tuple(notes), facts={"deprived": deprived, "counts": dict(zip(groups.names, counts, strict=True))}
        )


def _by_class(lab: Lab) -> Groups:
    known = lab.material.classes
    return Groups(lab.labels, known if len(known) == lab.classes else tuple(map(str, range(lab.classes))))


def _value(lab: Lab, table: Table, deprived: str, groups: list[str]) -> Row:
    def against(winners: list[str], losers: list[str]) -> Number:
        weights: dict[str, float] = {}
        for group in groups:
            share = 1.0 if group == deprived else -1.0 / (len(groups) - 1)
            weights |= {f"{name} on {group}": share / len(winners) for name in winners}
            weights |= {f"{name} on {group}": -share / len(losers) for name in losers}
        return table.number(weights)

    independents, controls = lab.independents, dict[str, Number]()
    if len(independents) >= 2:
        controls[SEEDS] = against(independents[:1], independents[1:])
    if independents:
        controls |= {name: against([name], independents) for name in lab.roles["control"]}
    gap = against(lab.students, independents) if independents else None
    return Row(f"gain of {deprived} less that of the others", "", {}, gap, controls)


def _group(lab: Lab, table: Table, group: str) -> Row:
    def on(names: list[str]) -> list[str]:
        return [f"{name} on {group}" for name in names]

    scores = {name: table.mean(f"{name} on {group}") for name in lab.watched}
    gap = table.difference(on(lab.students), minus=on(lab.independents)) if lab.independents else None
    return Row("accuracy", group, scores, gap)


def read_groups(path: str | Path, index: Tensor, *, deprived: str | None = None) -> Groups:
    """Groups from a CSV file with a header: a column `group`, and a column `index` unless the rows are in the images' order.

    Args:
        path: of the file.
        index: numbers of the images in their set (N,).
        deprived: name of the group that the teacher never saw.

    Raises:
        DataError: no such file or column, or rows that do not match the images; says how many.
    """
    header, rows = read_rows(Path(path), "--groups")
    if "group" not in header:
        raise DataError(f"{path} has no column `group` (it has {', '.join(header)}). Write a header line: index,group.")
    for row in rows:
        row["group"] = (row["group"] or "").strip()
        if not row["group"]:
            raise DataError(f"{path}, line {row['(line)']}: the group is missing. Name the group of every image.")
    if "index" in header:
        named = _numbered(path, rows)
        missing = [number for number in index.tolist() if number not in named]
        if missing:
            raise DataError(
                f"{path} says nothing of {len(missing)} of the {len(index)} images, such as number {missing[0]}; name the group of each."
            )
        words = [named[number] for number in index.tolist()]
    else:
        words = [row["group"] for row in rows]
        if len(words) != len(index):
            raise DataError(
                f"{path} has {len(words)} rows, but there are {len(index)} images. Give one row each, in their order, or a column `index`."
            )
    names = tuple(sorted(set(words)))
    place = {name: number for number, name in enumerate(names)}
    return Groups(torch.tensor([place[word] for word in words]), names, deprived)


def _numbered(path: str | Path, rows: list[dict[str, Any]]) -> dict[int, str]:
    named: dict[int, str] = {}
    for row in rows:
        line = row["(line)"]
        try:
            number = int(row["index"])
        except (TypeError, ValueError):
            raise DataError(f"{path}, line {line}: the index {row['index']!r} is no whole number.") from None
        if number in named and named[number] != row["group"]:
            raise DataError(
                f"{path}, line {line}: image {number} is in {row['group']!r} and in {named[number]!r}; it can be in one group."
            )
        named[number] = row["group"]
    return named
