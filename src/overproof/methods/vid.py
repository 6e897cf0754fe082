"""Variational information distillation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.losses.feature_distances import gaussian_nll, pooled, smaller_size
from overproof.methods.feature_objective import FeatureObjective, View
from overproof.methods.feature_probe import ImageShape, Place
from overproof.types import Batch, Progress

FLOOR = 1e-5


class Predictor(nn.Module):
    """Mean and variance of the teacher's map given the student's: three 1x1 convolutions, and one variance for each channel."""

    def __init__(self, place: Place, *, variance: float) -> None:
        super().__init__()
        inputs, outputs = place.student_shape[0], place.teacher_shape[0]
        layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 1, bias=False)]
        for _ in range(2):
            layers += [nn.ReLU(), nn.Conv2d(outputs, outputs, 1, bias=False)]
        self.mean = nn.Sequential(*layers)
        # The inverse of softplus, so that the first variance is the one asked for.
        self.log_scale = nn.Parameter(torch.full((outputs,), math.log(math.expm1(variance - FLOOR))))

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """The student's map (N, C_s, H, W) -> mean (N, C_t, H, W) and variance (C_t,), above 1e-5."""
        return self.mean(feature), F.softplus(self.log_scale) + FLOOR


class VID(FeatureObjective):
    """The student's maps say as much as possible about the teacher's: a Gaussian whose mean they predict.

    L = ce_weight mean_n CE(y_n, S(x_n)) + weight sum_stages mean ((F^t - mu(F^s))^2 / v + log v) / 2,  v = softplus(a_c) + 1e-5

    Args:
        student: images -> logits (N, K).
        teacher: images -> logits (N, K), frozen.
        weight: at least 0.
        variance: of every channel at the start, above 1e-5.
        student_layers, teacher_layers: where maps are compared, pairwise; None: all stages, paired by their sizes.
        ce_weight, image_shape: see `FeatureObjective`.

    Raises:
        UsageError: a negative weight, variance not above 1e-5, an unknown layer, or vectors instead of maps.

    Reference: Ahn, Hu, Damianou, Lawrence, Dai, CVPR 2019, arXiv 1904.05835.

    Differences from the paper: weight, predictor and first variance are those of the CIFAR-100 benchmark; the larger of two
    maps is average-pooled to the smaller size, and the pooled vector takes no part.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        weight: float = 1.0,
        variance: float = 5.0,
        student_layers: tuple[str, ...] | None = None,
        teacher_layers: tuple[str, ...] | None = None,
        ce_weight: float = 1.0,
        image_shape: ImageShape | None = None,
    ) -> None:
        super().__init__(student, teacher, ce_weight=ce_weight, image_shape=image_shape)
        if weight < 0 or variance <= FLOOR:
            raise UsageError(f"vid: needs weight >= 0 and variance > {FLOOR}, not {weight} and {variance}.")
        self.weight = weight
        self.watch_maps(student_layers, teacher_layers)
        self.predictors = nn.ModuleList(Predictor(place, variance=variance) for place in self.places)

    def compare(self, view: View, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The likelihood term."""
        terms = []
        places = zip(self.predictors, view.features, view.teacher_features, view.weights, strict=True)
        for predictor, ours, theirs, weights in places:
            size = smaller_size(ours, theirs)
            small = pooled(weights, size) if weights is not None else None
            mean, variance = predictor(pooled(ours, size))
            terms.append(gaussian_nll(mean, pooled(theirs, size), variance, weights=small).mean())
        return {"vid": self.weight * torch.stack(terms).sum()}
