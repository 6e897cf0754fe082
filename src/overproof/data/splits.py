"""Dividing a set into parts: per class, by the seed alone, without changing the order of the images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from overproof.data.images import ImageSet
from overproof.data.order import generator_for
from overproof.data.streams import StreamSet
from overproof.errors import DataError, UsageError

Images = ImageSet | StreamSet
Parts = dict[str, Images]
"""What a source gives: "train", and "validation" and "test" where it has them."""


@dataclass(frozen=True)
class Splits:
    """The parts of a data set.

    Args:
        train: what is trained on.
        validation: what the best weights are chosen on; None if nothing was held out.
        test: what the result is measured on.
        extra: images of a generator that join those of `train` in every batch; see `load_extra`.

    Raises:
        DataError: the parts differ in classes or in the shape of the images.
    """

    train: Images
    validation: Images | None
    test: Images
    extra: Images | None = None

    def __post_init__(self) -> None:
        for name, part in (("validation", self.validation), ("test", self.test)):
            if part is not None and part.shape != self.train.shape:
                raise DataError(
                    f"{self.train.name}: images of the {name} part are {part.shape}, those of the train part "
                    f"{self.train.shape} (channels, height, width). Read all "
                    "alike: image_size=32, channels=3, say (on the command line --set data.image_size=32 --set data.channels=3)."
                )
            if part is not None and part.classes != self.train.classes:
                raise DataError(f"{self.train.name}: the {name} part has other classes than the train part.")

    @property
    def name(self) -> str:
        """What the set is called."""
        return self.train.name

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names."""
        return self.train.classes

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return self.train.channels

    @property
    def image_size(self) -> int:
        """Height and width of the square images."""
        return self.train.image_size


def _shuffled_classes(labels: Tensor, seed: int) -> list[Tensor]:
    """Rows of each class that occurs, each in an order drawn from the seed."""
    generator = generator_for("split", seed)
    found = []
    for label in torch.unique(labels).tolist():
        rows = (labels == label).nonzero().flatten()
        found.append(rows[torch.randperm(len(rows), generator=generator)])
    return found


def stratified_split(labels: Tensor, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows held out: the same share of every class, both ascending.

    A class keeps at least one row to train on, so a class with a single image is never held out.

    Args:
        labels: class numbers (N,).
        fraction: share to hold out, above 0 and below 1; rounded per class.
        seed: of the choice.

    Raises:
        UsageError: the fraction is not between 0 and 1, or so small or large that one part is empty.
    """
    if not 0 < fraction < 1:
        raise UsageError(f"The share to hold out is {fraction}; give a number above 0 and below 1.")
    groups = _shuffled_classes(labels, seed)
    held = [rows[: min(round(fraction * len(rows)), len(rows) - 1)] for rows in groups]
    kept = [rows[len(part) :] for rows, part in zip(groups, held, strict=True)]
    if not any(len(part) for part in held):
        raise UsageError(
            f"Holding out {fraction:g} of {len(labels)} images holds out none of any class; hold out more, or nothing (0)."
        )
    return torch.cat(kept).sort().values, torch.cat(held).sort().values


def stratified_subset(labels: Tensor, count: int, seed: int = 0) -> Tensor:
    """`count` rows, ascending, with the classes in proportion; every class is there if `count` allows it.

    Args:
        labels: class numbers (N,).
        count: rows to choose, at least 1; all rows if there are no more.
        seed: of the choice.

    Raises:
        UsageError: count is below 1.
    """
    if count < 1:
        raise UsageError(f"A subset of {count} images was asked for; give at least 1.")
    groups = _shuffled_classes(labels, seed)
    # the j-th row of a class of n comes at j/n: taking the earliest gives each class its share, and one row at first
    turn = torch.cat([torch.arange(len(rows), dtype=torch.double) / len(rows) for rows in groups])
    return torch.cat(groups)[turn.argsort(stable=True)[:count]].sort().values


def origins(images: Images) -> Tensor:
    """What each image was made from, as a position in the source (N,)."""
    return images.origin if isinstance(images, ImageSet) else images.index


def originals(images: Images) -> Tensor:
    """Rows, ascending, of the first image made from each picture: what a choice is made among, so that no picture is on both sides."""
    kinds, which = torch.unique(origins(images), return_inverse=True)
    rows = torch.arange(len(images), device=which.device)
    return rows.new_full((len(kinds),), len(images)).scatter_reduce(0, which, rows, "amin").sort().values


def with_copies(images: Images, rows: Tensor) -> Images:
    """The images at `rows` and all others made from the same pictures, in the order of the set."""
    made = origins(images)
    return images.subset(torch.isin(made, made[rows]).nonzero().flatten())


def long_tailed(labels: Tensor, ratio: float, seed: int = 0) -> Tensor:
    """Rows of a long-tailed subset, ascending: class c of K keeps floor(n_0 ratio^(-c / (K - 1))) images.

    n_0 is the number of images of the largest class. A class that has fewer than it may keep keeps them all, and each keeps one. A
    larger ratio leaves a subset of what a smaller one leaves.

    Args:
        labels: class numbers (N,).
        ratio: of the first class's images to the last one's, at least 1.
        seed: of the choice.

    Raises:
        UsageError: the ratio is below 1.

    Reference: Cui, Jia, Lin, Song, Belongie, CVPR 2019, arXiv 1901.05555, for CIFAR.
    """
    if not 1 <= ratio < float("inf"):
        raise UsageError(f"The long tail's ratio is {ratio}; give a number of at least 1, such as 100.")
    groups = _shuffled_classes(labels, seed)
    most, last = max(map(len, groups)), max(int(labels.max()), 1)
    kept = []
    for rows in groups:
        share = ratio ** (-int(labels[rows[0]]) / last)
        kept.append(rows[: max(int(most * share + 1e-9), 1)])  # 5000 / 100 is 50, whatever the last digit says
    return torch.cat(kept).sort().values
