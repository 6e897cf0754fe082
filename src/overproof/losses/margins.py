"""How far a classifier is from a decision, a value per sample; all grow as the attacker gets nearer to the goal."""

from __future__ import annotations

import torch
from torch import Tensor


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The best other logit minus the label's, max_{k != y} z_k - z_y: positive exactly where the image is misclassified.

    Args:
        logits: (N, K), K at least 2.
        labels: class numbers (N,).

    Returns:
        (N,) in logit units.

    Reference: Carlini and Wagner, S&P 2017, arXiv 1608.04644 (f_6 with the sign turned).
    """
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(dim=1) - own.squeeze(1)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, -(z_y - max_{k != y} z_k) / (z_pi1 - z_pi3), pi sorting the logits downwards.

    It does not change when the logits are shifted or scaled. With two classes there is no third logit; the second takes its
    place.

    Args:
        logits: (N, K), K at least 2.
        labels: class numbers (N,).

    Returns:
        (N,), at most 1, and between -1 and 0 where the image is classified correctly.

    Reference: Croce and Hein, ICML 2020, arXiv 2003.01690, eq. (6).
    """
    top = logits.topk(min(3, logits.shape[1]), dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, -1] + 1e-12)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_pi1 - (z_pi3 + z_pi4) / 2): moves from class y towards class t.

    Args:
        logits: (N, K), K at least 3; below four classes the last logit stands for the missing ones.
        labels: the classes to leave (N,).
        targets: the classes to reach (N,).

    Returns:
        (N,).

    Reference: Croce and Hein, ICML 2020, arXiv 2003.01690, eq. (7).
    """
    top = logits.topk(min(4, logits.shape[1]), dim=1).values
    third, fourth = top[:, min(2, top.shape[1] - 1)], top[:, -1]
    step = logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])
    return step.squeeze(1) / (top[:, 0] - (third + fourth) / 2 + 1e-12)
