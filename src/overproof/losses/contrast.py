"""Contrastive bounds on the information two embeddings share, a value per sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def noise_contrast(positive: Tensor, negatives: Tensor, log_noise: Tensor | float, *, keep: Tensor | None = None) -> Tensor:
    """Noise-contrastive estimation, -log h(+) - sum_j log(1 - h(-_j)) with the critic h = e^u / (e^u + e^c).

    Computed as softplus(c - u_+) + sum_j softplus(u_j - c): nothing is exponentiated that could overflow.

    Args:
        positive: u of the pair that belongs together, log scores (N,).
        negatives: u of the others (N, m).
        log_noise: c = log(m / M) for m negatives drawn from M samples; a number or (N,).
        keep: which negatives count (N, m), or None for all.

    Returns:
        (N,) in nats; log(1 + m) + m log(1 + 1/m) where all u equal -log M. log m minus its mean bounds the mutual information
        from below.

    Reference: Tian, Krishnan, Isola, ICLR 2020, arXiv 1910.10699, eq. (17)-(18).
    """
    noise = torch.as_tensor(log_noise, dtype=positive.dtype, device=positive.device)
    others = F.softplus(negatives - (noise[:, None] if noise.dim() else noise))
    if keep is not None:
        others = others * keep
    return F.softplus(noise - positive) + others.sum(dim=1)


def info_nce(anchors: Tensor, candidates: Tensor, *, temperature: float, keep: Tensor | None = None) -> Tensor:
    """Cross-entropy of finding one's own partner in the batch, -log softmax_j(a_i . c_j / tau)_i.

    Args:
        anchors: unit vectors (N, d).
        candidates: unit vectors (N, d); row i belongs to anchor i.
        temperature: tau > 0.
        keep: which candidates anchor i is compared with (N, N), the diagonal True; None for all.

    Returns:
        (N,) in nats; log N where all vectors are equal. log N minus its mean bounds the mutual information from below.

    Reference: van den Oord, Li, Vinyals, 2018, arXiv 1807.03748.
    """
    scores = anchors @ candidates.T / temperature
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    return scores.logsumexp(dim=1) - scores.diagonal()


def candidates_in(labels: Tensor, *, same_class: bool = False) -> Tensor:
    """Whom each image of a batch is compared with: itself, and the images of other classes.

    Other images of its own class are no true negatives: their features ought to be alike.

    Args:
        labels: class numbers (N,).
        same_class: compare with those too.

    Returns:
        (N, N), boolean, the diagonal True: `keep` of `info_nce`.
    """
    keep = labels[:, None] != labels
    return (keep | same_class).fill_diagonal_(True)


def weighted(values: Tensor, weights: Tensor, *, normalise: bool = True) -> Tensor:
    """Values whose plain mean is the weighted one, N w_n v_n / sum w; without `normalise` w_n v_n.

    Args:
        values: (N,).
        weights: (N,), at least 0, without gradient.
        normalise: equal weights then change nothing, whatever their size. Where all are 0, so is the result.

    Returns:
        (N,).
    """
    weights = weights.to(values.dtype)
    if normalise:
        weights = weights * (len(weights) / weights.sum().clamp_min(torch.finfo(weights.dtype).eps))
    return weights * values
