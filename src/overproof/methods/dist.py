"""Distillation from a stronger teacher."""

from __future__ import annotations

from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.losses.feature_distances import wide
from overproof.losses.relations import correlation_gap
from overproof.methods.feature_objective import FeatureObjective, View
from overproof.types import Batch, Progress


class DIST(FeatureObjective):
    """Predictions need only correlate with the teacher's: over the classes of an image, and over the images for a class.

    L = ce_weight mean_n CE(y_n, S(x_n)) + tau^2 (beta mean_n (1 - rho(p^s_n., p^t_n.)) + gamma mean_k (1 - rho(p^s_.k, p^t_.k)))

    Args:
        student: images -> logits (N, K).
        teacher: images -> logits (N, K), frozen.
        beta: weight of the relations between classes, at least 0.
        gamma: weight of the relations within a class, at least 0.
        temperature: tau > 0.
        ce_weight: weight of the labels, at least 0.

    Raises:
        UsageError: a negative weight, or temperature not positive.

    Reference: Huang, You, Wang, Qian, Xu, NeurIPS 2022, arXiv 2205.10536.

    Differences from the paper: the weights are those of the authors' ImageNet code; tau^2 follows the later public versions of
    that code and is 1 at the default temperature.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        ce_weight: float = 1.0,
    ) -> None:
        super().__init__(student, teacher, ce_weight=ce_weight)
        if beta < 0 or gamma < 0 or temperature <= 0:
            raise UsageError(f"dist: needs beta, gamma >= 0 and temperature > 0, not {beta}, {gamma}, {temperature}.")
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def compare(self, view: View, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The two correlation terms."""
        ours, theirs = ((wide(z) / self.temperature).softmax(dim=1) for z in (view.logits, view.teacher_logits))
        between, within = correlation_gap(ours, theirs).mean(), correlation_gap(ours.T, theirs.T).mean()
        scale = self.temperature**2
        return {"dist-between": scale * self.beta * between, "dist-within": scale * self.gamma * within}
