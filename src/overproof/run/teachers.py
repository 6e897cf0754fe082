"""Teachers: named by a configuration, built, and looked at before a student trusts them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overproof import console
from overproof.attacks.base import classes_of, logits_of
from overproof.attacks.pgd import PGD
from overproof.attacks.randomness import Streams
from overproof.config import RunConfig, TeacherConfig
from overproof.data import Splits, make_loader
from overproof.data.extra import check_numbers_of_classes
from overproof.errors import NoGradientError, UsageError
from overproof.evaluation.verdicts import verdict
from overproof.folder import RunFolder
from overproof.methods import METHODS
from overproof.methods.objective import Objective
from overproof.models import create_model
from overproof.models.weights import fill, load_model, read_state
from overproof.networks import device_of, full_precision, in_mode
from overproof.registry import Entry
from overproof.types import Batch

LOOK = 128  # images on which a teacher is attacked once
WEAK = 0.25  # a teacher that keeps a smaller share of its clean accuracy under attack is not robust
GUESS = 1.2  # times the accuracy of guessing: hardly more than that


def check_teachers(config: RunConfig, entry: Entry) -> None:
    """Refuse a missing teacher, or one that the method has no use for.

    Raises:
        UsageError: names the method and what to say.
    """
    name, wanted = config.method.name, entry.positional()
    if "teacher" in wanted and config.teacher is None:
        raise UsageError(f"The method {name!r} distils: name a teacher with --teacher RUN (or [teacher] in the recipe).")
    if config.teacher is not None and "teacher" not in wanted:
        raise UsageError(f"The method {name!r} has no use for a teacher; use `overproof train`, or another method.")
    if "standard_teacher" in wanted and config.standard_teacher is None:
        raise UsageError(
            f"The method {name!r} learns from two teachers: beside the robust one name one that was trained without attacks, with "
            "--standard-teacher RUN (or [standard_teacher] in the recipe, standard_teacher=... in Python)."
        )
    if config.standard_teacher is not None and "standard_teacher" not in wanted:
        raise UsageError(f"The method {name!r} has no use for a standard teacher; leave it out, or use iad-2 or akd2.")


def make_teacher(config: TeacherConfig, splits: Any, *, trusted: bool, place: str = "teacher") -> nn.Module:
    """The network that the section `place` of the configuration, [teacher] or [standard_teacher], names.

    Raises:
        UsageError: neither a run nor a model with weights.
        FolderError: no such run, or weights that do not fit.
    """
    if config.run:
        folder = RunFolder(config.run).require()
        if folder.status["state"] != "done":
            console.note(f"note: the teacher's run {folder.path} is not finished (state: {folder.status['state']}).")
        return load_model(folder.path, config.which, trusted=trusted)
    if not config.name or not isinstance(splits, Splits):
        raise UsageError(f"[{place}] needs `run` (a run folder) or `name` (a model, with `weights` or pretrained=true).")
    options: dict[str, Any] = {"pretrained": config.pretrained, **config.options}
    model = create_model(config.name, len(splits.classes), splits.channels, splits.image_size, **options)
    if config.weights:
        fill(model, read_state(config.weights), Path(config.weights))
    elif not config.pretrained:
        raise UsageError(
            f"The teacher {config.name!r} has no weights: give {place}.weights=FILE, {place}.pretrained=true or a run."
        )
    return model


def compare_names(config: RunConfig, objective: Objective, classes: Sequence[str]) -> None:
    """Refuse a teacher's run whose classes have other numbers than the data's, where answers are compared.

    Raises:
        DataError: some class has another number.
    """
    for place in ("teacher", "standard_teacher"):
        about = getattr(config, place)
        if about is not None and about.run and objective.needs_same_classes and objective.same_classes:
            known = RunFolder(about.run).data.get("classes", ())
            check_numbers_of_classes(known, classes, f"the {place.replace('_', ' ')} {about.run}", "the data")


def look_at_teacher(config: RunConfig, objective: Objective, held_out: Any, data: Any, *, folder: RunFolder) -> None:
    """Look whether the teacher is any good on the run's images, and of a robust method whether it is robust; warn if not.

    What is found of a robust method's teacher is kept in the run's status.

    Args:
        config: names the method; only those tagged "robust" and "distillation" want a robust teacher.
        objective: on its device.
        held_out: loader of the validation images, or None: then training images are taken.
        data: the run's data, whose `train` are the training images.
        folder: of the run; if its status speaks of the teacher already, nothing happens.
    """
    attack, teacher, tags = objective.validation_attack, objective.teacher, METHODS.get(config.method.name).tags
    if "distillation" not in tags or teacher is None or "teacher" in folder.status:
        return
    if (
        not objective.same_classes or not objective.needs_same_classes
    ):  # it cannot be asked about these labels, or answers nothing
        return
    if "robust" not in tags or attack is None:
        if held_out is not None:  # images of the training may be there to be seen once
            batch = next(islice(held_out.batches(0), 1)).to(device_of(teacher))
            with in_mode(teacher), torch.no_grad():
                logits = logits_of(teacher, batch.images)
            _tell_guesses(float((classes_of(logits) == batch.labels).float().mean()), len(batch), logits.shape[1])
        return
    loader = held_out if held_out is not None else make_loader(data.train, LOOK)
    batch = next(islice(loader.batches(0), 1)).to(device_of(teacher))
    try:
        found, classes = measured(teacher, attack, batch)
    except NoGradientError:
        console.note("warning: no gradient flows through the teacher, so nobody knows by PGD whether it is robust.")
        return
    folder.write_status("running", teacher=found)
    images, clean, robust = found["images"], found["clean"], found["robust"]
    if not _tell_guesses(clean, images, classes) and robust < WEAK * clean:
        console.note(
            f"warning: the teacher is not robust: of {images:g} images it gets {clean:.0%} right untouched and {robust:.0%} under "
            f"PGD-{attack.steps} ({attack.norm}, eps={attack.eps:.4g}). A student cannot learn from it what it does not have; train "
            "the teacher with pgd-at or trades."
        )


def _tell_guesses(clean: float, images: float, classes: int) -> bool:
    if clean > GUESS / classes:
        return False
    console.note(
        f"warning: the teacher gets {clean:.0%} of {images:g} untouched images right, hardly more than guessing. Perhaps it "
        "expects other pixel values than [0, 1] (wrap it: overproof.Classifier(teacher, mean=..., std=...)), or other classes."
    )
    return True


def measured(teacher: nn.Module, attack: PGD, batch: Batch) -> tuple[dict[str, float], int]:
    """On how many of the first images the teacher is right, as shares: untouched and attacked; and its number of classes."""
    images, labels, index = (part[:LOOK] for part in (batch.images, batch.labels, batch.index))
    with full_precision(images.device), in_mode(teacher), torch.no_grad():
        logits = logits_of(teacher, images)
        right = (logits.argmax(dim=1) == labels).nonzero().flatten()
        held = 0
        if len(right):
            found = verdict(attack, teacher, images[right], labels[right], Streams.named(index[right], "teacher"))
            held = int((found.predictions == labels[right]).sum())
    facts = {"images": len(labels), "clean": len(right) / len(labels), "robust": held / len(labels)}
    return facts, logits.shape[1]
