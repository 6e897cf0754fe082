"""Batches from images in memory, and the choice of the loader that fits the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from overproof import console
from overproof.data.images import ImageSet
from overproof.data.iterables import IterableLoader
from overproof.data.order import Plan, generator_for
from overproof.data.pixels import to_float
from overproof.data.stream_loader import StreamLoader
from overproof.data.streams import StreamSet
from overproof.errors import UsageError
from overproof.types import Batch

Augmentation = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


@runtime_checkable
class Loader(Protocol):
    """Gives the batches of an epoch, from any batch on; `len` is the number of batches where it is known."""

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch`, beginning with batch number `start`."""
        ...


class DeviceLoader:
    """Batches of an `ImageSet`, gathered on the device.

    The order depends on `seed` and epoch alone, the augmentation on seed, epoch, batch number and rank: `batches(e, k)`
    gives exactly what `batches(e)` gives after k batches.

    Args:
        dataset: the images; moved to the device once, as a whole, if they take no more than a third of what is free on an accelerator,
            else batch by batch.
        batch_size: images per process and step.
        device: where the batches are made.
        shuffle: draw a new order in each epoch.
        seed: of order and augmentation.
        augment: `augment(images, labels, generator) -> (images, labels)`, see `build_augment`; the generator is on the CPU.
        drop_last: leave out an incomplete last global batch.
        rank: number of this process.
        world_size: number of processes; see `Plan` for how they share a global batch.

    Raises:
        UsageError: sizes that leave nothing to do.
    """

    def __init__(
        self,
        dataset: ImageSet,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        shuffle: bool = False,
        seed: int = 0,
        augment: Augmentation | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.plan = Plan(
            len(dataset), batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last, rank=rank, world_size=world_size
        )
        self.device, self.augment, self.seed, self.rank = torch.device(device), augment, seed, rank
        self._stays = not _fits(dataset, self.device)
        self.dataset = dataset if self._stays else dataset.to(device)

    def __len__(self) -> int:
        return len(self.plan)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch`, beginning with batch number `start`."""
        data = self.dataset
        for number, chosen in self.plan.rows(epoch, start):
            rows = chosen.to(data.images.device)
            batch = Batch(data.images[rows], data.labels[rows], data.index[rows])
            if self._stays:
                batch = _pinned(batch).to(self.device, non_blocking=True)
            images, labels = to_float(batch.images), batch.labels
            if self.augment is not None:
                images, labels = self.augment(images, labels, generator_for("augment", self.seed, epoch, number, self.rank))
            yield Batch(images, labels, batch.index)


def _fits(dataset: ImageSet, device: torch.device) -> bool:
    """Whether the images find room on the device, beside what training needs there."""
    images = dataset.images
    if device.type != "cuda" or images.is_cuda:
        return True
    size, free = images.numel() * images.element_size(), torch.cuda.mem_get_info(device)[0]
    if 3 * size <= free:
        return True
    console.note(
        f"note: the images ({size / 2**30:.1f} GiB) stay in main memory, for {free / 2**30:.1f} GiB are free on the device."
    )
    return False


def _pinned(batch: Batch) -> Batch:
    if not torch.cuda.is_available():
        return batch
    return Batch(batch.images.pin_memory(), batch.labels.pin_memory(), batch.index.pin_memory())


def make_loader(
    data: Any,
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    shuffle: bool = False,
    seed: int = 0,
    augment: Augmentation | None = None,
    drop_last: bool = False,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int | None = None,
    classes: int | None = None,
) -> Any:
    """The loader that fits `data`: it has `batches(epoch, start=0)`, and `len()` where the number of batches is known.

    Args:
        data: an `ImageSet`, a `StreamSet`, a map-style Dataset of (image, label), a pair of tensors (images, labels), an
            iterable of such batches (a DataLoader, say; it brings its own batch size and order), or a loader.
        batch_size: images per process and step.
        device: where the batches are made.
        shuffle: draw a new order in each epoch.
        seed: of order and augmentation.
        augment: see `build_augment`.
        drop_last: leave out an incomplete last batch.
        rank: number of this process.
        world_size: number of processes.
        num_workers: processes that read a `StreamSet` or Dataset.
        classes: number of classes, to check labels against where `data` does not know it.

    Raises:
        UsageError: none of these, or sizes that leave nothing to do.
        DataError: wrong shapes, types, pixels or labels.
    """
    if isinstance(data, Loader):
        return data
    shared: dict[str, Any] = {
        "device": device,
        "augment": augment,
        "seed": seed,
        "rank": rank,
        "world_size": world_size,
    }
    if _is_pair(data):
        data = ImageSet(data[0], data[1], classes=classes)
    if isinstance(data, ImageSet):
        return DeviceLoader(data, batch_size, shuffle=shuffle, drop_last=drop_last, **shared)
    if _is_map_style(data):
        order: dict[str, Any] = {"shuffle": shuffle, "drop_last": drop_last}
        return StreamLoader(data, batch_size, num_workers=num_workers, classes=classes, **order, **shared)
    if isinstance(data, Iterable):
        return IterableLoader(data, classes=classes, **shared)
    raise UsageError(
        f"Batches cannot be made from {type(data).__name__}. Give an ImageSet, a Dataset of (image, label), a pair of "
        "tensors (images, labels), or an iterable of (images, labels) such as a DataLoader."
    )


def brings_batches(data: Any) -> bool:
    """Whether `make_loader` leaves the size of the batches to `data`."""
    return not (_is_pair(data) or isinstance(data, ImageSet) or _is_map_style(data))


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)


def _is_map_style(data: Any) -> bool:
    from torch.utils.data import Dataset, IterableDataset

    return isinstance(data, StreamSet) or (isinstance(data, Dataset) and not isinstance(data, IterableDataset))
