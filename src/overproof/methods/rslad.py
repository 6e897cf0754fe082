"""Robust soft label adversarial distillation."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from overproof.attacks.threats import Norm
from overproof.errors import UsageError
from overproof.losses.divergences import kl_divergence
from overproof.methods.robust_distiller import RobustDistiller
from overproof.methods.robust_objective import AttackMode
from overproof.types import Batch, Output, Progress


class RSLAD(RobustDistiller):
    """The robust teacher's soft labels replace the hard ones in the attack and in both loss terms.

    L = a mean_n KL(p_n || softmax(S(x~_n))) + (1 - a) mean_n KL(p_n || softmax(S(x_n))),  p_n = softmax(T(x_n))
    x~ = PGD(KL(p || softmax(S(.)))) from x + 0.001 randn

    Args:
        student: images -> logits (N, K).
        teacher: adversarially trained, images -> logits (N, K), frozen.
        adversarial_weight: a in [0, 1].
        crafted_against: "teacher", the divergence above; or "labels", the cross-entropy.
        class_mean: divide KL by the number of classes, as the authors' code does on CIFAR-10.
        watch: log how good the teacher is on the student's adversarial images, for one more forward pass of it.
        norm, eps, step_size, steps, attack_mode: see `RobustObjective`; the student is attacked in eval mode.

    Raises:
        UsageError: a outside [0, 1], or an unknown `crafted_against`.

    Reference: Zi et al., ICCV 2021, arXiv 2108.07969.

    Differences from the paper: KL is averaged over samples; the authors' code also averages over the K classes on CIFAR-10
    and multiplies by 10 on CIFAR-100, so both equal a tenth of this loss (`class_mean` on CIFAR-10; else a tenth of the
    learning rate under SGD, with ten times the weight decay).
    """

    start = "gaussian"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        adversarial_weight: float = 5 / 6,
        crafted_against: Literal["teacher", "labels"] = "teacher",
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
        if not 0 <= adversarial_weight <= 1:
            raise UsageError(f"rslad: adversarial_weight={adversarial_weight} must lie in [0, 1].")
        if crafted_against not in ("teacher", "labels"):
            raise UsageError(f"rslad: crafted_against={crafted_against!r} must be teacher or labels.")
        self.adversarial_weight, self.crafted_against, self.class_mean = adversarial_weight, crafted_against, class_mean

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's losses."""
        target = self.teacher_logits(batch)

        def loss(x: Tensor, rows: Tensor) -> Tensor:
            return kl_divergence(target[rows], self.victim(x))

        labels = self.crafted_against == "labels"
        adversarial = self.against_labels(batch) if labels else self.perturb(loss, batch.images)
        logits = self.student(adversarial)
        share = 1 / logits.shape[1] if self.class_mean else 1.0
        losses = {"adversarial": share * self.adversarial_weight * kl_divergence(target, logits).mean()}
        if self.adversarial_weight < 1:
            clean = kl_divergence(target, self.student(batch.images)).mean()
            losses["clean"] = share * (1 - self.adversarial_weight) * clean
        attacked = self.ask(batch, adversarial)[0] if self.watch else None
        return Output(losses, logits, self.reliability(batch.labels, attacked, target))
