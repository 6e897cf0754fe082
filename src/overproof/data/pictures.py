"""Ordinary image files, of any mode and size, as a classifier reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from overproof.data.folders import EXTENSIONS
from overproof.errors import DataError


@dataclass(frozen=True)
class Picture:
    """A file with its pixels, uint8 (C, side, side); or with the reason why it cannot be read."""

    path: Path
    pixels: Tensor | None
    problem: str = ""


def find_pictures(paths: Iterable[str | Path]) -> list[Path]:
    """Image files by path: files as they are, of folders everything below them that has the ending of an image, sorted.

    Raises:
        DataError: a path does not exist, or there is no image at all.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = (p for p in sorted(path.rglob("*")) if p.suffix.lower() in EXTENSIONS and p.is_file())
            found += [p for p in inside if not p.name.startswith(".")]
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path} does not exist. Give image files, or folders of them.")
    if not found:
        raise DataError(
            f"There is no image in {', '.join(map(str, paths))}; known endings are {', '.join(sorted(EXTENSIONS))}."
        )
    return found


def read_pictures(paths: Iterable[Path], *, channels: int, side: int) -> Iterator[Picture]:
    """Each file as one picture, in order; what cannot be read comes with its reason.

    Args:
        paths: image files.
        channels: 1 for grey, 3 for colour.
        side: height and width in pixels.
    """
    for path in paths:
        try:
            yield Picture(path, read_picture(path, channels=channels, side=side))
        except Exception as error:  # decoders raise whatever broken bytes provoke
            yield Picture(path, None, f"{type(error).__name__}: {error}".replace("\n", " ")[:300])


def read_picture(path: Path, *, channels: int, side: int) -> Tensor:
    """One image file as uint8 (C, side, side).

    In this order: turned as its EXIF orientation says; of several frames the first; 16-bit pixels keep their upper eight bits;
    palettes, CMYK and the like become colours; what is transparent lies on white; grey or colour as wanted; resized (bilinear,
    antialiased) to a square without keeping the aspect ratio, as the images of a folder are for training.

    Raises:
        ValueError, OSError: no image, or pixels whose range is unknown (floating point, 32-bit integers).
    """
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        picture: Any = _eight_bit(ImageOps.exif_transpose(opened), opened.format)
    if picture.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (255, 255, 255, 255)), picture)
    picture = picture.convert("L" if channels == 1 else "RGB")
    if picture.size != (side, side):
        picture = picture.resize((side, side), Image.Resampling.BILINEAR)
    array = np.array(picture)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def _eight_bit(picture: Any, kind: str | None) -> Any:
    from PIL import Image

    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode == "I" and kind == "PNG":  # older versions read 16-bit PNG like this
        return Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {picture.mode!r} have no known range; save it with 8 or 16 bits")
    return picture
