"""What is asked of images that a generator makes of noise, and how far two networks are apart on them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def absolute_difference(target: Tensor, logits: Tensor) -> Tensor:
    """Mean absolute difference of the logits per sample, (1/K) sum_k |t_k - s_k|.

    Its gradient has a constant size, sign(s - t) / K: it does not vanish as the student comes near.

    Args:
        target: (N, K), nothing is detached.
        logits: (N, K).

    Returns:
        (N,).
    """
    return (target - logits).abs().flatten(1).mean(dim=1)


def squared_difference(target: Tensor, logits: Tensor) -> Tensor:
    """Mean squared difference of the logits per sample, (1/K) sum_k (t_k - s_k)^2; arguments as in `absolute_difference`."""
    return (target - logits).square().flatten(1).mean(dim=1)


def imbalance(logits: Tensor) -> Tensor:
    """How unequally a batch uses the classes: sum_k p_k log p_k with p the mean of the softmax over the batch, 0-d.

    It is least, -log K, where all classes are predicted equally often. In logarithms throughout: a class that nobody predicts
    gives no NaN.
    """
    log_mean = logits.log_softmax(dim=1).logsumexp(dim=0) - math.log(len(logits))
    return (log_mean.exp() * log_mean).sum()


def batch_statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, both (C,), of what a normalisation receives, (N, C) or (N, C, H, W)."""
    var, mean = torch.var_mean(inputs.transpose(0, 1).flatten(1), dim=1, correction=0)
    return mean, var


def statistics_gap(own: tuple[Tensor, Tensor], mean: Tensor, var: Tensor) -> Tensor:
    """Distance of statistics from those that a normalisation has kept, ||own mean - mean||_2 + ||own var - var||_2, 0-d.

    Args:
        own: of a batch, see `batch_statistics`.
        mean: running mean (C,).
        var: running variance (C,).
    """
    gap: Tensor = torch.linalg.vector_norm(own[0] - mean) + torch.linalg.vector_norm(own[1] - var)
    return gap


def relative_discrepancy(target: Tensor, logits: Tensor) -> Tensor:
    """mean |s - t| / mean |t|, 0-d, of logits (N, K) without their mean over the classes, which no probability depends on."""
    t, s = (z - z.mean(dim=1, keepdim=True) for z in (in_full(target.detach()), in_full(logits.detach())))
    return (s - t).abs().mean() / t.abs().mean().clamp_min(1e-12)


def in_full(values: Tensor) -> Tensor:
    """Distances of half-precision logits are taken in float32."""
    return values if values.dtype == torch.float64 else values.float()
