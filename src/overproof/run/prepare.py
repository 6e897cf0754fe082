"""What a configuration names, built and checked before anything is written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overproof.attacks.ascent import in_mode
from overproof.attacks.base import Attack, logits_of
from overproof.config import RunConfig, TeacherConfig
from overproof.data import Splits, load_data, make_loader
from overproof.errors import OverproofError, UsageError
from overproof.evaluation.evaluator import make_attacks
from overproof.folder import RunFolder
from overproof.methods import METHODS
from overproof.methods.objective import Objective
from overproof.models import create_model
from overproof.models.weights import fill, load_model, read_state

USER = "(yours)"  # stands in the configuration for a module or data set that came as an object


@dataclass(frozen=True)
class UserData:
    """Data that came as objects: whatever `make_loader` takes."""

    train: Any
    validation: Any = None
    test: Any = None
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parts:
    """Objects that replace what a configuration would build by name."""

    student: nn.Module | None = None
    teacher: nn.Module | None = None
    data: Splits | UserData | None = None
    attacks: Mapping[str, Attack] | None = None


def checked(config: RunConfig) -> RunConfig:
    """The configuration with names and options checked, before anything is built or written.

    A robust method whose evaluation names no attack gets PGD-20 under the threat it was trained for.

    Raises:
        UsageError: unknown name or option, a missing teacher, or an augmentation that forbids caching.
    """
    entry = METHODS.get(config.method.name)
    entry.check(config.method.options, "method")
    wants_teacher = "teacher" in entry.positional()
    if wants_teacher and config.teacher is None:
        raise UsageError(
            f"The method {config.method.name!r} distils: name a teacher with --teacher RUN (or [teacher] in the recipe)."
        )
    if config.teacher is not None and not wants_teacher:
        raise UsageError(
            f"The method {config.method.name!r} has no use for a teacher; use `overproof train`, or another method."
        )
    if config.train.cache_teacher and config.data.augment:
        raise UsageError(
            f"train.cache_teacher=true is exact only without augmentation, but data.augment is {config.data.augment}. Drop one."
        )
    make_attacks(config.evaluation.attacks)
    if "robust" not in entry.tags or config.evaluation.attacks:
        return config
    options = {**{o.name: o.default for o in entry.options().values()}, **entry.check(config.method.options)}
    attack = {"attack": "pgd", "steps": 20, "eps": options["eps"], "norm": options["norm"]}
    evaluation = config.evaluation.model_copy(update={"attacks": {"pgd-20": attack}})
    return config.model_copy(update={"evaluation": evaluation})


def prepare(config: RunConfig, parts: Parts) -> tuple[Objective, Splits | UserData]:
    """The objective with its networks, and the data."""
    splits = parts.data or data_of(config)
    torch.manual_seed(config.seed)
    student = parts.student
    if student is None:
        student = _build(config, splits)
    teacher = (parts.teacher or _teacher(config.teacher, splits)) if config.teacher is not None else None
    if teacher is not None and teacher is student:
        raise UsageError("Student and teacher are the same module; give the student its own.")
    networks = (student,) if teacher is None else (student, teacher)
    width = _probe(networks, splits)
    if isinstance(splits, UserData) and not splits.classes:
        splits = replace(splits, classes=tuple(map(str, range(width))))  # so that labels are checked
    return METHODS.create(config.method.name, *networks, **config.method.options), splits


def data_of(config: RunConfig) -> Splits:
    """The data that a configuration names."""
    data = config.data
    return load_data(
        data.name,
        root=Path(data.root) if data.root else None,
        validation=data.validation,
        seed=data.split_seed,
        limit_train=data.limit_train,
        limit_test=data.limit_test,
        **data.options,
    )


def _build(config: RunConfig, splits: Splits | UserData) -> nn.Module:
    if isinstance(splits, UserData):
        raise UsageError(
            f"The model {config.model.name!r} cannot be built by name for data that came as objects: their classes and size are not "
            "known. Build it first: overproof.create_model(name, classes, in_channels, image_size)."
        )
    mean, std = splits.train.mean_std()
    chosen = config.model
    options = {"mean": mean, "std": std, "pretrained": chosen.pretrained, **chosen.options}
    if chosen.pretrained:
        del options["mean"], options["std"]
    model = create_model(chosen.name, len(splits.classes), splits.channels, splits.image_size, **options)
    if chosen.weights:
        fill(model, read_state(chosen.weights), Path(chosen.weights))
    return model


def _teacher(config: TeacherConfig, splits: Splits | UserData) -> nn.Module:
    if config.run:
        return load_model(RunFolder(config.run).require().path, config.which)
    if not config.name or isinstance(splits, UserData):
        raise UsageError("[teacher] needs `run` (a run folder) or `name` (a model, with `weights` or pretrained=true).")
    options: dict[str, Any] = {"pretrained": config.pretrained, **config.options}
    model = create_model(config.name, len(splits.classes), splits.channels, splits.image_size, **options)
    if config.weights:
        fill(model, read_state(config.weights), Path(config.weights))
    elif not config.pretrained:
        raise UsageError(
            f"The teacher {config.name!r} has no weights: give teacher.weights=FILE, teacher.pretrained=true or a run."
        )
    return model


def _probe(networks: tuple[nn.Module, ...], splits: Splits | UserData) -> int:
    """One forward pass each: channels, size and class counts must fit before anything is written."""
    images = next(iter(make_loader(splits.train, 2).batches(0))).images[:2]
    widths = []
    for role, network in zip(("student", "teacher"), networks, strict=False):
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        try:
            with in_mode(network), torch.no_grad():
                widths.append(logits_of(network, images.to(device)).shape[1])
        except OverproofError:
            raise
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            raise UsageError(f"The {role} cannot take images of shape {tuple(images.shape[1:])}: {problem}") from error
    if len(set(widths)) > 1:
        raise UsageError(f"The student has {widths[0]} classes and the teacher {widths[1]}: they must agree to be compared.")
    if splits.classes and widths[0] < len(splits.classes):
        raise UsageError(f"The model has {widths[0]} outputs, the data {len(splits.classes)} classes.")
    return widths[0]


@contextlib.contextmanager
def borrowed(teacher: nn.Module | None) -> Iterator[None]:
    """The user's own teacher comes back with the modes and flags it had."""
    modes = [(m, m.training) for m in teacher.modules()] if teacher is not None else []
    flags = [(p, p.requires_grad) for p in teacher.parameters()] if teacher is not None else []
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
