"""What a program says about objects of its own: what nobody would look at is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from overproof.data import Splits
from overproof.data.extra import classes_agree, few
from overproof.data.loaders import brings_batches
from overproof.errors import DataError, UsageError

OF_SOURCES = ("long_tail", "attribute", "attribute_file")  # keys of [data] that only a source can serve
HELD_OUT = ("validation", "validation_from", "split_seed", "limit_train", "limit_test")  # likewise
OF_BATCHES = ("batch_size", "workers")  # keys of [train] that a loader has an answer of its own to


def refuse_idle(given: Mapping[str, Any], layer: Mapping[str, Any], network: Any, data: Any) -> None:
    """See that every option has somebody who looks at it.

    Args:
        given: arguments of the verb by name.
        layer: the configuration made of them.
        network, data: objects, or their names.

    Raises:
        UsageError: an option of something with a name for something that came as an object; names the remedy.
    """
    if isinstance(network, nn.Module) and given["model_options"]:
        raise UsageError(
            f"model_options={dict(given['model_options'])} belong to a registered name; the network came as an object."
        )
    if isinstance(data, str):
        return
    if named := [key for key in OF_SOURCES if layer["data"].get(key) is not None]:
        raise UsageError(
            f"data.{named[0]} belongs to data with a name; these came as objects. Thin them out with overproof.data.long_tailed(labels, "
            "ratio), give subgroups with ImageSet.with_attribute."
        )
    if held := [key for key in HELD_OUT if key in layer["data"]]:
        raise UsageError(
            f"data.{held[0]} belongs to data with a name; these came as objects, of which nothing is held out or left out: give "
            "validation_data and test_data, cut as they shall be (torch.utils.data.random_split, ImageSet.subset)."
        )
    if given["data_options"]:
        raise UsageError(f"data_options={dict(given['data_options'])} belong to data with a name; these came as objects.")
    walked = data is not None and not isinstance(data, Splits) and brings_batches(data)
    if walked and (asked := [key for key in OF_BATCHES if key in layer["train"]]):
        raise UsageError(f"train.{asked[0]}: the loader brings batches of its own; say it there, or give the Dataset.")


def same_classes(train: Any, **others: Any) -> None:
    """See that a number means the same class in all parts that name their classes.

    Raises:
        DataError: names the part.
    """
    known = _classes(train)
    for name, part in others.items():
        theirs = _classes(part)
        if known and theirs and not (classes_agree(theirs, known) or classes_agree(known, theirs)):
            raise DataError(
                f"{name} has {few(theirs)}, the training images have {few(known)}: the same number would mean another class. Give all "
                "parts the same classes, in the same order."
            )


def _classes(part: Any) -> tuple[str, ...]:
    return tuple(map(str, getattr(part, "classes", None) or ()))
