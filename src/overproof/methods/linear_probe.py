"""A linear classifier on frozen features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import nn

from overproof.attacks.pgd import PGD
from overproof.attacks.threats import Norm
from overproof.features import INPUT, Tap, last_linear
from overproof.losses.divergences import cross_entropy
from overproof.losses.feature_distances import wide
from overproof.methods.robust_objective import RobustObjective
from overproof.networks import in_mode
from overproof.types import Batch, Output, Progress


class LinearProbe(RobustObjective):
    """Only the last linear layer learns: what are the features below it worth, and how robust are they?

    L = mean_n CE(y_n, W f(x_n) + b), f as it is in eval mode

    Args:
        student: images -> logits (N, K); all but its last linear layer stays as it is, running statistics too.
        images: "clean", or "adv": x~ = PGD(CE(S(.), y)) through the whole network.
        norm, eps, step_size, steps: see `RobustObjective`; the attack of images="adv", and the threat under which
            the run is evaluated if nothing else is said.

    Raises:
        OverproofError: the network has no linear layer.

    Reference: Alain and Bengio, 2016, arXiv 1610.01644; of robust features: Shafahi et al., ICLR 2020, arXiv 1905.08232.

    Differences from the paper: none; a probe of the last features only.
    """

    partial: ClassVar[bool] = True

    def __init__(
        self,
        student: nn.Module,
        *,
        images: Literal["clean", "adv"] = "clean",
        norm: Norm = "Linf",
        eps: float = 8 / 255,
        step_size: float | None = None,
        steps: int = 10,
    ) -> None:
        super().__init__(student, norm=norm, eps=eps, step_size=step_size, steps=steps)
        self.images, self.layer = images, last_linear(student)
        self._tap = Tap(student, [f"{self.layer}{INPUT}"])

    @property
    def head(self) -> nn.Module:
        """The layer that learns."""
        return self.student.get_submodule(self.layer)

    def trainable(self, phase: str = "train") -> Iterator[nn.Parameter]:
        """The last layer's parameters."""
        return self.head.parameters()

    @property
    def validation_attack(self) -> PGD | None:
        """Clean probes are chosen by clean accuracy."""
        return super().validation_attack if self.images == "adv" else None

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's loss."""
        images = self.against_labels(batch) if self.images == "adv" else batch.images
        with in_mode(self.student), torch.no_grad():
            (feature,) = self._tap(images)[1].values()
        # Autocast may hold a copy of the layer that was made without gradients; in full precision it is not used.
        with torch.autocast(feature.device.type, enabled=False):
            logits = self.head(wide(feature))
        return Output({"ce": cross_entropy(logits, batch.labels).mean()}, logits)
