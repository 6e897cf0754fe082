"""Sets that do not fit into memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from overproof.data.attributes import Attribute
from overproof.data.images import channel_statistics, class_names, spread, square
from overproof.data.pixels import as_image, check_images, check_labels, class_number, to_float
from overproof.errors import DataError

SAMPLE = 1_000
SHOWN = 10  # images that cannot be read and are named
REMEDY = 'Repair or remove them, or leave such images out with on_error="skip" (on the command line --set data.on_error=skip).'


class UnreadableError(DataError):
    """One image could not be decoded; a set with on_error="skip" goes on without it."""

    def __init__(self, message: str, name: str = "") -> None:
        super().__init__(message)
        self.name = name


def unreadable(errors: Sequence[UnreadableError], count: int, name: str) -> UnreadableError:
    """All that cannot be read in one message: the first ten, and how many of `count` there are."""
    if len(errors) == 1 < count:
        return errors[0]
    shown = "".join(f"\n  {error.name} ({error.__cause__})" for error in errors[:SHOWN])
    more = f"\n  and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""
    if len(errors) == count:
        what, remedy = f"none of its {count} images can be read", "Repair them, or give other images."
    else:
        what, remedy = f"{len(errors)} of its {count} images cannot be read", REMEDY
    return UnreadableError(f"{name}: {what}:{shown}{more}\n{remedy}", errors[0].name)


class StreamSet:
    """Images read when they are needed, with the names of their classes.

    Args:
        dataset: map-style Dataset of (image, label): PIL images, uint8 or float tensors (C, H, W), or arrays (H, W, C).
        labels: class numbers (N,); if None, `dataset.targets`, or else every item is read when they are first asked for.
        classes: the K class names, or K itself; `dataset.classes` or one more than the largest label if None.
        shape: channels, height and width of an image; those of the first image if None.
        name: what the set is called.
        index: positions of the images in their source set (N,).
        on_error: "raise" on an image that cannot be decoded, or "skip" it with a warning; its name joins `skipped`.
        attribute: the subgroup of each image, by its position in the source set.
        files: name of each image's file, by the same; () if there are none.

    Raises:
        DataError: an empty set, or labels out of range.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        labels: Tensor | None = None,
        classes: Sequence[str] | int | None = None,
        shape: tuple[int, int, int] | None = None,
        name: str = "images",
        index: Tensor | None = None,
        on_error: str = "raise",
        attribute: Attribute | None = None,
        files: Sequence[str] = (),
    ) -> None:
        if not len(dataset):
            raise DataError(f"{name} is empty. Give at least one image.")
        self.dataset, self.name, self.on_error = dataset, name, on_error
        self.attribute, self.files = attribute, tuple(files)
        self._labels = labels if labels is not None else _known_labels(dataset)
        self.classes = class_names(classes if classes is not None else getattr(dataset, "classes", None))
        if self._labels is not None or not self.classes:
            self._labels = check_labels(self.labels, len(dataset), name, classes=len(self.classes) or None)
            self.classes = self.classes or class_names(int(self._labels.max()) + 1)
        self.index = torch.arange(len(dataset)) if index is None else index.long()
        self.skipped: tuple[str, ...] = ()
        self.shape = shape if shape is not None else self._first_shape()

    def __repr__(self) -> str:
        return f"StreamSet({self.name!r}, {len(self)} images {self.shape}, {len(self.classes)} classes)"

    def __len__(self) -> int:
        return len(self.dataset)

    def _first_shape(self) -> tuple[int, int, int]:
        place = f"image 0 of {self.name}"
        image = check_images(as_image(self.dataset[0][0], place).unsqueeze(0), place)
        return image.shape[1], image.shape[2], image.shape[3]

    @property
    def labels(self) -> Tensor:
        """Class numbers (N,)."""
        if self._labels is None:
            self._labels = torch.tensor([class_number(self.dataset[row][1], row) for row in range(len(self.dataset))])
        return self._labels

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return self.shape[0]

    @property
    def image_size(self) -> int:
        """Height and width of the square images."""
        return square(self.shape, self.name)

    def subset(self, rows: Tensor | Sequence[int]) -> StreamSet:
        """The images at `rows`, in that order; `index` keeps their positions in the source set."""
        rows = torch.as_tensor(rows, dtype=torch.long)
        about: dict[str, Any] = {"name": self.name, "index": self.index[rows], "on_error": self.on_error}
        about |= {"attribute": self.attribute, "files": self.files}
        dataset = Subset(self.dataset, rows.tolist())
        return StreamSet(dataset, labels=self.labels[rows], classes=self.classes, shape=self.shape, **about)

    @property
    def known_labels(self) -> Tensor | None:
        """Class numbers (N,), if they are known without reading the images."""
        return self._labels

    @property
    def groups(self) -> Tensor | None:
        """The subgroup of each image (N,), if the set knows."""
        return None if self.attribute is None else self.attribute.of(self.index)

    def with_attribute(self, attribute: Attribute) -> StreamSet:
        """The same set, knowing `attribute`, which has to cover all its images."""
        attribute.check(self.index, self.name)
        named = copy.copy(self)
        named.attribute = attribute
        return named

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel in [0, 1], of at most 1,000 images spread evenly over the set."""
        return channel_statistics(self._sample())

    def _sample(self) -> Iterator[Tensor]:
        for row in spread(len(self), SAMPLE).tolist():
            try:
                place = f"image {row} of {self.name}"
                yield to_float(check_images(as_image(self.dataset[row][0], place).unsqueeze(0), place))
            except UnreadableError:
                if self.on_error != "skip":
                    raise


def _known_labels(dataset: Any) -> Tensor | None:
    targets = getattr(dataset, "targets", None)
    fits = targets is not None and len(targets) == len(dataset)
    return torch.as_tensor(targets) if fits else None
