"""Several processes judge one set: each a contiguous part of it, none an image twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from overproof import console
from overproof.data import DeviceLoader, ImageSet, IterableLoader, StreamLoader, StreamSet, make_loader
from overproof.data.pixels import check_images
from overproof.errors import OverproofError
from overproof.types import Batch

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The processes that evaluate together: those of `torch.distributed`, or this one alone."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Group:
        """The group this process belongs to."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return cls()
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def speaking(self) -> AbstractContextManager[None]:
        """Silence in all processes but the first."""
        return console.quiet_unless(self.rank == 0)

    def slice(self, count: int) -> slice:
        """This process's part of `count` rows; the first process's is empty only if there are none."""
        first, last = (-(-count * rank // self.size) for rank in (self.rank, self.rank + 1))
        return slice(first, last)

    def everyone(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives in each process, in order; an error in one is raised in all.

        Raises:
            OverproofError: the work of another process failed; names it.
        """
        if self.size == 1:
            return [work()]
        result, error = _attempt(work)
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, (result, repr(error) if error else None))
        return self._settled(found, error)

    def first(self, work: Callable[[], T]) -> T:
        """What `work`, done by the first process alone, gives.

        Raises:
            OverproofError: it failed there.
        """
        if self.size == 1:
            return work()
        result, error = _attempt(work) if self.rank == 0 else (None, None)
        found: list[Any] = [(result, repr(error) if error else None)]
        torch.distributed.broadcast_object_list(found, src=0)
        settled: T = self._settled(found, error)[0]
        return settled

    @staticmethod
    def _settled(found: list[tuple[Any, str | None]], error: Exception | None) -> list[Any]:
        if error is not None:
            raise error
        for rank, (_, problem) in enumerate(found):
            if problem is not None:
                raise OverproofError(f"Process {rank} of the evaluation failed: {problem}")
        return [result for result, _ in found]


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


class Share:
    """This process's part of the data, batch by batch.

    Args:
        data: whatever `make_loader` takes. Sets with a length are cut into one contiguous slice per process; of an iterable,
            whose length is unknown, every process walks over all and takes its slice of each batch.
        batch_size: images per batch.
        device: where the batches go.
        group: the processes.
    """

    def __init__(self, data: Any, batch_size: int, device: torch.device, group: Group) -> None:
        from torch.utils.data import Dataset, IterableDataset, Subset

        self.group, self.device, self.shift, self.first = group, device, 0, 0
        own = isinstance(data, ImageSet | StreamSet)
        sized = own or (isinstance(data, Dataset) and not isinstance(data, IterableDataset))
        self.cut = group.size > 1 and not sized
        if group.size > 1 and sized:
            part = group.slice(len(data))
            rows = range(part.start, part.stop)
            self.first, self.shift = part.start, 0 if own else part.start
            data = None if not rows else data.subset(rows) if own else Subset(data, rows)
        self.loader = None if data is None else make_loader(data, batch_size, device=device)

    def __len__(self) -> int:
        """Number of batches; 0 if unknown."""
        loader: Any = self.loader
        return len(loader) if hasattr(loader, "__len__") else 0

    def __iter__(self) -> Iterator[tuple[Tensor, Batch]]:
        """Rows in the whole data, and the batch."""
        count = self.first
        known = isinstance(self.loader, DeviceLoader | StreamLoader | IterableLoader)
        for number, batch in enumerate(() if self.loader is None else self.loader.batches(0)):
            if not known:  # a loader of the user's: nobody has looked at its images yet
                check_images(batch.images, f"batch {number}")
            part = self.group.slice(len(batch)) if self.cut else slice(0, len(batch))
            rows = torch.arange(count, count + len(batch))[part]
            count += len(batch)
            if len(rows):
                mine = Batch(batch.images[part], batch.labels[part], batch.index[part] + self.shift)
                yield rows, mine.to(self.device)
