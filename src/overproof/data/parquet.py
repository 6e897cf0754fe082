"""Images in Parquet files, in the layout of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from overproof.data.decoding import GIB, Channels, Decoding, OnError
from overproof.data.splits import Parts
from overproof.data.tables import PARTS, chosen, parts_of
from overproof.errors import DataError


def parquet(
    directory: str,
    *,
    image_column: str = "image",
    label_column: str = "label",
    attribute: str | None = None,
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
        attribute: column of subgroups.
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
    tables = {part: [(str(file), _read(file, columns, attribute)) for file in files] for part, files in found.items()}
    return parts_of(tables, columns, name=f"parquet:{directory}", directory=top, how=how, attribute=attribute)


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
    raise DataError(f"{top} holds no Parquet files of a train part, neither itself nor in data/: expected train-*.parquet.")


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


def _read(file: Path, columns: tuple[str, str], attribute: str | None) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file)
        present = [name for name in dict.fromkeys((*columns, attribute)) if name in schema.names]
        return chosen(pq.read_table(file, columns=present), columns, str(file), schema, attribute=attribute)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable Parquet file ({error}). Fetch it again.") from error
