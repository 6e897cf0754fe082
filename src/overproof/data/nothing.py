"""No images: what stands in for training data where a method makes its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from overproof.data.images import square
from overproof.data.splits import Parts
from overproof.errors import DataError
from overproof.types import Batch


def none() -> Parts:
    """No images at all.

    Raises:
        DataError: always; a method without data does not come here.
    """
    raise DataError(
        "The data set 'none' holds no images: only methods with the tag data-free (dfad, zskt, dafl, dfq, fast-dfkd) train on it. Name a set with "
        "--data, also to evaluate what they have made."
    )


class NoImages:
    """What a method without data is told of the images that it does not get, and how long an epoch is; a loader of blank batches.

    Args:
        shape: channels, height and width of an image.
        classes: class names.
        batch_size: images per process and step.
        steps: batches of an epoch.
        mean, std: per channel, in pixel units, of what the teacher was trained on.
    """

    name = "none"

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: Sequence[str],
        *,
        batch_size: int,
        steps: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.shape, self.classes, self.steps = shape, tuple(classes), steps
        self._mean, self._std = tuple(mean), tuple(std)
        blank = torch.zeros(()).expand(batch_size, *shape)
        self._batch = Batch(blank, torch.zeros(batch_size, dtype=torch.long), torch.arange(batch_size))

    def __len__(self) -> int:
        return self.steps

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return self.shape[0]

    @property
    def image_size(self) -> int:
        """Height and width of the square images."""
        return square(self.shape, self.name)

    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, as the teacher knows them."""
        return self._mean, self._std

    def to(self, device: torch.device | str) -> NoImages:
        """The same on `device`, where it is a single number in memory."""
        moved: NoImages = object.__new__(NoImages)
        moved.__dict__.update(self.__dict__)
        count = len(self._batch)
        blank = torch.zeros((), device=device).expand(count, *self.shape)
        moved._batch = Batch(blank, self._batch.labels.to(device), self._batch.index.to(device))
        return moved

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Blank batches from number `start` on."""
        for _ in range(start, self.steps):
            yield self._batch
