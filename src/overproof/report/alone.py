"""Which run is the student trained alone, that a distilled one has to be compared with?"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overproof.errors import DataError, OverproofError
from overproof.evaluation.groups import By, Record
from overproof.folder import RunFolder
from overproof.methods import METHODS
from overproof.registry import convert
from overproof.report.reading import Run
from overproof.report.values import items, number, table

NEIGHBOURS = 500  # folders beside a run that are looked into
# What changes how long training takes, and not what comes of it.
WITHOUT_EFFECT = {"train.cache_teacher", "train.workers", "train.checkpoint_seconds", "train.loggers", "train.channels_last"}
THREAT = ("norm", "eps", "steps", "step_size")
OF_DATA = {"data.attribute", "data.attribute_file", "data.root"}


@dataclass(frozen=True)
class Match:
    """A run that was trained without a teacher, and what else is different about it, as keys of the configuration."""

    run: Run
    differs: list[str]


def is_distilled(run: Run) -> bool:
    """Whether the run learned from a teacher."""
    return bool(run.section("teacher")) or run.config.get("verb") == "distill"


def alone_for(run: Run, others: Sequence[Run]) -> Match | None:
    """The run of `others` that differs from a distilled one by the teacher, and by the least besides; None if there is none.

    It has the same network and seed, and learned from the labels alone; beside a robust student from attacked images.
    If none of `others` is so, the folders beside the run's own are looked into.
    """
    found = [match for other in others if (match := _match(run, other))]
    if not found:
        found = [match for other in _beside(run) if (match := _match(run, other))]
    return min(found, key=lambda match: (len(match.differs), _is_teacher(run, match.run)), default=None)


def _match(run: Run, other: Run) -> Match | None:
    if is_distilled(other) or not other.evaluations or not run.section("model"):
        return None
    if run.config.get("seed") != other.config.get("seed") or run.section("model") != other.section("model"):
        return None
    if number(run.model.get("parameters")) != number(
        other.model.get("parameters")
    ):  # a network of the caller's has no other name
        return None
    robust = is_robust(run)
    if robust != is_robust(other) or not (robust or other.section("method").get("name") == "ce"):
        return None
    pairs = [(_flat(part.section("train"), "train") | _flat(part.section("data"), "data")) for part in (run, other)]
    keys = sorted(pairs[0].keys() | pairs[1].keys())
    differs = [key for key in keys if key not in WITHOUT_EFFECT | OF_DATA and pairs[0].get(key) != pairs[1].get(key)]
    threats = [_threat(part) for part in (run, other)]
    return Match(other, differs + [key for key in threats[0] if key in threats[1] and threats[0][key] != threats[1][key]])


def _threat(run: Run) -> dict[str, Any]:
    """What a robust method trains against, as far as its options tell."""
    method = run.section("method")
    name = str(method.get("name"))
    known = METHODS.get(name).options() if name in METHODS else {}
    given = {key: method.get(key, known[key].default) for key in THREAT if key in known}
    return {f"method.{key}": convert(value, float, key) if key == "eps" else value for key, value in given.items()}


def teacher_of(run: Run) -> str:
    """The run's teacher, the same for the seeds of one experiment."""
    about = run.section("teacher")
    place = str(about.get("run") or "")
    return "/".join("seed" if part.startswith("seed-") else part for part in Path(place).parts) or str(about.get("name"))


def is_robust(run: Run) -> bool:
    """Whether the method, or a part of it, attacks the student while it trains."""
    method = run.section("method")
    return any(_tagged(str(name), "robust") for name in (method.get("name"), *items(method.get("methods"))))


def _tagged(name: str, tag: str) -> bool:
    return name in METHODS and tag in METHODS.get(name).tags


def _flat(section: dict[str, Any], place: str) -> dict[str, Any]:
    return {f"{place}.{key}": value for key, value in section.items()}


def _is_teacher(run: Run, other: Run) -> bool:
    return other.folder.path.resolve() == Path(str(run.section("teacher").get("run"))).resolve()


def _beside(run: Run) -> Iterator[Run]:
    """Finished runs without a teacher in the folder that this one lies in; for OUT/seed-0 also in OTHER/seed-0."""
    try:
        here = run.folder.path.resolve()
        found = [*here.parent.glob("*/config.toml"), *here.parent.parent.glob(f"*/{glob.escape(here.name)}/config.toml")]
        paths = sorted(path.parent for path in found)[:NEIGHBOURS]
    except OSError:
        return
    for path in paths:
        folder = RunFolder(path)
        try:
            config = folder.config
        except OverproofError:
            continue
        if table(config.get("model")) == run.section("model") and not config.get("teacher"):
            yield Run(folder, path.name).read()


def record_of(run: Run, evaluation: str | None = None, *, by: By = "class") -> Record:
    """What a run's evaluation kept about each image.

    Args:
        run: a run folder.
        evaluation: its name; the one that stands for the run if None.
        by: "class" or "attribute".

    Raises:
        DataError: there is no such evaluation, or it kept no rows.
        FolderError: they cannot be read.
    """
    name = evaluation or run.chosen
    if name is None or name not in run.evaluations:
        known = ", ".join(sorted(run.evaluations)) or "none"
        what = "has not been evaluated" if evaluation is None else f"has no evaluation {evaluation!r} (known: {known})"
        raise DataError(f"{run.folder.path} {what}. Do so: overproof evaluate {run.folder.path}.")
    try:
        return Record.of(run.folder.arrays(name), classes=max(len(run.evaluations[name]["classes"]), 2), by=by)
    except DataError as error:
        raise DataError(f"{run.folder.path}, evaluation {name!r}: {error}") from None


def group_names(run: Run, evaluation: str | None = None, *, by: By = "class") -> list[str]:
    """Names of the classes, or of the subgroups, of an evaluation."""
    found = run.evaluations.get(evaluation or run.chosen or "", {})
    return [
        str(name) for name in (found.get("classes", []) if by == "class" else items(table(found.get("attribute")).get("names")))
    ]
