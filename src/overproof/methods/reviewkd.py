"""Knowledge review."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.losses.feature_distances import hierarchical_distance
from overproof.methods.feature_objective import FeatureObjective, View
from overproof.methods.feature_probe import ImageShape, Place
from overproof.types import Batch, Progress

WIDEST = 512


class Fusion(nn.Module):
    """Attention-based fusion: what the deeper places have found, joined with this place, in the teacher's shape.

    Args:
        place: the shapes.
        width: channels of what is passed on to shallower places.
        deepest: nothing comes from below.
    """

    def __init__(self, place: Place, width: int, *, deepest: bool) -> None:
        super().__init__()
        inputs, outputs = place.student_shape[0], place.teacher_shape[0]
        narrow, broad = nn.Conv2d(inputs, width, 1, bias=False), nn.Conv2d(width, outputs, 3, padding=1, bias=False)
        for layer in (narrow, broad):
            nn.init.kaiming_uniform_(layer.weight, a=1)
        self.reduce = nn.Sequential(narrow, nn.BatchNorm2d(width))
        self.expand = nn.Sequential(broad, nn.BatchNorm2d(outputs))
        self.attend = None if deepest else nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid())

    def forward(self, feature: Tensor, below: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """(map in the teacher's channels and `size`, what is passed on)."""
        joined: Tensor = self.reduce(feature)
        if self.attend is not None and below is not None:
            below = F.interpolate(below, size=joined.shape[2:])
            share = self.attend(torch.cat([joined, below], dim=1))
            joined = joined * share[:, :1] + below * share[:, 1:]
        if joined.shape[2:] != size:
            joined = F.interpolate(joined, size=size)
        return self.expand(joined), joined


class ReviewKD(FeatureObjective):
    """Shallow teacher stages are reviewed with what the student has found in deeper ones.

    L = ce_weight mean_n CE(y_n, S(x_n)) + weight min(epoch / warmup, 1) sum_places HCL(fusion(F^s), F^t)

    Places are the stages (the teacher's before their activation) and the pooled vectors as 1x1 maps.

    Args:
        student: images -> logits (N, K).
        teacher: images -> logits (N, K), frozen.
        weight: at least 0. The authors: 5 for most pairs, 8 for ResNet-32x4 to ShuffleNetV2, 0.6 for ResNet-56 to ResNet-20,
            1 for ResNet-110 to ResNet-32.
        warmup: epochs over which the term grows, counted from 1; 0: none.
        student_layers, teacher_layers: where maps are compared, pairwise, shallow to deep; None: all stages.
        ce_weight, image_shape: see `FeatureObjective`.

    Raises:
        UsageError: a negative weight or warm-up, an unknown layer, or vectors instead of maps.

    Reference: Chen, Liu, Zhao, Jia, CVPR 2021, arXiv 2104.09044.

    Differences from the paper: epochs of the warm-up count from 1; the authors' own code begins with an epoch without
    distillation.
    """

    mapped: ClassVar[bool] = True

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        weight: float = 5.0,
        warmup: int = 20,
        student_layers: tuple[str, ...] | None = None,
        teacher_layers: tuple[str, ...] | None = None,
        ce_weight: float = 1.0,
        image_shape: ImageShape | None = None,
    ) -> None:
        super().__init__(student, teacher, ce_weight=ce_weight, image_shape=image_shape)
        if weight < 0 or warmup < 0:
            raise UsageError(f"reviewkd: needs weight >= 0 and warmup >= 0, not {weight} and {warmup}.")
        self.weight, self.warmup = weight, warmup
        self.watch_maps(student_layers, teacher_layers, preact=True)
        self.watch_vectors(None, None)
        width = min(WIDEST, self.places[-1].student_shape[0])
        deepest = len(self.places) - 1
        self.fusions = nn.ModuleList(Fusion(place, width, deepest=i == deepest) for i, place in enumerate(self.places))

    def project(self, features: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The student's maps after fusion, in the teacher's shapes, deep ones first into shallow ones."""
        passed: Tensor | None = None
        fused = []
        for fusion, ours, theirs in reversed(list(zip(self.fusions, features, teacher, strict=True))):
            out, passed = fusion(_as_cells(ours), passed, _as_cells(theirs).shape[2:])
            fused.append(out)
        return tuple(reversed(fused))

    def compare(self, view: View, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The review term."""
        places = zip(view.features, view.teacher_features, view.weights, strict=True)
        gaps = [hierarchical_distance(ours, _as_cells(theirs), weights=weights).mean() for ours, theirs, weights in places]
        scale = self.weight * (min((progress.epoch + 1) / self.warmup, 1.0) if self.warmup else 1.0)
        return {"reviewkd": scale * torch.stack(gaps).sum()}


def _as_cells(feature: Tensor) -> Tensor:
    """A vector as a map of one cell."""
    return feature if feature.dim() == 4 else feature[:, :, None, None]
