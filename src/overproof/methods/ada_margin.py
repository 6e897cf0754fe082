"""AdaMargin: reliability as a margin inside the distillation loss."""

from __future__ import annotations

from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.losses.divergences import cross_entropy
from overproof.losses.feature_distances import wide
from overproof.losses.group_reliability import Kind, MarginForm, margin_cross_entropy
from overproof.methods.ada_objective import Absent, AdaObjective, Group, HeldOut
from overproof.types import Batch, Output, Progress


class AdaMargin(AdaObjective):
    """Distillation in which classes that the teacher is unreliable about are lifted over those it knows well.

    L = mean_n [(1 - a) CE(y_n, S(x_n)) + a sum_k p_nk log(1 + sum_{j != k} exp(z_nj - z_nk + Delta_kj))],
    p = softmax(T(x) / tau),  z = S(x),  rho_c = scale g_c

    Delta_kj = rho_j - rho_k with margin_form="pairwise": the cross-entropy of z + rho, while at test time rho is left out.
    Delta_kj = rho_k with "target": a label wants a larger lead, the more reliable the teacher is about it. g_c is the teacher's
    mean margin gamma = (K p_y - 1) / (K - 1) on held-out images of class c, see `AdaObjective`, and may be negative here.

    Args:
        student: images -> logits (N, K).
        teacher: images -> logits (N, K), frozen.
        teacher_weight: a, in [0, 1].
        scale: at least 0; 0 is the plain mixture of labels and soft labels.
        margin_form: "pairwise" or "target".
        group: with "attribute" rho is that of the image's subgroup, the same for all classes: for margin_form="target" only.
        temperature, reliability, few, shrinkage, absent, held_out, allow_training_images: see `AdaObjective`.

    Raises:
        UsageError: an option out of its range, or margins by attribute that change nothing.

    Reference: Lukasik, Bhojanapalli, Menon, Kumar: Teacher's pet, TMLR 2022, arXiv 2106.10494; as described by Wang et al.,
    UAI 2023 (PMLR 216).

    Differences from the paper: a reconstruction. Which Delta the authors use is not known to us: "target" is the literal reading,
    "pairwise" the one that protects rare classes. That the term of the labels stays, with a = 0.5, is ours, and so is what
    `AdaAlpha` says about g_c.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        temperature: float = 1.0,
        teacher_weight: float = 0.5,
        scale: float = 1.0,
        margin_form: MarginForm = "pairwise",
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
        if not 0 <= teacher_weight <= 1 or scale < 0:
            raise UsageError(f"AdaMargin: needs teacher_weight in [0, 1] and scale >= 0, not {teacher_weight} and {scale}.")
        if group == "attribute" and margin_form == "pairwise":
            raise UsageError(
                'AdaMargin: with group="attribute" all classes of an image have the same margin, which margin_form="pairwise" does not '
                'feel. Say margin_form="target", or use ada-alpha.'
            )
        self.teacher_weight, self.scale, self.margin_form = teacher_weight, scale, margin_form

    def weights(self) -> dict[str, Tensor]:
        """Rho by group."""
        return {"rho": self.scale * self.measured}

    def margins(self, batch: Batch) -> Tensor:
        """Rho by class (K,), or by image (N, 1); 0 where nothing was measured."""
        rho = self.weights()["rho"]
        if not self.known:
            return rho.new_zeros(1)
        return rho if self.group == "class" else self.by_image(rho, batch)[:, None]

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's losses."""
        target, logits = self.soft_labels(batch), self.student(batch.images)
        soft = margin_cross_entropy(target, wide(logits), self.margins(batch), form=self.margin_form)
        losses = {"ada-margin": self.teacher_weight * soft.mean()}
        if self.teacher_weight < 1:
            losses["ce"] = (1 - self.teacher_weight) * cross_entropy(logits, batch.labels).mean()
        return Output(losses, logits)
