"""Sets of the Hugging Face Hub, through the package `datasets`."""

from __future__ import annotations

from pathlib import Path

from overproof.data.decoding import GIB, Channels, Decoding, OnError
from overproof.data.splits import Parts
from overproof.data.tables import PARTS, Named, chosen, parts_of
from overproof.errors import DataError, UsageError


def hub(
    name: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    attribute: str | None = None,
    image_size: int | None = None,
    channels: Channels | None = None,
    on_error: OnError = "raise",
    memory_limit: int = 4 * GIB,
) -> Parts:
    """A set of the Hugging Face Hub, through the package `datasets`; code that comes with a set is not run.

    Args:
        name: such as "uoft-cs/cifar10".
        config: which of the set's configurations.
        revision: branch, tag or commit; fix it to be sure of the same images later.
        image_column: column of images ("img" in some sets).
        label_column: column of class numbers, or of class names.
        attribute: column of subgroups.
        image_size: side to which images are resized (bilinear, antialiased; the aspect ratio is not kept).
        channels: 1 or 3; grey if all images are grey, otherwise colour, if None.
        on_error: "raise" on an image that cannot be read, or "skip" it with a warning.
        memory_limit: bytes; a set whose pixels need more is decoded while training.

    Raises:
        UsageError: the package is not installed.
        DataError: no such set or columns, labels that are missing, or an unreadable image.
    """
    try:
        import datasets
    except ImportError:
        raise UsageError(f"hub:{name} needs the package datasets: pip install overproof[hub]") from None
    # from version 4 on the package never runs code of a set; before, it has to be told
    guard = {"trust_remote_code": False} if int(datasets.__version__.partition(".")[0]) < 4 else {}
    try:
        loaded = datasets.load_dataset(name, config, revision=revision, **guard)
    except Exception as error:  # the Hub's client raises errors of many libraries
        raise DataError(f"hub:{name} could not be loaded: {error}") from error
    how = Decoding(image_size=image_size, channels=channels, on_error=on_error, memory_limit=memory_limit)
    columns = (image_column, label_column)
    tables: dict[str, Named] = {}
    for part, splits in PARTS.items():
        for split in (s for s in splits if s in loaded):
            # the table as it lies on the disk: images stay encoded
            table = loaded[split].data.table
            place = f"hub:{name} ({split})"
            tables[part] = [(place, chosen(table, columns, place, attribute=attribute))]
    if "train" not in tables:
        raise DataError(f"hub:{name} has no train part; it has {', '.join(loaded)}.")
    home = Path(datasets.config.HF_CACHE_HOME)
    return parts_of(tables, columns, name=f"hub:{name}", directory=home, how=how, attribute=attribute)
