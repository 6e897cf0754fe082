"""Distances between predicted distributions, a value per sample."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per sample, -sum_k y_k log softmax(z)_k.

    Args:
        logits: (N, K).
        labels: class numbers (N,), or class weights (N, K) after mixup or cutmix.

    Returns:
        (N,) in nats.
    """
    return F.cross_entropy(logits, labels, reduction="none")


def kl_divergence(target: Tensor, logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence per sample, KL(softmax(target / tau) || softmax(logits / tau)).

    The first argument is what is imitated. Nothing is detached here and tau^2 is not multiplied in: both belong to the
    method. The gradient with respect to `logits` is (softmax(logits / tau) - softmax(target / tau)) / tau.

    Args:
        target: logits (N, K) of the distribution to be imitated.
        logits: logits (N, K) of the imitator.
        temperature: tau > 0, applied to both.

    Returns:
        (N,) in nats, at least 0 up to rounding.
    """
    log_p = F.log_softmax(target / temperature, dim=1)
    log_q = F.log_softmax(logits / temperature, dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)
