"""Images in Parquet files, in the layout of the Hugging Face Hub, on the disk or fetched from it."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overproof.data.decoding import GIB, Channels, Decoding, OnError, read_images
from overproof.data.splits import Parts
from overproof.errors import DataError, UsageError

PARTS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
_Named = list[tuple[str, Any]]  # tables with what to call them


class _Rows:
    """Encoded images in the rows of tables that follow each other; paths in them may only lead into `directory`."""

    def __init__(self, tables: _Named, column: str, directory: Path) -> None:
        import pyarrow as pa

        self.columns = pa.chunked_array([chunk for _, table in tables for chunk in table[column].chunks])
        self.firsts = [0, *accumulate(len(table) for _, table in tables)]
        self.files, self.directory = [name for name, _ in tables], directory

    def __len__(self) -> int:
        return self.firsts[-1]

    def name(self, row: int) -> str:
        number = bisect_right(self.firsts, row) - 1
        return f"row {row - self.firsts[number]} of {self.files[number]}"

    def payload(self, row: int) -> bytes | Path:
        value = self.columns[row].as_py()
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return value
        if not isinstance(value, str) or not value:
            raise ValueError("there is no image in it")
        path = (self.directory / value).resolve()
        if not path.is_relative_to(self.directory.resolve()):
            raise DataError(
                f"{self.name(row)} points to {value!r}, outside of {self.directory}; such paths are refused."
            )
        return path


def parquet(
    directory: str,
    *,
    image_column: str = "image",
    label_column: str = "label",
    image_size: int | None = None,
    channels: Channels | None = None,
    on_error: OnError = "raise",
    memory_limit: int = 4 * GIB,
) -> Parts:
    """Images in Parquet files.

    Args:
        directory: holds {train,validation,test}-*.parquet, itself or in data/; files of other names are all train.
        image_column: column of encoded images: {bytes, path}, or bytes.
        label_column: column of class numbers, or of class names.
        image_size: side to which images are resized (bilinear, antialiased; the aspect ratio is not kept).
        channels: 1 or 3; grey if all images are grey, otherwise colour, if None.
        on_error: "raise" on an image that cannot be read, or "skip" it with a warning.
        memory_limit: bytes; a set whose pixels need more is decoded while training. The encoded images must fit.

    Raises:
        DataError: no such folder, files or columns, labels that are missing, or an unreadable image.
    """
    top = Path(directory).expanduser()
    how = Decoding(image_size=image_size, channels=channels, on_error=on_error, memory_limit=memory_limit)
    columns = (image_column, label_column)
    found = _files(top)
    for part, files in found.items():
        _check_size(part, files, memory_limit)
    tables = {part: [(str(file), _read(file, columns)) for file in files] for part, files in found.items()}
    return _parts(tables, columns, directory=top, how=how)


def hub(
    name: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
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
    try:
        loaded = datasets.load_dataset(name, config, revision=revision)
    except Exception as error:  # the Hub's client raises errors of many libraries
        raise DataError(f"hub:{name} could not be loaded: {error}") from error
    how = Decoding(image_size=image_size, channels=channels, on_error=on_error, memory_limit=memory_limit)
    columns = (image_column, label_column)
    tables: dict[str, _Named] = {}
    for part, splits in PARTS.items():
        for split in (s for s in splits if s in loaded):
            # the table as it lies on the disk: images stay encoded
            table = loaded[split].data.table
            tables[part] = [(f"hub:{name} ({split})", _chosen(table, columns, f"hub:{name} ({split})"))]
    if "train" not in tables:
        raise DataError(f"hub:{name} has no train part; it has {', '.join(loaded)}.")
    return _parts(tables, columns, directory=Path(datasets.config.HF_CACHE_HOME), how=how)


def _files(top: Path) -> dict[str, list[Path]]:
    """Parquet files of each part."""
    if not top.is_dir():
        raise DataError(f"parquet:{top} is not a folder. Give the one that holds train-*.parquet, itself or in data/.")
    for folder in (top / "data", top):
        found = {
            part: [
                file
                for name in names
                for pattern in (f"{name}.parquet", f"{name}-*.parquet")
                for file in sorted(folder.glob(pattern))
            ]
            for part, names in PARTS.items()
        }
        if found["train"]:
            return {part: files for part, files in found.items() if files}
        files = sorted(folder.glob("*.parquet"))
        if files and not any(found.values()):
            return {"train": files}
    raise DataError(
        f"{top} holds no Parquet files of a train part, neither itself nor in data/: expected train-*.parquet."
    )


def _check_size(part: str, files: Sequence[Path], limit: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = 0
    for file in files:
        try:
            facts = pq.read_metadata(file)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file} is not a readable Parquet file ({error}). Fetch it again.") from error
        size += sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups))
    if size > limit:
        raise DataError(
            f"The encoded images of the {part} part take {size / GIB:.1f} GiB, more than memory_limit ({limit / GIB:.1f} GiB). "
            "Raise memory_limit, or unpack them into class folders: folder:DIR reads from the disk while training."
        )


def _read(file: Path, columns: tuple[str, str]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
        present = [name for name in columns if name in schema.names]
        return _chosen(pq.read_table(file, columns=present), columns, str(file), schema)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable Parquet file ({error}). Fetch it again.") from error


def _chosen(table: Any, columns: tuple[str, str], place: str, schema: Any = None) -> Any:
    """The two columns of `table`, after a look at their types."""
    import pyarrow as pa

    image, label = columns
    for option, name in (("image_column", image), ("label_column", label)):
        if name not in table.schema.names:
            known = ", ".join(f"{field.name} ({field.type})" for field in (schema or table.schema))
            raise DataError(f"{place} has no column {name!r}; it has {known}. Name the column with {option}=...")
    kind = table.schema.field(image).type
    if not (pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(f"{place}: column {image!r} is {kind}; expected encoded images as {{bytes, path}} or bytes.")
    if table[label].null_count:
        row = table[label].is_null().to_pylist().index(True)
        raise DataError(f"{place}: row {row} has no label. Remove such rows first.")
    return table.select([image, label])


def _parts(tables: dict[str, _Named], columns: tuple[str, str], *, directory: Path, how: Decoding) -> Parts:
    image, label = columns
    values = {part: [table[label] for _, table in named] for part, named in tables.items()}
    classes, numbers = _numbered(values, _class_names(tables["train"][0][1].schema, label), label)
    parts: Parts = {}
    for part, named in tables.items():
        name = f"{named[0][0]}" if len(named) == 1 else f"{named[0][0]} and {len(named) - 1} more"
        parts[part] = read_images(_Rows(named, image, directory), numbers[part], classes=classes, name=name, how=how)
    return parts


def _numbered(
    values: dict[str, list[Any]], names: tuple[str, ...], label: str
) -> tuple[tuple[str, ...] | int, dict[str, Tensor]]:
    """Class names (or their number) and the class numbers of each part."""
    import pyarrow as pa

    kind = values["train"][0].type
    plain = {part: [value for column in columns for value in column.to_pylist()] for part, columns in values.items()}
    if pa.types.is_integer(kind):
        numbers = {part: torch.tensor(found, dtype=torch.long) for part, found in plain.items()}
        return names or 1 + max(int(n.max()) for n in numbers.values() if len(n)), numbers
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        known = {name: number for number, name in enumerate(sorted(set().union(*plain.values())))}
        return tuple(known), {part: torch.tensor([known[v] for v in found]) for part, found in plain.items()}
    raise DataError(f"The label column {label!r} is {kind}; expected class numbers or class names.")


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    """Class names from the Hub's own note in the schema; () if there is none."""
    try:
        note = json.loads((schema.metadata or {})[b"huggingface"])
        names = note["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()
