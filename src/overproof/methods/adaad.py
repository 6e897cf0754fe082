"""Adaptive adversarial distillation: AdaAD and AdaIAD."""

from __future__ import annotations

from torch import Tensor, nn

from overproof.attacks.threats import Norm
from overproof.errors import UsageError
from overproof.losses.divergences import kl_divergence
from overproof.methods.introspective import Introspective
from overproof.methods.robust_distiller import RobustDistiller
from overproof.methods.robust_objective import AttackMode
from overproof.types import Batch, Output, Progress


def widest_gap(method: RobustDistiller, images: Tensor) -> Tensor:
    """Images on which the student is farthest from a teacher that sees them too, x~ = PGD(KL(T(.) || S(.))).

    The gradient flows through both networks, so that images on which the teacher itself falls are not preferred.
    """
    teacher = method.teacher_copy(images)

    def loss(x: Tensor, rows: Tensor) -> Tensor:
        return kl_divergence(teacher(x), method.victim(x))

    return method.perturb(loss, images)


class AdaAD(RobustDistiller):
    """The student agrees with its teacher where it is farthest from it, both looking at the same perturbed image.

    L = a mean_n KL(softmax(T(x~_n)) || softmax(S(x~_n))) + (1 - a) mean_n KL(softmax(T(x_n)) || softmax(S(x_n)))
    x~ = PGD(KL(softmax(T(.)) || softmax(S(.)))) from x + 0.001 randn, with the gradient of both networks

    Args:
        student: images -> logits (N, K).
        teacher: adversarially trained, images -> logits (N, K), frozen; every inner step runs it forward and back.
        adversarial_weight: a in [0, 1].
        class_mean: divide KL by the number of classes, as the authors' code does on CIFAR-10.
        watch: log in which of the three cases the teacher is, for one more forward pass of it, on the untouched images.
        norm, eps, step_size, steps, attack_mode: see `RobustObjective`; the student is attacked in eval mode.

    Raises:
        UsageError: a outside [0, 1].

    Reference: Huang et al.: Boosting Accuracy and Robustness of Student Models via Adaptive Adversarial Distillation, CVPR 2023.

    Differences from the paper: written after the authors' code; the paper's own formulas could not be checked against it. The
    code trains by default with eps = 16/255 and step 4/255; which radius stands behind which of the published figures could not
    be verified, so 8/255 and 2/255, of its attack function, are the defaults here. KL is averaged over samples, as there on
    CIFAR-100.
    """

    start = "gaussian"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        adversarial_weight: float = 1.0,
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
            raise UsageError(f"adaad: adversarial_weight={adversarial_weight} must lie in [0, 1].")
        self.adversarial_weight, self.class_mean = adversarial_weight, class_mean

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's losses."""
        adversarial, both = widest_gap(self, batch.images), self.adversarial_weight < 1
        attacked, clean = self.ask(batch, adversarial, batch.images if both or self.watch else None)
        logits = self.student(adversarial)
        share = 1 / logits.shape[1] if self.class_mean else 1.0
        losses = {"adversarial": share * self.adversarial_weight * kl_divergence(attacked, logits).mean()}
        if both and clean is not None:
            gap = kl_divergence(clean, self.student(batch.images)).mean()
            losses["clean"] = share * (1 - self.adversarial_weight) * gap
        return Output(losses, logits, self.reliability(batch.labels, attacked, clean))


class AdaIAD(Introspective):
    """IAD-I on the images of AdaAD: the teacher too is asked about the perturbed image.

    L = c tau^2 mean_n KL(softmax(T(x~_n) / tau) || softmax(S(x~_n) / tau))
        + c mean_n (1 - alpha_n) KL(softmax(S(x_n)) || softmax(S(x~_n))) + (1 - c) mean_n CE(y_n, S(x_n))
    alpha_n = softmax(T(x~_n))_{y_n}^beta, without gradient;  x~ = PGD(KL(T(.) || S(.))) from x + 0.001 randn

    Args:
        student, teacher, all options: see `Introspective`; weight_teacher multiplies the first term by alpha_n.

    Raises:
        UsageError: an option out of range.

    Reference: Huang et al.: Boosting Accuracy and Robustness of Student Models via Adaptive Adversarial Distillation, CVPR 2023.

    Differences from the paper: as for AdaAD. The authors' code has tau = 30 by default (replay: temperature=30); here it is 1,
    as in IAD-I.
    """

    start = "gaussian"

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's losses."""
        adversarial = widest_gap(self, batch.images)
        wanted = self.watch or (self.hard_cases and self.doubting(progress))
        target, clean = self.ask(batch, adversarial, batch.images if wanted else None)
        alpha = self.trusted(progress, batch.labels, target, clean)
        losses, logits = self.imitate(batch, adversarial, target, alpha)
        return Output(losses, logits, self.reliability(batch.labels, target, clean, alpha))
