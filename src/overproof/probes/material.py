"""What probes look at: held-out images, the same classes in other surroundings, images whose cues are at odds, groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from overproof.data import make_loader
from overproof.data.extra import classes_agree, few
from overproof.errors import DataError
from overproof.evaluation.evaluator import images_of


@dataclass(frozen=True)
class Cues:
    """Images whose shape says one class and whose texture says another.

    Args:
        images: (N, C, H, W) in [0, 1].
        shape, texture: class numbers (N,).
        merged: for each class of the models the class number of the cues (K,), -1 for none; None if the classes are the same.
    """

    images: Tensor
    shape: Tensor
    texture: Tensor
    merged: Tensor | None = None

    def __post_init__(self) -> None:
        counts = (len(self.images), len(self.shape), len(self.texture))
        if len(set(counts)) > 1:
            raise DataError(
                f"Cue-conflict images: {counts[0]} images, {counts[1]} shapes and {counts[2]} textures; give one each."
            )


@dataclass(frozen=True)
class Groups:
    """To which group each image belongs.

    Args:
        numbers: (N,), from 0 on.
        names: of the groups.
        deprived: name of the group that the teacher never saw; None: not said.
    """

    numbers: Tensor
    names: tuple[str, ...]
    deprived: str | None = None

    def __post_init__(self) -> None:
        least, most = (int(end) for end in self.numbers.aminmax()) if len(self.numbers) else (0, 0)
        if least < 0 or most >= len(self.names):
            raise DataError(
                f"The group numbers reach from {least} to {most}, but there are {len(self.names)} names (0 to {len(self.names) - 1})."
            )
        if self.deprived is not None and self.deprived not in self.names:
            raise DataError(f"There is no group called {self.deprived!r}; the groups are {', '.join(self.names)}.")


@dataclass(frozen=True)
class Material:
    """Held-out images, and whatever else probes may ask for.

    Args:
        images: (N, C, H, W) in [0, 1].
        labels: class numbers (N,).
        index: numbers of the images in their set (N,), from which all that is drawn for them follows; None: 0 to N - 1.
        classes: their names, () if unknown.
        domains: images and labels of the same classes that the students never saw, by name.
        cues: for the shape bias.
        groups: for the group bias.

    Raises:
        DataError: an empty set, or parts that do not fit together.
    """

    images: Tensor
    labels: Tensor
    index: Tensor | None = None
    classes: tuple[str, ...] = ()
    domains: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    cues: Cues | None = None
    groups: Groups | None = None

    def __post_init__(self) -> None:
        for name in ("images", "labels"):  # models may lie elsewhere; batches are taken there
            object.__setattr__(self, name, getattr(self, name).cpu())
        if not len(self.images):
            raise DataError("There is nothing to probe: the data hold no image.")
        if len(self.images) != len(self.labels):
            raise DataError(f"{len(self.images)} images, but {len(self.labels)} labels. Give one label per image.")
        if self.index is None:
            object.__setattr__(self, "index", torch.arange(len(self.images)))
        if self.groups is not None and len(self.groups.numbers) != len(self.images):
            raise DataError(
                f"The groups are given for {len(self.groups.numbers)} images, but {len(self.images)} are probed. Give one for each image, in "
                "their order, or number them in a column `index`."
            )
        for name, (images, labels) in self.domains.items():
            if images.shape[1:] != self.images.shape[1:] or len(images) != len(labels) or not len(images):
                raise DataError(
                    f"The domain {name!r} has {len(images)} images of shape {tuple(images.shape[1:])} and {len(labels)} labels; expected images "
                    f"of shape {tuple(self.images.shape[1:])} and one label each."
                )

    @classmethod
    def of(cls, data: Any, **more: Any) -> Material:
        """From whatever `overproof.evaluate` takes; `more` are the other fields, domains as data too."""
        if isinstance(data, Material):
            return data
        data = images_of(data)
        images, labels, index = _gathered(data)
        others = {name: images_of(domain) for name, domain in more.pop("domains", {}).items()}
        names = _names(data)
        for name, other in others.items():
            theirs = _names(other)
            if not (classes_agree(theirs, names) or classes_agree(names, theirs)):
                raise DataError(
                    f"The domain {name!r} has {few(theirs)}, the images have {few(names)}. They must be the same, in the same order."
                )
        domains = {
            name: (_in_channels(pixels, images), y)
            for name, (pixels, y, _) in zip(others, map(_gathered, others.values()), strict=True)
        }
        return cls(images, labels, index, classes=names, domains=domains, **more)


def _names(data: Any) -> tuple[str, ...]:
    return tuple(getattr(data, "classes", ()))


def _gathered(data: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and numbers of all there is."""
    batches = [(batch.images, batch.labels, batch.index) for batch in make_loader(images_of(data), 512).batches(0)]
    if not batches:
        raise DataError("There is nothing to probe: the data hold no image.")
    images, labels, index = (torch.cat(part).cpu() for part in zip(*batches, strict=True))
    return images, labels, index


def _in_channels(pixels: Tensor, like: Tensor) -> Tensor:
    """Grey images in as many channels as those `like` which they are to be."""
    return pixels.expand(-1, like.shape[1], -1, -1).contiguous() if pixels.shape[1] == 1 else pixels
