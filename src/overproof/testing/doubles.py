"""Defences that are broken on purpose: each looks robust to a gradient attack and is not. The sanity panel must flag them all.

Athalye, Carlini and Wagner call what they do obfuscated gradients (ICML 2018, arXiv 1802.00420): shattered, vanishing,
stochastic. Use them to try out your own evaluation; never as a defence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from overproof.errors import UsageError


class _Double(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class Quantised(_Double):
    """A classifier behind rounded pixels, f(round(x * (levels - 1)) / (levels - 1)): the gradient is zero everywhere.

    Args:
        model: images in [0, 1] -> logits.
        levels: grey levels that are left, at least 2.
    """

    def __init__(self, model: nn.Module, levels: int = 16) -> None:
        super().__init__(model)
        if levels < 2:
            raise UsageError(f"Quantised(levels={levels}): at least 2 grey levels are needed.")
        self.levels = levels

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        steps = self.levels - 1
        logits: Tensor = self.model((images * steps).round() / steps)
        return logits


class Saturated(_Double):
    """A classifier with a softmax so sharp that cross-entropy has no gradient left, temperature * f(x).

    Args:
        model: images in [0, 1] -> logits.
        temperature: factor of the logits.
    """

    def __init__(self, model: nn.Module, temperature: float = 100.0) -> None:
        super().__init__(model)
        self.temperature = temperature

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        logits: Tensor = self.temperature * self.model(images)
        return logits


class NoisyInput(_Double):
    """A classifier that sees f(x + noise), other Gaussian noise at each call: an attack aims at a target that has moved.

    Args:
        model: images in [0, 1] -> logits.
        std: standard deviation of the noise in pixel units; drawn from torch's global generator.
    """

    def __init__(self, model: nn.Module, std: float = 0.1) -> None:
        super().__init__(model)
        self.std = std

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        logits: Tensor = self.model(images + self.std * torch.randn_like(images))
        return logits


class Thermometer(_Double):
    """A classifier that reads pixels as codes of bits, f(x > 1/(levels + 1), ..., x > levels/(levels + 1)): no gradient at all.

    Args:
        model: codes (N, C * levels, H, W) of zeros and ones -> logits; train it behind this wrapper, on ordinary images.
        levels: bits per pixel value, at least 1.

    Reference: Buckman et al., ICLR 2018, openreview S18Su--CW (broken in arXiv 1802.00420).
    """

    def __init__(self, model: nn.Module, levels: int = 10) -> None:
        super().__init__(model)
        if levels < 1:
            raise UsageError(f"Thermometer(levels={levels}): at least 1 bit per pixel is needed.")
        self.levels = levels

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        thresholds = torch.arange(1, self.levels + 1, device=images.device) / (self.levels + 1)
        codes = images[:, :, None] > thresholds.to(images.dtype)[:, None, None]
        logits: Tensor = self.model(codes.flatten(1, 2).to(images.dtype))
        return logits
