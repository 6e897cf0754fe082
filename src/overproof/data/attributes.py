"""Subgroups of images: a column of a table, or a CSV file beside the data."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from overproof.errors import DataError

if TYPE_CHECKING:
    from overproof.data.splits import Parts

KEYS = ("file", "index", "part")  # columns of a side file that say which image a row is about
MOST = 1000  # subgroups; more are no groups but measurements
UNKNOWN = -1


@dataclass(frozen=True)
class Attribute:
    """Which subgroup each image of a source belongs to.

    Args:
        name: of the attribute, such as "camera".
        names: of its G values, the subgroups.
        numbers: subgroup of each image by its position in the source (M,), 0 to G-1.
    """

    name: str
    names: tuple[str, ...]
    numbers: Tensor

    def check(self, index: Tensor, name: str) -> None:
        """Refuse to speak for images that it does not know.

        Raises:
            DataError: an image at one of the positions `index` (N,) of the set `name` has no subgroup.
        """
        known = torch.zeros(int(index.max()) + 1, dtype=torch.bool)
        numbers = self.numbers.cpu()[: len(known)]
        known[: len(numbers)] = (numbers >= 0) & (numbers < len(self.names))
        missing = index.cpu()[~known[index.cpu()]]
        if len(missing):
            raise DataError(
                f"{name}: {len(missing)} of the {len(index)} images have no {self.name!r}, the first is the one at position "
                f"{int(missing[0])} of its source. An attribute has a number below {len(self.names)} for every image."
            )

    def of(self, index: Tensor) -> Tensor:
        """Subgroups (N,) of the images at the positions `index` (N,)."""
        return self.numbers.to(index.device)[index]


def attributes_of(name: str, values: Mapping[str, Sequence[Any]], place: str) -> dict[str, Attribute]:
    """The attribute for each part of a source, subgroups numbered alike in all of them.

    Args:
        name: of the attribute.
        values: for each part the value at each position; None where no image is.
        place: what the values come from, for messages.

    Raises:
        DataError: so many different values that they cannot be subgroups.
    """
    texts = {part: [None if value is None else str(value).strip() for value in column] for part, column in values.items()}
    names = sorted({text for column in texts.values() for text in column if text is not None}, key=_natural)
    if len(names) > MOST:
        raise DataError(
            f"{place}: {name!r} takes {len(names)} different values ({', '.join(names[:3])}, ...), at most {MOST} can be subgroups. Name "
            "another column with data.attribute=..., or write down ranges of it."
        )
    known: dict[str | None, int] = {text: number for number, text in enumerate(names)}
    return {
        part: Attribute(name, tuple(names), torch.tensor([known.get(text, UNKNOWN) for text in column], dtype=torch.long))
        for part, column in texts.items()
    }


def _natural(text: str) -> tuple[bool, float, str]:
    number = text.removeprefix("-")
    return (False, int(text), text) if number.isdecimal() and number.isascii() else (True, 0, text)


def with_side_file(parts: Parts, path: str | Path, column: str | None = None) -> Parts:
    """The parts of a source with an attribute from a CSV file.

    Rows find their images by the column `file` (path inside a folder of images), or by `part` (train, validation or test) and
    `index` (position within it); without `index` the rows of a part are in the order of its images.

    Args:
        parts: what a source gives.
        path: CSV with a header line, UTF-8.
        column: the attribute; it need not be said where there is only one.

    Raises:
        DataError: no such file or column, or rows that do not match the images; names row and remedy.
    """
    path = Path(path).expanduser()
    header, rows = read_rows(path, "data.attribute_file")
    column = _column(header, column, path)
    match = _by_file if "file" in header else _by_position
    found = match(parts, [{**row, "(value)": _filled(row, column, path)} for row in rows], path)
    made = attributes_of(column, found, str(path))
    return {part: images.with_attribute(made[part]) for part, images in parts.items()}


def read_rows(path: Path, what: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The header of a CSV file, and its rows by column; a row's "(line)" is where it ends.

    Args:
        path: of the file, UTF-8 with or without a byte-order mark, as spreadsheets save it.
        what: the option that names the file, for messages.

    Raises:
        DataError: a file that cannot be read, or has no rows.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [{**row, "(line)": reader.line_num} for row in reader]
            header = [name.strip() for name in reader.fieldnames or ()]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{what}: {path} cannot be read as CSV ({error}).") from error
    if not rows:
        raise DataError(f"{what}: {path} has no rows below its header line.")
    return header, [{str(key).strip(): value for key, value in row.items()} for row in rows]


def _column(header: list[str], wanted: str | None, path: Path) -> str:
    others = [name for name in header if name not in KEYS]
    if wanted is None and len(others) == 1:
        return others[0]
    if wanted not in others:
        what = "no column that could be an attribute" if wanted is None and not others else f"the columns {', '.join(others)}"
        remedy = "" if wanted is None else f" but no {wanted!r}"
        raise DataError(f"{path} has {what}{remedy}. Name the one to be used with data.attribute=...")
    return str(wanted)


def _filled(row: dict[str, Any], column: str, path: Path) -> str:
    value = (row.get(column) or "").strip()
    if not value:
        raise DataError(f"{path}, line {row['(line)']}: there is no {column!r}. Give every image one, 'unknown' if need be.")
    return str(value)


def _by_file(parts: Parts, rows: list[dict[str, Any]], path: Path) -> dict[str, list[Any]]:
    known: dict[str, str] = {}
    for row in rows:
        name = PurePosixPath((row["file"] or "").strip().replace("\\", "/")).as_posix()
        if name in known:
            raise DataError(f"{path}, line {row['(line)']}: a second row for the file {name!r}.")
        known[name] = row["(value)"]
    found, met = {}, 0
    for part, images in parts.items():
        files = images.files
        if not files:
            raise DataError(
                f"{path} tells files apart, but the images of {images.name} have no names. Use the columns part and index."
            )
        missing = [files[i] for i in images.index.tolist() if files[i] not in known]
        if missing:
            raise DataError(
                f"{path} does not match {images.name}: {len(missing)} of the {len(images)} images of the {part} part have no row, such as "
                f"{missing[0]!r}. Paths are counted from the folder of the data."
            )
        found[part] = [known.get(name) for name in files]
        met += len({*files} & known.keys())
    if met < len(known):
        warnings.warn(f"{path}: {len(known) - met} of its {len(known)} rows are about files that are not there.", stacklevel=2)
    return found


def _by_position(parts: Parts, rows: list[dict[str, Any]], path: Path) -> dict[str, list[Any]]:
    if "part" not in rows[0] and len(parts) > 1:
        raise DataError(
            f"{path} has neither a column 'file' nor a column 'part', and the data have the parts {', '.join(parts)}: nobody knows which "
            "rows are whose. Add a column part."
        )
    named: dict[str, list[dict[str, Any]]] = {part: [] for part in parts}
    for row in rows:
        part = (row["part"] or "").strip() if "part" in row else next(iter(parts))
        if part not in named:
            raise DataError(f"{path}, line {row['(line)']}: the data have no part {part!r}; they have {', '.join(parts)}.")
        named[part].append(row)
    return {part: _placed(named[part], part, images, path) for part, images in parts.items()}


def _placed(rows: list[dict[str, Any]], part: str, images: Any, path: Path) -> list[Any]:
    # Images that could not be read have a row too; else the positions in the source may have holes that no row knows of.
    order = list(range(len(images) + len(images.skipped))) if images.skipped else images.index.tolist()
    values: list[Any] = [None] * (max(order) + 1)
    for number, row in enumerate(rows):
        place = (row["index"] or "").strip() if "index" in row else str(number)
        if not (place.isdecimal() and int(place) < len(order)):
            raise DataError(
                f"{path} does not match {images.name}: line {row['(line)']} is about image {place} of the {part} part, which has "
                f"{len(order)} images (0 to {len(order) - 1})."
            )
        if values[order[int(place)]] is not None:
            raise DataError(f"{path}, line {row['(line)']}: a second row for image {place} of the {part} part.")
        values[order[int(place)]] = row["(value)"]
    missing = [place for place in images.index.tolist() if values[place] is None]
    if missing:
        raise DataError(
            f"{path} does not match {images.name}: {len(missing)} of the {len(images)} images of the {part} part have no row, the first is "
            f"number {order.index(missing[0])}."
        )
    return values
