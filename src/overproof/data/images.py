"""A set of images held in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from overproof.data.attributes import Attribute
from overproof.data.pixels import check_images, check_labels, to_float
from overproof.errors import DataError

SAMPLE = 10_000
_CHUNK = 500


class ImageSet:
    """Images and labels in memory, with the names of their classes.

    Args:
        images: uint8 (N, C, H, W), or floats in [0, 1]; C is 1 or 3.
        labels: class numbers (N,), 0 to K-1.
        classes: the K class names, or K itself; one more than the largest label if None.
        name: what the set is called in messages and reports.
        index: positions of the images in their source set (N,); 0 to N-1 if None.
        skipped: names of images of the source that could not be read and were left out.
        attribute: the subgroup of each image, by its position in the source set.
        files: name of each image's file, by the same; () if there are none.
        origin: what each image was made from, as a position in the source set (N,): equal for images that show the same picture and
            must not be held apart; `index` if None.

    Raises:
        DataError: an empty set, wrong shapes or types, pixels or labels out of range; names the row and the remedy.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        classes: Sequence[str] | int | None = None,
        name: str = "images",
        index: Tensor | None = None,
        skipped: Iterable[str] = (),
        attribute: Attribute | None = None,
        files: Sequence[str] = (),
        origin: Tensor | None = None,
    ) -> None:
        self.name = name
        self.images = check_images(images, name)
        self.classes = class_names(classes)
        self.labels = check_labels(labels, len(images), name, classes=len(self.classes) or None)
        self.classes = self.classes or class_names(int(self.labels.max()) + 1)
        self.index = torch.arange(len(images)) if index is None else index.long()
        self.labels, self.index = self.labels.to(self.images.device), self.index.to(self.images.device)
        self.origin = self.index if origin is None else origin.long().to(self.images.device)
        self.skipped, self.attribute, self.files = tuple(skipped), attribute, tuple(files)
        for key, positions in (("index", self.index), ("origin", self.origin)):
            if len(positions) != len(images):
                raise DataError(f"{name}: {len(images)} images, but {len(positions)} positions in `{key}`.")

    def __repr__(self) -> str:
        return f"ImageSet({self.name!r}, {len(self)} images {self.shape}, {len(self.classes)} classes)"

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return self.shape[0]

    @property
    def image_size(self) -> int:
        """Height and width of the square images."""
        return square(self.shape, self.name)

    def subset(self, rows: Tensor | Sequence[int]) -> ImageSet:
        """The images at `rows`, in that order; `index` keeps their positions in the source set."""
        rows = torch.as_tensor(rows, dtype=torch.long)
        images, labels, index, origin = (
            part[rows.to(part.device)] for part in (self.images, self.labels, self.index, self.origin)
        )
        about: dict[str, Any] = {"origin": origin, "skipped": self.skipped, "attribute": self.attribute, "files": self.files}
        return ImageSet(images, labels, classes=self.classes, name=self.name, index=index, **about)

    @property
    def groups(self) -> Tensor | None:
        """The subgroup of each image (N,), if the set knows."""
        return None if self.attribute is None else self.attribute.of(self.index)

    def with_attribute(self, attribute: Attribute) -> ImageSet:
        """The same set, knowing `attribute`, which has to cover all its images."""
        attribute.check(self.index, self.name)
        named = copy.copy(self)
        named.attribute = attribute
        return named

    def to(self, device: torch.device | str) -> ImageSet:
        """The same set on `device`; itself if it is there already."""
        if self.images.device == torch.device(device):
            return self
        moved = object.__new__(ImageSet)  # already checked: a second look would cost a pass over all pixels
        moved.__dict__.update(self.__dict__)
        for key in ("images", "labels", "index", "origin"):
            setattr(moved, key, getattr(self, key).to(device))
        return moved

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel in [0, 1], of at most 10,000 images spread evenly over the set."""
        rows = spread(len(self), SAMPLE).to(self.images.device)
        return channel_statistics(to_float(self.images[part]) for part in torch.split(rows, _CHUNK))


def class_names(classes: Sequence[str] | int | None) -> tuple[str, ...]:
    """Class names from names, from their number, or () if unknown."""
    if classes is None:
        return ()
    return tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(map(str, classes))


def square(shape: tuple[int, int, int], name: str) -> int:
    """The one side of square images.

    Raises:
        DataError: height and width differ.
    """
    _, height, width = shape
    if height != width:
        raise DataError(
            f"{name}: images are {height} high and {width} wide; the models here take square ones. Resize them with "
            "the option image_size, or bring your own model."
        )
    return height


def spread(count: int, at_most: int) -> Tensor:
    """Row numbers spread evenly over `count` rows, no more than `at_most`."""
    taken = min(count, at_most)
    return torch.arange(taken) * count // taken


def channel_statistics(parts: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel over float batches (N, C, H, W).

    A standard deviation is at least 1/255, so that an even channel can still be divided by it.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for part in parts:
        values = part.transpose(0, 1).flatten(1).double().cpu()
        count += values.shape[1]
        total, squares = total + values.sum(dim=1), squares + values.square().sum(dim=1)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)
    return tuple(mean.tolist()), tuple(std.tolist())
