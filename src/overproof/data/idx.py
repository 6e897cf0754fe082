"""MNIST and the sets made in its likeness: IDX files, packed or not."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from overproof.data.images import ImageSet
from overproof.data.sources import data_root, missing
from overproof.data.splits import Parts
from overproof.errors import DataError

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_DIGITS = tuple("0123456789")
_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_SYLLABLES = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
_PIECE = 1 << 20
SYSTEM = Path("/usr/share/datasets")  # where Debian's dataset-* packages put theirs


def mnist(*, root: Path | None = None, download: bool = True) -> Parts:
    """MNIST: 60,000 + 10,000 handwritten digits, 28x28 grey.

    Args:
        root: folder that holds the IDX files, itself or in MNIST/raw or mnist.
        download: fetch the files if they are not there.

    Raises:
        DataError: the files are not there and cannot be fetched, or are damaged.
    """
    return _load("mnist", "MNIST", _DIGITS, root, download)


def fashion_mnist(*, root: Path | None = None, download: bool = True) -> Parts:
    """Fashion-MNIST: 60,000 + 10,000 pieces of clothing, 28x28 grey.

    Args:
        root: folder that holds the IDX files, itself or in FashionMNIST/raw or fashion-mnist.
        download: fetch the files if they are not there.

    Raises:
        DataError: the files are not there and cannot be fetched, or are damaged.
    """
    return _load("fashion-mnist", "FashionMNIST", _CLOTHES, root, download)


def kmnist(*, root: Path | None = None, download: bool = True) -> Parts:
    """Kuzushiji-MNIST: 60,000 + 10,000 cursive Japanese characters, 28x28 grey.

    Args:
        root: folder that holds the IDX files, itself or in KMNIST/raw or kmnist.
        download: fetch the files if they are not there.

    Raises:
        DataError: the files are not there and cannot be fetched, or are damaged.
    """
    return _load("kmnist", "KMNIST", _SYLLABLES, root, download)


def _load(name: str, family: str, classes: tuple[str, ...], root: Path | None, download: bool) -> Parts:
    top = data_root(root)
    # a folder shared by several sets holds files of the same names, so the set's own folder comes first
    places = [top / family / "raw", top / name, top, SYSTEM / name]
    place = next((p for p in places if _complete(p)), None)
    if place is None and download:
        place = _download(name, family, top)
    if place is None:
        raise missing(name, top, [f"{file}[.gz]" for files in _FILES.values() for file in files], f"{family}/raw")
    parts: Parts = {}
    for part, (images, labels) in _FILES.items():
        pixels, numbers = read_idx(_file(place, images)), read_idx(_file(place, labels))
        parts[part] = ImageSet(pixels.unsqueeze(1), numbers.long(), classes=classes, name=name)
    return parts


def _download(name: str, family: str, top: Path) -> Path | None:
    import torchvision.datasets

    try:
        getattr(torchvision.datasets, family)(str(top), download=True)
    except (OSError, RuntimeError, EOFError) as error:
        files = [f"{file}[.gz]" for files in _FILES.values() for file in files]
        raise missing(name, top, files, f"{family}/raw", error) from error
    return top / family / "raw"


def _complete(place: Path) -> bool:
    return all(_file(place, name).is_file() for names in _FILES.values() for name in names)


def _file(place: Path, name: str) -> Path:
    packed = place / f"{name}.gz"
    return packed if packed.is_file() else place / name


def read_idx(path: Path) -> Tensor:
    """The uint8 array in an IDX file, gzipped or not.

    Raises:
        DataError: the file is no IDX file of bytes, or shorter or longer than its header says.
    """
    try:
        with path.open("rb") as plain:
            file = gzip.GzipFile(fileobj=plain) if path.suffix == ".gz" else plain
            return torch.from_numpy(_read_idx(file))
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{path} is damaged or no IDX file ({error}). Fetch it again.") from error


def _read_idx(file: IO[bytes] | gzip.GzipFile) -> np.ndarray:
    zero, kind, dimensions = struct.unpack(">HBB", file.read(4))
    if zero or kind != 8 or not 1 <= dimensions <= 4:
        raise ValueError("the first bytes do not announce an array of bytes")
    shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
    size = 1
    for length in shape:
        size *= length
    data = bytearray()
    while len(data) <= size and (piece := file.read(_PIECE)):  # a header may announce more than any memory holds
        data += piece
    if len(data) != size:
        raise ValueError(f"the header announces {size} bytes, but there are {'more' if len(data) > size else len(data)}")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape).copy()
