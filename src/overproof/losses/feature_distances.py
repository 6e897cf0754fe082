"""Distances between feature maps, a value per sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from overproof.errors import UsageError

HALVES = (torch.float16, torch.bfloat16)
LEVELS = (4, 2, 1)


def wide(tensor: Tensor) -> Tensor:
    """Half precision as float32, all else as it is: squares and sums of features overflow sooner than logits."""
    return tensor.float() if tensor.dtype in HALVES else tensor


def squared_distance(student: Tensor, teacher: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Mean squared difference, mean_{c,h,w} q_hw (s - t)^2.

    Args:
        student: (N, ...).
        teacher: the same shape.
        weights: q, (N, 1, H, W), or None for 1 everywhere.

    Returns:
        (N,).

    Raises:
        UsageError: the shapes differ (they would be broadcast in silence).

    Reference: Romero et al., ICLR 2015, arXiv 1412.6550, eq. (3), as a mean instead of a sum.
    """
    if student.shape != teacher.shape:
        raise UsageError(
            f"Features of shapes {tuple(student.shape)} and {tuple(teacher.shape)} cannot be compared value by value. If adapters "
            "were built for another image size, give image_shape=(channels, height, width) of the training images."
        )
    gap = (wide(student) - wide(teacher)).square()
    if weights is not None:
        gap = gap * weights
    return gap.flatten(1).mean(dim=1)


def attention_map(feature: Tensor, *, power: float = 2.0) -> Tensor:
    """Where a network looks: mean_c |f_c|^p over the cells, scaled to length 1.

    Args:
        feature: (N, C, H, W).
        power: p > 0.

    Returns:
        (N, H * W); the same for any positive multiple of `feature`.

    Reference: Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928.
    """
    # The length cancels every factor, so dividing by the largest entry first is free and keeps small maps above the floor of
    # `normalize`.
    absolute = wide(feature).abs()
    scale = absolute.flatten(1).amax(dim=1).clamp_min(torch.finfo(absolute.dtype).tiny).detach()
    cells = (absolute / scale[:, None, None, None]).pow(power).mean(dim=1)
    return F.normalize(cells.flatten(1), dim=1)


def attention_distance(student: Tensor, teacher: Tensor, *, power: float = 2.0, weights: Tensor | None = None) -> Tensor:
    """Mean squared difference of the two attention maps; the larger map is average-pooled to the smaller one first.

    Args:
        student: (N, C_s, H_s, W_s).
        teacher: (N, C_t, H_t, W_t).
        power: p > 0.
        weights: of the cells, (N, 1, H_t, W_t), or None.

    Returns:
        (N,); the authors' code takes the same mean over the cells.

    Reference: Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928.
    """
    size = smaller_size(student, teacher)
    student, teacher = pooled(student, size), pooled(teacher, size)
    gap = (attention_map(student, power=power) - attention_map(teacher, power=power)).square()
    if weights is not None:
        gap = gap * pooled(weights, size).flatten(1)
    return gap.mean(dim=1)


def hierarchical_distance(student: Tensor, teacher: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Hierarchical context: mean squared differences of the full maps and of their averages over 4x4, 2x2 and 1x1 fields.

    d = sum_l w_l mse(pool_l(s), pool_l(t)) / sum_l w_l, with w = 1, 1/2, 1/4, ... over the levels that are smaller than the map.

    Args:
        student: (N, C, H, W).
        teacher: the same shape.
        weights: of the cells, (N, 1, H, W), or None.

    Returns:
        (N,).

    Reference: Chen et al., CVPR 2021, arXiv 2104.09044.
    """
    total, sum_of_weights, weight = squared_distance(student, teacher, weights=weights), 1.0, 1.0
    for level in LEVELS:
        if level >= student.shape[2]:
            continue
        weight /= 2
        size = (level, level)
        small = pooled(weights, size) if weights is not None else None
        total = total + weight * squared_distance(pooled(wide(student), size), pooled(wide(teacher), size), weights=small)
        sum_of_weights += weight
    return total / sum_of_weights


def gaussian_nll(mean: Tensor, target: Tensor, variance: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of the target under independent Gaussians, mean_{c,h,w} q ((t - mu)^2 / v + log v) / 2.

    The constant log(2 pi) / 2 is left out.

    Args:
        mean: mu, (N, C, H, W).
        target: t, the same shape.
        variance: v > 0, one for each channel (C,).
        weights: q, (N, 1, H, W), or None.

    Returns:
        (N,) in nats.

    Reference: Ahn et al., CVPR 2019, arXiv 1904.05835, eq. (4).
    """
    spread = wide(variance).view(1, -1, 1, 1)
    nll = ((wide(mean) - wide(target)).square() / spread + spread.log()) / 2
    if weights is not None:
        nll = nll * weights
    return nll.flatten(1).mean(dim=1)


def smaller_size(first: Tensor, second: Tensor) -> tuple[int, int]:
    """Height and width that both maps can be pooled to."""
    return min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3])


def pooled(feature: Tensor, size: tuple[int, int]) -> Tensor:
    """The map (N, C, H, W) averaged to `size`; itself if it has that size."""
    return feature if tuple(feature.shape[2:]) == size else F.adaptive_avg_pool2d(feature, size)
