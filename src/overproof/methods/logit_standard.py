"""Logit standardisation."""

from __future__ import annotations

from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.losses.decoupled import standardised
from overproof.losses.divergences import kl_divergence
from overproof.methods.feature_objective import FeatureObjective, View
from overproof.types import Batch, Progress


class LogitStandard(FeatureObjective):
    """Knowledge distillation of z-scores: the student learns how logits relate, not how large they are.

    L = ce_weight mean_n CE(y_n, S(x_n)) + kd_weight tau^2 mean_n KL(softmax(Z(T(x_n)) / tau) || softmax(Z(S(x_n)) / tau))
    Z(z) = (z - mean z) / std z over the classes

    Args:
        student: images -> logits (N, K).
        teacher: images -> logits (N, K), frozen.
        temperature: tau > 0, the authors' base temperature.
        ce_weight: weight of the labels, at least 0.
        kd_weight: weight of the teacher, at least 0.

    Raises:
        UsageError: temperature not positive, or a negative weight.

    Reference: Sun, Ren, Li, Wang, Cao, CVPR 2024, arXiv 2403.01427.

    Differences from the paper: none; defaults are those of the authors' CIFAR-100 command for plain distillation (base
    temperature 2, weights 0.1 and 9). DKD takes `standardise = true`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        temperature: float = 2.0,
        ce_weight: float = 0.1,
        kd_weight: float = 9.0,
    ) -> None:
        super().__init__(student, teacher, ce_weight=ce_weight)
        if temperature <= 0 or kd_weight < 0:
            raise UsageError(f"logit-standard: needs temperature > 0 and kd_weight >= 0, not {temperature} and {kd_weight}.")
        self.temperature, self.kd_weight = temperature, kd_weight

    def compare(self, view: View, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The divergence of the standardised logits."""
        target, logits = standardised(view.teacher_logits), standardised(view.logits)
        gap = kl_divergence(target, logits, temperature=self.temperature).mean()
        return {"logit-standard": self.kd_weight * self.temperature**2 * gap}
