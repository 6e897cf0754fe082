"""What generators and discriminators want, on raw logits: a value per sample; for generators also its slope in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Pairs = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class GeneratorLoss:
    """A generator's loss l(d, r) of the logits d (N,) of its images, and its slope dl/dd.

    Args:
        value: l per sample (N,).
        slope: dl/dd per sample (N,), so that one pass through networks serves any number of losses.
        relative: whether it looks at the logits r (N,) of real images.
    """

    value: Pairs
    slope: Pairs
    relative: bool = False


def _pull_sigmoid(d: Tensor, r: Tensor) -> Tensor:
    p = d.sigmoid()
    return 2 * (p - 1) * p * (1 - p)


GENERATOR_LOSSES: dict[str, GeneratorLoss] = {
    "minimax": GeneratorLoss(lambda d, r: -F.softplus(d), lambda d, r: -d.sigmoid()),
    "heuristic": GeneratorLoss(lambda d, r: F.softplus(-d), lambda d, r: -(-d).sigmoid()),
    "least-squares": GeneratorLoss(lambda d, r: (d - 1).square(), lambda d, r: 2 * (d - 1)),
    "least-squares-sigmoid": GeneratorLoss(lambda d, r: (d.sigmoid() - 1).square(), _pull_sigmoid),
    "wgan": GeneratorLoss(lambda d, r: -d, lambda d, r: -torch.ones_like(d)),
    "relativistic": GeneratorLoss(lambda d, r: F.softplus(r - d), lambda d, r: -(r - d).sigmoid(), relative=True),
}
"""By name, with p = sigmoid(d): log(1 - p); -log p; (d - 1)^2; (p - 1)^2; -d; -log sigmoid(d - r)."""

DISCRIMINATOR_LOSSES: dict[str, Pairs] = {
    "vanilla": lambda d, r: F.softplus(-r) + F.softplus(d),
    "least-squares": lambda d, r: (r - 1).square() + d.square(),
    "wgan": lambda d, r: d - r,
    "relativistic": lambda d, r: F.softplus(d - r),
}
"""By name, of the logits d of generated and r of real images, both (N,), a value per pair (N,)."""


def gradient_penalty(discriminator: Callable[[Tensor], Tensor], between: Tensor) -> Tensor:
    """How far the discriminator's slope is from one.

    (||grad_x D(x)||_2 - 1)^2

    Args:
        discriminator: images -> logits (N,).
        between: images (N, ...) on the segments between real and generated ones.

    Returns:
        A value per sample (N,), with a graph through the discriminator's weights.

    Reference: Gulrajani et al.: Improved Training of Wasserstein GANs, NeurIPS 2017, arXiv 1704.00028.
    """
    points = between.detach().requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(points).sum(), points, create_graph=True)
    size: Tensor = torch.linalg.vector_norm(slope.flatten(1), dim=1)
    return (size - 1).square()
