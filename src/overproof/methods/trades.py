"""TRADES."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from overproof.attacks.threats import Norm
from overproof.errors import UsageError
from overproof.losses.divergences import cross_entropy, kl_divergence
from overproof.methods.robust_objective import AttackMode, RobustObjective
from overproof.networks import in_mode
from overproof.types import Batch, Output, Progress


class TRADES(RobustObjective):
    """Accuracy on clean images, and the same prediction around them.

    L = mean_n CE(y_n, S(x_n)) + beta mean_n KL(softmax(S(x_n)) || softmax(S(x~_n)))
    x~ = PGD(KL(softmax(S(x)) || softmax(S(.)))) from x + 0.001 randn

    The gradient of the second term flows through both sides.

    Args:
        student: images -> logits (N, K).
        beta: weight of the second term (1 / lambda in the paper), at least 0.
        norm, eps, step_size, steps, attack_mode: see `RobustObjective`; the student is attacked in eval mode.

    Raises:
        UsageError: beta is negative.

    Reference: Zhang et al., ICML 2019, arXiv 1901.08573.

    Differences from the paper: eps is 8/255 and the step a quarter of it where the authors' code has 0.031 and 0.007.
    """

    start = "gaussian"

    def __init__(
        self,
        student: nn.Module,
        *,
        beta: float = 6.0,
        norm: Norm = "Linf",
        eps: float = 8 / 255,
        step_size: float | None = None,
        steps: int = 10,
        attack_mode: AttackMode = "eval",
    ) -> None:
        super().__init__(student, norm=norm, eps=eps, step_size=step_size, steps=steps, attack_mode=attack_mode)
        if beta < 0:
            raise UsageError(f"trades: beta={beta} must be at least 0.")
        self.beta = beta

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's losses."""
        with in_mode(self.student, self.attack_mode), torch.no_grad():
            here = self.student(batch.images)

        def loss(x: Tensor, rows: Tensor) -> Tensor:
            return kl_divergence(here[rows], self.victim(x))

        adversarial = self.perturb(loss, batch.images)
        logits = self.student(batch.images)
        gap = kl_divergence(logits, self.student(adversarial)).mean()
        return Output({"ce": cross_entropy(logits, batch.labels).mean(), "trades": self.beta * gap}, logits)
