"""Distances between the relations that samples, or classes, have in a batch; a value per sample (or class)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from overproof.losses.feature_distances import wide


def distance_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """How differently the samples lie apart: mean_j huber(d^s_ij / mean d^s - d^t_ij / mean d^t), Euclidean d.

    Args:
        student: vectors (N, d_s); N at least 2.
        teacher: vectors (N, d_t).

    Returns:
        (N,), row i averaged over all j; the same for any rotation and scaling of either side.

    Reference: Park et al., CVPR 2019, arXiv 1904.05068, eq. (4)-(6).
    """
    return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher), reduction="none").mean(dim=1)


def angle_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """How differently the samples see each other: mean_jk huber(cos^s_jik - cos^t_jik), the angle at sample i.

    Args:
        student: vectors (N, d_s); N at least 2.
        teacher: vectors (N, d_t).

    Returns:
        (N,), averaged over all pairs (j, k). Memory grows with N^2 (N + d).

    Reference: Park et al., CVPR 2019, arXiv 1904.05068, eq. (7)-(8).
    """
    return F.smooth_l1_loss(_angles(student), _angles(teacher), reduction="none").flatten(1).mean(dim=1)


def similarity_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the batch's similarity matrices, mean_j (g^s_ij - g^t_ij)^2, rows of F F^T scaled to length 1.

    Args:
        student: features (N, ...), flattened.
        teacher: features (N, ...), flattened.

    Returns:
        (N,); its mean is the paper's sum over N^2.

    Reference: Tung and Mori, ICCV 2019, arXiv 1907.09682, eq. (1)-(4).
    """
    ours, theirs = (_similarities(feature) for feature in (student, teacher))
    return (ours - theirs).square().mean(dim=1)


def correlation_gap(student: Tensor, teacher: Tensor, *, eps: float = 1e-8) -> Tensor:
    """1 minus Pearson's correlation of corresponding rows.

    Args:
        student: (R, C): rows are samples for relations between classes, or classes (transposed) for those within a class.
        teacher: the same shape.
        eps: added to the product of the lengths.

    Returns:
        (R,) in [0, 2].

    Reference: Huang et al., NeurIPS 2022, arXiv 2205.10536, eq. (5)-(8).
    """
    ours, theirs = (wide(rows) - wide(rows).mean(dim=1, keepdim=True) for rows in (student, teacher))
    lengths: Tensor = torch.linalg.vector_norm(ours, dim=1) * torch.linalg.vector_norm(theirs, dim=1)
    return torch.sub(1.0, (ours * theirs).sum(dim=1) / (lengths + eps))


def _relative_distances(vectors: Tensor) -> Tensor:
    vectors = wide(vectors)
    gaps = (vectors[:, None] - vectors[None]).square().sum(dim=2)
    # The root has no slope at 0, where every sample meets itself: those entries stay 0 and take no part in the mean.
    apart = gaps > 0
    distances = torch.where(apart, gaps, torch.ones_like(gaps)).sqrt() * apart
    mean = (distances.sum() / apart.sum().clamp_min(1)).clamp_min(1e-12)
    return torch.div(distances, mean)


def _angles(vectors: Tensor) -> Tensor:
    vectors = wide(vectors)
    directions = F.normalize(vectors[None] - vectors[:, None], dim=2)
    return torch.matmul(directions, directions.transpose(1, 2))


def _similarities(feature: Tensor) -> Tensor:
    rows = wide(feature).flatten(1)
    # A common factor cancels; without it products of large maps overflow in half precision.
    rows = rows / rows.detach().norm(dim=1).amax().clamp_min(1e-12)
    return F.normalize(rows @ rows.T, dim=1)
