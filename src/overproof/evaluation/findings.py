"""What an evaluation has seen so far: a row per sample, counts per attack, a few pictures. It can be packed, and merged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Column = tuple[type, Any]  # kind of number, and what stands where nothing was recorded
GALLERY = 8
_META = "_meta"
_PICTURE = ("clean", "adversarial", "label", "clean_prediction", "adversarial_prediction")


class Findings:
    """A growing record.

    Args:
        columns: the type and the empty value of each column; those with a leading "_" are for internal use.

    Attributes:
        counts: by attack and member: what was done and how long it took.
        facts: single values about the whole.
        pictures: by row, the most telling few.
    """

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self.kinds = dict(columns)
        self.count = 0
        self._arrays: dict[str, np.ndarray] = {name: np.full(0, empty, kind) for name, (kind, empty) in columns.items()}
        self.counts: dict[str, dict[str, dict[str, float]]] = {}
        self.facts: dict[str, float] = {"classes": 0, "softmax": 1, "seconds": 0.0}
        self.pictures: dict[int, dict[str, Any]] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        """A column; writing into it changes the record."""
        return self._arrays[name][: self.count]

    def extend(self, count: int) -> np.ndarray:
        """Make room for `count` samples more; returns their rows."""
        wanted = self.count + count
        for name, (kind, empty) in self.kinds.items():
            room = len(self._arrays[name])
            if wanted > room:
                more: np.ndarray = np.full(max(wanted, 2 * room) - room, empty, kind)
                self._arrays[name] = np.concatenate([self._arrays[name], more])
        rows, self.count = np.arange(self.count, wanted), wanted
        return rows

    def tally(self, lane: str, member: str, **amounts: float) -> None:
        """Add to the counts of one member of an attack."""
        known = self.counts.setdefault(lane, {}).setdefault(member, {})
        for name, amount in amounts.items():
            known[name] = known.get(name, 0) + amount

    def total(self, lane: str, name: str) -> float:
        """A count over all members of an attack."""
        return sum(counts.get(name, 0) for counts in self.counts.get(lane, {}).values())

    def picture(self, row: int, **facts: Any) -> None:
        """Keep a picture: at most `GALLERY`, successful ones and early rows first."""
        self.pictures[row] = facts
        if len(self.pictures) > GALLERY:
            del self.pictures[max(self.pictures, key=lambda row: (not self.pictures[row]["broken"], row))]

    @property
    def gallery(self) -> dict[str, np.ndarray]:
        """The pictures in order: those of successful attacks, or if there are none the others."""
        broken = [row for row in sorted(self.pictures) if self.pictures[row]["broken"]]
        chosen = [self.pictures[row] for row in broken or sorted(self.pictures)]
        return _stacked(chosen, (*_PICTURE, "attack"))

    def pack(self) -> dict[str, np.ndarray]:
        """Everything as plain arrays; the rest as JSON in one of bytes."""
        rows = sorted(self.pictures)
        meta = {"counts": self.counts, "facts": self.facts, "pictures": rows}
        meta["broken"] = [bool(self.pictures[row]["broken"]) for row in rows]
        meta["attack"] = self.pictures[rows[0]]["attack"] if rows else ""
        pictures = _stacked([self.pictures[row] for row in rows], _PICTURE)
        packed = {name: self[name].copy() for name in self.kinds}
        packed |= {f"_picture/{name}": values for name, values in pictures.items()}
        return packed | {_META: np.frombuffer(json.dumps(meta).encode(), np.uint8)}

    @classmethod
    def unpack(cls, columns: Mapping[str, Column], packed: Mapping[str, np.ndarray]) -> Findings:
        """The record that `pack` wrote.

        Raises:
            KeyError: parts are missing.
            ValueError: parts are damaged.
        """
        made, meta = cls(columns), json.loads(packed[_META].tobytes())
        made.extend(len(packed[next(iter(columns))]))
        for name in columns:
            made[name][:] = packed[name]
        made.counts, made.facts = meta["counts"], meta["facts"]
        for number, (row, broken) in enumerate(zip(meta["pictures"], meta["broken"], strict=True)):
            shown = {name: packed[f"_picture/{name}"][number] for name in _PICTURE}
            made.pictures[row] = shown | {"broken": broken, "attack": meta["attack"]}
        return made

    @classmethod
    def merged(cls, columns: Mapping[str, Column], parts: Iterable[Findings]) -> Findings:
        """One record from those of several processes, in the order of the data."""
        found, made = list(parts), cls(columns)
        made.extend(sum(part.count for part in found))
        order = np.argsort(np.concatenate([part["_row"] for part in found]), kind="stable")
        for name in columns:
            made[name][:] = np.concatenate([part[name] for part in found])[order]
        places = np.argsort(order)  # where each row has gone
        start = 0
        for part in found:
            for row in sorted(part.pictures):
                made.picture(int(places[start + row]), **part.pictures[row])
            start += part.count
            for lane, members in part.counts.items():
                for member, counts in members.items():
                    longest = max(counts.get("seconds", 0.0), made.counts.get(lane, {}).get(member, {}).get("seconds", 0.0))
                    made.tally(lane, member, **counts)
                    made.counts[lane][member]["seconds"] = longest
        facts = [part.facts for part in found]
        made.facts = {"softmax": min(f["softmax"] for f in facts)}
        made.facts |= {name: max(f[name] for f in facts) for name in ("classes", "seconds")}
        return made


def _stacked(pictures: list[dict[str, Any]], names: Iterable[str]) -> dict[str, np.ndarray]:
    return {name: np.stack([np.asarray(picture[name]) for picture in pictures]) for name in names} if pictures else {}
