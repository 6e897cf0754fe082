"""What was distilled, asked of finished runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from overproof import console
from overproof.config import RunConfig, resolve
from overproof.data import Splits
from overproof.data.extra import classes_agree, few
from overproof.data.load import source_of
from overproof.data.modifiers import MODIFIERS
from overproof.errors import UsageError
from overproof.folder import RunFolder
from overproof.models.weights import load_model
from overproof.probes import PROBES
from overproof.probes.domains import agreeing
from overproof.probes.group_bias import read_groups
from overproof.probes.lab import Lab
from overproof.probes.material import Groups, Material
from overproof.probes.shape_bias import read_cues
from overproof.probes.store import Store
from overproof.probes.suite import Explanation, explain
from overproof.run.judging import part_of
from overproof.run.prepare import USER, data_of, with_data

HOME = "probes"  # in the teacher's folder
ASKED = {"planes": "decision-planes", "fooled": "adversarial-transfer"}  # figures of recipes, and their probes
GREY_DOMAINS, DOMAINS = ("color", "blobs", "inverted", "sketch"), ("inverted", "sketch")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What the runs are asked about.

    Args:
        data: name of a set; None: that of the first student.
        split: "test", "validation" or "train".
        limit: use only so many images, the classes in proportion.
        domains: names of sets, or changes of that set such as "color"; None: the usual changes.
        cues: folder of images called SHAPE-TEXTURE, such as cat1-bottle2.png.
        groups: CSV file with a column `group`, and `index` unless its rows are in the images' order; None: the subgroups that
            the data know, else the classes.
        deprived: the group that the teacher never saw.
    """

    data: str | None = None
    split: str = "test"
    limit: int | None = None
    domains: Sequence[str] | None = None
    cues: str | Path | None = None
    groups: str | Path | None = None
    deprived: str | None = None


def explain_runs(
    teacher: str | Path,
    students: Sequence[str | Path],
    *,
    others: Mapping[str, Sequence[str | Path]] | None = None,
    subject: Subject | None = None,
    which: str = "best",
    keep: bool = True,
    trusted: bool = False,
    **options: Any,
) -> Explanation:
    """In which respects have the students become like their teacher?

    Args:
        teacher, students: run folders with weights.
        others: further runs by role: "independent", "control", "foreign", "plain"; see `overproof.probes.Lab`.
        subject: the images.
        which: "best" or "last" weights.
        keep: what concerns the teacher is kept in its folder and serves the next students too.
        trusted: allow folders that name a package.module:callable to import and run it.
        **options: probes, options, seed, resamples, batch_size, as in `overproof.explain`.

    Raises:
        FolderError: no such run.
        UsageError: runs or names that do not fit together.
    """
    by_role = {"student": list(students), **{role: list(runs) for role, runs in (others or {}).items() if runs}}
    if not students:
        raise UsageError("Name at least one student: overproof explain TEACHER STUDENT --independent RUN --independent RUN.")
    folders = {"teacher": RunFolder(teacher).require(), **_named(by_role)}
    first = next(name for name in folders if name.startswith("student"))
    config = resolve(folders[first].config)
    material = material_of(config, subject or Subject())
    _same_classes(folders, material)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models: dict[str, nn.Module] = {
        name: load_model(folder.path, which, trusted=trusted).to(device) for name, folder in folders.items()
    }
    store = Store(folders["teacher"].path / HOME if keep else None)
    if len(by_role.get("independent", ())) < 2:
        console.note("note: name two students without teacher (--independent RUN, two seeds), else no probe can be controlled.")
    if not by_role.get("foreign") and (shared := _shared_seeds(folders)):
        console.note(
            f"note: {', '.join(shared)} began with the weights of a student. Attacks made against such a network fool that student more than "
            "chance, so the control by foreign attacks is too large: name independent students of other seeds, or --foreign RUN."
        )
    found = explain(models, material, store=store, **options)
    runs = {name: str(folder.path) for name, folder in folders.items()}
    about = {"data": (subject or Subject()).data or config.data.name, "split": (subject or Subject()).split, "runs": runs}
    return Explanation(found.results, {**about, "weights": which, **found.facts})


def _same_classes(folders: Mapping[str, RunFolder], material: Material) -> None:
    """Refuse runs that name their classes otherwise than the images do, or than each other."""
    given = {"the set": material.classes}
    given |= {f"{name} ({folder.path})": tuple(map(str, folder.data.get("classes", ()))) for name, folder in folders.items()}
    for (one, names), (other, theirs) in combinations(((who, names) for who, names in given.items() if names), 2):
        if not (classes_agree(names, theirs) or classes_agree(theirs, names)):
            raise UsageError(
                f"{other} has {few(theirs)}, but {one} has {few(names)}. Models of different classes cannot be compared."
            )


