"""The verbs in Python, on the user's own modules and loaders."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from overproof.attacks import ATTACKS
from overproof.attacks.base import Attack
from overproof.config import DataConfig, TrainConfig, resolve
from overproof.data import ImageSet, Splits
from overproof.errors import UnknownNameError, UsageError
from overproof.evaluation.evaluator import make_attacks
from overproof.folder import RunFolder
from overproof.methods import METHODS
from overproof.models.weights import load_model
from overproof.networks import require_network
from overproof.run.environment import free
from overproof.run.execute import Run, execute
from overproof.run.given import refuse_idle, same_classes
from overproof.run.prepare import USER, Parts, UserData


def load(run: str | Path, which: str = "best", *, model: nn.Module | None = None, trusted: bool = False) -> nn.Module:
    """The trained model of a run folder, in eval mode on the CPU.

    Args:
        run: a run folder.
        which: "best" (by validation) or "last".
        model: a module of the same structure to fill, needed only for a model that Overproof did not build itself.
        trusted: allow a folder that names a package.module:callable to import and run it.

    Raises:
        FolderError: no such run or weights, damaged weights, or weights that do not fit. Nothing read is executed.
    """
    return load_model(RunFolder(run).require().path, which, model, trusted=trusted)


def train(
    model: nn.Module | str,
    data: Any,
    *,
    method: str = "ce",
    out: str | Path | None = None,
    validation_data: Any = None,
    test_data: Any = None,
    extra_data: Any = None,
    attacks: Mapping[str, Any] | Sequence[Any] = (),
    curve: Sequence[float] = (),
    evaluation: Mapping[str, Any] | None = None,
    model_options: Mapping[str, Any] | None = None,
    data_options: Mapping[str, Any] | None = None,
    resume: bool = False,
    **options: Any,
) -> Run:
    """Train a classifier and keep the run.

    Args:
        model: images in [0, 1] -> logits (N, K), trained in place; or a registered name.
        data: training images: a registered name, `Splits`, `ImageSet`, a Dataset of (image, label), a pair of tensors, or an
            iterable of (images, labels) that can be walked once an epoch. For methods without data None, or a name or `Splits`, of
            which only the validation and test images are looked at.
        method: registered name of a method without teacher.
        out: run folder; the next free `runs/METHOD-n` if None.
        validation_data: held-out images for choosing the best weights; without them the last are the best.
        test_data: images for the final evaluation.
        extra_data: images of a generator, as `data` but no iterable: `extra_share` (0.7) of every batch are theirs.
        attacks, curve: for the final evaluation, as in `evaluate`.
        evaluation: further keys of [evaluation], such as {"batch_size": 32} where validation would not find room on the device.
        model_options, data_options: options of a registered model and data set.
        resume: continue the run in `out`.
        **options: any key of [train] (epochs, lr, ...), any option of the method, `seed`, or `augment`.

    Returns:
        The finished run; `model` holds the best weights.

    Raises:
        UsageError: an unknown option, name or combination.
    """
    return start(None, model, data, locals())


def distill(
    student: nn.Module | str,
    teacher: nn.Module | str | Path,
    data: Any,
    *,
    method: str | Sequence[str] = "kd",
    standard_teacher: nn.Module | str | Path | None = None,
    out: str | Path | None = None,
    validation_data: Any = None,
    test_data: Any = None,
    extra_data: Any = None,
    attacks: Mapping[str, Any] | Sequence[Any] = (),
    curve: Sequence[float] = (),
    evaluation: Mapping[str, Any] | None = None,
    model_options: Mapping[str, Any] | None = None,
    data_options: Mapping[str, Any] | None = None,
    resume: bool = False,
    **options: Any,
) -> Run:
    """Train a student that learns from a teacher, and keep the run.

    Args:
        student: as `model` in `train`.
        teacher: images in [0, 1] -> logits (N, K), left as it is; or a run folder.
        method: registered name of a method, or several that are added up (with `weights` and `options` by name).
        standard_teacher: as `teacher`, but trained without attacks; for methods that have it beside a robust one (iad-2, akd2).
        all others: see `train`.

    Returns:
        The finished run; `student` holds the best weights.

    Raises:
        UsageError: an unknown option, name or combination.
    """
    return start(teacher, student, data, locals())


def start(teacher: Any, student: Any, data: Any, given: dict[str, Any], *, source: nn.Module | None = None) -> Run:
    """What the verbs share: arguments sorted into a configuration, which is executed.

    Args:
        teacher, student, data: as in `distill`.
        given: the other arguments of the verb by name.
        source: a network whose copy, under a new last layer, is the student.
    """
    named = (
        ("model" if teacher is None else "student", student),
        ("teacher", teacher),
        ("standard_teacher", given.get("standard_teacher")),
    )
    for place, network in named:
        if network is not None and not isinstance(network, str | Path if "teacher" in place else str):
            require_network(network, place, " or a run folder" if "teacher" in place else " or a registered name")
    method = given["method"] if isinstance(given["method"], str) else ",".join(given["method"])
    layer = _sort(method, given["options"])
    if data is None and given["validation_data"] is None and given["test_data"] is None:
        data = "none"
    own_data = isinstance(data, str)
    layer["data"] = {"name": data if own_data else USER, **layer["data"]}
    layer["model"] = {"name": student if isinstance(student, str) else USER}
    for place, network in (("teacher", teacher), ("standard_teacher", given.get("standard_teacher"))):
        if network is not None:
            layer[place] = {"name": USER} if isinstance(network, nn.Module) else {"run": str(network)}
    layer["verb"] = "train" if teacher is None else "distill"
    attacks = make_attacks(given["attacks"])
    layer["evaluation"] = {"attacks": _attack_options(attacks), "curve": list(given["curve"])}
    layer["evaluation"] |= given.get("evaluation") or {}
    layer["data"] |= given["data_options"] or {}
    layer["model"] |= given["model_options"] or {}
    extra = given.get("extra_data")
    if extra is not None:
        layer["data"]["extra"] = extra if isinstance(extra, str) else USER
    if isinstance(data, Splits) and (given["validation_data"] is not None or given["test_data"] is not None):
        raise UsageError("Splits bring their own validation and test images; leave validation_data and test_data out.")
    if own_data and (given["validation_data"] is not None or given["test_data"] is not None):
        raise UsageError(
            f"The data set {data!r} brings its own validation and test images; leave validation_data and test_data out."
        )
    refuse_idle(given, layer, student, data)
    config = resolve(layer)
    parts = Parts(
        student=_module(student),
        teacher=_module(teacher),
        standard_teacher=_module(given.get("standard_teacher")),
        data=None if own_data else _data(data, given["validation_data"], given["test_data"]),
        extra=None if isinstance(extra, str) else _images(extra),
        attacks=attacks or None,
        source=source,
    )
    out = given["out"] if given["out"] is not None else free(method.replace(",", "-"), resume=given["resume"])
    return execute(config, out, parts=parts, resume=given["resume"])


def _sort(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Each option into the section that knows it."""
    of_method = METHODS.get("composed" if "," in method else method).options()
    of_data = {name for name in DataConfig.model_fields if name != "name"}
    layer: dict[str, Any] = {"train": {}, "method": {"name": method}, "data": {}}
    for name, value in options.items():
        if name == "seed":
            layer["seed"] = value
        elif name in of_method:
            layer["method"][name] = value
        elif name in TrainConfig.model_fields:
            layer["train"][name] = value
        elif name in of_data:
            layer["data"][name] = value
        else:
            known = {*of_method, *TrainConfig.model_fields, *of_data, "seed", *inspect.signature(train).parameters} - {
                "options"
            }
            raise UnknownNameError("option", name, known)
    return layer


def _module(given: Any) -> nn.Module | None:
    return given if isinstance(given, nn.Module) else None


def _data(data: Any, validation: Any, test: Any) -> Splits | UserData:
    if isinstance(data, Splits):
        return data
    train, validation, test = (_images(part) for part in (data, validation, test))
    same_classes(train, validation_data=validation, test_data=test)
    return UserData(train, validation, test, tuple(getattr(train, "classes", ())))


def _images(data: Any) -> Any:
    pair = isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)
    return ImageSet(*data) if pair else data


def _attack_options(attacks: dict[str, Attack]) -> dict[str, dict[str, Any]]:
    """What the configuration can say about attacks: options of those that are registered."""
    names = {entry.load(): entry.name for entry in ATTACKS.entries()}
    known = {name: attack for name, attack in attacks.items() if type(attack) in names and is_dataclass(attack)}
    return {name: {"attack": names[type(attack)], **asdict(attack)} for name, attack in known.items()}  # type: ignore[call-overload]
