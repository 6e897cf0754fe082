"""What student and teachers make of the first images, looked at before anything is written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from overproof.attacks.base import logits_of
from overproof.data import Splits, make_loader
from overproof.errors import DataError, OverproofError, UsageError
from overproof.networks import buffers_unchanged, dice, in_mode, put_dice

ROLES = ("student", "teacher", "standard teacher")


def first_look(networks: Sequence[nn.Module], splits: Any) -> tuple[list[int], tuple[int, int, int]]:
    """A forward pass each, and one more of the student as it is trained: what does not fit is found before training.

    Args:
        networks: the student, and its teachers.
        splits: `Splits`, or data that came as objects.

    Returns:
        Numbers of classes, and the shape of an image.

    Raises:
        UsageError: a network refuses the images, gives no finite logits, or the student cannot be trained; names which and the remedy.
        DataError: a network that returns no logits, or a label that the student does not know.
    """
    batch = next(iter(make_loader(splits.train, 2).batches(0)))
    images = batch.images[:2]
    widths = [_width(role, network, images) for role, network in zip(ROLES, networks, strict=False)]
    if batch.labels.dim() == 1 and int(batch.labels.max()) >= widths[0]:
        raise DataError(
            f"Label {int(batch.labels.max())} does not exist for a model with {widths[0]} outputs (0 to {widths[0] - 1})."
        )
    if splits.classes and widths[0] < len(splits.classes):
        raise UsageError(f"The model has {widths[0]} outputs, the data {len(splits.classes)} classes.")
    _try_training(networks[0], images)
    channels, height, breadth = images.shape[1:]
    return widths, (channels, height, breadth)


def refuse_single_class(splits: Any) -> None:
    """There is nothing to tell apart among images of one class.

    Raises:
        DataError: names the data, the class and the remedy.
    """
    if isinstance(splits, Splits) and len(splits.classes) == 1:
        raise DataError(
            f"{splits.name} has a single class, {splits.classes[0]!r}, and a classifier tells two or more apart. Add images of another class; "
            "of a folder name the one in which the folders of the classes are."
        )


def refuse_not_finite(options: Mapping[str, Any], place: str) -> None:
    """See that the numbers among `options` are finite, those in lists and tables too.

    Raises:
        UsageError: names place, option and value.
    """
    for name, value in options.items():
        inner = value if isinstance(value, Mapping) else dict(enumerate(value)) if isinstance(value, list | tuple) else {}
        refuse_not_finite({f"{name}.{key}": part for key, part in inner.items()}, place)
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(
                f"{place}, option {name!r}: {value} is not a finite number. Give another, or leave the option out."
            )


def _width(role: str, network: nn.Module, images: Tensor) -> int:
    with _naming(role, f"cannot take images of shape {tuple(images.shape[1:])}"):
        with in_mode(network), torch.no_grad():
            logits = logits_of(network, images.to(_place(network)))
        if not bool(logits.isfinite().all()):
            raise UsageError(f"its logits of the first images are not finite ({_reason(network)}).")
    return logits.shape[1]


def _place(network: nn.Module) -> torch.device:
    return next((p.device for p in network.parameters()), torch.device("cpu"))


def _reason(network: nn.Module) -> str:
    """Where numbers that are none come from, and what to do."""
    named = ((name, value) for name, value in network.state_dict().items() if isinstance(value, Tensor))
    bad = next((name for name, value in named if value.is_floating_point() and not bool(value.isfinite().all())), None)
    if bad is not None:
        return f"{bad} holds NaN or infinite values: load other weights"
    return "its weights are finite, so something in its forward divides by zero or overflows"


def _try_training(student: nn.Module, images: Tensor) -> None:
    """One forward of the student in train mode, after which it is what it was."""
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise UsageError(
            "The student cannot be trained: none of its parameters requires a gradient. Call student.requires_grad_(True), at least on "
            "the layers that shall learn."
        )
    place = _place(student)
    few = (images if len(images) > 1 else images.repeat(2, 1, 1, 1)).to(place)  # one image has no statistics to normalise with
    before = dice(place)
    try:
        with (
            _naming("student", "fails in train mode"),
            buffers_unchanged(student),
            in_mode(student, "train"),
            torch.enable_grad(),
        ):
            logits = student(few)
    finally:
        put_dice(place, before)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(few):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UsageError(
            f"The student returns {found} for {len(few)} images in train mode, where it has to return logits of shape (N, K) as in eval mode. "
            "Wrap it so that it returns its logits alone, or switch its auxiliary outputs off (torchvision: aux_logits=False, on the "
            "command line --set model.aux_logits=false)."
        )
    if not logits.requires_grad:
        raise UsageError(
            "The student cannot be trained: its logits do not depend on its parameters as far as autograd can see. Remove detach(), "
            "no_grad() or rounding from its forward."
        )


@contextmanager
def _naming(role: str, problem: str) -> Iterator[None]:
    """Errors inside the block say which network they are about."""
    try:
        yield
    except (UsageError, DataError) as error:
        if type(error) not in (UsageError, DataError):
            raise
        raise type(error)(f"The {role}: {error}") from error
    except OverproofError:
        raise
    except Exception as error:
        raise UsageError(f"The {role} {problem}: {type(error).__name__}: {error}") from error
