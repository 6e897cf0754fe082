"""The objective as Lightning Fabric can wrap it."""

from __future__ import annotations

from typing import Any

from torch import nn

from overproof.methods.objective import Objective
from overproof.types import Batch, Progress


class Parcel:
    """A batch and the progress, in a wrapping that Fabric passes on unopened.

    It rebuilds the collections it knows, which frozen records refuse, and rounds the images in them to the half precision of the
    networks: by half a grey level in bfloat16, which an attack of eight must not suffer.
    """

    def __init__(self, batch: Batch, progress: Progress) -> None:
        self.batch, self.progress = batch, progress


class Plain(nn.Module):
    """Parcel in, plain containers out.

    Args:
        objective: what is wrapped; the strategy sees all of it, inner attack included.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, parcel: Parcel, phase: str) -> dict[str, Any]:
        """`vars` of the objective's output."""
        output: dict[str, Any] = vars(self.objective(parcel.batch, parcel.progress, phase))
        return output
