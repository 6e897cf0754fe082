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

    It does not change when the logits are shifted or scaled. With two classes there is no third logit and the ratio would be
    constant, its gradient zero: the numerator alone is returned, the margin.

    Args:
        logits: (N, K), K at least 2.
        labels: class numbers (N,).

    Returns:
        (N,); from three classes on at most 1, and between -1 and 0 where the image is classified correctly.

    Reference: Croce and Hein, ICML 2020, arXiv 2003.01690, eq. (6).
    """
    if logits.shape[1] < 3:
        return margin(logits, labels)
    top = logits.topk(3, dim=1)
    best_other = torch.where(top.indices[:, 0] == labels, top.values[:, 1], top.values[:, 0])
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return (best_other - own) / (top.values[:, 0] - top.values[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """-(z_y - z_t) / (z_pi1 - (z_pi3 + z_pi4) / 2): moves from class y towards class t.

    Below four classes there is no fourth logit, and the ratio is constant where t comes last: the numerator alone is
    returned.

    Args:
        logits: (N, K), K at least 2.
        labels: the classes to leave (N,).
        targets: the classes to reach (N,).

    Returns:
        (N,).

    Reference: Croce and Hein, ICML 2020, arXiv 2003.01690, eq. (7).
    """
    gap = (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)
    if logits.shape[1] < 4:
        return gap
    top = logits.topk(4, dim=1).values
    return gap / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)
