"""Adversarially robust distillation."""

from __future__ import annotations

from torch import nn

from overproof.attacks.threats import Norm
from overproof.errors import UsageError
from overproof.losses.divergences import cross_entropy, kl_divergence
from overproof.methods.robust_distiller import RobustDistiller
from overproof.methods.robust_objective import AttackMode
from overproof.types import Batch, Output, Progress


class ARD(RobustDistiller):
    """The student on its adversarial images imitates the robust teacher on the clean ones.

    L = c tau^2 mean_n KL(softmax(T(x_n) / tau) || softmax(S(x~_n) / tau)) + (1 - c) mean_n CE(y_n, S(x_n))
    x~ = PGD(CE(S(.), y)) from a uniform start

    Args:
        student: images -> logits (N, K).
        teacher: adversarially trained, images -> logits (N, K), frozen.
        temperature: tau > 0.
        kd_weight: c in [0, 1]; below 1 the student's clean images cost one more forward and backward pass.
        class_mean: divide KL by the number of classes, as the authors' code does.
        watch: log how good the teacher is on the student's adversarial images, for one more forward pass of it.
        norm, eps, step_size, steps, attack_mode: see `RobustObjective`. The authors craft in train mode (batch statistics,
            and running statistics drift with every inner step): attack_mode="train" replays that.

    Raises:
        UsageError: temperature not positive, or c outside [0, 1].

    Reference: Goldblum et al., AAAI 2020, arXiv 1905.09747.

    Differences from the paper: tau = 1 and the mean over samples, as in later work; the authors' code has tau = 30 and the
    mean over samples and classes, an effective weight tau^2 / K = 90 on CIFAR-10 (replay: temperature=30, class_mean=True).
    The attack runs in eval mode by default.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        temperature: float = 1.0,
        kd_weight: float = 1.0,
        class_mean: bool = False,
        watch: bool = True,
        norm: Norm = "Linf",
        eps: float = 8 / 255,
        step_size: float | None = None,
        steps: int = 10,
        attack_mode: AttackMode = "eval",
    ) -> None:
        super().__init__(
            student, teacher, watch=watch, norm=norm, eps=eps, step_size=step_size, steps=steps, attack_mode=attack_mode
        )
        if temperature <= 0 or not 0 <= kd_weight <= 1:
            raise UsageError(f"ard: needs temperature > 0 and kd_weight in [0, 1], not {temperature} and {kd_weight}.")
        self.temperature, self.kd_weight, self.class_mean = temperature, kd_weight, class_mean

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's losses."""
        adversarial = self.against_labels(batch)
        target, attacked = self.ask(batch, batch.images, adversarial if self.watch else None)
        logits = self.student(adversarial)
        gap = kl_divergence(target, logits, temperature=self.temperature).mean()
        if self.class_mean:
            gap = gap / logits.shape[1]
        losses = {"ard": self.kd_weight * self.temperature**2 * gap}
        if self.kd_weight < 1:
            losses["ce"] = (1 - self.kd_weight) * cross_entropy(self.student(batch.images), batch.labels).mean()
        return Output(losses, logits, self.reliability(batch.labels, attacked, target))
