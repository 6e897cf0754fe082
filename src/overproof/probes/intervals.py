"""Means over images, differences of such means, and what another draw of the images would have given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

RESAMPLES = 1000
CHUNK = 100
FEW = 5_000_000  # numbers of draws that are worth keeping for the next table


@dataclass(frozen=True)
class Number:
    """A figure with its 95 % interval over images drawn with replacement; NaN where nothing was counted.

    Attributes:
        value: the figure on the images themselves.
        low, high: of the interval. It covers the choice of images, not the choice of seeds.
        count: images (planes, ...) that count.
    """

    value: float
    low: float
    high: float
    count: int


class Table:
    """A value per image and column; NaN where an image does not count.

    All figures of a table are made from the same draws, so that differences between columns are paired.

    Args:
        columns: values (N,) by name, N at least 1.
        resamples: draws, at least 1.
        seed: of the draws.
    """

    def __init__(self, columns: Mapping[str, Tensor], *, resamples: int = RESAMPLES, seed: int = 0) -> None:
        self.places = {name: place for place, name in enumerate(columns)}
        values = torch.stack([column.detach().cpu().double() for column in columns.values()], dim=1)
        self.valid = values.isfinite()
        filled, counted = values.nan_to_num(0, 0, 0), self.valid.double()
        self.means = filled.sum(dim=0) / counted.sum(dim=0)
        drawn = [(times @ filled) / (times @ counted) for times in _times(len(values), resamples, seed)]
        self.draws = torch.cat(drawn)

    def mean(self, *names: str) -> Number:
        """The mean of the means of the columns `names`."""
        return self.number(_shares(names))

    def difference(self, names: Iterable[str], minus: Iterable[str]) -> Number:
        """The mean of the columns `names` less that of the columns `minus`."""
        weights = _shares(tuple(names))
        for name, share in _shares(tuple(minus)).items():
            weights[name] = weights.get(name, 0.0) - share
        return self.number(weights)

    def number(self, weights: Mapping[str, float]) -> Number:
        """The weighted sum of the means of columns."""
        places = [self.places[name] for name in weights]
        factors = torch.tensor(list(weights.values()), dtype=torch.double)
        draws = self.draws[:, places] @ factors
        low, high = draws.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
        value = float(self.means[places] @ factors)
        return Number(value, low, high, int(self.valid[:, places].sum(dim=0).min()))


def _times(rows: int, resamples: int, seed: int) -> Iterable[Tensor]:
    """How often each row occurs in each draw (chunk, rows), chunk by chunk."""
    return _known(rows, resamples, seed) if rows * resamples <= FEW else _drawn(rows, resamples, seed)


@lru_cache(maxsize=4)
def _known(rows: int, resamples: int, seed: int) -> tuple[Tensor, ...]:
    return tuple(_drawn(rows, resamples, seed))


def _drawn(rows: int, resamples: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, resamples, CHUNK):
        chosen = torch.randint(rows, (min(CHUNK, resamples - first), rows), generator=generator)
        ones = torch.ones(chosen.shape, dtype=torch.double)
        yield torch.zeros_like(ones).scatter_add_(1, chosen, ones)


def _shares(names: tuple[str, ...]) -> dict[str, float]:
    return dict.fromkeys(names, 1 / len(names))
