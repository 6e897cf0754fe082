"""Sets that do not fit into memory, and the loader that reads them with worker processes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from overproof.data.images import channel_statistics, class_names, spread, square
from overproof.data.iterables import checked
from overproof.data.order import Plan, generator_for
from overproof.data.pixels import as_image, check_images, check_labels, shape_error, to_float
from overproof.errors import DataError
from overproof.types import Batch

SAMPLE = 1_000
WORKERS = 4


class UnreadableError(DataError):
    """One image could not be decoded; a set with on_error="skip" goes on without it."""

    def __init__(self, message: str, name: str = "") -> None:
        super().__init__(message)
        self.name = name


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
    ) -> None:
        if not len(dataset):
            raise DataError(f"{name} is empty. Give at least one image.")
        self.dataset, self.name, self.on_error = dataset, name, on_error
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
            self._labels = torch.tensor([int(self.dataset[row][1]) for row in range(len(self.dataset))])
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
        dataset = Subset(self.dataset, rows.tolist())
        return StreamSet(dataset, labels=self.labels[rows], classes=self.classes, shape=self.shape, **about)

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


class StreamLoader:
    """Batches of a `StreamSet` or of any map-style Dataset of (image, label), read by worker processes.

    Order and augmentation are those of `DeviceLoader`. Random transforms inside the user's own Dataset are seeded per
    epoch and worker, so they are not repeated exactly by a run that is resumed within an epoch.

    Args:
        dataset: a `StreamSet`, or a Dataset whose items are as described there.
        batch_size: images per process and step.
        num_workers: processes that read; if None, up to 4 for a `StreamSet` and none for a Dataset.
        classes: number of classes, to check labels against where the dataset does not know it.
        device, augment, seed: as in `DeviceLoader`.
        order: shuffle, drop_last, rank and world_size, as in `DeviceLoader`.

    Raises:
        UsageError: sizes that leave nothing to do.
        DataError: (while iterating) wrong shapes, types, pixels or labels; names the image or the batch.
    """

    def __init__(
        self,
        dataset: StreamSet | Dataset[Any],
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        augment: Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]] | None = None,
        seed: int = 0,
        num_workers: int | None = None,
        classes: int | None = None,
        **order: Any,
    ) -> None:
        self.plan = Plan(_length(dataset), batch_size, seed=seed, **order)
        known = isinstance(dataset, StreamSet)
        self.dataset, self.device, self.augment, self.seed = dataset, torch.device(device), augment, seed
        self.classes = len(dataset.classes) if isinstance(dataset, StreamSet) else classes
        workers = min(WORKERS, os.cpu_count() or 1) if known else 0
        self.num_workers = workers if num_workers is None else num_workers

    def __len__(self) -> int:
        return len(self.plan)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch`, beginning with batch number `start`."""
        source = self.dataset.dataset if isinstance(self.dataset, StreamSet) else self.dataset
        index = self.dataset.index if isinstance(self.dataset, StreamSet) else None
        plan = list(self.plan.rows(epoch, start))
        loader = DataLoader(
            _Items(source),
            batch_sampler=[rows.tolist() for _, rows in plan],
            num_workers=self.num_workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=generator_for("workers", self.seed, epoch),
        )
        for (number, _), found in zip(plan, loader, strict=True):
            batch = self._batch(found, number)
            batch = Batch(batch.images, batch.labels, batch.index if index is None else index[batch.index])
            yield self._augmented(batch.to(self.device, non_blocking=True), epoch, number)

    def _batch(self, found: tuple[Any, ...], number: int) -> Batch:
        images, labels, rows, errors = found
        for error in errors:
            self._unreadable(error)
        if images is None:
            raise DataError(f"batch {number}: none of its images can be read. Remove them from {self.dataset}.")
        batch = checked(images, labels, f"batch {number}", self.classes)
        return Batch(batch.images, batch.labels, rows)

    def _unreadable(self, error: DataError) -> None:
        data = self.dataset
        if not (isinstance(error, UnreadableError) and isinstance(data, StreamSet) and data.on_error == "skip"):
            raise error
        if error.name not in data.skipped:
            data.skipped += (error.name,)
            warnings.warn(f"{data.name}: left out an image that could not be read. {error}", stacklevel=3)

    def _augmented(self, batch: Batch, epoch: int, number: int) -> Batch:
        if self.augment is None:
            return batch
        generator = generator_for("augment", self.seed, epoch, number, self.plan.rank)
        return Batch(*self.augment(batch.images, batch.labels, generator), batch.index)


def _length(dataset: Any) -> int:
    try:
        count = len(dataset)
    except TypeError:
        raise DataError(f"The Dataset {type(dataset).__name__} has no length; give it __len__.") from None
    if not count:
        raise DataError(f"The Dataset {type(dataset).__name__} is empty. Give at least one image.")
    return count


class _Items(Dataset[Any]):
    """Items as (image, label, row), or the error met: errors raised inside a worker lose their text on the way."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, row: int) -> tuple[Tensor, int, int] | DataError:
        try:
            item = self.dataset[row]
            if not isinstance(item, tuple | list) or len(item) != 2:
                return DataError(f"Item {row} of the Dataset is {type(item).__name__}; expected (image, label).")
            return as_image(item[0], f"image {row}"), int(item[1]), row
        except DataError as error:
            return error


def _collate(items: Iterable[tuple[Tensor, int, int] | DataError]) -> tuple[Any, ...]:
    errors = [item for item in items if isinstance(item, DataError)]
    good = [item for item in items if not isinstance(item, DataError)]
    if not good:
        return None, None, None, errors
    images, labels, rows = zip(*good, strict=True)
    shapes = {f"image {row}": tuple(image.shape) for image, row in zip(images, rows, strict=True)}
    if len(set(shapes.values())) > 1:
        errors.append(shape_error(shapes, "Resize all images to one size."))
        return None, None, None, errors
    if len({image.dtype for image in images}) > 1:
        images = tuple(to_float(image) for image in images)
    return torch.stack(images), torch.tensor(labels), torch.tensor(rows), errors
