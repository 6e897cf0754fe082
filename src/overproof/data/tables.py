"""Tables with a column of encoded images and one of labels, as Parquet files and the Hugging Face Hub have them."""

from __future__ import annotations

import json
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overproof.data.attributes import attributes_of
from overproof.data.decoding import Decoding, read_images
from overproof.data.pixels import check_labels
from overproof.data.splits import Parts
from overproof.errors import DataError

PARTS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
Named = list[tuple[str, Any]]
"""Tables with what to call them."""


class _Rows:
    """Encoded images in the rows of tables that follow each other; paths in them may only lead into `directory`."""

    def __init__(self, tables: Named, column: str, directory: Path) -> None:
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
            raise DataError(f"{self.name(row)} points to {value!r}, outside of {self.directory}; such paths are refused.")
        return path


def chosen(table: Any, columns: tuple[str, str], place: str, schema: Any = None, *, attribute: str | None = None) -> Any:
    """The two columns of `table`, and that of the attribute if there is one, after a look at their types."""
    import pyarrow as pa

    image, label = columns
    wanted = {"image_column": image, "label_column": label} | ({} if attribute is None else {"attribute": attribute})
    for option, name in wanted.items():
        if name not in table.schema.names:
            known = ", ".join(f"{field.name} ({field.type})" for field in (schema or table.schema))
            raise DataError(f"{place} has no column {name!r}; it has {known}. Name the column with {option}=...")
    kind = table.schema.field(image).type
    if not (pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(f"{place}: column {image!r} is {kind}; expected encoded images as {{bytes, path}} or bytes.")
    if table[label].null_count:
        row = table[label].is_null().to_pylist().index(True)
        raise DataError(f"{place}: row {row} has no label. Remove such rows first.")
    if attribute is not None and table[attribute].null_count:
        row = table[attribute].is_null().to_pylist().index(True)
        raise DataError(f"{place}: row {row} has no {attribute!r}. Give every image one, 'unknown' if need be.")
    return table.select(list(dict.fromkeys(wanted.values())))


def parts_of(
    tables: dict[str, Named],
    columns: tuple[str, str],
    *,
    name: str,
    directory: Path,
    how: Decoding,
    attribute: str | None = None,
) -> Parts:
    """The parts made of `tables`, whose columns hold images, labels and perhaps an attribute.

    Raises:
        DataError: an empty part, labels that are no class numbers or names, or an unreadable image.
    """
    image, label = columns
    values = {part: [table[label] for _, table in named] for part, named in tables.items()}
    classes, numbers = _numbered(values, _class_names(tables["train"][0][1].schema, label), label)
    known = classes if isinstance(classes, int) else len(classes)
    parts: Parts = {}
    for part, named in tables.items():
        rows = _Rows(named, image, directory)
        if not len(rows):
            raise DataError(f"The {part} part of {name} is empty: {named[0][0]} has no rows.")
        labels = check_labels(numbers[part], len(rows), f"{name} ({part})", classes=known)
        parts[part] = read_images(rows, labels, classes=classes, name=name, how=how)
    if attribute is not None:
        found = {part: [v for _, table in named for v in table[attribute].to_pylist()] for part, named in tables.items()}
        made = attributes_of(attribute, found, name)
        parts = {part: images.with_attribute(made[part]) for part, images in parts.items()}
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
