"""The student alone."""

from __future__ import annotations

from torch import nn

from overproof.errors import UsageError
from overproof.losses.divergences import cross_entropy
from overproof.methods.objective import Objective
from overproof.types import Batch, Output, Progress


class CE(Objective):
    """Cross-entropy with the labels.

    L = mean_n CE((1 - s) y_n + s / K, softmax(S(x_n)))

    Args:
        student: images -> logits (N, K).
        label_smoothing: s in [0, 1).

    Raises:
        UsageError: label smoothing outside [0, 1).

    Differences from the paper: none.
    """

    def __init__(self, student: nn.Module, *, label_smoothing: float = 0.0) -> None:
        super().__init__(student)
        if not 0 <= label_smoothing < 1:
            raise UsageError(f"ce: label_smoothing={label_smoothing} must lie in [0, 1).")
        self.label_smoothing = label_smoothing

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's loss."""
        logits = self.student(batch.images)
        loss = cross_entropy(logits, batch.labels)
        if self.label_smoothing:
            uniform = -logits.log_softmax(dim=1).mean(dim=1)
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * uniform
        return Output({"ce": loss.mean()}, logits)
