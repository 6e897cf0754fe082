"""What does it ignore?"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from overproof.attacks.randomness import Streams
from overproof.probes.base import Probe, Result
from overproof.probes.lab import Lab
from overproof.probes.views import Pair, colour_views, crop_views, shift_room, shift_views


@dataclass(frozen=True, kw_only=True)
class Invariance(Probe):
    """How often does a model answer alike to two views of an image?

    agreement(M) = share of images with argmax M(X_1) = argmax M(X_2)

    Views are drawn once for each image and shown to every model.

    Args:
        strengths: of the views, one row each; the first row of the result is `headline`, or else all of them together.
        images: at most so many, at least 1.
        seed, resamples: see `Probe`.

    Reference: Ojha, Li, Sundara Rajan, Liang, Lee, NeurIPS 2023, arXiv 2205.16004.

    Differences from the paper: sizes in proportion to the image; the hue of the colour views of a fixed strength s turns by s / 2, which
    the paper does not tell.
    """

    headline: ClassVar[float | None] = None
    largest: ClassVar[float] = 1.0

    strengths: tuple[float, ...] = ()
    images: int = 5000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.images >= 1, f"images={self.images} must be at least 1")
        self.require(
            all(0 < strength <= self.largest for strength in self.strengths),
            f"strengths={self.strengths} must lie above 0 and up to {self.largest:g}",
        )
        self.require(bool(self.strengths) or self.headline is not None, "strengths is empty; give at least one")

    @abstractmethod
    def views(self, images: Tensor, streams: Streams, strength: float) -> Pair:
        """Two views of each image."""

    def kind(self, images: Tensor, strength: float) -> object:
        """What strengths have in common that make the same views of these images."""
        return strength

    def measure(self, lab: Lab) -> Result:
        """Agreement of every model, overall and at each strength."""
        kinds: dict[object, float] = {}  # of strengths that are one on images of this size the first
        for strength in self.strengths:
            kinds.setdefault(self.kind(lab.images, strength), strength)
        found = {strength: self._agreement(lab, strength) for strength in kinds.values()}
        if self.headline is not None:
            first = self._agreement(lab, self.headline)
        else:
            first = {name: torch.stack([columns[name] for columns in found.values()]).mean(dim=0) for name in lab.watched}
        rows = [self.row(lab, "same answer to both views", first)]
        rows += [self.row(lab, "same answer to both views", columns, condition=f"{at:g}") for at, columns in found.items()]
        notes = []
        if isinstance(self, Colour) and _grey(lab.images):
            notes.append("Grey images have neither saturation nor hue: only brightness and contrast change.")
        merged = [f"{strength:g}" for strength in dict.fromkeys(self.strengths) if strength not in found]
        if merged:
            notes.append(f"On images of this size an earlier strength makes the same views, so left out: {', '.join(merged)}.")
        return self.found(*rows, notes=tuple(notes))

    def _agreement(self, lab: Lab, strength: float) -> Mapping[str, Tensor]:
        rows = lab.some(self.images, self.seed)

        @cache  # for all models, if there is one that has not seen them
        def made() -> Tensor:
            return torch.cat(self.views(lab.images[rows], lab.streams(f"{self.name} {strength:g}", self.seed, rows), strength))

        key, found = ("views", self.name, strength, len(rows), self.seed), dict[str, Tensor]()
        for name in lab.watched:
            first, second = lab.predictions(name, *key, of=made).chunk(2)
            found[name] = (first == second).double()
        return found


@dataclass(frozen=True, kw_only=True)
class Colour(Invariance):
    __doc__ = Invariance.__doc__

    name: ClassVar[str] = "colour"
    question: ClassVar[str] = "Which colours does it ignore?"
    headline: ClassVar[float | None] = 0.0  # strengths drawn for each image

    strengths: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6)

    def views(self, images: Tensor, streams: Streams, strength: float) -> Pair:
        """The image, and its colours changed."""
        return colour_views(images, streams, strength)


@dataclass(frozen=True, kw_only=True)
class Crop(Invariance):
    __doc__ = Invariance.__doc__

    name: ClassVar[str] = "crop"
    question: ClassVar[str] = "Does it know the whole from a part?"

    strengths: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6)

    def views(self, images: Tensor, streams: Streams, strength: float) -> Pair:
        """Two crops of the same share of the area."""
        return crop_views(images, streams, strength)


@dataclass(frozen=True, kw_only=True)
class Shift(Invariance):
    __doc__ = Invariance.__doc__

    name: ClassVar[str] = "shift"
    question: ClassVar[str] = "Which shifts does it ignore?"
    largest: ClassVar[float] = 224.0

    strengths: tuple[float, ...] = (8, 16, 24, 32)

    def views(self, images: Tensor, streams: Streams, strength: float) -> Pair:
        """Two windows some pixels apart."""
        return shift_views(images, streams, strength)

    def kind(self, images: Tensor, strength: float) -> object:
        """Whole pixels."""
        return shift_room(images, strength)


def _grey(images: Tensor) -> bool:
    return bool((images == images[:, :1]).all())
