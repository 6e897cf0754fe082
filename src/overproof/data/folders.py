"""Images in class folders on the user's disk."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from overproof import console
from overproof.data.decoding import GIB, Channels, Decoding, OnError, read_images
from overproof.data.splits import Images, Parts
from overproof.errors import DataError

EXTENSIONS = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"))
_PARTS = {"train": ("train", "training"), "validation": ("validation", "val", "valid"), "test": ("test", "testing")}

_REMEDIES = {
    "test": "Put some there, or remove that folder and hold out a share of every class with data.test=0.2 (--set data.test=0.2). ",
    "validation": "Put some there, or remove that folder, and a share of the training images is held out (data.validation=0.1). ",
}


class _Files:
    """Image files below one folder."""

    def __init__(self, paths: list[Path], directory: Path) -> None:
        self.paths, self.directory = paths, directory

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, row: int) -> str:
        return str(self.paths[row])

    def payload(self, row: int) -> Path:
        return self.paths[row]


def folder(
    directory: str,
    *,
    image_size: int | None = None,
    channels: Channels | None = None,
    on_error: OnError = "raise",
    memory_limit: int = 4 * GIB,
) -> Parts:
    """Images in one folder per class.

    Args:
        directory: holds CLASS/IMAGE, or train/CLASS/IMAGE with test/CLASS/IMAGE and validation/CLASS/IMAGE beside it.
            Classes are numbered in the order of their names; hidden files and files that are no images are passed over.
        image_size: side to which images are resized (bilinear, antialiased; the aspect ratio is not kept).
        channels: 1 or 3; grey if all images are grey, otherwise colour, if None.
        on_error: "raise" on an image that cannot be read, or "skip" it with a warning.
        memory_limit: bytes of pixels; a set that needs more is read from the disk while training.

    Raises:
        DataError: no such folder, no images, an unreadable one, images that differ in size, or a link out of the folder.
    """
    top = Path(directory).expanduser()
    if not top.is_dir():
        raise DataError(f"folder:{directory}: {top} is not a folder. Give one that holds a folder of images per class.")
    how = Decoding(image_size=image_size, channels=channels, on_error=on_error, memory_limit=memory_limit)
    found = {part: top / name for part, names in _PARTS.items() for name in names if (top / name).is_dir()}
    if "train" not in found:
        found = {"train": top}
    for path in found.values():
        if path != top:  # the folder itself is the user's own choice and may be a link
            _refuse_link(path, top)
    classes = _classes(found["train"], top)
    if not classes:
        raise DataError(f"{found['train']} holds no folders. Put the images of each class into a folder of its own.")
    return {part: _read(part, path, top, classes=classes, how=how) for part, path in found.items()}


def _read(part: str, path: Path, top: Path, *, classes: list[str], how: Decoding) -> Images:
    unknown = [name for name in _classes(path, top) if name not in classes]
    if unknown:
        raise DataError(f"{path / unknown[0]}: the class {unknown[0]!r} is not among the train classes ({len(classes)}).")
    paths, labels, absent = [], [], []
    for label, name in enumerate(classes):
        files = _images(path / name, top) if (path / name).is_dir() else []
        paths += files
        labels += [label] * len(files)
        absent += [] if files else [name]
    if not paths:
        known = ", ".join(sorted(EXTENSIONS))
        remedy = _REMEDIES.get(part, "")
        raise DataError(f"{path} holds no images in its class folders. {remedy}Known kinds of files: {known}.")
    if absent:
        shown = f"{', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}"
        console.note(f"note: {path} holds no image of {len(absent)} of the {len(classes)} classes: {shown}.")
    found = read_images(_Files(paths, top), torch.tensor(labels), classes=classes, name=f"folder:{top}", how=how)
    found.files = tuple(file.relative_to(top).as_posix() for file in paths)
    return found


def _classes(path: Path, top: Path) -> list[str]:
    names = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    for name in names:
        _refuse_link(path / name, top)
    return names


def _images(path: Path, top: Path) -> list[Path]:
    """Image files anywhere below `path`, sorted."""
    found = []
    for here, folders, files in os.walk(path, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in [*folders, *files]:
            _refuse_link(Path(here, name), top)
        found += [Path(here, n) for n in files if Path(n).suffix.lower() in EXTENSIONS and not n.startswith(".")]
    return sorted(found)


def _refuse_link(path: Path, top: Path) -> None:
    """Links may point to files inside the folder and nowhere else: what comes from others must not reach the rest of the disk.

    Raises:
        DataError: a link to a folder, or out of `top`.
    """
    if path.is_symlink() and (path.is_dir() or not path.resolve().is_relative_to(top.resolve())):
        raise DataError(
            f"{path} is a link to {path.resolve()}; only links to files inside {top} are followed. Put the images "
            "themselves there, or name the folder they are in."
        )
