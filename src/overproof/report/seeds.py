"""Runs that differ only in their seed, taken together."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

from overproof.errors import UnknownNameError
from overproof.report.table import Row

_SEED = re.compile(r"(?:[-_. /]+(?:seed|s)?|seed)[-_=]?\d*$")
_SEED_FOLDER = re.compile(r"\bseed-\d+\b")
FIGURES = ("clean", "robust", "agreement", "ece", "seconds")


def group_by_seed(rows: Sequence[Row], baseline: str | None = None) -> list[Row]:
    """Rows of `summarise` whose configurations are equal but for `seed` and `out`, as one row each.

    Figures become means over seeds and their `_se` the standard error of that mean, stdev / sqrt(n); with a single
    seed the binomial error of the run is kept and `se` says "binomial" instead of "seeds". Runs that were evaluated
    differently are never averaged.

    Args:
        rows: rows of `summarise`.
        baseline: name of a group, or of a run in it. Every other group then gains `clean_difference` and
            `robust_difference`: means of the differences between runs of equal seed, with `_se` and `_n`.

    Raises:
        UnknownNameError: there is no group or run called `baseline`.
    """
    members: dict[Any, list[Row]] = {}
    for position, row in enumerate(rows):
        config = {key: value for key, value in row["config"].items() if key not in ("seed", "out")}
        # A student of seed 1 learns from the teacher of seed 1: its folder's name differs by the seed and by nothing else.
        key = (
            _SEED_FOLDER.sub("seed-N", json.dumps(config, sort_keys=True, default=str))
            if config
            else f"no configuration, row {position}"
        )
        members.setdefault((key, row["protocol"]), []).append(row)
    groups: dict[str, list[Row]] = {}
    for found in members.values():
        name, copies = _name(found), 1
        while (label := name if copies == 1 else f"{name} ({copies})") in groups:
            copies += 1
        groups[label] = found
    merged = [_merge(label, found) for label, found in groups.items()]
    if baseline is not None:
        label = _find(groups, baseline)
        for group in merged:
            if group["name"] != label:
                group |= _differences(groups[group["name"]], groups[label]) | {"baseline": label}
    return merged


def _name(found: Sequence[Row]) -> str:
    names = [row["name"] for row in found]
    if len(names) == 1:
        return str(names[0])
    end = _common_start([name[::-1] for name in names])[::-1]
    return _SEED.sub("", _common_start(names)) or end.lstrip("0123456789/-_. ") or str(found[0]["method"])


def _common_start(names: Sequence[str]) -> str:
    first, last = min(names), max(names)
    return next((first[:i] for i, letter in enumerate(first) if last[i : i + 1] != letter), first)


def _find(groups: dict[str, list[Row]], wanted: str) -> str:
    if wanted in groups:
        return wanted
    for label, found in groups.items():
        if any(row["name"] == wanted for row in found):
            return label
    raise UnknownNameError("baseline", wanted, [*groups, *(row["name"] for found in groups.values() for row in found)])


def _by_seed(pairs: Iterable[tuple[Any, float | None]]) -> dict[Any, float]:
    """A value per seed; repetitions of one seed are not independent, so they count once, by their mean."""
    values: dict[Any, list[float]] = {}
    for seed, figure in pairs:
        if figure is not None:
            values.setdefault(seed, []).append(figure)
    return {seed: fmean(figures) for seed, figures in values.items()}


def _error(values: Sequence[float]) -> float | None:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _merge(label: str, found: Sequence[Row]) -> Row:
    first, seeds = found[0], sorted({row["seed"] for row in found}, key=str)
    states = {row["state"] for row in found}
    merged = {
        **{key: first[key] for key in ("method", "data", "model", "parameters", "samples", "protocol", "config")},
        **{key: first[key] for key in ("worst", "attacks_samples", "robust_samples", "apart")},
        "name": label,
        "state": states.pop() if len(states) == 1 else "mixed",
        "seeds": seeds,
        "n": len(seeds),
        "runs": [row["name"] for row in found],
        "se": "seeds" if len(seeds) > 1 else "binomial",
        "suspected": any(row["suspected"] for row in found),
        "attacks": {},
        "attacks_se": {},
        "sizes": {},
    }
    for key in FIGURES:
        values = list(_by_seed((row["seed"], row[key]) for row in found).values())
        merged[key] = fmean(values) if values else None
        merged[f"{key}_se"] = _error(values) if len(seeds) > 1 else first.get(f"{key}_se")
    for name in first["attacks"]:
        values = list(_by_seed((row["seed"], row["attacks"].get(name)) for row in found).values())
        merged["attacks"][name] = fmean(values) if values else None
        merged["attacks_se"][name] = _error(values) if len(seeds) > 1 else first["attacks_se"].get(name)
    for name in first["sizes"]:
        values = list(_by_seed((row["seed"], row["sizes"].get(name)) for row in found).values())
        merged["sizes"][name] = fmean(values) if values else None
    return merged


def _differences(found: Sequence[Row], base: Sequence[Row]) -> Row:
    """Paired by seed: what varies with the seed in both cancels. Only for figures measured in the same way."""
    result: Row = {}
    for part, key in enumerate(("clean", "robust")):
        ours, theirs = (_by_seed((row["seed"], row[key]) for row in rows) for rows in (found, base))
        protocols = [rows[0]["protocol"] for rows in (found, base)]
        same = all(protocols) and protocols[0][: part + 1] == protocols[1][: part + 1]
        paired = [ours[seed] - theirs[seed] for seed in ours if seed in theirs] if same else []
        result[f"{key}_difference"] = fmean(paired) if paired else None
        result[f"{key}_difference_se"] = _error(paired)
        result[f"{key}_difference_n"] = len(paired)
    return result
