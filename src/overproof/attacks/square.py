"""Square attack: random search over square-shaped changes."""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from overproof.attacks.base import BudgetAttack, logits_of
from overproof.attacks.randomness import Streams
from overproof.errors import UsageError
from overproof.losses.margins import margin
from overproof.networks import in_mode

_BLOCK = 64  # queries whose random numbers are drawn at once
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries

Patch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Square(BudgetAttack):
    """Random search without gradients: a square is repainted, and kept if the margin grows.

    Linf: the square takes x_0 + eps or x_0 - eps, a random sign per channel; the start is vertical stripes.
    L2: the mass of two squares, and what is left of the budget, moves into the first, shaped by a pyramid of random sign.

    Args:
        eps, norm, targeted: see `BudgetAttack`; norms "Linf" and "L2".
        queries: candidates per restart, the start included; one forward pass each.
        p_init: share of the pixels that the first squares cover, in (0, 1]; it is halved on a schedule.
        restarts: searches; later ones only for images that still hold.
        rescale: stretch the schedule, made for 10,000 queries, to `queries`, as AutoAttack does.

    Raises:
        UsageError: an unknown norm or an option out of range.

    Reference: Andriushchenko, Croce, Flammarion and Hein, ECCV 2020, arXiv 1912.00049.

    Differences from the paper: every image has squares of its own, not one place for the whole batch; `targeted` maximises
    the margin of the target instead of lowering the cross-entropy.
    """

    logits_only: ClassVar[bool] = True

    queries: int = 5000
    p_init: float = 0.8
    restarts: int = 1
    rescale: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in ("Linf", "L2"):
            raise UsageError(f"Square knows the norms Linf and L2, not {self.norm!r}.")
        if self.queries < 1 or self.restarts < 1 or not 0 < self.p_init <= 1:
            raise UsageError(
                f"Square(queries={self.queries}, restarts={self.restarts}, p_init={self.p_init}): the first two must be at "
                "least 1, p_init in (0, 1]."
            )

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images; the best candidate where none succeeded."""
        streams, found = Streams.of(generator, images), images.detach().clone(memory_format=torch.contiguous_format)
        with in_mode(model), torch.no_grad():
            best = self._value(model, found, labels)
            for restart in range(self.restarts):
                rows = (~(best > 0)).nonzero().squeeze(1)
                if len(rows) == 0:
                    break
                chosen = (streams.fork(restart) if restart else streams).rows(rows)
                x, value = self._search(model, images[rows], labels[rows], chosen)
                better = value > best[rows]
                found[rows[better]], best[rows[better]] = x[better], value[better]
        return found

    def _value(self, model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        """Positive exactly where the attacker has won."""
        values = margin(logits_of(model, x), labels)
        return (-values if self.targeted else values).nan_to_num(-math.inf, math.inf, -math.inf)

    def _search(self, model: nn.Module, images: Tensor, labels: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        painter: _Painter = (_Linf if self.norm == "Linf" else _L2)(images, self.eps)
        x = painter.start(streams)
        best, rows = self._value(model, x, labels), torch.arange(len(images), device=images.device)
        found, values, draws = x.clone(), best.clone(), None
        for query in range(self.queries):
            if query:
                if draws is None or query % _BLOCK == 0:
                    draws = streams.bits((_BLOCK, 5 + images.shape[1]), images.device)
                patches = painter.paint(x, self._share(query), draws[:, query % _BLOCK])
                flat = x.view(-1)
                for place, _, new in patches:
                    flat.put_(place, new)
                value = self._value(model, x, labels)
                better = value > best
                for place, old, new in patches:
                    flat.put_(place, torch.where(better[:, None, None], new, old))
                best = torch.where(better, value, best)
            holds = ~(best > 0)
            if not bool(holds.all()):
                found[rows[~holds]], values[rows[~holds]] = x[~holds], best[~holds]
                x, best, rows, labels = (t[holds] for t in (x, best, rows, labels))
                if len(rows) == 0:
                    return found, values
                painter, streams = painter.rows(holds), streams.rows(holds)
                draws = draws[holds] if draws is not None else None
        found[rows], values[rows] = x, best
        return found, values

    def _share(self, query: int) -> float:
        """The share of pixels that the square of this query covers."""
        moment = int(query / self.queries * 10_000) if self.rescale else query
        return self.p_init * 0.5 ** bisect.bisect_left(_HALVINGS, moment)


class _Painter(ABC):
    """Knows where squares lie in the memory of a batch (N, C, H, W)."""

    def __init__(self, images: Tensor, eps: float) -> None:
        self.images, self.eps = images.contiguous(), eps
        self.first = torch.arange(len(images), device=images.device)[:, None, None] * images[0].numel()
        self.offsets: dict[int, Tensor] = {}
        self.shapes: dict[int, Tensor] = {}

    def rows(self, chosen: Tensor) -> _Painter:
        """The painter of the images `chosen`."""
        other = type(self)(self.images[chosen], self.eps)
        other.offsets, other.shapes = self.offsets, self.shapes
        return other

    @abstractmethod
    def start(self, streams: Streams) -> Tensor:
        """The first candidates."""

    @abstractmethod
    def paint(self, x: Tensor, share: float, draws: Tensor) -> list[Patch]:
        """Places in memory (N, C, s^2), what is there, what shall be there; written in order."""

    def corner(self, side: int, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column (N,) of the upper left corner, uniform over all places inside the image."""
        height, width = self.images.shape[2:]
        return (draws[:, 0] * (height - side + 1)) >> 23, (draws[:, 1] * (width - side + 1)) >> 23

    def square(self, side: int, corner: tuple[Tensor, Tensor]) -> Tensor:
        """Places (N, C, side^2) in memory."""
        channels, height, width = self.images.shape[1:]
        if side not in self.offsets:
            line = torch.arange(side, device=self.images.device)
            planes = torch.arange(channels, device=self.images.device)[:, None] * (height * width)
            self.offsets[side] = planes + (line[:, None] * width + line).flatten()
        return (self.first + (corner[0] * width + corner[1])[:, None, None]) + self.offsets[side]


