"""Noise, patches, and how far a rebuilt image is from the clean one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from overproof.errors import DataError, UsageError

Law = Literal["gamma", "uniform", "fixed"]
SMALLEST = 1e-6  # added to the variance of a patch, which may be even


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """How strong the noise is, one level sigma per image, in grey levels (0 to 255).

    Args:
        law: "gamma": Gamma(shape, scale), of mean shape * scale and standard deviation sqrt(shape) * scale; "uniform": between 0
            and high; "fixed": always sigma.
        shape, scale: above 0.
        high, sigma: at least 0.

    Raises:
        UsageError: another law, or a number out of range.

    Reference: You, Liu, Han, Xu, NeurIPS 2023, arXiv 2302.01056.
    """

    law: Law = "gamma"
    shape: float = 25.0
    scale: float = 3.0
    high: float = 150.0
    sigma: float = 75.0

    def __post_init__(self) -> None:
        if self.law not in ("gamma", "uniform", "fixed"):
            raise UsageError(f"noise={self.law!r}: known are gamma, uniform and fixed.")
        numbers = (self.shape, self.scale, self.high, self.sigma)
        if not (all(map(math.isfinite, numbers)) and self.shape > 0 and self.scale > 0 and self.high >= 0 and self.sigma >= 0):
            raise UsageError(
                f"Noise levels: shape={self.shape} and scale={self.scale} must be positive, high={self.high} and sigma={self.sigma} at "
                "least 0, and all of them finite."
            )

    def draw(self, like: Tensor) -> Tensor:
        """A level for each image of `like` (N, ...), shape (N,), from the global generator."""
        count = len(like)
        if self.law == "fixed":
            return like.new_full((count,), self.sigma)
        if self.law == "uniform":
            return self.high * torch.rand(count, dtype=like.dtype, device=like.device)
        exact = like if like.dtype == torch.float64 else like.float()  # of half precision there are no Gamma numbers on a CPU
        rate = exact.new_tensor(1 / self.scale)  # torch counts in rates
        law = torch.distributions.Gamma(exact.new_tensor(self.shape), rate, validate_args=False)
        levels: Tensor = law.sample(torch.Size((count,)))
        return levels.to(like.dtype)

    @property
    def span(self) -> tuple[float, float]:
        """The lowest and the highest level that training sees; of the Gamma law three standard deviations around the mean."""
        if self.law == "gamma":
            mean, deviation = self.shape * self.scale, self.shape**0.5 * self.scale
            return max(0.0, mean - 3 * deviation), mean + 3 * deviation
        return (0.0, self.high) if self.law == "uniform" else (self.sigma, self.sigma)


def add_noise(images: Tensor, sigma: Tensor | float, unit: Tensor) -> Tensor:
    """x + sigma / 255 z, not clamped.

    Args:
        images: x in [0, 1], (N, C, H, W).
        sigma: in grey levels, one number or one per image (N,).
        unit: z, Gaussian numbers of standard deviation 1, (N, C, H, W).
    """
    level = sigma.view(-1, 1, 1, 1) if isinstance(sigma, Tensor) else sigma
    return images + level / 255 * unit


def patchify(images: Tensor, size: int) -> Tensor:
    """Images (N, C, H, W) -> patches (N, L, size^2 C), row by row; within a patch rows, columns, and channels fastest.

    Raises:
        DataError: the size does not divide height and width.
    """
    count, channels, height, width = images.shape
    if height % size or width % size:
        raise DataError(f"Patches of {size} pixels do not fit images of {height} x {width}; resize the images.")
    grid = images.reshape(count, channels, height // size, size, width // size, size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(count, height * width // size**2, size * size * channels)


def unpatchify(patches: Tensor, size: int, shape: tuple[int, int, int]) -> Tensor:
    """The inverse of `patchify`: patches (N, L, size^2 C) -> images (N, C, H, W) of `shape` (C, H, W)."""
    channels, height, width = shape
    grid = patches.reshape(len(patches), height // size, width // size, size, size, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, width)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """mu and sqrt(v + 1e-6) of each patch (N, L, P), both (N, L, 1); v is the unbiased variance of its P values, P at least 2."""
    return patches.mean(dim=-1, keepdim=True), (patches.var(dim=-1, keepdim=True) + SMALLEST).sqrt()


def patch_errors(predicted: Tensor, images: Tensor, size: int, *, norm_pix: bool) -> Tensor:
    """Mean squared error of each patch, (N, L).

    Args:
        predicted: what is said of each patch, (N, L, size^2 C).
        images: the clean images (N, C, H, W).
        size: side of a patch.
        norm_pix: the truth of a patch is (t - mu) / sqrt(v + 1e-6) instead of its pixels t.

    Reference: He et al., CVPR 2022, arXiv 2111.06377; of noisy images: You et al., NeurIPS 2023, arXiv 2302.01056.
    """
    truth = patchify(images, size)
    if norm_pix:
        mean, scale = patch_statistics(truth)
        truth = (truth - mean) / scale
    return (predicted.to(truth.dtype) - truth).square().mean(dim=-1)


def kept_patches(numbers: Tensor, ratio: float) -> Tensor:
    """Which patches are not masked: the round((1 - ratio) L) with the smallest of the random `numbers` (N, L), at least one.

    Returns:
        Places (N, M).
    """
    count = max(1, round((1 - ratio) * numbers.shape[1]))
    return numbers.argsort(dim=1)[:, :count]


def masked_patches(kept: Tensor, patches: int) -> Tensor:
    """1 at each patch that is not among `kept` (N, M), else 0; (N, patches)."""
    return torch.ones(len(kept), patches, device=kept.device).scatter(1, kept, 0.0)
