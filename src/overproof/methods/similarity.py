"""Similarity-preserving distillation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.losses.relations import similarity_gap
from overproof.methods.feature_objective import FeatureObjective, View
from overproof.methods.feature_probe import ImageShape
from overproof.types import Batch, Progress


class SimilarityPreserving(FeatureObjective):
    """Images that excite the teacher alike excite the student alike.

    L = ce_weight mean_n CE(y_n, S(x_n)) + weight sum_places mean_ij (G^s_ij - G^t_ij)^2,  G = rows of F F^T scaled to length 1

    Args:
        student: images -> logits (N, K).
        teacher: images -> logits (N, K), frozen.
        weight: at least 0.
        student_layers, teacher_layers: where maps are compared, pairwise; None: the last stage of both.
        ce_weight, image_shape: see `FeatureObjective`.

    Raises:
        UsageError: a negative weight, an unknown layer, vectors instead of maps, or a batch of one image.

    Reference: Tung and Mori, ICCV 2019, arXiv 1907.09682.

    Differences from the paper: weight 3000 and the last stage alone are those of the CIFAR-100 benchmark.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        weight: float = 3000.0,
        student_layers: tuple[str, ...] | None = None,
        teacher_layers: tuple[str, ...] | None = None,
        ce_weight: float = 1.0,
        image_shape: ImageShape | None = None,
    ) -> None:
        super().__init__(student, teacher, ce_weight=ce_weight, image_shape=image_shape)
        if weight < 0:
            raise UsageError(f"sp: weight={weight} must be at least 0.")
        self.weight = weight
        self.watch_maps(student_layers, teacher_layers, choice="last")

    def compare(self, view: View, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The similarity term; where cells have weights, both maps are multiplied by their roots."""
        if len(view.logits) < 2:
            raise UsageError("sp compares images of a batch with each other; give at least two (train.batch_size).")
        gaps = []
        for ours, theirs, weights in zip(view.features, view.teacher_features, view.weights, strict=True):
            if weights is not None:
                small = nn.functional.interpolate(weights, size=ours.shape[2:])
                ours, theirs = ours * small.sqrt(), theirs * weights.sqrt()
            gaps.append(similarity_gap(ours, theirs).mean())
        return {"sp": self.weight * torch.stack(gaps).sum()}
