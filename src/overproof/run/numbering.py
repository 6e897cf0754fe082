"""The numbers by which methods remember images."""

from __future__ import annotations

from typing import Any

import torch

from overproof.data import ImageSet, make_loader
from overproof.data.iterables import IterableLoader
from overproof.errors import UsageError
from overproof.methods.objective import Objective


def check_numbers(objective: Objective, data: Any) -> None:
    """Refuse training data whose images change their numbers, for a method that remembers them by number.

    Raises:
        UsageError: a loader that shuffles, or whose order nobody knows.
    """
    if not any(getattr(part, "by_index", False) for part in objective.modules()):
        return
    loader = make_loader(data, 2)
    if isinstance(loader, IterableLoader) and not loader.keeps_numbers:
        raise UsageError(
            f"The method ({type(objective).__name__}) remembers each image by its number, and a loader that shuffles numbers them anew "
            "in each epoch. Hand over the Dataset itself, which is shuffled all the same, or yield overproof.Batch(images, labels, index)."
        )


def rows_of(data: Any) -> int | None:
    """How many rows a table by `Batch.index` needs; None where it cannot be known. (`len` of a loader counts batches.)"""
    from torch.utils.data import Dataset

    if isinstance(data, ImageSet):
        return int(data.index.max()) + 1  # a part of a set keeps the numbers of the whole
    index = getattr(data, "index", None)
    if isinstance(index, torch.Tensor) and len(index):
        return int(index.max()) + 1
    return len(data) if isinstance(data, Dataset) and hasattr(data, "__len__") else None
