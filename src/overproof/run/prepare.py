"""What a configuration names, built and checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overproof import console
from overproof.attacks.base import Attack
from overproof.config import DataConfig, ModelConfig, RunConfig, resolve
from overproof.data import DATA, NoImages, Splits, build_augment, load_data, load_extra
from overproof.data.modifiers import same_source, split_name
from overproof.errors import UnknownNameError, UsageError
from overproof.evaluation.curves import check_curve
from overproof.evaluation.evaluator import make_attacks
from overproof.methods import METHODS
from overproof.methods.objective import Objective
from overproof.models import MODELS, create_model
from overproof.models.weights import fill, read_state
from overproof.registry import Registry
from overproof.run.course import checked_evolution
from overproof.run.first_look import ROLES, first_look, refuse_not_finite, refuse_single_class
from overproof.run.numbering import check_numbers, rows_of
from overproof.run.robust import check_extra, warm_up, with_attack
from overproof.run.teachers import check_teachers, compare_names, make_teacher
from overproof.run.transfer import named_by_run, transferred
from overproof.run.without_data import check_without_data, data_free, imagined

USER = "(yours)"  # stands in the configuration for a module or data set that came as an object
OF_ANY = ("validation", "split_seed", "root")  # keys of [data] that have a meaning for every set


@dataclass(frozen=True)
class UserData:
    """Data that came as objects: whatever `make_loader` takes."""

    train: Any
    validation: Any = None
    test: Any = None
    classes: tuple[str, ...] = ()
    extra: Any = None


@dataclass(frozen=True)
class Parts:
    """Objects that replace what a configuration would build by name."""

    student: nn.Module | None = None
    teacher: nn.Module | None = None
    standard_teacher: nn.Module | None = None
    data: Splits | UserData | None = None
    extra: Any = None  # images of a generator beside the training data
    attacks: Mapping[str, Attack] | None = None
    source: nn.Module | None = None  # the student is a copy of it under a new last layer
    trusted: bool = False


def checked(config: RunConfig, own_attacks: Mapping[str, Attack] | None = None) -> RunConfig:
    """The configuration with names and options checked, before anything is built or written.

    A robust method whose evaluation names no attack gets PGD-20 under the threat it was trained for.

    Raises:
        UsageError: unknown name or option, a missing teacher, or an augmentation that forbids caching.
    """
    if config.verb == "evolve" or config.evolution is not None:
        return checked_evolution(config)
    entry = METHODS.get(config.method.name)
    entry.check(config.method.options, "method")
    refuse_not_finite(config.method.options, f"method {config.method.name!r}")
    check_teachers(config, entry)
    check_without_data(config)
    if config.train.optimizer == "sgd" and "autoencoder" in entry.tags:
        console.note(
            f"{config.method.name} is made for AdamW, and train.optimizer is sgd with lr={config.train.lr:g}: better --lr 1e-3 "
            "--set train.optimizer=adamw --set train.weight_decay=0.05."
        )
    if config.train.cache_teacher and config.data.augment:
        raise UsageError(
            f"train.cache_teacher=true is exact only without augmentation, but data.augment is {config.data.augment}. Drop one."
        )
    if config.train.cache_teacher and config.teacher is None:
        raise UsageError("train.cache_teacher=true needs a teacher.")
    if config.train.cache_teacher and {"features", "composition"} & set(entry.tags):
        raise UsageError(
            f"train.cache_teacher=true keeps the teacher's logits, but {config.method.name!r} needs its features. Drop it."
        )
    config = named_by_run(config)
    _check_section("model", config.model, MODELS)
    _check_section("data", config.data, DATA)
    check_extra(config, named=config.data.extra != USER)
    build_augment(config.data.augment, classes=2)
    config = config if own_attacks else with_attack(config, entry)
    check_curve(config.evaluation.curve, own_attacks or make_attacks(config.evaluation.attacks))
    return config


def _check_section(kind: str, section: DataConfig | ModelConfig, registry: Registry) -> None:
    """Refuse keys that are neither the section's own nor options of the entry (of foreign entries we cannot know)."""
    name = split_name(section.name)[0].partition(":")[0] if kind == "data" else section.name
    if section.name == USER or (kind == "model" and ":" in name):
        return
    known = {*type(section).model_fields, *registry.get(name).options()} | ({"test"} if kind == "data" else set())
    known |= {"mean", "std"} if kind == "model" else set()
    for key in section.options:
        if key not in known:
            raise UnknownNameError(f"key of [{kind}] for {section.name!r}:", key, known)


def refuse_code(config: RunConfig, place: str, trusted: bool) -> RunConfig:
    """A file may name models of Overproof, timm and torchvision; a name that imports other code has to be trusted.

    Raises:
        UsageError: a model is named as package.module:callable, and `trusted` is False.
    """
    teachers = [teacher for teacher in (config.teacher, config.standard_teacher, config.judge) if teacher is not None]
    names = [config.model.name, *(teacher.name or "" for teacher in teachers)]
    for name in names:
        if ":" in name and name.partition(":")[0] not in ("timm", "torchvision") and not trusted:
            raise UsageError(
                f"{place} names the model {name!r}, which would import and run that code. If you trust the file, say --trust "
                "(in Python: trusted=True)."
            )
    return config


