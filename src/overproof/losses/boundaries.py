"""Where two classes meet, and how alike two networks draw that line; a value per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from overproof.losses.feature_distances import wide


def boundary_gap(logits: Tensor, base: Tensor, target: Tensor) -> Tensor:
    """How far one class is ahead of another, z_b - z_k: zero on the boundary between the two.

    Args:
        logits: (N, K).
        base: classes b (N,).
        target: classes k (N,).

    Returns:
        (N,) in logit units, float32 at least: near the boundary the difference of two half-precision numbers is noise.

    Reference: Heo et al., AAAI 2019, arXiv 1805.05532.
    """
    logits = wide(logits)
    return (logits.gather(1, base[:, None]) - logits.gather(1, target[:, None])).squeeze(1)


def discrepancy(target: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """How differently two networks spread what they leave to the wrong classes, sum_{k != y} (q^T_k - q^S_k)^2.

    Args:
        target: the teacher's logits (N, K); q^T is their softmax.
        logits: the student's (N, K).
        labels: class numbers y (N,).

    Returns:
        (N,) in [0, 2]; 0 where both give the same probabilities.

    Reference: Heo et al., AAAI 2019, arXiv 1805.05532.
    """
    gap = wide(target).softmax(dim=1) - wide(logits).softmax(dim=1)
    return gap.scatter(1, labels[:, None], 0).square().sum(dim=1)


def length_similarity(first: Tensor, second: Tensor) -> Tensor:
    """How alike two changes are in size, min(||u||, ||v||) / max(||u||, ||v||), Euclidean; averaged: MagSim.

    Args:
        first: u, (N, ...).
        second: v, the same shape.

    Returns:
        (N,) in [0, 1]; 0 where one of them is zero.

    Reference: Heo et al., AAAI 2019, arXiv 1805.05532.
    """
    ours, theirs = _lengths(first), _lengths(second)
    return torch.minimum(ours, theirs) / torch.maximum(ours, theirs).clamp(min=torch.finfo(ours.dtype).tiny)


def direction_similarity(first: Tensor, second: Tensor) -> Tensor:
    """How alike two changes are in direction, <u, v> / (||u|| ||v||); averaged: AngSim.

    Args:
        first: u, (N, ...).
        second: v, the same shape.

    Returns:
        (N,) in [-1, 1]; 0 where one of them is zero.

    Reference: Heo et al., AAAI 2019, arXiv 1805.05532.
    """
    units = []
    for change in (first, second):
        length = _lengths(change).clamp(min=torch.finfo(change.dtype).tiny)
        units.append(change.flatten(1) / length[:, None])
    return (units[0] * units[1]).sum(dim=1).clamp(-1, 1)


def _lengths(change: Tensor) -> Tensor:
    lengths: Tensor = change.flatten(1).norm(dim=1)
    return lengths
