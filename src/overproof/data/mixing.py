"""Augmentations that blend images of a batch, and their labels with them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from overproof.data.steps import draw, draw_seed, require


def _share(alpha: float, generator: Generator) -> float:
    """A draw from Beta(alpha, alpha); torch has none that takes a generator."""
    return float(np.random.default_rng(draw_seed(generator)).beta(alpha, alpha))


def _partners(images: Tensor, generator: Generator) -> Tensor:
    return torch.randperm(len(images), generator=generator, device=generator.device).to(images.device)


def _weights(labels: Tensor, classes: int) -> Tensor:
    """Class weights (N, K) from class numbers, or as they are."""
    return labels if labels.is_floating_point() else F.one_hot(labels, classes).float()


def _check_mix(name: str, alpha: float, classes: int) -> None:
    require(alpha > 0, f"{name}: alpha is {alpha}; give a value above 0.")
    require(classes > 0, f"{name} needs the number of classes, because it makes class weights of the labels.")


@dataclass(frozen=True)
class Mixup:
    """Blend each image and its label with those of another of the batch: lambda x + (1 - lambda) x'.

    Args:
        alpha: lambda is drawn from Beta(alpha, alpha) once per batch; above 0.
        classes: K; labels become class weights (N, K).

    Reference:
        Zhang, Cisse, Dauphin, Lopez-Paz: mixup: Beyond Empirical Risk Minimization, ICLR 2018. arXiv:1710.09412
    """

    alpha: float = 0.2
    classes: int = 0

    def __post_init__(self) -> None:
        _check_mix("mixup", self.alpha, self.classes)

    def __call__(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Blended images, and class weights (N, K)."""
        share, weights = _share(self.alpha, generator), _weights(labels, self.classes)
        other = _partners(images, generator)
        return torch.lerp(images[other], images, share), torch.lerp(weights[other], weights, share)


@dataclass(frozen=True)
class CutMix:
    """Paste a box of another image of the batch into each image; labels are weighted by the areas.

    The box covers the share 1 - lambda of the image around a random pixel; what lies beyond the border is cut off, and the
    labels' weights are those of the area that is left.

    Args:
        alpha: lambda is drawn from Beta(alpha, alpha) once per batch; above 0.
        classes: K; labels become class weights (N, K).

    Reference:
        Yun, Han, Oh, Chun, Choe, Yoo: CutMix, ICCV 2019. arXiv:1905.04899
    """

    alpha: float = 1.0
    classes: int = 0

    def __post_init__(self) -> None:
        _check_mix("cutmix", self.alpha, self.classes)

    def __call__(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Images with a foreign box, and class weights (N, K)."""
        side, weights = (1 - _share(self.alpha, generator)) ** 0.5, _weights(labels, self.classes)
        other = _partners(images, generator)
        (top, bottom), (left, right) = (_span(length, side, generator) for length in images.shape[2:])
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
        return mixed, torch.lerp(weights[other], weights, share)


def _span(length: int, share: float, generator: Generator) -> tuple[int, int]:
    """First and one past last pixel of `share` of `length` around a random pixel, cut off at the borders."""
    middle = int(draw(length, 1, generator, torch.device("cpu")))
    size = int(length * share)
    first = middle - size // 2
    return max(first, 0), min(first + size, length)
