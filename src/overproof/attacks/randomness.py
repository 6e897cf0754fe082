"""Randomness that belongs to the image, not to its place in a batch.

A batch must give what its images give one by one, however it is cut, resumed or shared among devices. So an attack turns the
generator it is handed into `Streams`: one stream of numbers per image, computed by hashing (key of the image, number of the
draw, number of the element). Selecting images selects their streams.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed integer


class Streams(torch.Generator):
    """A generator with one independent stream per image.

    To code that knows nothing of streams it is an ordinary generator on the CPU, seeded by the keys.

    Args:
        keys: (N,) integers, one per image; equal keys give equal numbers.
        draws: how many draws have been made already.
    """

    def __new__(cls, keys: Tensor, draws: int = 0) -> Streams:
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]

    def __init__(self, keys: Tensor, draws: int = 0) -> None:
        self.keys, self.draws = keys.long(), draws
        self.manual_seed(zlib.crc32(repr((self.keys.tolist(), draws)).encode()))

    @classmethod
    def of(cls, generator: torch.Generator | None, images: Tensor) -> Streams:
        """The streams of a batch: `generator` itself if it has them, else new ones whose keys are drawn from it."""
        if isinstance(generator, Streams):
            if len(generator.keys) != len(images):
                raise ValueError(f"{len(generator.keys)} random streams for {len(images)} images; select the rows first.")
            return generator
        place = generator.device if generator is not None else "cpu"
        keys = torch.randint(2**62, (len(images),), generator=generator, device=place)
        return cls(keys.to(images.device))

    @classmethod
    def named(cls, index: Tensor, *parts: float | str) -> Streams:
        """The streams of images number `index` for the purpose named by `parts`: they depend on nothing else."""
        salt = zlib.crc32("/".join(map(str, parts)).encode())
        return cls(_mix(index.long() * _GOLDEN + salt))

    def seed_global(self) -> Streams:
        """These streams, after the global generators were seeded by them: a model that rolls dice itself rolls the same for the same batch."""
        torch.default_generator.manual_seed(self.initial_seed())
        if self.keys.is_cuda:
            torch.cuda.manual_seed(self.initial_seed())
        return self

    def rows(self, chosen: Tensor) -> Streams:
        """The streams of the images `chosen` (numbers or a mask), at the same point."""
        return Streams(self.keys[chosen.to(self.keys.device)], self.draws)

    def fork(self, number: int) -> Streams:
        """Other streams of the same images, one set for each `number`: restarts, targets, samples."""
        return Streams(_mix(self.keys + torch.tensor(number + 1, device=self.keys.device) * _GOLDEN))

    def bits(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Integers in [0, 2^23) of shape (N, *shape); one draw."""
        count = math.prod(shape)
        start = _mix(self.keys.to(device) ^ _mix(torch.tensor(self.draws + 1, device=device) * _GOLDEN))
        self.draws += 1
        values = _mix(start[:, None] + torch.arange(1, count + 1, device=device) * _GOLDEN)
        return ((values >> 41) & 0x7FFFFF).view(-1, *shape)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers that spreads every bit over all (the finaliser of SplitMix64)."""
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)


def uniform(like: Tensor, generator: torch.Generator | None, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform numbers in [low, high) with the shape, type and device of `like` (N, ...)."""
    if isinstance(generator, Streams):
        unit = (generator.bits(like.shape[1:], like.device).to(like.dtype) + 0.5) / 2**23
        return low + (high - low) * unit
    return _blank(like, generator).uniform_(low, high, generator=generator).to(like.device)


def normal(like: Tensor, generator: torch.Generator | None, std: float = 1.0) -> Tensor:
    """Gaussian numbers with the shape, type and device of `like` (N, ...)."""
    if isinstance(generator, Streams):
        unit = (generator.bits(like.shape[1:], like.device).double() + 0.5) / 2**23
        bell: Tensor = torch.special.ndtri(unit)
        return bell.mul_(std).to(like.dtype)
    return _blank(like, generator).normal_(0, std, generator=generator).to(like.device)


def integers(high: int, shape: Sequence[int], generator: Streams, device: torch.device) -> Tensor:
    """Integers in [0, high), high at most 2^23, of shape (N, *shape)."""
    return (generator.bits(shape, device) * high) >> 23


def other_classes(labels: Tensor, classes: int, generator: Streams) -> Tensor:
    """For each label (N,) one of the other classes, drawn uniformly; with a single class the label itself."""
    return (labels + 1 + integers(classes - 1, (), generator, labels.device)) % classes


def _blank(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=generator.device if generator else like.device)
