"""What the cache remembers: keys with their classes, as small as wanted."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

KeyType = Literal["float64", "float32", "float16", "bfloat16", "int8"]
ITERATIONS = 20  # of k-means
ALIKE = 1e-6  # keys nearer than that are one key


@dataclass(frozen=True)
class Items:
    """M items, sorted by class so that a class is a range of rows.

    Args:
        keys: (M, D), in any type; (0, D) if an index keeps them.
        scales: (M,) by which int8 keys are multiplied; (0,) for other types.
        weights: (M,) logarithm of how many images an item stands for; (0,) if each stands for itself.
        labels: (M,) classes, ascending (in order of arrival if an index keeps the keys).
        source: (M,) position of the image in its data set.
        mirrored: (M,) whether it is the mirror image.
        index: keeps the keys instead, and finds the nearest (`cache_index.FaissIndex`).
    """

    keys: Tensor
    scales: Tensor
    weights: Tensor
    labels: Tensor
    source: Tensor
    mirrored: Tensor
    index: Any = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def ends(self) -> list[int]:
        """The row after the last of each class, from class 0."""
        return list(accumulate(torch.bincount(self.labels).tolist()))

    def blocks(self, size: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """First row and keys (at most `size`, D) of one block after the other, as numbers to calculate with."""
        for start in range(0, len(self.keys), size):
            yield start, self.take(slice(start, start + size), dtype)

    def take(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """The keys at `rows`."""
        if self.index is not None:
            kept: Tensor = self.index.take(rows).to(self.labels.device, dtype)
            return kept
        keys = self.keys[rows].to(dtype)
        return keys * self.scales[rows, None].to(dtype) if len(self.scales) else keys

    def classes_in(self, start: int, stop: int) -> Iterator[tuple[int, slice]]:
        """The classes that have rows in [start, stop), each with its range, counted from `start`."""
        label, low = bisect_right(self.ends, start), start
        while low < stop:
            high = min(self.ends[label], stop)
            if low < high:
                yield label, slice(low - start, high - start)
            label, low = label + 1, high

    def plus(self, other: Items, *, ordered: bool = True) -> Items:
        """Both together; `ordered` by class, so that each class keeps its range. Room is taken for the result alone."""
        labels = torch.cat([self.labels, other.labels])
        places = torch.arange(len(labels), device=labels.device)
        if ordered:
            places[labels.argsort(stable=True)] = places.clone()
        split = len(self)

        def merged(mine: Tensor, theirs: Tensor) -> Tensor:
            if not len(mine) and not len(theirs):
                return mine
            whole = mine.new_empty((len(labels), *mine.shape[1:]))
            whole[places[:split]], whole[places[split:]] = mine, theirs.to(mine)
            return whole

        columns = {name: merged(getattr(self, name), getattr(other, name)) for name in ("keys", "scales", "source", "mirrored")}
        weighted = len(self.weights) or len(other.weights)
        columns |= {"labels": merged(self.labels, other.labels)}
        columns |= {"weights": merged(self._weights, other._weights) if weighted else self.weights}
        return replace(self, **columns)

    @property
    def _weights(self) -> Tensor:
        return self.weights if len(self.weights) else torch.zeros(len(self), device=self.labels.device)


def stored(keys: Tensor, kind: KeyType) -> tuple[Tensor, Tensor]:
    """Keys (M, D) in the type they are kept in, and the scales (M,) of int8 keys, (0,) for other types."""
    if kind != "int8":
        return keys.to(getattr(torch, kind)), keys.new_zeros(0, dtype=torch.float32)
    scales = keys.abs().amax(dim=1).clamp(min=1e-12) / 127
    return (keys / scales[:, None]).round().to(torch.int8), scales.float()


def clustered(keys: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """k-means on the sphere: at most `count` centres that stand for all `keys`.

    Args:
        keys: (M, D) of length one.
        count: number of centres.
        generator: chooses the first centres among the keys.

    Returns:
        Centres (k, D) of length one, logarithm (k,) of how many keys each stands for, and the row (k,) of the key nearest to each.
    """
    if len(keys) <= count:
        return keys, keys.new_zeros(len(keys)), torch.arange(len(keys), device=keys.device)
    centres = _first_centres(keys, count, generator)
    nearest = keys.new_full((len(keys),), -1, dtype=torch.long)
    for _ in range(ITERATIONS):
        now = (keys @ centres.T).argmax(dim=1)
        if bool((now == nearest).all()):
            break
        nearest = now
        sums = torch.zeros_like(centres).index_add_(0, nearest, keys)
        alone = torch.bincount(nearest, minlength=len(centres)) == 0
        centres = torch.where(alone[:, None], centres, normalize(sums, dim=1))
    similarity = keys @ centres.T
    sizes = torch.bincount(similarity.argmax(dim=1), minlength=len(centres))
    used = sizes > 0
    return centres[used], sizes[used].log().to(keys.dtype), similarity.argmax(dim=0)[used]


def _first_centres(keys: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` different keys, each drawn by its distance from those before (k-means++)."""
    rows = [int(torch.randint(len(keys), (1,), generator=generator))]
    distance = 1 - keys @ keys[rows[0]]
    while len(rows) < count and bool((distance > ALIKE).any()):
        rows.append(int(distance.clamp(min=0).cpu().multinomial(1, generator=generator)))
        distance = torch.minimum(distance, 1 - keys @ keys[rows[-1]])
    return keys[rows]


def assemble(parts: Iterable[tuple[Tensor, ...]], most: int) -> Items:
    """One `Items` of parts (keys, scales, weights, labels, source, mirrored) whose classes ascend, `most` items at most.

    The room is taken once, so that the keys never exist twice.
    """
    columns: list[Tensor] = []
    count = 0
    for part in parts:
        columns = columns or [column.new_empty((most if len(column) else 0, *column.shape[1:])) for column in part]
        rows = slice(count, count + len(part[0]))
        for whole, column in zip(columns, part, strict=True):
            whole[rows] = column
        count = rows.stop
    return Items(*(column if len(column) <= count else column[:count].clone() for column in columns))