def _shared_seeds(folders: Mapping[str, RunFolder]) -> list[str]:
    """Independent students with the network and the seed of a student."""
    begun = {name: (folder.config.get("seed"), folder.config.get("model")) for name, folder in folders.items()}
    taught = [start for name, start in begun.items() if name.startswith("student")]
    return [name for name, start in begun.items() if name.startswith("independent") and start in taught]


def _named(by_role: Mapping[str, Sequence[str | Path]]) -> dict[str, RunFolder]:
    """Runs by role and name; those of equal names by number too."""
    found: dict[str, RunFolder] = {}
    for role, runs in by_role.items():
        for run in runs:
            folder = RunFolder(run).require()
            if role == "independent" and (taught := resolve(folder.config).teacher) is not None:
                raise UsageError(
                    f"{folder.path} has the teacher {taught.run or taught.name}, so it is no independent student: name runs without a teacher, "
                    "or give it as --control."
                )
            name, number = f"{role}:{folder.name}", 2
            while name in found:
                name, number = f"{role}:{folder.name} ({number})", number + 1
            found[name] = folder
    return found


def material_of(config: RunConfig, subject: Subject) -> Material:
    """The images that a run is asked about, with domains, cues and groups.

    Raises:
        UsageError: the run was made from data of a program and no set is named.
        DataError: parts that do not fit the images.
    """
    if subject.data is None and config.data.name == USER:
        raise UsageError("The student was trained on data of a program; name a data set with --data, or use overproof.explain.")
    config = config if subject.data is None else with_data(config, subject.data)
    splits = data_of(config)
    part = part_of(splits, subject.split, subject.limit)
    seen = Material.of(part)
    assert seen.index is not None
    names = _domains(seen) if subject.domains is None else [name for name in subject.domains if name != "none"]
    domains = {name: part_of(data_of(with_data(config, _full(config, name))), subject.split, subject.limit) for name in names}
    groups = _groups(part, seen.index, subject)
    if subject.deprived is not None and groups is None:
        raise UsageError(f"--deprived {subject.deprived!r} names a group of a file; give that file with --groups FILE.")
    shape = seen.images.shape[1:]
    cues = None if subject.cues is None else read_cues(subject.cues, splits.classes, channels=shape[0], side=shape[1])
    return Material.of(part, domains=domains, groups=groups, cues=cues)


def _groups(part: Any, index: Tensor, subject: Subject) -> Groups | None:
    """Those of the file, or else the subgroups that the data know."""
    if subject.groups is not None:
        return read_groups(subject.groups, index, deprived=subject.deprived)
    return None if part.groups is None else Groups(part.groups.cpu(), part.attribute.names, subject.deprived)


def _full(config: RunConfig, name: str) -> str:
    """A change stands for the set's own images under it."""
    return f"{config.data.name}+{name}" if name.partition("+")[0].partition(":")[0] in MODIFIERS else name


def _domains(seen: Material) -> tuple[str, ...]:
    coloured = seen.images.shape[1] == 3
    return GREY_DOMAINS if coloured and bool((seen.images == seen.images[:, :1]).all()) else DOMAINS


def check_resemblance(metric: str, options: Mapping[str, Any], config: RunConfig, data: str) -> None:
    """Refuse options that the probe behind a figure of a recipe does not have, and data that there are not.

    Raises:
        UsageError: names one.
    """
    if data:
        source_of(_full(config, data))
    if metric in ASKED:
        PROBES.get(ASKED[metric]).check(dict(options), "probe")
    elif options:
        raise UsageError(f"The figure {metric!r} has no options; {', '.join(options)} were given.")


def resemblance(
    run: Path,
    other: Path,
    which: str,
    *,
    data: str,
    metric: str,
    options: Mapping[str, Any] | None = None,
    read: Callable[[RunConfig], Splits] = data_of,
) -> dict[str, float]:
    """A figure of a recipe about one run and another, by its name: accuracy, consensus, planes or fooled.

    Args:
        run, other: run folders. "fooled" is the share of the images made against the other run, and fooling it, that fool this one too.
        which: "best" or "last" weights.
        data: another set than the run's own, or a change of it; "" for none.
        metric: the name.
        options: of the probe.
        read: the data of a configuration.
    """
    config = resolve(RunFolder(run).config)
    images = read(with_data(config, _full(config, data)) if data else config).test
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {"teacher": load_model(other, which).to(device), "student": load_model(run, which).to(device)}
    lab, given = Lab(models, images, Store(other / HOME)), dict(options or {})
    if metric == "accuracy":
        return {metric: float((lab.clean("student") == lab.labels).double().mean())}
    if metric == "consensus":
        return {metric: float(agreeing(lab, "clean", of=lab.images)["student"].double().mean())}
    probe = PROBES.create(ASKED[metric], **given)
    return {metric: probe.measure(lab).rows[0].scores["student"].value}
