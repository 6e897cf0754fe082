"""Adversarial training softened by two teachers."""

from __future__ import annotations

from torch import nn

from overproof.attacks.threats import Norm
from overproof.errors import UsageError
from overproof.losses.divergences import cross_entropy, kl_divergence
from overproof.methods.robust_distiller import RobustDistiller, TwoTeachers, check_shares
from overproof.methods.robust_objective import AttackMode
from overproof.types import Batch, Output, Progress


class AKD2(RobustDistiller):
    """Labels, a robust teacher and a standard teacher, all on the student's adversarial images.

    L = (1 - a - b) mean_n CE(y_n, S(x~_n)) + a tau^2 mean_n KL(softmax(T(x~_n) / tau) || softmax(S(x~_n) / tau))
        + b tau^2 mean_n KL(softmax(T'(x~_n) / tau) || softmax(S(x~_n) / tau))
    x~ = PGD(CE(S(.), y)) from a uniform start

    Args:
        student: images -> logits (N, K).
        teacher: T, adversarially trained, images -> logits (N, K), frozen.
        standard_teacher: T', trained without attacks, images -> logits (N, K), frozen.
        teacher_weight: a, at least 0.
        standard_weight: b, at least 0, with a + b at most 1.
        temperature: tau > 0.
        watch: log in which of the three cases the robust teacher is, for one more forward pass of it, on the untouched images.
        norm, eps, step_size, steps, attack_mode: see `RobustObjective`.

    Raises:
        UsageError: weights or temperature out of range.

    Reference: Chen, Zhang, Liu, Chang, Wang: Robust Overfitting May Be Mitigated by Properly Learned Smoothening, ICLR 2021.

    Differences from the paper: KL instead of the cross-entropy of soft labels, which has the same gradient. Their averaging of
    weights is train.averaging="swa". Zhu et al. (ICLR 2022), who named it AKD2, take teacher_weight=0.5, standard_weight=0.25
    and temperature=1.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        standard_teacher: nn.Module,
        *,
        teacher_weight: float = 0.6,
        standard_weight: float = 0.1,
        temperature: float = 2.0,
        watch: bool = True,
        norm: Norm = "Linf",
        eps: float = 8 / 255,
        step_size: float | None = None,
        steps: int = 10,
        attack_mode: AttackMode = "eval",
    ) -> None:
        teachers = TwoTeachers(teacher, standard_teacher)
        super().__init__(
            student, teachers, watch=watch, norm=norm, eps=eps, step_size=step_size, steps=steps, attack_mode=attack_mode
        )
        check_shares(self, teacher_weight, standard_weight)
        if temperature <= 0:
            raise UsageError(f"akd2: temperature={temperature} must be positive.")
        self.teacher_weight, self.standard_weight, self.temperature = teacher_weight, standard_weight, temperature

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's losses."""
        adversarial, tau = self.against_labels(batch), self.temperature
        attacked, clean = self.ask(batch, adversarial, batch.images if self.watch else None)
        standard, logits = self.ask_standard(adversarial), self.student(adversarial)
        rest = 1 - self.teacher_weight - self.standard_weight
        losses = {
            "teacher": self.teacher_weight * tau**2 * kl_divergence(attacked, logits, temperature=tau).mean(),
            "standard": self.standard_weight * tau**2 * kl_divergence(standard, logits, temperature=tau).mean(),
            "adversarial": rest * cross_entropy(logits, batch.labels).mean(),
        }
        return Output(losses, logits, self.reliability(batch.labels, attacked, clean))
