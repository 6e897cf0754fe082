"""The objective as Lightning Fabric can wrap it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from overproof.methods.objective import Objective
from overproof.types import Batch, Progress


class Plain(nn.Module):
    """Plain containers instead of frozen records: Fabric rebuilds what passes through it.

    Args:
        objective: what is wrapped; the strategy sees all of it, inner attack included.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: dict[str, Tensor], progress: dict[str, int], phase: str) -> dict[str, Any]:
        """`vars` of the objective's output."""
        output: dict[str, Any] = vars(self.objective(Batch(**batch), Progress(**progress), phase))
        return output
