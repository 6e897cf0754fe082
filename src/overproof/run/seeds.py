"""The same run for several seeds: mean, standard error, paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from overproof import console
from overproof.config import RunConfig, resolve
from overproof.errors import UnknownNameError, UsageError
from overproof.folder import RunFolder
from overproof.registry import convert
from overproof.run.in_a_row import Row
from overproof.run.launch import refuse_in_a_row
from overproof.run.prepare import Parts

WITHIN, LOGGED, FIRST = " fooling within ", "logged ", "first "


def execute_seeds(config: RunConfig, out: str | Path, seeds: Sequence[int], *, trusted: bool = False) -> list[RunFolder]:
    """One run per seed in `out/seed-N`; finished ones are kept, so that the call can be repeated.

    Raises:
        UsageError: over several devices without torchrun.
        DivergedError: training diverged with some of them; the others are done.
    """
    folders = [RunFolder(Path(out) / f"seed-{seed}") for seed in seeds]
    refuse_in_a_row((config, folder) for folder in folders)
    table, row = config.table(), Row()
    for seed, folder in zip(seeds, folders, strict=True):
        console.note(f"seed {seed} -> {folder.path}")
        row.execute(resolve({**table, "seed": seed}), folder, parts=Parts(trusted=trusted))
    row.finish()
    return folders


def figures(folder: RunFolder, evaluation: str = "test-best") -> dict[str, float]:
    """The headline figures of a run's evaluation: clean, worst_case, one per attack, agreement, ece, nll.

    With "class-mean" the mean accuracy over classes, and with "worst-1", "worst-3", "worst-5" and "worst-10" that over the classes with the
    least. With "NAME fooling" the share of rightly classified images that an attack breaks; with flatness measured also trace, lambda_max and
    max_probability, means over the images, and "... median"; of a generator what its samples show, and "selected ORIGIN".
    """
    summary = folder.evaluations.get(evaluation, {})
    found = {name: summary.get(name) for name in ("clean", "worst_case", "ece", "nll")}
    found |= {name: facts["robust"] for name, facts in summary.get("attacks", {}).items()}
    found |= {f"{name} fooling": facts.get("success_rate") for name, facts in summary.get("attacks", {}).items()}
    found["agreement"] = (summary.get("agreement") or {}).get("clean")
    found |= _by_class((summary.get("per_class") or {}).get("clean") or [])
    flat = summary.get("fisher") or {}
    for name in ("trace", "lambda_max", "max_probability"):
        middle = flat.get(name) or {}
        found |= {name: middle.get("mean"), f"{name} median": middle.get("median")}
    found |= folder.samples.get("figures", {})
    found |= {f"selected {name}": share for name, share in folder.samples.get("selected", {}).items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def figure_of(folder: RunFolder, metric: str, evaluation: str = "test-best") -> float:
    """One of the `figures`; "NAME fooling within EPS": what a minimum-norm attack breaks with changes of at most that size;
    "logged NAME" and "first logged NAME": what the method told of itself, mean over the last and the first epoch in which it did.

    Raises:
        UnknownNameError: the evaluation has no such figure or attack, or the method told no such thing.
        UsageError: the attack has a radius of its own.
    """
    if (logged := metric.removeprefix(FIRST)).startswith(LOGGED):
        epochs = folder.metrics if logged == metric else reversed(folder.metrics)
        told = {name: value for epoch in epochs for name, value in epoch["train"].items()}
        if (name := logged.removeprefix(LOGGED)) not in told:
            raise UnknownNameError(f"logged figure of {folder.path}:", name, told)
        return float(told[name])
    known = figures(folder, evaluation)
    name, between, radius = metric.partition(WITHIN)
    if not between:
        if metric not in known:
            raise UnknownNameError(f"figure of {folder.path}, {evaluation}:", metric, known)
        return known[metric]
    facts = folder.evaluations.get(evaluation, {}).get("attacks", {})
    if name not in facts:
        raise UnknownNameError(f"attack of {folder.path}, {evaluation}:", name, facts)
    if facts[name]["eps"] is not None:
        raise UsageError(
            f"{metric!r} of {folder.path}: {name} was bounded by {facts[name]['eps']:.4g}. Only an attack that looks for the smallest "
            "change, without eps, serves every radius."
        )
    rows = folder.arrays(evaluation)
    right = rows["prediction"] == rows["label"]
    broken = right & ~rows[f"{name}/robust"] & (rows[f"{name}/size"] <= radius_of(radius, metric))
    return float(broken.sum() / max(right.sum(), 1))


def radius_of(text: str, place: str) -> float:
    """A radius in pixel units, such as "0.5" or "8/255".

    Raises:
        UsageError: no finite number of at least 0; names the `place`.
    """
    radius: float = convert(text, float, place)
    if not 0 <= radius < math.inf:
        raise UsageError(f"{place}: {text!r} is no radius; expected a number of at least 0.")
    return radius


def _by_class(shares: Sequence[float | None]) -> dict[str, float | None]:
    known = sorted(share for share in shares if share is not None)
    worst = {f"worst-{k}": sum(known[:k]) / k for k in (1, 3, 5, 10) if k <= len(known)}
    return {"class-mean": sum(known) / len(known), **worst} if known else {}


def mean_and_error(values: Sequence[float]) -> dict[str, Any]:
    """Mean, its standard error (None for a single value) and the values."""
    array = np.asarray(values, dtype=float)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None
    return {"mean": float(array.mean()), "standard_error": error, "n": len(array), "values": array.tolist()}
