"""Adversarial training."""

from __future__ import annotations

from torch import nn

from overproof.attacks.threats import Norm
from overproof.losses.divergences import cross_entropy
from overproof.methods.robust_objective import AttackMode, RobustObjective
from overproof.types import Batch, Output, Progress


class PGDAT(RobustObjective):
    """Cross-entropy on adversarial images of the student itself.

    L = mean_n CE(y_n, S(x~_n)),  x~ = PGD(CE(S(.), y)) from a uniform start

    With steps=1 this is fast adversarial training (Wong et al.): a start anywhere in the ball, one step of 1.25 eps, and back
    into the ball. It costs two passes a batch instead of eleven, and may collapse all at once: the model then fools that one step
    and nothing else. Validation watches for it, see `train.collapse`.

    Args:
        student: images -> logits (N, K).
        step_size: pixel units; None: eps / 4 (2/255 at 8/255), and 1.25 eps with steps=1 (10/255 at 8/255).
        norm, eps, steps, attack_mode: see `RobustObjective`; the student is attacked in eval mode. The authors of the fast variant
            attack in train mode: attack_mode="train" replays that.

    Reference: Madry et al., ICLR 2018, arXiv 1706.06083; steps=1: Wong, Rice, Kolter, ICLR 2020, arXiv 2001.03994.

    Differences from the paper: the paper's CIFAR-10 training used 7 inner steps; 10 is the field's present habit. Fast training
    there goes with a one-cycle learning rate and mixed precision, here options of [train].
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        norm: Norm = "Linf",
        eps: float = 8 / 255,
        step_size: float | None = None,
        steps: int = 10,
        attack_mode: AttackMode = "eval",
    ) -> None:
        super().__init__(student, norm=norm, eps=eps, step_size=step_size, steps=steps, attack_mode=attack_mode)

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's loss."""
        logits = self.student(self.against_labels(batch))
        return Output({"adversarial": cross_entropy(logits, batch.labels).mean()}, logits)
