"""The records that travel between rooms: frozen, and free of behaviour that could surprise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A minibatch.

    Args:
        images: float tensor (N, C, H, W) with values in [0, 1].
        labels: int64 class numbers (N,), or float class weights (N, K) after mixup or cutmix.
        index: int64 positions of the samples in their data set (N,).
    """

    images: Tensor
    labels: Tensor
    index: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        moved = {k: getattr(self, k).to(device, non_blocking=non_blocking) for k in ("images", "labels", "index")}
        return replace(self, **moved)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Progress:
    """Where training stands: optimiser steps done, steps in all, the zero-based epoch, and epochs in all."""

    step: int = 0
    total: int = 1
    epoch: int = 0
    epochs: int = 1

    @property
    def fraction(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        return min(self.step / max(self.total, 1), 1.0)


@dataclass(frozen=True)
class Output:
    """What an objective returns: weighted loss terms (0-d tensors, summed by the loop), the student's logits
    (N, K) on the images named by the method, and unweighted quantities worth logging. The logits are compared with `labels`
    (N,), the batch's own if there are none."""

    losses: dict[str, Tensor]
    logits: Tensor
    logs: dict[str, Tensor] | None = None
    labels: Tensor | None = None
