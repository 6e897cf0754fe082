"""Images on their way through the members of an attack: batches stay full while the set shrinks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

S = TypeVar("S")


@dataclass(frozen=True)
class Chunk:
    """Images with their labels, their positions in the source (`index`) and their rows in the record, all (N, ...)."""

    images: Tensor
    labels: Tensor
    index: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Tensor | slice) -> Chunk:
        """The images at `chosen` (numbers, mask or slice)."""
        return Chunk(self.images[chosen], self.labels[chosen], self.index[chosen], self.rows[chosen])

    @staticmethod
    def joined(parts: Sequence[Chunk]) -> Chunk:
        """All images of `parts` in order."""
        columns = zip(*((p.images, p.labels, p.index, p.rows) for p in parts), strict=True)
        return parts[0] if len(parts) == 1 else Chunk(*(torch.cat(column) for column in columns))


class Lane(Generic[S]):
    """A chain of stages, each with a queue; a stage works whenever its queue holds a full batch.

    A queue never holds more than `size` images plus one incoming batch, so memory depends on the number of stages, not on
    the number of images.

    Args:
        stages: in order.
        size: images per batch.
        work: called as `work(stage, chunk)`; returns the mask of images that go on to the next stage.

    Attributes:
        peak: most images that ever waited for one stage.
    """

    def __init__(self, stages: Sequence[S], size: int, work: Callable[[S, Chunk], Tensor]) -> None:
        self.stages, self.size, self.work = tuple(stages), size, work
        self.queues: list[list[Chunk]] = [[] for _ in self.stages]
        self.peak = 0

    @property
    def waiting(self) -> int:
        """Images in all queues."""
        return sum(map(_count, self.queues))

    def feed(self, chunk: Chunk, number: int = 0) -> None:
        """Hand `chunk` to stage `number`, and let every stage work that has enough."""
        if number == len(self.stages) or not len(chunk):
            return
        queue = self.queues[number]
        queue.append(chunk)
        self.peak = max(self.peak, _count(queue))
        while _count(queue) >= self.size:
            whole = Chunk.joined(queue)
            queue[:] = [whole.take(slice(self.size, None))] if len(whole) > self.size else []
            self._run(number, whole.take(slice(0, self.size)))

    def flush(self, after: Callable[[], None] = lambda: None) -> None:
        """Let every stage work on what is left, the first stage first; `after` is called behind each."""
        for number, queue in enumerate(self.queues):
            if queue:
                whole = Chunk.joined(queue)
                queue.clear()
                self._run(number, whole)
                after()

    def _run(self, number: int, chunk: Chunk) -> None:
        self.feed(chunk.take(self.work(self.stages[number], chunk)), number + 1)


def _count(queue: list[Chunk]) -> int:
    return sum(map(len, queue))
