"""Which rows each batch holds: from the seed and the epoch alone, the same on every device and process count."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from overproof.errors import UsageError


def generator_for(*parts: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on `parts` alone, on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class Plan:
    """The rows of every batch of an epoch, for one process of several.

    A global batch has `batch_size * world_size` rows and is cut into contiguous slices, one per process: two processes
    with batch b see in each step exactly what one process with batch 2b sees.

    Args:
        count: rows in the set.
        batch_size: rows per process and step, at least 1.
        shuffle: draw a new order in each epoch.
        seed: of the order.
        drop_last: leave out a last global batch that is not full, so that all processes take equally many full steps.
            Otherwise it is cut into near-equal slices, and a process whose slice is empty has one batch less.
        rank: number of this process, 0 to `world_size` - 1.
        world_size: number of processes.

    Raises:
        UsageError: sizes that leave nothing to do.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}; give at least 1.")
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} of {world_size} processes; ranks run from 0 to {world_size - 1}.")
        self.count, self.width = count, batch_size * world_size
        self.shuffle, self.seed, self.rank, self.world_size = shuffle, seed, rank, world_size
        self.full = count // self.width
        if drop_last and not self.full:
            raise UsageError(
                f"{count} images do not fill one batch of {batch_size} on {world_size} process(es): lower batch_size to "
                f"{max(count // world_size, 1)} or less, or keep incomplete batches with drop_last=False."
            )
        first, last = self._slice(0 if drop_last else count - self.full * self.width)
        self.batches = self.full + (last > first)

    def _slice(self, rows: int) -> tuple[int, int]:
        return rows * self.rank // self.world_size, rows * (self.rank + 1) // self.world_size

    def __len__(self) -> int:
        return self.batches

    def rows(self, epoch: int, start: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Number and rows of each batch of `epoch`, beginning with batch `start`."""
        order = torch.arange(self.count)
        if self.shuffle:
            order = torch.randperm(self.count, generator=generator_for("order", self.seed, epoch))
        for number in range(start, self.batches):
            together = order[number * self.width : (number + 1) * self.width]
            first, last = self._slice(len(together))
            yield number, together[first:last]
