"""Finished runs group by group: teacher, student alone, distilled students."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from overproof import console
from overproof.config import resolve
from overproof.data import make_loader
from overproof.errors import OverproofError, UsageError
from overproof.evaluation.grouping import group_figures
from overproof.evaluation.groups import By, GroupReport, Model, Record
from overproof.folder import RunFolder
from overproof.losses.group_reliability import estimate_reliability, shrunk
from overproof.models.weights import load_model
from overproof.report.alone import Match, alone_for, group_names, is_distilled, record_of, teacher_of
from overproof.report.payers import REMEDY, caveats, grouping_name, reliability_of, seed_of, train_counts
from overproof.report.reading import Run, read_runs
from overproof.report.seeds import group_by_seed
from overproof.report.table import row
from overproof.run.prepare import USER, data_of
from overproof.run.studying import learned


def group_report(
    runs: Sequence[str | Path],
    *,
    alone: Sequence[str | Path] = (),
    by: By = "class",
    worst: int = 5,
    evaluation: str | None = None,
    reliability: bool = True,
    trusted: bool = False,
) -> GroupReport:
    """Accuracy by class or subgroup of finished runs, and who paid for the distillation.

    Args:
        runs: run folders, at least one of a distilled student. Runs that differ in the seed alone are taken together.
        alone: runs of the student trained alone; those among `runs`, or in the same folder, with the same network and seed if none.
        by: "class", or "attribute": the subgroups that the data know.
        worst: how many of the weakest groups are averaged.
        evaluation: whose rows are compared, by name; the one that stands for a run if None.
        reliability: tell how reliable the teacher is about each group: as the method measured it, else it is measured now on held-out
            images.
        trusted: allow a folder that names a package.module:callable to import and run it.

    Raises:
        UsageError: none of the runs was distilled.
        DataError: a run was not evaluated, or not on the same images.
        FolderError: no such run.
    """
    found = read_runs([RunFolder(run).require().path for run in (*runs, *alone)])
    students = [run for run in found if is_distilled(run)]
    if not students:
        raise UsageError("None of these runs was distilled, so nobody can have paid. Name a run that learned from a teacher.")
    if alone:
        chosen = {Path(path).resolve() for path in alone}
        candidates = [run for run in found if run.folder.path.resolve() in chosen]
    else:
        candidates = found
    matches = {run.name: _match(run, candidates, named=bool(alone)) for run in students}
    models = _models(students, matches, by, evaluation)
    notes = caveats([(run, match) for run in students if (match := matches[run.name]) is not None])
    lonely = [run.name for run in students if matches[run.name] is None]
    if lonely:
        notes.append(f"No student trained alone was found for: {', '.join(lonely)}.")
    notes = notes if any(matches.values()) else [REMEDY]
    first = students[0]
    facts: dict[str, Any] = reliability_of(students, by)
    if len({teacher_of(run) for run in students}) > 1:
        notes.append("These students had different teachers, so no reliability is shown: ask about them one teacher at a time.")
    elif reliability and not facts:
        facts = _measured(first, by, trusted)
    return group_figures(
        models,
        group_names(first, evaluation, by=by),
        by=grouping_name(first, by),
        worst=worst,
        train=train_counts(first, by),
        notes=notes,
        **facts,
    )


def _match(run: Run, candidates: Sequence[Run], *, named: bool) -> Match | None:
    """The student alone; one that was named is taken though it be another network, which is said."""
    found = alone_for(run, candidates)
    if not named or (found is not None and found.run in candidates):
        return found
    same = [other for other in candidates if seed_of(other) == seed_of(run)]
    return Match(same[0], ["model or method"]) if same else None


def _models(students: Sequence[Run], matches: dict[str, Match | None], by: By, evaluation: str | None) -> list[Model]:
    """Teachers first, then students alone, then those that were distilled; seeds taken together."""
    named = {run.name: run for run in students}
    teachers: dict[str, Model] = {}
    lonely: dict[str, dict[int, Record]] = {}
    taught = []
    for group in group_by_seed([row(run) for run in students]):
        members = [named[name] for name in group["runs"]]
        records = {seed_of(run): record_of(run, evaluation, by=by) for run in members}
        pairs = {seed_of(run): match.run for run in members if (match := matches[run.name]) is not None}
        name = str(group_by_seed([row(run) for run in pairs.values()])[0]["name"]) if pairs else ""
        lonely.setdefault(name, {}).update({seed: record_of(run, evaluation, by=by) for seed, run in pairs.items()})
        taught.append(Model(str(group["name"]), "student", records, name))
        label, theirs = _teachers(members, records, evaluation, by)
        if theirs:
            teachers.setdefault(teacher_of(members[0]), Model(label, "teacher", theirs))
    lonely.pop("", None)
    labels = [model.name for model in teachers.values()]
    told = [  # of the same name by their folders
        replace(model, name=place) if labels.count(model.name) > 1 else model for place, model in teachers.items()
    ]
    return [*told, *(Model(name, "alone", records) for name, records in lonely.items()), *taught]


def _teachers(
    members: Sequence[Run], records: dict[int, Record], evaluation: str | None, by: By
) -> tuple[str, dict[int, Record]]:
    """What the teachers said: from their own runs if these were evaluated on the same images, else as the students' evaluations know it."""
    found, names = {}, []
    for run in members:
        place, mine = str(run.section("teacher").get("run") or ""), records[seed_of(run)]
        names.append(Path(place).name or str(run.section("teacher").get("name") or "teacher"))
        wanted = (f"test-{run.section('teacher').get('which') or 'best'}", evaluation)
        own = next(
            (known for name in wanted if place and (known := _own(place, name, by)) is not None and _same(known, mine)), None
        )
        if own is not None:
            found[seed_of(run)] = own
        elif mine.teacher is not None:
            found[seed_of(run)] = Record(mine.index, mine.label, mine.teacher, mine.group)
    return _common(names, "teacher"), found


