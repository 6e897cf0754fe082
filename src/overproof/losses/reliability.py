"""How far a teacher is right, and what a student does where it is not; a value per sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from overproof.losses.divergences import kl_divergence
from overproof.losses.feature_distances import wide


def log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Logarithm of the probability of the label, log softmax(z)_y.

    Args:
        logits: (N, K).
        labels: class numbers (N,), or class weights (N, K) after mixup or cutmix: then log sum_k y_k softmax(z)_k.

    Returns:
        (N,) in nats, at most 0 and finite for finite logits: where p itself would round to 0, its logarithm does not.
    """
    log_p = F.log_softmax(wide(logits), dim=1)
    if labels.dim() == 1:
        return log_p.gather(1, labels[:, None]).squeeze(1)
    return (log_p + labels.log()).logsumexp(dim=1).clamp(max=0)


def trust(logits: Tensor, labels: Tensor, *, beta: float, clean: Tensor | None = None) -> Tensor:
    """Weight of a teacher that gives the label the probability p, alpha = p^beta.

    Args:
        logits: the teacher's (N, K) on the images in question.
        labels: class numbers (N,), or class weights (N, K).
        beta: exponent, at least 0; 0 trusts wholly, and the larger, the less a doubtful answer counts.
        clean: the teacher's logits (N, K) on the untouched images; where they are wrong, alpha is 0. None: no such test.

    Returns:
        (N,) in [0, 1], without gradient.

    Reference: Zhu et al., ICLR 2022, arXiv 2106.04928.
    """
    with torch.no_grad():
        alpha = (beta * log_probability(logits, labels)).exp()
        return alpha if clean is None else alpha.masked_fill(clean.argmax(dim=1) != _classes(labels), 0)


def introspection(clean: Tensor, adversarial: Tensor, alpha: Tensor, *, detach: bool = False) -> Tensor:
    """What a student takes from itself where the teacher is not trusted, (1 - alpha) KL(softmax(clean) || softmax(adversarial)).

    Args:
        clean: the student's logits (N, K) on the untouched images.
        adversarial: its logits on the adversarial ones.
        alpha: trust in the teacher (N,), in [0, 1].
        detach: no gradient through `clean`; the value is the same.

    Returns:
        (N,) in nats.

    Reference: Zhu et al., ICLR 2022, arXiv 2106.04928.
    """
    return (1 - alpha) * kl_divergence(clean.detach() if detach else clean, adversarial)


def teacher_case(clean: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
    """Which of three cases an image is.

    Args:
        clean: the teacher's logits (N, K) on the untouched images.
        adversarial: its logits on the adversarial ones.
        labels: class numbers (N,), or class weights (N, K), of which the heaviest counts.

    Returns:
        (N,) integers: 0 right on the adversarial image (nearly always on the untouched one too), 1 right on the untouched one
        only, 2 right on neither.

    Reference: Zhu et al., ICLR 2022, arXiv 2106.04928.
    """
    right, before = (logits.argmax(dim=1) == _classes(labels) for logits in (adversarial, clean))
    return torch.where(right, 0, torch.where(before, 1, 2))


def _classes(labels: Tensor) -> Tensor:
    return labels if labels.dim() == 1 else labels.argmax(dim=1)
