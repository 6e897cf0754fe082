"""From a name to the parts of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from overproof.data import DATA
from overproof.data.attributes import with_side_file
from overproof.data.modifiers import Modifier, modified, split_name
from overproof.data.splits import (
    Images,
    Parts,
    Splits,
    long_tailed,
    originals,
    stratified_split,
    stratified_subset,
    with_copies,
)
from overproof.errors import DataError, UsageError
from overproof.registry import Entry

From = Literal["train", "test"]


def load_data(
    name: str,
    *,
    root: str | Path | None = None,
    validation: float | None = 0.1,
    validation_from: From = "train",
    test: float | None = None,
    seed: int = 0,
    long_tail: float | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    attribute: str | None = None,
    attribute_file: str | Path | None = None,
    **options: Any,
) -> Splits:
    """The train, validation and test parts of a data set.

    Args:
        name: a name from `overproof list data`; or parquet:DIR, folder:DIR, hub:NAME; each with changes such as "+color" after it
            (see `data.modifiers`).
        root: folder in which named sets are looked for and put; OVERPROOF_DATA or ~/.cache/overproof/data if None.
        validation: share of every class of the train part to hold out; a source's own validation part is taken
            instead. 0 or None: no validation part.
        validation_from: hold that share out of the "test" part instead, whose rest is then the test part.
        test: share of every class to hold out as test part, for a source that has none.
        seed: of what is held out and of the subsets.
        long_tail: thin the train part out, after that, so that the first class has so many times the images of the last; see
            `long_tailed`. Validation and test part stay as they are.
        limit_train: train on no more images than this, the classes in proportion; "+mixed" shows fewer pictures then, each under all
            changes.
        limit_test: no more images than this in validation and test part each.
        attribute: the subgroups of images: a column of a Parquet or Hub source, or of `attribute_file`.
        attribute_file: CSV file that knows them, see `with_side_file`.
        options: of the source (image_size, on_error, ...).

    Raises:
        UnknownNameError: no such source or option.
        UsageError: an option of the wrong type, or shares that leave a part empty.
        DataError: the source cannot be read, or has no test part and `test` is None, or a side file does not match it.
    """
    parts = read_parts(name, root, options, attribute=attribute, attribute_file=attribute_file)
    return divided(
        name, parts, validation=validation, validation_from=validation_from, test=test, seed=seed, long_tail=long_tail,
        limit_train=limit_train, limit_test=limit_test,
    )  # fmt: skip


def read_parts(
    name: str,
    root: str | Path | None,
    options: dict[str, Any],
    *,
    attribute: str | None = None,
    attribute_file: str | Path | None = None,
) -> Parts:
    """What the source itself divides into: "train", and "validation" and "test" where it has them; see `load_data`."""
    entry, argument, changes = source_of(name)
    if root is not None and "root" in entry.options():
        options = {"root": Path(root), **options}
    if attribute is not None and attribute_file is None:
        if "attribute" not in entry.options():
            raise UsageError(
                f"data.attribute={attribute!r}: {name} has no columns. Name a CSV file that has one with data.attribute_file=..."
            )
        options = {"attribute": attribute, **options}
    parts: Parts = entry.load()(*([argument] if argument else []), **entry.check(options, "data source"))
    whole = dict(parts) if attribute_file is None else with_side_file(parts, attribute_file, attribute)
    return modified(whole, changes, lambda other: read_parts(other, root, {}))


def source_of(name: str) -> tuple[Entry, str, tuple[Modifier, ...]]:
    """What the name of a set asks for, before anything is read: the registered source, what it is told after the colon, and changes.

    Raises:
        UnknownNameError: no such source or change.
        UsageError: a source that needs an argument and has none, or the other way round; a change with a wrong argument.
    """
    base, changes = split_name(name)
    kind, colon, argument = base.partition(":")
    entry = DATA.get(kind)
    wanted = entry.positional()
    if wanted and not argument:
        raise UsageError(f"The data source {name!r} needs to be told where: {kind}:{wanted[0].upper()}.")
    if colon and not wanted:
        raise UsageError(f"The data source {kind!r} takes nothing after a colon; {name!r} was given.")
    return entry, argument, changes


def divided(
    name: str,
    parts: Parts,
    *,
    validation: float | None = 0.1,
    validation_from: From = "train",
    test: float | None = None,
    seed: int = 0,
    long_tail: float | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
) -> Splits:
    """The parts of a source divided further, as `load_data` says; `name` is what messages call it.

    Pictures are divided, not images: what was made from one picture stays together.
    """
    train, given, judged = parts["train"], parts.get("validation"), parts.get("test")
    if judged is not None and test is not None:
        raise UsageError(f"{name} has its own test part of {len(judged)} images; leave out data.test={test:g}.")
    if judged is None and not test:
        raise DataError(
            f"{name} has no test part. Hold out a share of every class with data.test=0.2 (on the command line --set data.test=0.2)."
        )
    if test:
        train, judged = _held_out(train, test, seed)
    assert judged is not None
    if validation and validation_from == "test":
        judged, given = _held_out(judged, validation, seed)
    elif validation and given is None:
        train, given = _held_out(train, validation, seed)
    if long_tail is not None:
        first = originals(train)
        train = with_copies(train, first[long_tailed(train.labels[first], long_tail, seed)])
    return Splits(
        train=_limited(train, limit_train, seed),
        validation=_limited(given, limit_test, seed) if validation and given is not None else None,
        test=_limited(judged, limit_test, seed),
    )


def _held_out(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    first = originals(images)
    kept, held = stratified_split(images.labels[first], fraction, seed)
    return with_copies(images, first[kept]), with_copies(images, first[held])


def _limited(images: Images, count: int | None, seed: int) -> Images:
    if count is None or (len(images) <= count):
        return images
    first = originals(images)
    share = max(count * len(first) // len(images), min(count, 1))  # of nothing too, which is then refused
    chosen = with_copies(images, first[stratified_subset(images.labels[first], share, seed)])
    return chosen if len(chosen) <= count else chosen.subset(torch.arange(count))
