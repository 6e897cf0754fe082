"""Soft labels that no teacher made: a control for what distillation is said to do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.losses.divergences import cross_entropy
from overproof.methods.objective import Objective
from overproof.types import Batch, Output, Progress


class NoisyLabels(Objective):
    """Cross-entropy with labels softened by noise.

    L = mean_n CE(softmax((y_n + e_n) / tau), softmax(S(x_n))),  e_n ~ N(0, variance), drawn anew in every step

    Args:
        student: images -> logits (N, K).
        variance: of the noise added to the one-hot label, at least 0.
        temperature: tau > 0.

    Raises:
        UsageError: a negative variance, or a temperature that is not positive.

    Reference: Ojha, Li, Sundara Rajan, Liang, Lee, NeurIPS 2023, arXiv 2205.16004 (control).

    Differences from the paper: it does not tell whether the noise is drawn once or in every step.
    """

    def __init__(self, student: nn.Module, *, variance: float = 0.2, temperature: float = 0.15) -> None:
        super().__init__(student)
        if variance < 0 or temperature <= 0:
            raise UsageError(
                f"noisy-labels: variance={variance} must be at least 0 and temperature={temperature} must be positive."
            )
        self.variance, self.temperature = variance, temperature

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's loss."""
        logits = self.student(batch.images)
        target = self.soften(batch.labels, logits.shape[1])
        return Output({"noisy-labels": cross_entropy(logits, target.to(logits.dtype)).mean()}, logits)

    def soften(self, labels: Tensor, classes: int) -> Tensor:
        """Class numbers (N,) or weights (N, K) -> probabilities (N, K)."""
        weights = labels if labels.dim() == 2 else F.one_hot(labels, classes).float()
        noisy = weights + self.variance**0.5 * torch.randn_like(weights)
        probabilities: Tensor = (noisy / self.temperature).softmax(dim=1)
        return probabilities
