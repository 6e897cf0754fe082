"""The two halves of knowledge distillation: how sure the target class is, and how the other classes share the rest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def target_divergence(target: Tensor, logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Target-class part, KL(b^t || b^s) between the two-way distributions b = (p_y, 1 - p_y).

    log b = (logsigmoid(l), logsigmoid(-l)) with l = z_y / tau - logsumexp_{k != y}(z_k / tau): no probability is ever formed,
    so a sure teacher gives no log(0).

    Args:
        target: the teacher's logits (N, K), K at least 2.
        logits: the student's (N, K).
        labels: class numbers y (N,).
        temperature: tau > 0.

    Returns:
        (N,) in nats.

    Reference: Zhao et al., CVPR 2022, arXiv 2203.08679, eq. (7).
    """
    odds_t, odds_s = (_log_odds(z / temperature, labels) for z in (target, logits))
    divergence = torch.zeros_like(odds_s)
    for sign in (1, -1):
        log_p, log_q = F.logsigmoid(sign * odds_t), F.logsigmoid(sign * odds_s)
        divergence = divergence + log_p.exp() * (log_p - log_q)
    return divergence


def rest_divergence(target: Tensor, logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Non-target part, KL between the softmax distributions over the K - 1 classes other than y.

    Args:
        target: the teacher's logits (N, K), K at least 2.
        logits: the student's (N, K).
        labels: class numbers y (N,).
        temperature: tau > 0.

    Returns:
        (N,) in nats; 0 for two classes.

    Reference: Zhao et al., CVPR 2022, arXiv 2203.08679, eq. (7).
    """
    log_p = F.log_softmax(_others(target, labels) / temperature, dim=1)
    log_q = F.log_softmax(_others(logits, labels) / temperature, dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


def standardised(logits: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Z-scores over the classes, (z - mean(z)) / (std(z) + eps), with the unbiased standard deviation of the authors' code.

    Args:
        logits: (N, K), K at least 2.
        eps: keeps equal logits finite.

    Returns:
        (N, K); the same after any shift and, up to eps, any positive scaling of the logits.

    Reference: Sun et al., CVPR 2024, arXiv 2403.01427.
    """
    std, mean = torch.std_mean(logits, dim=1, keepdim=True)
    return (logits - mean) / (std + eps)


def _others(logits: Tensor, labels: Tensor) -> Tensor:
    """The K - 1 logits other than the label's; gathered, for a mask added to the logits is not exact."""
    places = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    return logits.gather(1, places + (places >= labels[:, None]))


def _log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, None]).squeeze(1) - _others(logits, labels).logsumexp(dim=1)
