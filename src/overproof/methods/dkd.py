"""Decoupled knowledge distillation."""

from __future__ import annotations

from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.losses.decoupled import rest_divergence, standardised, target_divergence
from overproof.methods.feature_objective import FeatureObjective, View, hard_labels
from overproof.types import Batch, Progress


class DKD(FeatureObjective):
    """Distillation in two parts that no longer hamper each other: the target class, and the classes beside it.

    L = ce_weight mean_n CE(y_n, S(x_n)) + min(epoch / warmup, 1) tau^2 mean_n (alpha TCKD_n + beta NCKD_n)

    With beta = 1 - p^t_y, sample by sample, and alpha = 1 this is knowledge distillation.

    Args:
        student: images -> logits (N, K).
        teacher: images -> logits (N, K), frozen.
        alpha: weight of the target-class part, at least 0.
        beta: weight of the other classes, at least 0; the paper has 8 for most pairs, 6 for VGG-13 to VGG-8 and WRN-40-2 to
            WRN-16-2, 2 for ResNet-56 to ResNet-20.
        temperature: tau > 0.
        warmup: epochs over which the term grows, counted from 1 (the first epoch has 1 / warmup); 0: none.
        standardise: turn the logits of both sides into z-scores first (see `logit-standard`).
        ce_weight: weight of the labels, at least 0.

    Raises:
        UsageError: a negative weight or warm-up, or temperature not positive.

    Reference: Zhao, Cui, Song, Qiu, Liang, CVPR 2022, arXiv 2203.08679.

    Differences from the paper: none. The authors' code takes the logarithm of a sum of probabilities, which can be log 0; the
    log-odds used here cannot.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        warmup: int = 20,
        standardise: bool = False,
        ce_weight: float = 1.0,
    ) -> None:
        super().__init__(student, teacher, ce_weight=ce_weight)
        if min(alpha, beta, warmup) < 0 or temperature <= 0:
            raise UsageError(
                f"dkd: needs alpha, beta, warmup >= 0 and temperature > 0, not {alpha}, {beta}, {warmup}, {temperature}."
            )
        self.alpha, self.beta, self.temperature = alpha, beta, temperature
        self.warmup, self.standardise = warmup, standardise

    def compare(self, view: View, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The two parts."""
        target, logits, labels = view.teacher_logits.detach(), view.logits, hard_labels(batch.labels)
        if self.standardise:
            target, logits = standardised(target), standardised(logits)
        scale = self.temperature**2 * (min((progress.epoch + 1) / self.warmup, 1.0) if self.warmup else 1.0)
        own = target_divergence(target, logits, labels, temperature=self.temperature).mean()
        rest = rest_divergence(target, logits, labels, temperature=self.temperature).mean()
        return {"dkd-target": scale * self.alpha * own, "dkd-rest": scale * self.beta * rest}
