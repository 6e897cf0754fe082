"""Craft on one model, test on another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from overproof.attacks.base import logits_of
from overproof.attacks.combined import Wrapper, patient
from overproof.errors import UsageError
from overproof.networks import device_of, in_mode


@dataclass(frozen=True, kw_only=True, eq=False)
class Transfer(Wrapper):
    """Adversarial images crafted on `source` alone; the attacked model is never asked.

    The source's mistakes are no success, so no inner attack stops early. With several sources the images are crafted on their
    mean log-probability, which transfers better than either.

    Args:
        inner, eps, norm, targeted: see `Wrapper`.
        source: images -> logits (N, K), one network or several with the same classes, on the device of the images.

    Raises:
        UsageError: no source, or one on another device than the images.

    Reference: Papernot, McDaniel, Goodfellow, arXiv 1605.07277; several sources: Liu et al., ICLR 2017, arXiv 1611.02770.

    Differences from the papers: log-probabilities are averaged, not probabilities, so that no gradient vanishes where one
    source is sure.
    """

    source: nn.Module | Sequence[nn.Module] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.source, nn.Module) and not len(self.source):
            raise UsageError(
                "Transfer needs the model on which the images are crafted: Transfer(source=model), or --transfer-from RUN."
            )

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        source = self.source if isinstance(self.source, nn.Module) else MeanModel(self.source)
        if device_of(source) != images.device:
            raise UsageError(f"Transfer: the source is on {device_of(source)}, the images on {images.device}; move the source.")
        with in_mode(source):
            return patient(self.attack)(source, images, labels, generator)


class MeanModel(nn.Module):
    """Several classifiers as one: the mean of their log-probabilities."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> log-probabilities (N, K), up to a constant per image."""
        return torch.stack([logits_of(model, images).log_softmax(dim=1) for model in self.models]).mean(dim=0)