class _Linf(_Painter):
    def __init__(self, images: Tensor, eps: float) -> None:
        super().__init__(images, eps)
        self.bounds = torch.stack([(self.images - eps).clamp_(min=0), (self.images + eps).clamp_(max=1)])

    def start(self, streams: Streams) -> Tensor:
        channels, _, width = self.images.shape[1:]
        up = streams.bits((channels, 1, width), self.images.device) >> 22
        return torch.where(up.bool(), self.bounds[1], self.bounds[0])

    def paint(self, x: Tensor, share: float, draws: Tensor) -> list[Patch]:
        channels, height, width = x.shape[1:]
        side = min(max(round(math.sqrt(share * height * width)), 1), height, width)
        place = self.square(side, self.corner(side, draws))
        up = (draws[:, 5 : 5 + channels, None] >> 22) * x.numel()
        return [(place, x.take(place), self.bounds.take(place + up))]


class _L2(_Painter):
    def start(self, streams: Streams) -> Tensor:
        count, channels, height, width = self.images.shape
        side = max(min(height, width) // 5, 1)
        down, across = height // side, width // side
        bits = streams.bits((channels + 1, down, across), self.images.device) >> 22
        tiles = self.pyramids(side)[bits[:, -1:]] * (2 * bits[:, :-1] - 1)[..., None].to(self.images.dtype)
        tiles = tiles.view(count, channels, down, across, side, side).transpose(3, 4)
        tiles = tiles.reshape(count, channels, down * side, across * side)
        top, left = (height - down * side) // 2, (width - across * side) // 2
        delta = torch.zeros_like(self.images)
        delta[:, :, top : top + down * side, left : left + across * side] = tiles
        size = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
        start: Tensor = (self.images + delta * (self.eps / size)).clamp_(0, 1)
        return start

    def paint(self, x: Tensor, share: float, draws: Tensor) -> list[Patch]:
        channels, height, width = x.shape[1:]
        side = min(max(round(math.sqrt(share * height * width)), 3) // 2 * 2 + 1, height, width)
        to, source = self.corner(side, draws), self.corner(side, draws[:, 2:])
        here, there = self.square(side, to), self.square(side, source)
        old, origin, gone, blank = x.take(here), self.images.take(here), x.take(there), self.images.take(there)
        change, line = old - origin, torch.arange(side, device=x.device)
        rows, columns = ((a - b)[:, None] + line for a, b in zip(source, to, strict=True))
        shared = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
        outside = ~shared.flatten(1)[:, None]
        mass = change.square().sum(dim=2) + ((gone - blank).square() * outside).sum(dim=2)
        spent = torch.linalg.vector_norm(x - self.images, dim=(1, 2, 3)).square()
        mass = (mass + ((self.eps**2 - spent) / channels)[:, None]).clamp(min=0)
        signs = (2 * (draws[:, 5 : 5 + channels] >> 22) - 1).to(x.dtype)
        shape = self.pyramids(side)[draws[:, 4] >> 22][:, None] * signs[..., None]
        shape = shape + change / (torch.linalg.vector_norm(change, dim=2, keepdim=True) + 1e-12)
        shape = shape / (torch.linalg.vector_norm(shape, dim=2, keepdim=True) + 1e-12)
        return [(there, gone, blank), (here, old, (origin + shape * mass.sqrt()[..., None]).clamp_(0, 1))]

    def pyramids(self, side: int) -> Tensor:
        """A positive pyramid above a negative one, and the same turned by 90 degrees: (2, side^2), of length 1."""
        if side not in self.shapes:
            halves = [_pyramid(side // 2, side), -_pyramid(side - side // 2, side)]
            shape = torch.cat([half / half.norm().clamp(min=1e-12) for half in halves])
            self.shapes[side] = (torch.stack([shape, shape.T]).flatten(1) / shape.norm()).to(self.images)
        return self.shapes[side]


def _pyramid(height: int, width: int) -> Tensor:
    """Value sum_{k >= m} 1 / (k + 1)^2 at distance m from the middle."""
    down, across = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    distance = torch.maximum(down.abs()[:, None], across.abs()[None])
    levels = 1 / (torch.arange(max(height, width) // 2 + 1, dtype=torch.float64) + 1) ** 2
    tails: Tensor = levels.flip(0).cumsum(0).flip(0)
    return tails[distance]
