"""AdaAlpha: the teacher counts as much as it is reliable, class by class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.losses.divergences import cross_entropy
from overproof.losses.feature_distances import wide
from overproof.losses.group_reliability import Kind, mixed_target
from overproof.methods.ada_objective import Absent, AdaObjective, Group, HeldOut
from overproof.types import Batch, Output, Progress


class AdaAlpha(AdaObjective):
    """Labels and soft labels, mixed by how far the teacher is right about held-out images of the class.

    L = mean_n [(1 - alpha_{y_n}) CE(y_n, S(x_n)) + alpha_{y_n} CE(softmax(T(x_n) / tau), S(x_n))],
    alpha_c = max_alpha clip(g_c, 0, 1)^power

    g_c is the teacher's mean margin gamma = (K p_y - 1) / (K - 1) on held-out images of class c, see `AdaObjective`. It is the
    class of the label that decides, not the one that the teacher sees. power=0 is the plain mixture with one alpha = max_alpha.

    Args:
        student: images -> logits (N, K).
        teacher: images -> logits (N, K), frozen.
        max_alpha: in [0, 1]; what a teacher gets that is always right and sure.
        power: at least 0; the larger, the less a doubtful teacher counts.
        temperature, group, reliability, few, shrinkage, absent, held_out, allow_training_images: see `AdaObjective`.

    Raises:
        UsageError: an option out of its range.

    Reference: Lukasik, Bhojanapalli, Menon, Kumar: Teacher's pet, TMLR 2022, arXiv 2106.10494; as described by Wang et al.,
    UAI 2023 (PMLR 216).

    Differences from the paper: a reconstruction. That g_c is an average over held-out images, at temperature 1, that alpha is cut
    off at 0, max_alpha, power, shrinkage and subgroups are ours.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        temperature: float = 1.0,
        max_alpha: float = 1.0,
        power: float = 1.0,
        group: Group = "class",
        reliability: Kind = "margin",
        few: int = 5,
        shrinkage: float = 5.0,
        absent: Absent = "raise",
        held_out: HeldOut = "validation",
        allow_training_images: bool = False,
    ) -> None:
        super().__init__(
            student, teacher, temperature=temperature, group=group, reliability=reliability, few=few, shrinkage=shrinkage,
            absent=absent, held_out=held_out, allow_training_images=allow_training_images,
        )  # fmt: skip
        if not 0 <= max_alpha <= 1 or power < 0:
            raise UsageError(f"AdaAlpha: needs max_alpha in [0, 1] and power >= 0, not {max_alpha} and {power}.")
        self.max_alpha, self.power = max_alpha, power

    def weights(self) -> dict[str, Tensor]:
        """Alpha by group."""
        return {"alpha": self.max_alpha * self.measured.clamp(0, 1) ** self.power}

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's loss."""
        target, logits = self.soft_labels(batch), self.student(batch.images)
        even = torch.full((len(batch),), self.max_alpha, device=target.device)
        alpha = self.by_image(self.weights()["alpha"], batch) if self.known else even
        loss = cross_entropy(wide(logits), mixed_target(target, batch.labels, alpha))
        return Output({"ada-alpha": loss.mean()}, logits)
