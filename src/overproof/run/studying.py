"""Before a student trusts its teacher class by class: how reliable is the teacher on images it has not learned from?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from overproof.config import DataConfig, RunConfig, resolve
from overproof.data import Splits, make_loader
from overproof.data.load import divided, read_parts
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
    """How many of the validation images the teacher was trained on, as far as its run tells; 0 where nobody can know."""
    if data.validation is data.train:
        known: Any = data.train
        return len(known) if hasattr(known, "__len__") else 1
    run = config.teacher.run if config.teacher is not None else None
    if not run or config.data.name == USER or not RunFolder(run).exists or not isinstance(data, Splits):
        return 0
    ours, theirs = config.data, resolve(RunFolder(run).config).data
    shares = [part.options.get("test") for part in (ours, theirs)]
    if ours.name != theirs.name or (_split(ours) == _split(theirs) and shares[0] == shares[1]):
        return 0
    root = Path(ours.root) if ours.root else None
    parts = read_parts(ours.name, root, {key: value for key, value in ours.options.items() if key != "test"})
    # Images of a part that the source itself holds out, or of its test part, nobody has trained on.
    if ours.validation_from == "test" or "validation" in parts:
        return 0
    theirs_divided = divided(
        theirs.name, parts, validation=theirs.validation, validation_from=theirs.validation_from, test=shares[1],
        seed=theirs.split_seed, long_tail=theirs.long_tail, limit_train=theirs.limit_train,
    )  # fmt: skip
    assert data.validation is not None
    return int(torch.isin(data.validation.index.cpu(), theirs_divided.train.index.cpu()).sum())


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
