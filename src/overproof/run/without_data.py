"""Training without data: what the teacher alone says about the images."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from overproof import console
from overproof.attacks.base import logits_of
from overproof.config import RunConfig
from overproof.data import NoImages
from overproof.errors import OverproofError, UsageError
from overproof.methods import METHODS
from overproof.models.classifier import normalisation_of
from overproof.networks import device_of, in_mode

STEPS = 50  # of an epoch, if nothing else is said


def data_free(config: RunConfig) -> bool:
    """Whether the method makes its images itself."""
    return "data-free" in METHODS.get(config.method.name).tags


def unnamed_data(config: RunConfig) -> dict[str, Any]:
    """The table that says "none" for the data of a method that needs none, if nobody has named any; else {}."""
    silent = "name" not in config.data.model_fields_set
    return {"data": {"name": "none"}} if silent and data_free(config) else {}


def check_without_data(config: RunConfig) -> None:
    """Refuse what has no meaning without, or with, training images.

    Raises:
        UsageError: names the key and the remedy.
    """
    name, train, data = config.method.name, config.train, config.data
    if not data_free(config):
        if train.steps_per_epoch is not None:
            raise UsageError(
                f"train.steps_per_epoch={train.steps_per_epoch}: with {name!r} an epoch is one pass over the data; leave it out."
            )
        return
    meaningless = {
        "data.augment": data.augment, "data.extra": data.extra, "train.cache_teacher": train.cache_teacher, "train.awp": train.awp,
    }  # fmt: skip
    for key, value in meaningless.items():
        if value:
            raise UsageError(f"{key}={value!r} belongs to training on given images, and {name!r} makes its own: leave it out.")
    if train.batch_size < 2:
        raise UsageError(
            f"train.batch_size={train.batch_size}: the generator of {name!r} normalises over the batch, which needs 2 images or more."
        )


def imagined(config: RunConfig, teacher: nn.Module, known: Any) -> NoImages:
    """What stands in for the training images.

    Args:
        config: batch size, steps of an epoch, and perhaps the shape (method.image_shape).
        teacher: tells shape, classes and normalisation.
        known: data for the evaluation, or None; its test and validation parts are asked for shape and names, its training part never.

    Raises:
        UsageError: nobody says what shape the images have, the teacher refuses it, or the test images have another.
    """
    held = [part for name in ("test", "validation") if (part := getattr(known, name, None)) is not None]
    shape = _shape(config, teacher, held)
    for part in held:
        if tuple(getattr(part, "shape", shape)) != shape:
            raise UsageError(
                f"The teacher takes images of shape {shape} (channels, height, width), but those of {getattr(part, 'name', 'the test')} are "
                f"{tuple(part.shape)}: evaluate on others, or resize them (data.image_size)."
            )
    count = _classes(teacher, shape)
    names = tuple(getattr(known, "classes", ()) or ())
    if names and len(names) != count:
        raise UsageError(f"The teacher tells {count} classes apart, the data for the evaluation have {len(names)}.")
    if normalisation_of(teacher) is None and not {"mean", "std"} & config.method.options.keys():
        console.note(
            "The teacher has no normalisation of its own, so it is taken to know pixels of mean 0.5 and deviation 0.25; say method.mean and "
            "method.std if you know better."
        )
    mean, std = _normalisation(teacher, shape[0])
    names = names or tuple(map(str, range(count)))
    steps = config.train.steps_per_epoch or STEPS
    return NoImages(shape, names, batch_size=config.train.batch_size, steps=steps, mean=mean, std=std)


def _shape(config: RunConfig, teacher: nn.Module, held: list[Any]) -> tuple[int, int, int]:
    given, spec = config.method.options.get("image_shape"), getattr(teacher, "spec", None)
    if given:
        channels, height, width = (int(number) for number in given)
        return channels, height, width
    if isinstance(spec, dict) and {"in_channels", "image_size"} <= spec.keys():
        return int(spec["in_channels"]), int(spec["image_size"]), int(spec["image_size"])
    for part in held:
        if isinstance(shape := getattr(part, "shape", None), tuple) and len(shape) == 3:
            return shape
    raise UsageError(
        "The teacher does not say what images it takes, and there are no others to ask: give method.image_shape=[channels, height, "
        "width] (in Python: image_shape=...)."
    )


def _classes(teacher: nn.Module, shape: tuple[int, int, int]) -> int:
    try:
        with in_mode(teacher), torch.no_grad():
            return int(logits_of(teacher, torch.zeros(2, *shape, device=device_of(teacher))).shape[1])
    except OverproofError:
        raise
    except Exception as error:
        raise UsageError(f"The teacher cannot take images of shape {shape}: {type(error).__name__}: {error}") from error


def _normalisation(teacher: nn.Module, channels: int) -> tuple[list[float], list[float]]:
    first = normalisation_of(teacher)
    if first is None:
        return [0.0] * channels, [1.0] * channels
    mean, std = first.mean.flatten().tolist(), first.std.flatten().tolist()
    every = channels if len(mean) == 1 else 1
    return mean * every, std * every
