"""Encoded images to arrays: fast, with every unreadable one named."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from overproof import console
from overproof.data.images import ImageSet
from overproof.data.pixels import shape_error
from overproof.data.streams import REMEDY, StreamSet, UnreadableError, unreadable
from overproof.errors import DataError

GIB = 2**30
_CHUNK = 256
_SMALL = 16 * 1024  # bytes
_PROBE = 100  # images looked at to tell grey from colour in a set too large to read first
RESIZE = "Resize all with image_size=32, say (on the command line --set data.image_size=32)."
_GREY = ("1", "L", "LA", "La")
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")

Channels = Literal[1, 3]
OnError = Literal["raise", "skip"]


class Encoded(Protocol):
    """A sequence of encoded images."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> str:
        """What to call image `row` in messages."""
        ...

    def payload(self, row: int) -> bytes | Path:
        """The encoded image, or the file that holds it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How images are decoded.

    Args:
        image_size: side to which images are resized (bilinear, antialiased); as they are if None.
        channels: 1 for grey, 3 for colour; grey if all images are grey, otherwise colour, if None.
        on_error: "raise" on an image that cannot be read, or "skip" it with a warning.
        memory_limit: bytes; a set that needs more is streamed from where it lies.
    """

    image_size: int | None = None
    channels: Channels | None = None
    on_error: OnError = "raise"
    memory_limit: int = 4 * GIB


def decode(payload: bytes | Path, *, channels: int | None = None, image_size: int | None = None) -> np.ndarray:
    """One encoded image, of any mode and size, as uint8 (C, H, W).

    In this order: turned as its EXIF orientation says; of several frames the first; 16-bit pixels keep their upper eight bits;
    palettes, CMYK and the like become colours; what is transparent lies on white; grey or colour as wanted; resized (bilinear,
    antialiased) to a square without keeping the aspect ratio.

    Args:
        payload: the bytes, or the file.
        channels: 1 for grey, 3 for colour; as in the image if None.
        image_size: side in pixels; as in the image if None.

    Raises:
        ValueError, OSError: no image, or pixels whose range is unknown (floating point, 32-bit integers).
    """
    from PIL import Image, ImageOps

    with Image.open(BytesIO(payload) if isinstance(payload, bytes) else payload) as opened:
        kind = opened.format
        ImageOps.exif_transpose(opened, in_place=True)
        picture: Any = _eight_bit(opened, kind)
        grey = channels == 1 if channels else picture.mode in _GREY
        if picture.mode in _TRANSPARENT or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
        mode = "L" if grey else "RGB"
        picture = picture if picture.mode == mode else picture.convert(mode)
        if image_size and picture.size != (image_size, image_size):
            picture = picture.resize((image_size, image_size), Image.Resampling.BILINEAR)
        array = np.asarray(picture)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _eight_bit(picture: Any, kind: str | None) -> Any:
    from PIL import Image

    # Conversion would cut off at 255. Older versions of the library read 16-bit PNG as 32-bit integers.
    if picture.mode.startswith("I;16") or (picture.mode == "I" and kind == "PNG"):
        return Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {picture.mode!r} have no known range; save it with 8 or 16 bits")
    return picture


