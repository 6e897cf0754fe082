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


def statistics_gap(inputs: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Distance of a batch's statistics from those that a normalisation has kept, ||mean_B - mean||_2 + ||var_B - var||_2, 0-d.

    Args:
        inputs: what the normalisation receives, (N, C) or (N, C, H, W).
        mean: running mean (C,).
        var: running variance (C,); the batch's is the biased one.
    """
    values = inputs.transpose(0, 1).flatten(1)
    own_var, own_mean = torch.var_mean(values, dim=1, correction=0)
    gap: Tensor = torch.linalg.vector_norm(own_mean - mean) + torch.linalg.vector_norm(own_var - var)
    return gap
