"""Crossover: a child that keeps what its first parent does better and learns from the second what that does better."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from overproof.evolution.individual import Buffers, Individual, Species, per_sample, row


def couples(mutated: Sequence[Individual], count: int) -> list[tuple[Individual, Individual]]:
    """The `count` pairs with the largest sums of scores, in each the fitter first."""
    found = [(a, b) if a.score >= b.score else (b, a) for a, b in combinations(mutated, 2)]
    return sorted(found, key=lambda pair: -(pair[0].score + pair[1].score))[:count]


def second_wins(first: Individual, second: Individual, margin: float = 0.0) -> Tensor:
    """On which noise the child learns from the second parent (M,): where the first is better by no more than `margin`."""
    assert first.values is not None
    assert second.values is not None
    return first.values - second.values <= margin


def pull_to_second(
    species: Species, first: Individual, second: Individual, noise: Tensor, *, margin: float = 0.0
) -> tuple[Tensor, Buffers]:
    """Gradient (P,) of the imitation loss at the first parent's weights, and the running statistics afterwards.

    grad_theta (1/MP) sum_i ||G_theta(z_i) - t_i||^2 = (2/MP) sum_{i: second wins} J_theta(z_i)^T (x_a,i - x_b,i)

    The child begins as the first parent, whose images are its targets wherever they win: those residuals are zero. Only the others
    go through the network, unless the images of a batch depend on each other.

    Args:
        species: the network.
        first: the fitter parent, evaluated on `noise`.
        second: the other, evaluated on the same noise.
        noise: (M, d).
        margin: see `second_wins`.
    """
    assert second.images is not None
    learns = second_wins(first, second, margin)
    rows = torch.arange(len(noise), device=noise.device) if species.coupled else learns.nonzero().flatten()
    if not len(rows):
        return torch.zeros_like(first.weights), first.buffers
    leaves = species.leaves(first)
    images, buffers = species.run(leaves, first.buffers, noise[rows])
    gap = images.detach() - second.images[rows]
    gap *= per_sample(learns[rows], gap)
    gap *= 2 / second.images.numel()
    return row(torch.autograd.grad(images, leaves, gap)), buffers


def cross(species: Species, first: Individual, second: Individual, noise: Tensor, *, margin: float = 0.0) -> Individual:
    """The child of two evaluated parents: one optimiser step of imitation from the first, with its moments.

    Even where the first wins everywhere the inherited moments move the child on.

    Args:
        all: see `pull_to_second`.
    """
    gradient, buffers = pull_to_second(species, first, second, noise, margin=margin)
    (child,) = species.children(first, gradient[None], ["crossover"], buffers)
    return child