class DecodedDataset(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Items (uint8 tensor (C, H, W), label), decoded when asked for.

    Raises:
        UnreadableError: (item) the image cannot be decoded.
        DataError: (item) it has another size, or is the first in colour of a set taken for grey.
    """

    def __init__(self, items: Encoded, labels: Tensor, *, shape: tuple[int, ...] | None, how: Decoding) -> None:
        self.items, self.labels, self.shape, self.how = items, labels, shape, how

    def __len__(self) -> int:
        return len(self.items)

    def array(self, row: int) -> np.ndarray:
        """Image `row` as uint8 (C, H, W)."""
        name = self.items.name(row)
        try:
            found = decode(self.items.payload(row), channels=self.how.channels, image_size=self.how.image_size)
        except DataError:
            raise
        except Exception as error:  # decoders raise whatever broken bytes provoke
            raise UnreadableError(f"{name} is not a readable image ({error}). {REMEDY.replace('them', 'it')}", name) from error
        if self.shape is not None and found.shape[1:] != self.shape[1:]:
            raise shape_error({"the first image": self.shape, name: found.shape}, RESIZE)
        if self.shape is not None and len(found) > self.shape[0]:
            raise _ColourError(
                f"{name} is in colour, but the images before it are grey. Give channels=3 or 1 (--set data.channels=3)."
            )
        return found if self.shape is None or len(found) == self.shape[0] else found.repeat(self.shape[0], axis=0)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return torch.from_numpy(np.array(self.array(row))), int(self.labels[row])


class _ColourError(DataError):
    """An image is in colour in a set taken for grey."""


def read_images(
    items: Encoded, labels: Tensor, *, classes: Sequence[str] | int | None, name: str, how: Decoding
) -> ImageSet | StreamSet:
    """The images in memory, or a `StreamSet` if they need more than `how.memory_limit` bytes.

    Raises:
        DataError: nothing there, an unreadable image (with on_error="raise"), or images that differ in size.
    """
    if not len(items):
        raise DataError(f"{name} is empty: it holds no image.")
    shape = _probe(DecodedDataset(items, labels, shape=None, how=how), name)
    dataset = DecodedDataset(items, labels, shape=shape, how=how)
    if len(items) * int(np.prod(shape)) > how.memory_limit:
        return StreamSet(dataset, labels=labels, classes=classes, shape=shape, name=name, on_error=how.on_error)
    try:
        images, errors = _fill(dataset, name)
    except _ColourError:
        if how.channels is not None:
            raise
        return read_images(items, labels, classes=classes, name=name, how=replace(how, channels=3))
    if not errors:
        return ImageSet(torch.from_numpy(images), labels, classes=classes, name=name)
    kept = torch.tensor([row for row in range(len(items)) if row not in errors], dtype=torch.long)
    skipped = [error.name for error in errors.values()]
    more = ", ..." if len(skipped) > 5 else ""
    message = f"{name}: left out {len(skipped)} of {len(items)} images that could not be read: "
    warnings.warn(message + ", ".join(skipped[:5]) + more, stacklevel=2)
    found = torch.from_numpy(images)[kept]
    return ImageSet(found, labels[kept], classes=classes, name=name, index=kept, skipped=skipped)


def _probe(dataset: DecodedDataset, name: str) -> tuple[int, int, int]:
    """Shape of the images: size of the first, in colour if any of the first ones is."""
    shape: tuple[int, ...] | None = None
    errors = []
    for row in range(len(dataset)):
        if shape is not None and (row >= _PROBE or shape[0] == 3):
            break
        try:
            found = dataset.array(row).shape
        except UnreadableError as error:
            errors.append(error)  # told together with the others
            continue
        shape = found if shape is None else (max(shape[0], found[0]), *shape[1:])
    if shape is None:
        raise unreadable(errors, len(dataset), name)
    return shape[0], shape[1], shape[2]


def _fill(dataset: DecodedDataset, name: str) -> tuple[np.ndarray, dict[int, UnreadableError]]:
    """All images, and what went wrong by row; with on_error="raise" all of it is raised as one."""
    images = np.empty((len(dataset), *(dataset.shape or ())), dtype=np.uint8)
    errors: dict[int, UnreadableError] = {}

    def work(first: int) -> dict[int, UnreadableError]:
        met = {}
        for row in range(first, min(first + _CHUNK, len(dataset))):
            try:
                images[row] = dataset.array(row)
            except UnreadableError as error:
                met[row] = error
        return met

    with ThreadPoolExecutor(_threads(dataset)) as pool, console.bar(f"reading {name}", len(dataset)) as bar:
        futures = [pool.submit(work, first) for first in range(0, len(dataset), _CHUNK)]
        for number, met in enumerate(_in_order(futures)):
            errors |= met
            bar.update(min((number + 1) * _CHUNK, len(dataset)))
    if errors and dataset.how.on_error == "raise":
        raise unreadable(list(errors.values()), len(dataset), name)
    return images, errors


def _threads(dataset: DecodedDataset) -> int:
    """One for small images: their decoders are done before another thread has the interpreter."""
    try:
        payload = dataset.items.payload(len(dataset) // 2)
        size = len(payload) if isinstance(payload, bytes) else payload.stat().st_size
    except (DataError, OSError, ValueError):  # reported when its turn comes
        size = 0
    return 1 if size < _SMALL else min(8, os.cpu_count() or 1)


def _in_order(futures: list[Future[dict[int, UnreadableError]]]) -> Iterator[dict[int, UnreadableError]]:
    """Results in order; after an error the work that has not begun is called off."""
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()