def _own(place: str, evaluation: str | None, by: By) -> Record | None:
    try:
        return record_of(read_runs([place])[0], evaluation, by=by)
    except OverproofError:
        return None


def _same(own: Record, mine: Record) -> bool:
    """Whether this is the teacher that the student's evaluation knew, on the same images."""
    alike = np.array_equal(own.index, mine.index) and np.array_equal(own.label, mine.label)
    return alike and (mine.teacher is None or np.array_equal(own.prediction, mine.teacher))


def _common(names: Sequence[str], otherwise: str) -> str:
    """One name for runs that differ in the seed: their own, if all have the same last part."""
    last = {Path(name).name for name in names}
    return last.pop() if len(last) == 1 else otherwise


def _measured(run: Run, by: By, trusted: bool) -> dict[str, Any]:
    """The teacher's reliability on the validation images of a run; {} with a note where it cannot be known."""
    try:
        return _measure(run, by, trusted)
    except OverproofError as error:
        console.note(f"note: how reliable the teacher is remains unknown: {error}")
        return {}


def _measure(run: Run, by: By, trusted: bool) -> dict[str, Any]:
    config = resolve(run.folder.config)
    if config.teacher is None or not config.teacher.run or config.data.name == USER:
        raise UsageError("the run does not name a teacher's run and data that can be loaded.")
    data = data_of(config)
    if data.validation is None:
        raise UsageError("no images were held out (data.validation=0).")
    seen = learned(config, data)
    if seen:
        raise UsageError(f"the teacher was trained on {seen} of the held-out images.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_model(config.teacher.run, config.teacher.which, trusted=trusted).to(device)
    loader = make_loader(data.validation, config.evaluation.batch_size, device=device, num_workers=config.train.workers)
    groups: dict[str, Any] = {}
    if by == "attribute":
        attribute = data.validation.attribute
        if attribute is None:
            raise UsageError("the data do not know the subgroups of the held-out images.")
        groups = {"groups": attribute.numbers, "count": len(attribute.names)}
    found = estimate_reliability(teacher, loader.batches(0), **groups)
    size = len(data.classes) if by == "class" else len(found.counts)
    empty = int((found.counts[:size] == 0).sum())
    if empty:
        raise UsageError(f"{empty} of {size} groups have no held-out image.")
    return {"reliability": shrunk(found)[:size].tolist(), "source": f"margin on {int(found.counts.sum())} held-out images"}


def losers(student: RunFolder, alone: RunFolder, evaluation: str) -> dict[str, float]:
    """How many classes of a student lost accuracy against another run, "fell", and more than chance explains, "paid"."""
    both = read_runs([student.path, alone.path])
    mine, theirs = (record_of(run, evaluation) for run in both)
    models = [Model("alone", "alone", {0: theirs}), Model("student", "student", {0: mine}, "alone")]
    changes = group_figures(models, group_names(both[0], evaluation)).models[-1].changes
    return {"fell": float(sum(c.difference < 0 for c in changes)), "paid": float(sum(c.paid for c in changes))}
