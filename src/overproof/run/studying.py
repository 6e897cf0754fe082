"""Before a student trusts its teacher class by class: how reliable is the teacher on images it has not learned from?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from overproof import console
from overproof.config import DataConfig, RunConfig, resolve
from overproof.data import Splits, make_loader
from overproof.data.load import divided, read_parts
from overproof.data.modifiers import same_source, split_name
from overproof.data.splits import origins
from overproof.errors import UsageError
from overproof.folder import RunFolder
from overproof.methods.ada_objective import AdaObjective
from overproof.methods.objective import Objective
from overproof.networks import on_device
from overproof.run.prepare import USER, UserData

OF_SPLIT = ("validation", "validation_from", "split_seed", "limit_train", "long_tail")


def study_teacher(config: RunConfig, objective: Objective, data: Splits | UserData, device: torch.device | str) -> None:
    """Let every part of the method that wants to know measure the teacher's reliability, on held-out images.

    Args:
        config: of the run.
        objective: the method.
        data: of the run.
        device: where to measure.

    Raises:
        UsageError: there are no held-out images, the teacher was trained on some of them, or their subgroups are not known.
        DataError: a class or subgroup without held-out images.
    """
    for part in objective.modules():
        if not isinstance(part, AdaObjective):
            continue
        held = held_out(part, config, data)
        groups = _groups(part, data, held)
        loader = make_loader(
            held,
            config.evaluation.batch_size,
            device=device,
            num_workers=config.train.workers,
            classes=len(data.classes) or None,
        )
        with on_device(part.teacher, torch.device(device)):
            part.study(loader.batches(0), **groups)


def held_out(part: AdaObjective, config: RunConfig, data: Splits | UserData) -> Any:
    """The images that the teacher is measured on.

    Raises:
        UsageError: there are none, or the teacher has learned from some of them and nobody insists.
    """
    name, force = type(part).__name__, "insist with method.allow_training_images=true."
    if part.held_out == "train":
        if not part.allow_training_images:
            raise UsageError(
                f'{name}: method.held_out="train" would measure the teacher on images that it may know by heart, and about those it is '
                f'reliable in every class. Take method.held_out="validation", or {force}'
            )
        return data.train
    if data.validation is None:
        raise UsageError(
            f"{name} trusts the teacher as far as it is right about images that it has not learned from, and there is no validation part. "
            "Hold one out with data.validation=0.1 (in Python: validation_data=...), for the teacher's own run too."
        )
    seen = 0 if part.allow_training_images else learned(config, data)
    if seen:
        raise UsageError(
            f"{name}: the teacher was trained on {seen} of the held-out images, so that it looks more reliable than "
            "it is. Hold out the same images from both (equal data.validation, data.split_seed and data.validation_from), or "
            + force
        )
    return data.validation


def learned(config: RunConfig, data: Splits | UserData) -> int:
    """How many of the validation images the teacher was trained on, as far as its run tells; 0, and a note, where nobody can know."""
    if data.validation is data.train:
        known: Any = data.train
        return len(known) if hasattr(known, "__len__") else 1
    run = config.teacher.run if config.teacher is not None else None
    if not run or not RunFolder(run).exists:
        return _unknown("it comes without a run" if not run else f"its run {run} is not there")
    if config.data.name == USER or not isinstance(data, Splits):
        return _unknown("the images come from a program")
    ours, theirs = config.data, resolve(RunFolder(run).config).data
    if not same_source(ours.name, theirs.name):
        return _unknown(f"its run was made from {theirs.name}")
    if _split(ours) == _split(theirs) and ours.options == theirs.options:
        return 0
    # Changes move no image from one part to another, so the set itself tells what was made from what.
    base, changes = split_name(theirs.name)
    root = Path(ours.root) if ours.root else None
    options = {key: value for key, value in theirs.options.items() if key != "test"}
    parts = read_parts(split_name(ours.name)[0], root, options)
    # Images of a part that the source itself holds out nobody has trained on.
    if ("test" if ours.validation_from == "test" else "validation") in parts:
        return 0
    limit = theirs.limit_train and max(theirs.limit_train // math.prod(change.copies for change in changes), 1)
    theirs_divided = divided(
        base, parts, validation=theirs.validation, validation_from=theirs.validation_from, test=theirs.options.get("test"),
        seed=theirs.split_seed, long_tail=theirs.long_tail, limit_train=limit,
    )  # fmt: skip
    assert data.validation is not None
    return int(torch.isin(origins(data.validation).cpu(), origins(theirs_divided.train).cpu()).sum())


def _unknown(why: str) -> int:
    console.note(f"note: nobody can tell whether the teacher has learned from the held-out images: {why}.")
    return 0


def _split(data: DataConfig) -> tuple[Any, ...]:
    return tuple(getattr(data, key) for key in OF_SPLIT)


def _groups(part: AdaObjective, data: Splits | UserData, held: Any) -> dict[str, Any]:
    """The arguments of `study` that tell whose reliability is measured."""
    if part.group == "class":
        return {"names": data.classes}
    known = [getattr(images, "attribute", None) for images in (held, data.train)]
    if known[0] is None or known[1] is None:
        raise UsageError(
            'method.group="attribute" needs the subgroup of every image: name a column with data.attribute=... (Parquet), a CSV file with '
            "data.attribute_file=..., or give sets that know (ImageSet.with_attribute)."
        )
    if known[0].names != known[1].names:
        raise UsageError(
            f"The training images have the subgroups {', '.join(known[1].names)}, the held-out ones {', '.join(known[0].names)}; they must be "
            "the same, in the same order."
        )
    if data.extra is not None:
        raise UsageError(
            'method.group="attribute": nobody knows the subgroups of the images in data.extra. Leave one of the two out.'
        )
    return {"names": known[0].names, "held_groups": known[0].numbers, "train_groups": known[1].numbers}
