"""What is known of a run under attack: from all evaluations of the same images and weights, not from one alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from overproof.errors import FolderError
from overproof.report.reading import Run


@dataclass(frozen=True)
class Attacked:
    """Attacks by label, the images that each figure rests on, and the worst case over those in `worst`.

    `robust` is the worst case on `samples` images; None if no attack has a radius.
    """

    attacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    images: dict[str, float | None] = field(default_factory=dict)
    robust: float | None = None
    samples: float | None = None
    worst: list[str] = field(default_factory=list)
    suspected: bool = False


def bounded(attacks: dict[str, dict[str, Any]]) -> list[str]:
    """The attacks with a radius. One without breaks nearly everything: its figure is the size of the change."""
    return [name for name, facts in attacks.items() if not facts.get("sizes")]


def attacked(run: Run) -> Attacked:
    """All attacks on the images and weights of the run's chosen evaluation.

    Of two figures of one attack that on more images counts; another attack of the same name bears that of its evaluation too.
    """
    attacks: dict[str, dict[str, Any]] = {}
    origins: dict[str, str] = {}
    for evaluation in run.alike:
        for name, facts in run.evaluations[evaluation]["attacks"].items():
            label = name if name not in attacks or _same(attacks[name], facts) else f"{name} ({evaluation})"
            if label not in attacks:
                attacks[label], origins[label] = facts, evaluation
    samples = {name: run.evaluations[name]["samples"] for name in run.alike}
    most = max((samples[origins[label]] or 0 for label in bounded(attacks)), default=0)
    whole = {label: origins[label] for label in bounded(attacks) if (samples[origins[label]] or 0) == most}
    robust, worst = _worst(run, whole)
    suspected = any(run.evaluations[name]["sanity"].get("suspected") for name in {*run.alike[:1], *origins.values()})
    images = {label: samples[origin] for label, origin in origins.items()}
    return Attacked(attacks, images, robust, most or None, worst, suspected)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("attack", "threat", "eps"))


def _worst(run: Run, origins: dict[str, str]) -> tuple[float | None, list[str]]:
    """The worst case over attacks of one or several evaluations of the same images, and over which attacks it is.

    Of several the rows per image tell. Where they are not kept, the evaluation with the lowest figure speaks for itself alone.
    """
    names = list(dict.fromkeys(origins.values()))
    alone = {name: share for name in names if (share := run.evaluations[name]["worst_case"]) is not None}
    if len(names) > 1 and (robust := _joint(run, names)) is not None:
        return robust, list(origins)
    if not alone:
        return None, []
    lowest = min(alone, key=alone.__getitem__)
    return alone[lowest], [label for label, origin in origins.items() if origin == lowest]


def _joint(run: Run, names: list[str]) -> float | None:
    try:
        rows = {name: run.folder.arrays(name) for name in names}
        first = rows[names[0]]
        if not all(np.array_equal(part[key], first[key]) for part in rows.values() for key in ("index", "label")):
            return None
        holds = [rows[name][f"{label}/robust"] for name in names for label in bounded(run.evaluations[name]["attacks"])]
        return float(np.logical_and.reduce(holds).mean())
    except (FolderError, KeyError, ValueError, TypeError):  # not kept, or damaged
        return None
