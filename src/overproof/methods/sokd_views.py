"""SoKD between what the teacher shows and what the base method compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from overproof.losses.feature_distances import wide
from overproof.methods.feature_objective import FeatureObjective, View
from overproof.methods.feature_probe import as_map, as_vector
from overproof.methods.shared_forward import Lesson, Seen
from overproof.methods.sokd_policy import Draw, Policy


@dataclass(frozen=True)
class Step:
    """What holds during one evaluation of the loss: the refinement, and whether the policy may learn from it."""

    draw: Draw
    leaves: dict[str, Tensor]
    lesson: Lesson
    search: bool = False
    attached: bool = False


def refine_all(
    policy: Policy,
    step: Step,
    pools: Mapping[str, str],
    *,
    parts: Sequence[FeatureObjective],
    views: Sequence[View],
    seen: Seen,
) -> dict[str, Tensor]:
    """Refined teacher features by tap name: each map once, vectors pooled from the refined map they come from.

    Args:
        policy, step: how they are refined.
        pools: of a vector's layer, the layer of the map whose average it is.
        parts, views: the methods and what they would compare.
        seen: all that was tapped.
    """
    refined: dict[str, Tensor] = {}

    def once(name: str, feature: Tensor) -> Tensor:
        if name not in refined:
            # In fp16 the gradients of a mean over a map would vanish, and the policy with them.
            refined[name] = policy.refine(wide(feature), step.draw, step.leaves, search=step.search)
        return refined[name]

    for part, view in zip(parts, views, strict=True):
        for place, feature in zip(part.places, view.teacher_features, strict=True):
            name = place.teacher
            if place.spatial:
                once(name, feature)
            elif name in pools:
                refined[name] = as_vector(once(pools[name], as_map(seen.teacher_features[pools[name]], pools[name])))
            else:
                refined[name] = feature
    return refined


def with_refined(part: FeatureObjective, view: View, refined: Mapping[str, Tensor], weights: Tensor | None) -> View:
    """The view with refined features, and the weights (N, 1, H, W) brought to the size of each map."""
    theirs = tuple(refined[place.teacher] for place in part.places)
    sized = tuple(
        F.interpolate(weights, size=feature.shape[2:]) if weights is not None and place.spatial else None
        for place, feature in zip(part.places, theirs, strict=True)
    )
    return replace(view, teacher_features=theirs, weights=sized)
