"""Batches from images that are read when they are needed, by worker processes."""

from __future__ import annotations

import os
import random
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from overproof.data.iterables import as_floats, checked
from overproof.data.order import Plan, generator_for
from overproof.data.pixels import as_image, class_number, shape_error, to_float
from overproof.data.streams import StreamSet, UnreadableError
from overproof.errors import DataError
from overproof.types import Batch

WORKERS = 4


class StreamLoader:
    """Batches of a `StreamSet` or of any map-style Dataset of (image, label), read by worker processes.

    Order and augmentation are those of `DeviceLoader`. Random transforms inside the user's own Dataset are seeded per epoch and image,
    so that any number of workers and processes, and a run that is resumed within an epoch, draw the same.

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
        positions = self.dataset.index if isinstance(self.dataset, StreamSet) else None
        plan = list(self.plan.rows(epoch, start))
        loader = DataLoader(
            _Items(source, None if isinstance(self.dataset, StreamSet) else (self.seed, epoch)),
            batch_sampler=[rows.tolist() for _, rows in plan],
            num_workers=self.num_workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=generator_for("workers", self.seed, epoch),
        )
        for (number, _), found in zip(plan, loader, strict=True):
            batch = self._batch(found, number)
            batch = Batch(batch.images, batch.labels, batch.index if positions is None else positions[batch.index])
            yield self._augmented(as_floats(batch.to(self.device, non_blocking=True)), epoch, number)

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


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Inside the block the global generators of Python, NumPy and torch (on the CPU) begin anew from `parts`; afterwards they go on."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = generator_for("item", *parts).initial_seed()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class _Items(Dataset[Any]):
    """Items as (image, label, row), or the error met: errors raised inside a worker lose their text on the way.

    With `seeds` the transforms of a Dataset draw the same for the same row in the same epoch, whoever asks and whenever: however many
    workers and processes there are, and after an interruption.
    """

    def __init__(self, dataset: Any, seeds: tuple[int, int] | None) -> None:
        self.dataset, self.seeds = dataset, seeds

    def __getitem__(self, row: int) -> tuple[Tensor, int, int] | DataError:
        try:
            with nullcontext() if self.seeds is None else seeded(*self.seeds, row):
                item = self.dataset[row]
            if not isinstance(item, tuple | list) or len(item) != 2:
                return DataError(f"Item {row} of the Dataset is {type(item).__name__}; expected (image, label).")
            return as_image(item[0], f"image {row}"), class_number(item[1], row), row
        except DataError as error:
            return error
        except Exception as error:  # a Dataset raises whatever its files provoke
            return _raised(self.dataset, row, error)


def _raised(dataset: Any, row: int, error: Exception) -> DataError:
    """What a Dataset raised, with the place: on the way out of a worker the error keeps nothing but its text."""
    while isinstance(dataset, Subset):
        dataset, row = dataset.dataset, int(dataset.indices[row])
    where = traceback.extract_tb(error.__traceback__)[-1]
    found = DataError(
        f"Image {row} of the Dataset {type(dataset).__name__} cannot be read: {type(error).__name__}: {error} "
        f"({where.filename}, line {where.lineno}). Repair or remove it, or leave it out with torch.utils.data.Subset."
    )
    found.__cause__ = error
    return found


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
