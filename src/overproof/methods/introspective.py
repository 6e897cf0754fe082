"""Students that trust their teacher as far as it is right, and themselves for the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from overproof.attacks.threats import Norm
from overproof.errors import UsageError
from overproof.losses.divergences import cross_entropy, kl_divergence
from overproof.losses.reliability import introspection, trust
from overproof.methods.robust_distiller import ALPHA, PROBABILITY, RobustDistiller
from overproof.methods.robust_objective import AttackMode
from overproof.types import Batch, Progress


class Introspective(RobustDistiller):
    """A robust student that weighs its teacher sample by sample, alpha_n = p_n^beta with p_n = softmax(T(x~_n))_{y_n}.

    Args:
        student: images -> logits (N, K).
        teacher: adversarially trained, images -> logits (N, K), frozen.
        beta: at least 0; 0 trusts the teacher wholly.
        begin: zero-based epoch from which on the teacher is doubted; before it alpha is 1.
        kd_weight: c in [0, 1].
        temperature: tau > 0 of the teacher's term; alpha and the student's own term know none.
        detach_self: no gradient through the student's clean prediction in its own term. (With c = 1 its clean images then
            teach nothing.)
        weight_teacher: multiply the teacher's term by alpha.
        hard_cases: alpha = 0 where the teacher is wrong on the untouched image.
        watch: see `RobustDistiller`.
        norm, eps, step_size, steps, attack_mode: see `RobustObjective`.

    Raises:
        UsageError: an option out of range.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        beta: float = 0.1,
        begin: int = 60,
        kd_weight: float = 1.0,
        temperature: float = 1.0,
        detach_self: bool = False,
        weight_teacher: bool = False,
        hard_cases: bool = False,
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
        name = type(self).__name__
        if not 0 <= beta < math.inf or begin < 0:
            raise UsageError(
                f"{name}: beta={beta} and begin={begin} must be numbers of at least 0 (beta=0 trusts the teacher wholly)."
            )
        if temperature <= 0 or not 0 <= kd_weight <= 1:
            raise UsageError(f"{name}: needs temperature > 0 and kd_weight in [0, 1], not {temperature} and {kd_weight}.")
        self.beta, self.begin, self.kd_weight, self.temperature = beta, begin, kd_weight, temperature
        self.detach_self, self.weight_teacher, self.hard_cases = detach_self, weight_teacher, hard_cases
        self._epochs = 0

    def doubting(self, progress: Progress) -> bool:
        """Whether alpha may differ from 1."""
        return progress.epoch >= self.begin and (self.beta > 0 or self.hard_cases)

    def trusted(self, progress: Progress, labels: Tensor, attacked: Tensor | None, clean: Tensor | None) -> Tensor | None:
        """alpha (N,) from the teacher's logits; None while it is not doubted."""
        self._epochs = progress.epochs
        if attacked is None or not self.doubting(progress):
            return None
        return trust(attacked, labels, beta=self.beta, clean=clean if self.hard_cases else None)

    def concerns(self, means: Mapping[str, float]) -> dict[str, str]:
        """That the teacher is never doubted, because the training ends before that."""
        found = super().concerns(means)
        if (self.beta > 0 or self.hard_cases) and 0 < self._epochs <= self.begin:
            found["begin"] = (
                f"The teacher is doubted from epoch {self.begin} on, but there are {self._epochs}: it is trusted throughout. "
                f"Set method.begin, to {self._epochs * 3 // 10} say."
            )
        return found

    def guidance(self, gap: Tensor, alpha: Tensor | None) -> Tensor:
        """The teacher's term (N,): the divergence `gap`, weighted if that is wanted."""
        return alpha * gap if self.weight_teacher and alpha is not None else gap

    def imitate(
        self, batch: Batch, adversarial: Tensor, target: Tensor, alpha: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of ARD with introspection, and the student's logits on the adversarial images.

        c tau^2 KL(target || S(x~)),  c (1 - alpha) KL(S(x) || S(x~)),  (1 - c) CE(y, S(x))
        """
        c, tau = self.kd_weight, self.temperature
        logits = self.student(adversarial)
        gap = kl_divergence(target, logits, temperature=tau)
        losses = {"teacher": c * tau**2 * self.guidance(gap, alpha).mean()}
        if alpha is None and c == 1:
            return losses, logits
        own = self.student(batch.images)
        if alpha is not None:
            losses["introspection"] = c * introspection(own, logits, alpha, detach=self.detach_self).mean()
        if c < 1:
            losses["ce"] = (1 - c) * cross_entropy(own, batch.labels).mean()
        return losses, logits

    def reliability(
        self, labels: Tensor, attacked: Tensor | None, clean: Tensor | None, alpha: Tensor | None = None
    ) -> dict[str, Tensor] | None:
        """How good the teacher is, and how far it was trusted: the mean of alpha, 1 while it is not doubted."""
        logs = super().reliability(labels, attacked, clean)
        if logs is not None:
            logs[ALPHA] = alpha.mean() if alpha is not None else logs[PROBABILITY].new_ones(())
        return logs
