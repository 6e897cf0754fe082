"""FitNets: hints from the middle of the teacher."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.losses.feature_distances import squared_distance
from overproof.methods.feature_adapters import Regressor
from overproof.methods.feature_objective import FeatureObjective, View
from overproof.methods.feature_probe import ImageShape
from overproof.types import Batch, Progress


class FitNet(FeatureObjective):
    """The student's middle map, through a regressor, equals the teacher's.

    L = ce_weight mean_n CE(y_n, S(x_n)) + weight sum_places mean (r(F^s) - F^t)^2

    Args:
        student: images -> logits (N, K).
        teacher: images -> logits (N, K), frozen.
        weight: of the hints, at least 0.
        regressor_depth: convolutions of the regressor r, at least 1.
        plain_regressor: r is convolutions alone. With this and weight = beta c h w / 2, for maps (c, h, w), the hint is beta / 2 times the
            squared distance by which the transfer of knowledge was probed (arXiv 2205.16004).
        student_layers, teacher_layers: where maps are compared, pairwise; None: the middle stage of both.
        ce_weight, image_shape: see `FeatureObjective`.

    Raises:
        UsageError: a negative weight, an unknown layer, vectors instead of maps, or a teacher's map that is larger than the
            student's and not exactly twice as large.

    Reference: Romero et al., ICLR 2015, arXiv 1412.6550.

    Differences from the paper: hints and labels are trained jointly, as in the CIFAR-100 benchmark (weight 100, regressor with
    normalisation and ReLU), not in two stages. Where the teacher's feature has negative values the regressor has no last ReLU.
    """

    mapped: ClassVar[bool] = True
    refined_factor: ClassVar[float] = 10.0  # 1000 in all, the area weight of SoKD's authors

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        weight: float = 100.0,
        regressor_depth: int = 1,
        plain_regressor: bool = False,
        student_layers: tuple[str, ...] | None = None,
        teacher_layers: tuple[str, ...] | None = None,
        ce_weight: float = 1.0,
        image_shape: ImageShape | None = None,
    ) -> None:
        super().__init__(student, teacher, ce_weight=ce_weight, image_shape=image_shape)
        if weight < 0:
            raise UsageError(f"fitnet: weight={weight} must be at least 0.")
        self.weight = weight
        self.watch_maps(student_layers, teacher_layers, choice="middle")
        self.regressors = nn.ModuleList(Regressor(place, depth=regressor_depth, plain=plain_regressor) for place in self.places)

    def project(self, features: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The student's maps in the teacher's shapes."""
        return tuple(regressor(feature) for regressor, feature in zip(self.regressors, features, strict=True))

    def compare(self, view: View, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The hint term."""
        places = zip(view.features, view.teacher_features, view.weights, strict=True)
        hints = torch.stack([squared_distance(ours, theirs, weights=weights).mean() for ours, theirs, weights in places])
        return {"fitnet": self.weight * hints.sum()}
