"""Batches from whatever the user iterates over, checked one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from overproof.data.order import generator_for
from overproof.data.pixels import check_images, check_labels, to_float
from overproof.errors import DataError
from overproof.types import Batch


class IterableLoader:
    """Batches from an iterable of (images, labels), such as a DataLoader.

    The iterable brings its own batch size and order; `index` is a running count. Each batch is checked. With several
    processes every one iterates over the same batches and takes its contiguous slice of each. `len()` works where the
    iterable has a length.

    Args:
        data: iterable of (images, labels), or of `Batch`; images uint8, or floats in [0, 1], (N, C, H, W). It must be
            possible to iterate anew for each epoch.
        classes: number of classes, or their names, to check the labels against.
        device: where the batches go.
        augment: see `build_augment`.
        seed: of the augmentation.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        DataError: (while iterating) an empty iterable, wrong shapes, types, pixels or labels; names the batch.
    """

    def __new__(cls, data: Iterable[Any], **options: Any) -> IterableLoader:
        """The class that has `len()` where `data` has one."""
        chosen = _SizedIterableLoader if cls is IterableLoader and _length(data) is not None else cls
        return object.__new__(chosen)

    def __init__(
        self,
        data: Iterable[Any],
        *,
        classes: int | Iterable[str] | None = None,
        device: torch.device | str = "cpu",
        augment: Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]] | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.data, self.device, self.augment, self.seed = data, torch.device(device), augment, seed
        self.classes = classes if isinstance(classes, int) or classes is None else len(tuple(classes))
        self.rank, self.world_size = rank, world_size
        sharing = isinstance(getattr(data, "sampler", None), DistributedSampler)
        if world_size > 1 and sharing:
            raise DataError(
                "The DataLoader has a DistributedSampler, but its batches are shared out among the processes here, too: most images would "
                "never be seen. Give the Dataset, or a DataLoader without that sampler."
            )

    @property
    def keeps_numbers(self) -> bool:
        """Whether an image has the same `index` in every pass: its order is known not to change, or batches bring their own."""
        data = self.data
        if isinstance(data, DataLoader):
            fixed = type(data.batch_sampler) is BatchSampler and isinstance(data.sampler, SequentialSampler)
        else:
            fixed = isinstance(data, Sequence)
        return fixed or isinstance(next(iter(data), None), Batch)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one pass, without the first `start`; `epoch` only seeds the augmentation."""
        count, number = 0, -1
        for number, item in enumerate(self._seeded(epoch)):
            images, labels = self._pair(item, f"batch {number}")
            first, count = count, count + len(labels)
            if number < start:
                continue
            whole = checked(images, labels, f"batch {number}", self.classes)
            index = item.index.cpu() if isinstance(item, Batch) else whole.index + first
            batch = self._mine(replace(whole, index=index))
            if len(whole) < self.world_size:
                raise DataError(
                    f"batch {number} has {len(whole)} images for {self.world_size} processes, so one would go without. Use drop_last=True, "
                    "or give a Dataset instead of a loader."
                )
            if len(batch):
                yield self._augmented(as_floats(batch.to(self.device, non_blocking=True)), epoch, number)
        if number < 0:
            raise DataError(
                "The iterable gave no batch: it is empty, or it was used up by an earlier pass (a generator can be used "
                "once; give something that can be iterated anew, such as a DataLoader or a list)."
            )

    @staticmethod
    def _pair(item: Any, place: str) -> tuple[Tensor, Tensor]:
        if isinstance(item, Batch):
            return item.images, item.labels
        pair = isinstance(item, tuple | list) and len(item) == 2
        if not pair or not all(isinstance(part, Tensor) for part in item):
            kind = [type(part).__name__ for part in item] if isinstance(item, tuple | list) else type(item).__name__
            raise DataError(f"{place} is {kind}; expected a pair of tensors (images, labels). {_remedy(item)}")
        return item[0], item[1]

    def _seeded(self, epoch: int) -> Iterator[Any]:
        """The user's batches; what their order and transforms draw from the global generator depends on (seed, epoch, number).

        So a resumed run meets the same batches, and all processes meet the same ones.
        """
        _seed_global(self.seed, epoch, -1)
        for sampler in (getattr(self.data, "sampler", None), getattr(self.data, "batch_sampler", None)):
            if sampler is not None and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        batches = iter(self.data)
        for number in itertools.count():
            _seed_global(self.seed, epoch, number)
            try:
                item = next(batches)
            except StopIteration:
                return
            yield item

    def _mine(self, batch: Batch) -> Batch:
        rows = slice(*(len(batch) * rank // self.world_size for rank in (self.rank, self.rank + 1)))
        return Batch(batch.images[rows], batch.labels[rows], batch.index[rows])

    def _augmented(self, batch: Batch, epoch: int, number: int) -> Batch:
        if self.augment is None:
            return batch
        generator = generator_for("augment", self.seed, epoch, number, self.rank)
        return Batch(*self.augment(batch.images, batch.labels, generator), batch.index)


def _remedy(item: Any) -> str:
    """How to make a batch of what is none."""
    if isinstance(item, Mapping):
        return f"Yield (images, labels), taken from its keys ({', '.join(map(str, item))})."
    parts = item if isinstance(item, tuple | list) else [item]
    if any(isinstance(part, np.ndarray) for part in parts):
        return "Make tensors of the arrays with torch.from_numpy(...), images of shape (N, C, H, W) and labels of shape (N,)."
    return "A Dataset or list of single images goes into a torch.utils.data.DataLoader first."


def _seed_global(*parts: int) -> None:
    torch.default_generator.manual_seed(generator_for("iterable", *parts).initial_seed())


class _SizedIterableLoader(IterableLoader):
    def __len__(self) -> int:
        return _length(self.data) or 0


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:  # no length, or a DataLoader over an iterable set without one
        return None


def checked(images: Tensor, labels: Tensor, place: str, classes: int | None) -> Batch:
    """A batch of images, uint8 or float32 in [0, 1], and int64 labels, `index` counting from 0.

    Raises:
        DataError: wrong shapes, types, pixels or labels; names `place`.
    """
    images = check_images(images, place)
    return Batch(images, check_labels(labels, len(images), place, classes=classes), torch.arange(len(images)))


def as_floats(batch: Batch) -> Batch:
    """Its images as float32 in [0, 1]: after the way to the device, on which bytes are a quarter of the load."""
    return Batch(to_float(batch.images), batch.labels, batch.index)
