"""Attention transfer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.losses.feature_distances import attention_distance
from overproof.methods.feature_objective import FeatureObjective, View
from overproof.methods.feature_probe import ImageShape
from overproof.types import Batch, Progress


class AttentionTransfer(FeatureObjective):
    """The student looks where the teacher looks, at every stage.

    L = ce_weight mean_n CE(y_n, S(x_n)) + weight sum_stages mean (Q^s - Q^t)^2,  Q = mean_c |F_c|^p scaled to length 1

    The larger of two maps is average-pooled to the smaller size first; channels need not agree and nothing else is trained.

    Args:
        student: images -> logits (N, K).
        teacher: images -> logits (N, K), frozen.
        weight: of the attention terms, at least 0.
        power: p > 0.
        student_layers, teacher_layers: where maps are compared, pairwise; None: all stages, paired by their sizes.
        ce_weight, image_shape: see `FeatureObjective`.

    Raises:
        UsageError: a negative weight, power not positive, an unknown layer, or vectors instead of maps.

    Reference: Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928.

    Differences from the paper: squared differences are averaged over the cells, as in the authors' code; the paper's beta / 2
    times the norm differs by a factor.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        weight: float = 1000.0,
        power: float = 2.0,
        student_layers: tuple[str, ...] | None = None,
        teacher_layers: tuple[str, ...] | None = None,
        ce_weight: float = 1.0,
        image_shape: ImageShape | None = None,
    ) -> None:
        super().__init__(student, teacher, ce_weight=ce_weight, image_shape=image_shape)
        if weight < 0 or power <= 0:
            raise UsageError(f"at: needs weight >= 0 and power > 0, not {weight} and {power}.")
        self.weight, self.power = weight, power
        self.watch_maps(student_layers, teacher_layers)

    def compare(self, view: View, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The attention term."""
        places = zip(view.features, view.teacher_features, view.weights, strict=True)
        gaps = [attention_distance(ours, theirs, power=self.power, weights=weights).mean() for ours, theirs, weights in places]
        return {"at": self.weight * torch.stack(gaps).sum()}
