"""Ordinary image files, of any mode and size, as a classifier reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from overproof.data.decoding import decode
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
    """Each file as one picture, decoded as for training, in order; what cannot be read comes with its reason.

    Args:
        paths: image files.
        channels: 1 for grey, 3 for colour.
        side: height and width in pixels.
    """
    for path in paths:
        try:
            yield Picture(path, torch.from_numpy(decode(path, channels=channels, image_size=side).copy()))
        except Exception as error:  # decoders raise whatever broken bytes provoke
            yield Picture(path, None, f"{type(error).__name__}: {error}".replace("\n", " ")[:300])
