"""Knowledge distillation."""

from __future__ import annotations

from torch import nn

from overproof.errors import UsageError
from overproof.losses.divergences import cross_entropy, kl_divergence
from overproof.methods.objective import Objective
from overproof.types import Batch, Output, Progress


class KD(Objective):
    """The student imitates the teacher's class probabilities, softened on both sides.

    L = ce_weight mean_n CE(y_n, S(x_n)) + kd_weight tau^2 mean_n KL(softmax(T(x_n) / tau) || softmax(S(x_n) / tau))

    Args:
        student: images -> logits (N, K).
        teacher: images -> logits (N, K), frozen.
        temperature: tau > 0; tau^2 keeps the size of the gradients as tau grows.
        ce_weight: weight of the labels, at least 0.
        kd_weight: weight of the teacher, at least 0.

    Raises:
        UsageError: temperature not positive, or a negative weight.

    Reference: Hinton, Vinyals, Dean, 2015, arXiv 1503.02531.

    Differences from the paper: weights 0.1 and 0.9 and temperature 4 are those of the common CIFAR-100 benchmark; the
    paper names no single choice.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        temperature: float = 4.0,
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
    ) -> None:
        super().__init__(student, teacher)
        if temperature <= 0:
            raise UsageError(f"kd: temperature={temperature} must be positive.")
        if ce_weight < 0 or kd_weight < 0:
            raise UsageError(f"kd: weights must be at least 0 (ce_weight={ce_weight}, kd_weight={kd_weight}).")
        self.temperature, self.ce_weight, self.kd_weight = temperature, ce_weight, kd_weight

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's losses."""
        target = self.teacher_logits(batch)
        logits = self.student(batch.images)
        imitation = self.temperature**2 * kl_divergence(target, logits, temperature=self.temperature).mean()
        labels = cross_entropy(logits, batch.labels).mean()
        return Output({"ce": self.ce_weight * labels, "kd": self.kd_weight * imitation}, logits)
