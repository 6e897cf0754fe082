"""From a name to the parts of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from overproof.data import DATA
from overproof.data.modifiers import modified, split_name
from overproof.data.splits import Images, Parts, Splits, stratified_split, stratified_subset
from overproof.errors import DataError, UsageError


def load_data(
    name: str,
    *,
    root: str | Path | None = None,
    validation: float | None = 0.1,
    test: float | None = None,
    seed: int = 0,
    limit_train: int | None = None,
    limit_test: int | None = None,
    **options: Any,
) -> Splits:
    """The train, validation and test parts of a data set.

    Args:
        name: a name from `overproof list data`; or parquet:DIR, folder:DIR, hub:NAME; each with changes such as "+color" after it
            (see `data.modifiers`).
        root: folder in which named sets are looked for and put; OVERPROOF_DATA or ~/.cache/overproof/data if None.
        validation: share of every class of the train part to hold out; a source's own validation part is taken
            instead. 0 or None: no validation part.
        test: share of every class to hold out as test part, for a source that has none.
        seed: of what is held out and of the subsets.
        limit_train: train on no more images than this, the classes in proportion.
        limit_test: no more images than this in validation and test part each.
        options: of the source (image_size, on_error, ...).

    Raises:
        UnknownNameError: no such source or option.
        UsageError: an option of the wrong type, or shares that leave a part empty.
        DataError: the source cannot be read, or has no test part and `test` is None.
    """
    parts = read_parts(name, root, options)
    train, given = parts["train"], parts.get("validation")
    if "test" in parts and test is not None:
        raise UsageError(f"{name} has its own test part of {len(parts['test'])} images; leave out data.test={test:g}.")
    if "test" not in parts and not test:
        raise DataError(f"{name} has no test part. Hold out a share of every class with data.test=0.2.")
    if test:
        train, parts["test"] = _held_out(train, test, seed)
    if validation and given is None:
        train, given = _held_out(train, validation, seed)
    return Splits(
        train=_limited(train, limit_train, seed),
        validation=_limited(given, limit_test, seed) if validation and given is not None else None,
        test=_limited(parts["test"], limit_test, seed),
    )


def read_parts(name: str, root: str | Path | None, options: dict[str, Any]) -> Parts:
    """What the source itself divides into: "train", and "validation" and "test" where it has them; see `load_data`."""
    base, changes = split_name(name)
    kind, colon, argument = base.partition(":")
    entry = DATA.get(kind)
    wanted = entry.positional()
    if wanted and not argument:
        raise UsageError(f"The data source {name!r} needs to be told where: {kind}:{wanted[0].upper()}.")
    if colon and not wanted:
        raise UsageError(f"The data source {kind!r} takes nothing after a colon; {name!r} was given.")
    if root is not None and "root" in entry.options():
        options = {"root": Path(root), **options}
    parts: Parts = entry.load()(*([argument] if wanted else []), **entry.check(options, "data source"))
    return modified(dict(parts), changes, lambda other: read_parts(other, root, {}))


def _held_out(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    kept, held = stratified_split(images.labels, fraction, seed)
    return images.subset(kept), images.subset(held)


def _limited(images: Images, count: int | None, seed: int) -> Images:
    if count is None or (len(images) <= count):
        return images
    return images.subset(stratified_subset(images.labels, count, seed))
