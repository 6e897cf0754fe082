"""Sets known by name: scikit-learn's digits, and those that torchvision knows how to fetch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from overproof.data.images import ImageSet
from overproof.data.splits import Parts, stratified_split
from overproof.errors import DataError

_BIRDS_AND_MORE = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
_SIGNS = (
    "Speed limit 20", "Speed limit 30", "Speed limit 50", "Speed limit 60", "Speed limit 70", "Speed limit 80",
    "End of speed limit 80", "Speed limit 100", "Speed limit 120", "No passing", "No passing over 3.5 t",
    "Right of way at next crossing", "Priority road", "Yield", "Stop", "No vehicles", "No vehicles over 3.5 t", "No entry",
    "General caution", "Curve left", "Curve right", "Double curve", "Bumpy road", "Slippery road", "Road narrows right",
    "Road work", "Traffic signals", "Pedestrians", "Children crossing", "Bicycles crossing", "Ice or snow", "Wild animals",
    "End of all limits", "Turn right ahead", "Turn left ahead", "Ahead only", "Straight or right", "Straight or left",
    "Keep right", "Keep left", "Roundabout", "End of no passing", "End of no passing over 3.5 t",
)  # fmt: skip


def data_root(root: Path | None) -> Path:
    """`root`, or the environment's OVERPROOF_DATA, or ~/.cache/overproof/data."""
    chosen = root or os.environ.get("OVERPROOF_DATA") or Path("~/.cache/overproof/data")
    return Path(chosen).expanduser()


def missing(name: str, root: Path, files: Iterable[str], below: str = "", cause: Exception | None = None) -> DataError:
    """The error for a set that is neither on the disk nor to be fetched."""
    why = f" and could not be fetched ({cause})" if cause else ""
    return DataError(
        f"{name} is not in {root}{why}. Put {', '.join(files)} into {root / below}, name another folder with root=... or "
        "OVERPROOF_DATA, or read your own copy with parquet:DIR or folder:DIR."
    )


def digits(*, root: Path | None = None) -> Parts:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey; a fixed quarter of every class is the test part.

    The sixteen grey levels v become round(255 v / 16).

    Args:
        root: not used; the images come with scikit-learn.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    whole = ImageSet(images, torch.from_numpy(bunch.target), classes=10, name="digits")
    train, test = stratified_split(whole.labels, 0.25, seed=0)
    return {"train": whole.subset(train), "test": whole.subset(test)}


def cifar10(*, root: Path | None = None, download: bool = True) -> Parts:
    """CIFAR-10: 50,000 + 10,000 photographs, 32x32 colour.

    Args:
        root: folder that holds cifar-10-batches-py.
        download: fetch the files if they are not there.

    Raises:
        DataError: the files are not there and cannot be fetched.
    """
    return _cifar("cifar10", "CIFAR10", root, download)


def cifar100(*, root: Path | None = None, download: bool = True) -> Parts:
    """CIFAR-100: 50,000 + 10,000 photographs, 32x32 colour.

    Args:
        root: folder that holds cifar-100-python.
        download: fetch the files if they are not there.

    Raises:
        DataError: the files are not there and cannot be fetched.
    """
    return _cifar("cifar100", "CIFAR100", root, download)


def _cifar(name: str, family: str, root: Path | None, download: bool) -> Parts:
    parts: Parts = {}
    for part in ("train", "test"):
        data = _fetch(name, family, data_root(root), train=part == "train", download=download)
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        parts[part] = ImageSet(images, torch.tensor(data.targets), classes=data.classes, name=name)
    return parts


def svhn(*, root: Path | None = None, download: bool = True) -> Parts:
    """SVHN: 73,257 + 26,032 digits cut out of photographs of house numbers, 32x32 colour.

    Args:
        root: folder that holds train_32x32.mat and test_32x32.mat.
        download: fetch the files if they are not there.

    Raises:
        DataError: the files are not there and cannot be fetched.
    """
    return _planar("svhn", "SVHN", tuple("0123456789"), data_root(root), download=download)


def stl10(*, root: Path | None = None, download: bool = True) -> Parts:
    """STL-10: 5,000 + 8,000 photographs, 96x96 colour; the unlabelled ones are not read.

    Args:
        root: folder that holds stl10_binary.
        download: fetch the files if they are not there.

    Raises:
        DataError: the files are not there and cannot be fetched.
    """
    return _planar("stl10", "STL10", _BIRDS_AND_MORE, data_root(root), download=download)


def _planar(name: str, family: str, classes: tuple[str, ...], root: Path, *, download: bool) -> Parts:
    parts: Parts = {}
    for part in ("train", "test"):
        data = _fetch(name, family, root, split=part, download=download)
        images = torch.from_numpy(np.ascontiguousarray(data.data))
        labels = torch.from_numpy(data.labels.astype(np.int64))
        parts[part] = ImageSet(images, labels, classes=classes, name=name)
    return parts


def gtsrb(*, root: Path | None = None, download: bool = True, image_size: int = 32) -> Parts:
    """GTSRB: German traffic signs of 43 classes, the whole image resized (bilinear, antialiased) to a square.

    Args:
        root: folder that holds gtsrb/GTSRB.
        download: fetch the files if they are not there.
        image_size: side of the resized images in pixels.

    Raises:
        DataError: the files are not there and cannot be fetched.
    """
    from PIL import Image

    parts: Parts = {}
    for part in ("train", "test"):
        data = _fetch("gtsrb", "GTSRB", data_root(root), split=part, download=download)

        def read(row: int, data: Any = data) -> tuple[np.ndarray, int]:
            try:
                image, label = data[row]
            except OSError as error:
                raise DataError(f"gtsrb: a sign cannot be read ({error}). Fetch the set again.") from error
            return np.asarray(image.resize((image_size, image_size), Image.Resampling.BILINEAR)), label

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            images, labels = zip(*pool.map(read, range(len(data))), strict=True)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        parts[part] = ImageSet(pixels, torch.tensor(labels), classes=_SIGNS, name="gtsrb")
    return parts


_EXPECTED = {
    "CIFAR10": ("cifar-10-batches-py/ (data_batch_1 to 5, test_batch, batches.meta)",),
    "CIFAR100": ("cifar-100-python/ (train, test, meta)",),
    "SVHN": ("train_32x32.mat", "test_32x32.mat"),
    "STL10": ("stl10_binary/ (train_X.bin, train_y.bin, test_X.bin, test_y.bin, unlabeled_X.bin)",),
    "GTSRB": ("gtsrb/GTSRB/Training", "gtsrb/GTSRB/Final_Test/Images", "gtsrb/GT-final_test.csv"),
}


def _fetch(name: str, family: str, root: Path, **options: Any) -> Any:
    import torchvision.datasets

    try:
        return getattr(torchvision.datasets, family)(str(root), **options)
    except (OSError, RuntimeError, EOFError) as error:
        cause = error if options.get("download") else None
        raise missing(name, root, _EXPECTED[family], cause=cause) from error