def prepare(config: RunConfig, parts: Parts) -> tuple[Objective, Splits | UserData]:
    """The objective with its networks, and the data."""
    parts = _without_data(config, parts) if data_free(config) else parts
    splits = parts.data or data_of(config)
    torch.manual_seed(config.seed)
    student = parts.student
    if student is None:
        refuse_single_class(splits)
    if student is None and (parts.source is not None or config.model.run):
        student = transferred(config.model, len(splits.classes), source=parts.source, trusted=parts.trusted)
    elif student is None:
        student = _build(config, splits)
    teachers = [
        getattr(parts, place) or make_teacher(about, splits, trusted=parts.trusted, place=place)
        for place in ("teacher", "standard_teacher")
        if (about := getattr(config, place)) is not None
    ]
    if any(teacher is student for teacher in teachers):
        raise UsageError("Student and teacher are the same module; give the student its own.")
    networks = (student, *teachers)
    widths, shape = first_look(networks, splits)
    if isinstance(splits, UserData) and not splits.classes:
        splits = replace(splits, classes=tuple(map(str, range(widths[0]))))  # so that labels are checked
    extra = next((given for given in (parts.extra, splits.extra, config.data.extra) if given is not None), None)
    if extra is not None:
        how: dict[str, Any] = {"root": config.data.root, "options": config.data.extra_options}
        splits = replace(
            splits, extra=load_extra(extra, shape=shape, classes=splits.classes, first=rows_of(splits.train) or 0, **how)
        )
    # What a method may want to know about the data, and nobody has to say.
    known: dict[str, Any] = {"image_shape": shape, "samples": rows_of(splits.train if splits.extra is None else splits.extra)}
    asked = METHODS.get(config.method.name).options()
    found = {key: value for key, value in known.items() if key in asked and value is not None}
    objective: Objective = METHODS.create(config.method.name, *networks, **{**found, **config.method.options})
    _compare_classes(objective, widths)
    compare_names(config, objective, splits.classes)
    check_numbers(objective, splits.train)
    warm_up(objective, config.train.eps_warmup)
    return objective, splits


def _without_data(config: RunConfig, parts: Parts) -> Parts:
    """The parts with the teacher, and for training data what it says of them; real images are for the evaluation alone."""
    known = parts.data or (None if config.data.name == "none" else data_of(config))
    if isinstance(known, UserData) and known.train is not None:
        raise UsageError(
            f"{config.method.name!r} looks at no training images, and images came as its data: give None instead, and what the student is "
            "evaluated on as test_data=... (validation_data=...)."
        )
    assert config.teacher is not None
    teacher = parts.teacher or make_teacher(config.teacher, known, trusted=parts.trusted)
    train = imagined(config, teacher, known)
    validation, test = (getattr(known, part, None) for part in ("validation", "test"))
    return replace(parts, teacher=teacher, data=UserData(train, validation, test, train.classes))


def _compare_classes(objective: Objective, widths: Sequence[int]) -> None:
    for role, width in zip(ROLES, widths, strict=False):
        if width != widths[0] and objective.needs_same_classes:
            raise UsageError(f"The student has {widths[0]} classes and the {role} {width}: they must agree to be compared.")
    objective.same_classes = len({*widths}) == 1


def data_of(config: RunConfig) -> Splits:
    """The data that a configuration names."""
    data = config.data
    known = ("validation", "validation_from", "long_tail", "limit_train", "limit_test", "attribute", "attribute_file")
    how = {key: getattr(data, key) for key in known}
    return load_data(data.name, root=Path(data.root) if data.root else None, seed=data.split_seed, **how, **data.options)


def with_data(config: RunConfig, name: str | None) -> RunConfig:
    """The configuration with another set, if one is named; it is divided and read as the first if both are one set differently changed."""
    if name is None:
        return config
    table = config.table()
    same = same_source(name, config.data.name)
    own = {key: value for key, value in table["data"].items() if same or key in OF_ANY}
    return resolve({**table, "data": {**own, "name": name}})


def _build(config: RunConfig, splits: Splits | UserData) -> nn.Module:
    if isinstance(splits, UserData) and not isinstance(splits.train, NoImages):
        raise UsageError(
            f"The model {config.model.name!r} cannot be built by name for data that came as objects: their classes and size are not "
            "known. Build it first: overproof.create_model(name, classes, in_channels, image_size)."
        )
    mean, std = splits.train.mean_std()
    chosen = config.model
    own = {} if chosen.pretrained else {"mean": mean, "std": std}  # pretrained weights bring their normalisation
    options = {**own, "pretrained": chosen.pretrained, **chosen.options}
    model = create_model(chosen.name, len(splits.classes), splits.train.channels, splits.train.image_size, **options)
    if chosen.weights:
        fill(model, read_state(chosen.weights), Path(chosen.weights))
    return model
