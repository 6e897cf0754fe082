"""Reliable adversarial distillation with unreliable teachers: IAD-I and IAD-II."""

from __future__ import annotations

from torch import nn

from overproof.attacks.threats import Norm
from overproof.losses.divergences import cross_entropy, kl_divergence
from overproof.losses.reliability import introspection
from overproof.methods.introspective import Introspective
from overproof.methods.robust_distiller import TwoTeachers, check_shares
from overproof.methods.robust_objective import AttackMode
from overproof.types import Batch, Output, Progress


class IAD1(Introspective):
    """ARD whose student takes from itself what it does not take from a teacher that is wrong on the adversarial image.

    L = c tau^2 mean_n KL(softmax(T(x_n) / tau) || softmax(S(x~_n) / tau))
        + c mean_n (1 - alpha_n) KL(softmax(S(x_n)) || softmax(S(x~_n))) + (1 - c) mean_n CE(y_n, S(x_n))
    alpha_n = softmax(T(x~_n))_{y_n}^beta, without gradient;  x~ = PGD(CE(S(.), y)) from a uniform start

    Args:
        student, teacher, all options: see `Introspective`; weight_teacher multiplies the first term by alpha_n.

    Raises:
        UsageError: an option out of range.

    Reference: Zhu et al., ICLR 2022, arXiv 2106.04928.

    Differences from the paper: written after the authors' code. Its rate drops to a tenth at half of the training and, by a
    slip, never again (replay: train.schedule="multi-step", train.milestones=[0.5]). It crafts in train mode (attack_mode="train").
    It weights only the second term, where the text speaks of both (weight_teacher=True). hard_cases is ours.
    """

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's losses."""
        adversarial = self.against_labels(batch)
        wanted = self.watch or self.doubting(progress)
        target, attacked = self.ask(batch, batch.images, adversarial if wanted else None)
        alpha = self.trusted(progress, batch.labels, attacked, target)
        losses, logits = self.imitate(batch, adversarial, target, alpha)
        return Output(losses, logits, self.reliability(batch.labels, attacked, target, alpha))


class IAD2(Introspective):
    """AKD2 whose student takes from itself what it does not take from a robust teacher that is wrong.

    L = (1 - a - b) mean_n CE(y_n, S(x~_n))
        + a tau^2 mean_n [alpha_n KL(softmax(T(x~_n) / tau) || softmax(S(x~_n) / tau))
                          + (1 - alpha_n) KL(softmax(S(x_n)) || softmax(S(x~_n)))]
        + b tau^2 mean_n KL(softmax(T'(x~_n) / tau) || softmax(S(x~_n) / tau))
    alpha_n = softmax(T(x~_n))_{y_n}^beta, without gradient;  x~ = PGD(CE(S(.), y)) from a uniform start

    Args:
        student: images -> logits (N, K).
        teacher: T, adversarially trained, images -> logits (N, K), frozen.
        standard_teacher: T', trained without attacks, images -> logits (N, K), frozen.
        teacher_weight: a, at least 0.
        standard_weight: b, at least 0, with a + b at most 1.
        beta, begin, temperature, detach_self, weight_teacher, hard_cases: see `Introspective`.
        watch: see `RobustDistiller`.
        norm, eps, step_size, steps, attack_mode: see `RobustObjective`.

    Raises:
        UsageError: an option out of range.

    Reference: Zhu et al., ICLR 2022, arXiv 2106.04928.

    Differences from the paper: as for IAD-I.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        standard_teacher: nn.Module,
        *,
        teacher_weight: float = 0.5,
        standard_weight: float = 0.25,
        beta: float = 0.1,
        begin: int = 40,
        temperature: float = 1.0,
        detach_self: bool = False,
        weight_teacher: bool = True,
        hard_cases: bool = False,
        watch: bool = True,
        norm: Norm = "Linf",
        eps: float = 8 / 255,
        step_size: float | None = None,
        steps: int = 10,
        attack_mode: AttackMode = "eval",
    ) -> None:
        super().__init__(
            student, TwoTeachers(teacher, standard_teacher), beta=beta, begin=begin, temperature=temperature,
            detach_self=detach_self, weight_teacher=weight_teacher, hard_cases=hard_cases, watch=watch, norm=norm, eps=eps,
            step_size=step_size, steps=steps, attack_mode=attack_mode,
        )  # fmt: skip
        check_shares(self, teacher_weight, standard_weight)
        self.teacher_weight, self.standard_weight = teacher_weight, standard_weight

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's losses."""
        adversarial, tau = self.against_labels(batch), self.temperature
        wanted = self.watch or (self.hard_cases and self.doubting(progress))
        attacked, clean = self.ask(batch, adversarial, batch.images if wanted else None)
        standard, logits = self.ask_standard(adversarial), self.student(adversarial)
        alpha = self.trusted(progress, batch.labels, attacked, clean)
        gap = self.guidance(kl_divergence(attacked, logits, temperature=tau), alpha)
        rest = 1 - self.teacher_weight - self.standard_weight
        losses = {
            "teacher": self.teacher_weight * tau**2 * gap.mean(),
            "standard": self.standard_weight * tau**2 * kl_divergence(standard, logits, temperature=tau).mean(),
            "adversarial": rest * cross_entropy(logits, batch.labels).mean(),
        }
        if alpha is not None:
            own = introspection(self.student(batch.images), logits, alpha, detach=self.detach_self)
            losses["introspection"] = self.teacher_weight * tau**2 * own.mean()
        return Output(losses, logits, self.reliability(batch.labels, attacked, clean, alpha))
