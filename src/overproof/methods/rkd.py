"""Relational knowledge distillation."""

from __future__ import annotations

from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.losses.relations import angle_relation, distance_relation
from overproof.methods.feature_objective import FeatureObjective, View
from overproof.methods.feature_probe import ImageShape
from overproof.types import Batch, Progress


class RKD(FeatureObjective):
    """The student's embeddings of a batch lie to each other as the teacher's do: their distances and their angles.

    L = ce_weight mean_n CE(y_n, S(x_n)) + distance_weight mean_ij huber(d^s_ij / mean d^s - d^t_ij / mean d^t)
        + angle_weight mean_ijk huber(cos^s_jik - cos^t_jik)

    Args:
        student: images -> logits (N, K).
        teacher: images -> logits (N, K), frozen.
        distance_weight, angle_weight: at least 0.
        student_layers, teacher_layers: one layer each; None: the vectors that the last linear layers read.
        ce_weight, image_shape: see `FeatureObjective`.

    Raises:
        UsageError: a negative weight, an unknown layer, or a batch of one image.

    Reference: Park et al., CVPR 2019, arXiv 1904.05068.

    Differences from the paper: weights 25 and 50 are those of the authors' code and of the CIFAR-100 benchmark.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        student_layers: tuple[str, ...] | None = None,
        teacher_layers: tuple[str, ...] | None = None,
        ce_weight: float = 1.0,
        image_shape: ImageShape | None = None,
    ) -> None:
        super().__init__(student, teacher, ce_weight=ce_weight, image_shape=image_shape)
        if distance_weight < 0 or angle_weight < 0:
            raise UsageError(f"rkd: weights must be at least 0, not {distance_weight} and {angle_weight}.")
        self.distance_weight, self.angle_weight = distance_weight, angle_weight
        self.watch_vectors(student_layers, teacher_layers)

    def compare(self, view: View, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The distance and angle terms."""
        ours, theirs = view.features[0], view.teacher_features[0]
        if len(ours) < 2:
            raise UsageError("rkd compares images of a batch with each other; give at least two (train.batch_size).")
        return {
            "rkd-distance": self.distance_weight * distance_relation(ours, theirs).mean(),
            "rkd-angle": self.angle_weight * angle_relation(ours, theirs).mean(),
        }
