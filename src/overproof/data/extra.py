"""Images of a generator beside those of the set itself: a fixed share of every batch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from overproof import console
from overproof.data.images import ImageSet
from overproof.data.load import read_parts
from overproof.data.loaders import DeviceLoader, make_loader
from overproof.data.order import generator_for
from overproof.data.splits import Images
from overproof.data.stream_loader import StreamLoader
from overproof.data.streams import StreamSet
from overproof.errors import DataError, UsageError
from overproof.types import Batch


def load_extra(
    source: Any,
    *,
    shape: tuple[int, int, int],
    classes: tuple[str, ...],
    first: int,
    root: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Images:
    """The train part of a further source, checked against the set that it is to be mixed with.

    Args:
        source: a name such as parquet:DIR, or an `ImageSet`, `StreamSet` or Dataset of (image, label).
        shape: channels, height and width of the set's images.
        classes: the set's class names, () if unknown. The source has the same names, or only numbers of them.
        first: what the positions of its images in `Batch.index` begin with, so that they are nobody else's.
        root: folder of named sets.
        options: of the source.

    Raises:
        UsageError: no such source or option, or something else than images that can be chosen by number.
        DataError: images of another shape, or of other classes.
    """
    images = read_parts(source, root, dict(options or {}))["train"] if isinstance(source, str) else _as_set(source, classes)
    if images.shape != shape:
        channels, height, _ = shape
        raise DataError(
            f"The extra data {images.name} hold images of shape {images.shape}, the training set of {shape} (channels, height, "
            f"width). Read them with data.extra_options={{image_size={height}, channels={channels}}}, or generate them anew."
        )
    if classes and not classes_agree(images.classes, classes):
        raise DataError(
            f"The extra data {images.name} have {few(images.classes)}, the training set {few(classes)}. They must be the same, in the "
            "same order."
        )
    moved = copy.copy(images)
    moved.index = images.index + first
    return moved


def _as_set(source: Any, classes: tuple[str, ...]) -> Images:
    if isinstance(source, ImageSet | StreamSet):
        return source
    if not isinstance(source, Dataset):
        raise UsageError(
            f"Extra data cannot be {type(source).__name__}: give a name such as parquet:DIR, an ImageSet, a pair of tensors or a Dataset "
            "of (image, label)."
        )
    return StreamSet(source, classes=classes or None, name="extra data")


def classes_agree(extra: tuple[str, ...], classes: tuple[str, ...]) -> bool:
    """A generator's folder often numbers its classes only, and need not have made images of the last ones."""
    if _numbered(extra):
        return len(extra) <= len(classes)
    return extra == classes or (_numbered(classes) and len(extra) == len(classes))


def check_numbers_of_classes(ours: Sequence[str], theirs: Sequence[str], who: str, what: str) -> None:
    """Classes are known by their numbers: refuse those that go by a name of ours with another number, and tell of other names.

    Args:
        ours, theirs: names by number; nothing is compared where one of them only numbers its classes.
        who: has `ours`, in words.
        what: has `theirs`.

    Raises:
        DataError: some class has another number.
    """
    ours, theirs = tuple(map(str, ours)), tuple(map(str, theirs))
    if ours == theirs or not ours or not theirs or _numbered(ours) or _numbered(theirs):
        return
    known = {name: number for number, name in enumerate(ours)}
    moved = [name for number, name in enumerate(theirs) if known.get(name, number) != number]
    if moved:
        raise DataError(
            f"{who} has {few(ours)}, {what} {few(theirs)}: the class {moved[0]!r} has number {known[moved[0]]} there and "
            f"{theirs.index(moved[0])} here, so that answers and labels would not mean the same. Give the classes the same order (of a folder: "
            "all class folders, in it and with the same names)."
        )
    if strange := [name for name in theirs if name not in known]:
        console.note(
            f"note: {what} names classes ({', '.join(strange[:4])}) that {who} does not know; they are compared by number."
        )


def _numbered(names: tuple[str, ...]) -> bool:
    return names == tuple(map(str, range(len(names))))


def few(names: tuple[str, ...]) -> str:
    """How many classes, and the first of them."""
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{len(names)} classes ({shown})"


class MixedLoader:
    """Batches with a fixed number of images of each of two loaders: first the set's own, then the extra ones.

    An epoch is one pass over the own images. Through the extra ones it goes on where the epoch before stopped: all of them (but for a
    rest that fills no batch) are seen before any is seen again, in another order in each pass. `batches(e, k)` gives what
    `batches(e)` gives after k batches.

    Args:
        own, extra: `DeviceLoader`s or `StreamLoader`s that leave out incomplete batches.
    """

    def __init__(self, own: DeviceLoader | StreamLoader, extra: DeviceLoader | StreamLoader) -> None:
        self.own, self.extra = own, extra

    def __len__(self) -> int:
        return len(self.own)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch`, beginning with batch number `start`."""
        with closing(self._extra(epoch * len(self) + start)) as more:
            for batch in self.own.batches(epoch, start):
                yield _joined(batch, next(more))

    def _extra(self, number: int) -> Generator[Batch, None, None]:
        """The extra halves of all batches from `number` on, counted over the whole training."""
        first, start = divmod(number, len(self.extra))
        for turn in itertools.count(first):
            yield from self.extra.batches(turn, start if turn == first else 0)


def _joined(own: Batch, extra: Batch) -> Batch:
    return Batch(*(torch.cat([getattr(part, name) for part in (own, extra)]) for name in ("images", "labels", "index")))


def make_mixed(
    data: Any, extra: Images, batch_size: int, *, share: float, seed: int = 0, world_size: int = 1, **how: Any
) -> MixedLoader:
    """The loader of `batch_size` images a batch, of which round(share * batch_size) are extra ones.

    Args:
        data: training images, as in `make_loader`, but for iterables, which bring their own batches.
        extra: see `load_extra`.
        batch_size: images per process and step.
        share: of the extra images, between 0 and 1.
        seed: of both orders and both augmentations.
        world_size: number of processes.
        how: see `make_loader`.

    Raises:
        UsageError: batches that would lack one of the two kinds, or sets that do not fill one batch.
    """
    count = round(share * batch_size)
    if not 0 < count < batch_size:
        raise UsageError(
            f"data.extra_share={share:g} of a batch of {batch_size} is {count} images, so that one kind is missing: raise train.batch_size or "
            "give another share."
        )
    if len(extra) < count * world_size:
        raise UsageError(
            f"The extra data {extra.name} hold {len(extra)} images, but each step takes {count * world_size} of them "
            f"(data.extra_share={share:g} of {world_size} batch(es) of {batch_size}). Generate more, or lower the share or train.batch_size."
        )
    shared: dict[str, Any] = {**how, "shuffle": True, "drop_last": True, "world_size": world_size}
    own = make_loader(data, batch_size - count, seed=seed, **shared)
    if not isinstance(own, DeviceLoader | StreamLoader):
        raise UsageError(
            f"Extra data cannot be mixed into batches that {type(data).__name__} makes itself: give the images as an ImageSet, a pair of "
            "tensors or a Dataset."
        )
    other = generator_for("extra", seed).initial_seed()  # crops and flips must not be those of the own images
    return MixedLoader(own, make_loader(extra, count, seed=other, **shared))
