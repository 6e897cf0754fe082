"""The classifier: a network behind the normalisation of its images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from overproof.errors import DataError, UsageError

Statistic = float | Sequence[float] | None


LARGEST = 5.0  # of a mean or deviation of images in [0, 1]; beyond it somebody counts in grey levels


class Normalize(nn.Module):
    """(images - mean) / std, per channel.

    Args:
        mean: one number for all channels or one per channel, in pixel units; None is 0.
        std: likewise, positive; None is 1.

    Raises:
        UsageError: not finite, std not positive, numbers that belong to pixels up to 255, or different numbers of channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Statistic = None, std: Statistic = None) -> None:
        super().__init__()
        means, stds = _numbers("mean", mean, 0.0), _numbers("std", std, 1.0)
        if any(value <= 0 for value in stds):
            raise UsageError(f"Normalisation: std={std} must be positive.")
        if any(abs(value) > LARGEST for value in (*means, *stds)):
            raise UsageError(
                f"Normalisation: mean={mean}, std={std} belong to pixels from 0 to 255; images here are in [0, 1]: divide both by 255."
            )
        counts = {len(values) for values, given in ((means, mean), (stds, std)) if isinstance(given, Sequence)}
        if len(counts) > 1:
            raise UsageError(f"Normalisation: mean has {len(means)} channels, std has {len(stds)}; give as many of each.")
        self.channels = counts.pop() if counts else None
        size = self.channels or 1
        for name, values in (("mean", means), ("std", stds)):
            full = values if len(values) == size else values * size
            self.register_buffer(name, torch.tensor(full, dtype=torch.float32).reshape(1, size, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] -> normalised images."""
        return (images - self.mean) / self.std

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def _numbers(name: str, value: Statistic, default: float) -> list[float]:
    given = [default] if value is None else list(value) if isinstance(value, Sequence) else [value]
    numbers = [float(number) for number in given]
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise UsageError(f"Normalisation: {name}={value} must be a finite number, or one for each channel.")
    return numbers


def normalisation_of(model: nn.Module) -> Normalize | None:
    """The normalisation that is a model's first layer, or the first one found in it; None without any."""
    own = getattr(model, "normalize", None)
    return own if isinstance(own, Normalize) else next((m for m in model.modules() if isinstance(m, Normalize)), None)


class Classifier(nn.Module):
    """Images in [0, 1], shape (N, C, H, W), to logits (N, K): normalisation, then the network.

    Where the network publishes `stages`, `preact_stages` or `penultimate`, so does the classifier, with the prefix "net.".

    Args:
        net: normalised images -> logits.
        mean: subtracted from the images, in pixel units: a number, one per channel, or None for 0.
        std: divides them: likewise, None for 1.
        spec: how to build it again with `rebuild` (JSON-able), or None for a network made elsewhere.

    Raises:
        UsageError: mean or std are not usable.
    """

    stages: tuple[str, ...]
    preact_stages: tuple[str, ...]
    penultimate: str

    def __init__(
        self, net: nn.Module, *, mean: Statistic = None, std: Statistic = None, spec: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.net = net
        self.spec = spec
        for name in ("stages", "preact_stages"):
            published = getattr(net, name, None)
            if isinstance(published, tuple):  # networks of other makers may use these names for something else
                setattr(self, name, tuple(f"net.{stage}" for stage in published))
        if isinstance(last := getattr(net, "penultimate", None), str):
            self.penultimate = f"net.{last}"

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] -> logits (N, K).

        Raises:
            DataError: not a float tensor with four dimensions, or other channels than the normalisation's.
        """
        if images.dim() != 4 or not images.is_floating_point():
            raise DataError(
                f"A classifier reads float images of shape (N, C, H, W) in [0, 1], not {images.dtype} of shape "
                f"{tuple(images.shape)}. Convert with images.float() / 255; give a single image as images[None]."
            )
        channels = self.normalize.channels
        if channels is not None and images.shape[1] != channels:
            raise DataError(
                f"The images have {images.shape[1]} channels, shape {tuple(images.shape)}; this classifier was built for "
                f"{channels}. Convert the images, or build the model with in_channels={images.shape[1]}."
            )
        logits: Tensor = self.net(self.normalize(images))
        return logits


def as_classifier(module: nn.Module, *, mean: Statistic = None, std: Statistic = None) -> Classifier:
    """`module` itself if it is a `Classifier`, else wrapped once in the given normalisation (none by default).

    Raises:
        UsageError: normalisation is given for a module that has its own.
    """
    if not isinstance(module, Classifier):
        return Classifier(module, mean=mean, std=std)
    if mean is not None or std is not None:
        raise UsageError("This model is a Classifier and normalises its images already; leave out mean and std.")
    return module


def parameters_of(model: nn.Module) -> int:
    """Number of trainable parameters: all weights and biases, also while frozen; no buffers."""
    return sum(parameter.numel() for parameter in model.parameters())
