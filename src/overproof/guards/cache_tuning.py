"""The whole grid of theta and lambda from one pass over the validation images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from overproof.errors import UsageError

# 37 values each over the ranges of the authors' search.
THETAS = tuple(torch.linspace(10, 90, 37, dtype=torch.double).tolist())
POOLED_THETAS = tuple(5 * theta for theta in THETAS)  # pooled features lie nearer to each other
LAMS = tuple(torch.linspace(0.1, 0.9, 37, dtype=torch.double).tolist())


def grid_search(
    answers: Iterable[tuple[Tensor, Tensor, Tensor]], thetas: Sequence[float], lams: Sequence[float]
) -> dict[str, Any]:
    """Accuracy of the network, of every mixture, and of the cache alone.

    Args:
        answers: batches of log p_net (N, K), log p_cache (T, N, K) for every theta, labels (N,).
        thetas: T inverse temperatures.
        lams: L mixture weights in [0, 1].

    Returns:
        "images", "network" (accuracy), "thetas", "lams", "mixture" (T rows of L accuracies), "cache" (T accuracies).

    Raises:
        UsageError: an empty grid, or values out of range.
    """
    if not thetas or not lams or min(thetas) < 0 or not 0 <= min(lams) <= max(lams) <= 1:
        raise UsageError(
            f"The grid thetas={list(thetas)}, lams={list(lams)} needs at least one theta >= 0 and one lambda in [0, 1]."
        )
    count, network = 0, 0
    mixture, cache = torch.zeros(len(thetas), len(lams), dtype=torch.long), torch.zeros(len(thetas), dtype=torch.long)
    for ours, theirs, labels in answers:
        ours, theirs = ours.exp(), theirs.exp()
        shares = torch.tensor(lams, dtype=ours.dtype, device=ours.device)[:, None, None]
        count, network = count + len(labels), network + int((ours.argmax(dim=1) == labels).sum())
        for row, shared in enumerate(theirs):
            hits = torch.lerp(ours[None], shared[None], shares).argmax(dim=2) == labels
            mixture[row] += hits.sum(dim=1).cpu()
        cache += (theirs.argmax(dim=2) == labels).sum(dim=1).cpu()
    if not count:
        raise UsageError("There is nothing to tune on: no image was given.")
    return {
        "images": count,
        "network": network / count,
        "thetas": list(thetas),
        "lams": list(lams),
        "mixture": (mixture.double() / count).tolist(),
        "cache": (cache.double() / count).tolist(),
    }


def best_of(found: dict[str, Any], *, alone: bool) -> tuple[float, float]:
    """(theta, lambda) of the highest accuracy; of several, the one in their middle. With `alone`, lambda is 1."""
    scores = torch.tensor(found["cache"] if alone else found["mixture"], dtype=torch.double)
    ties = (scores == scores.max()).nonzero()
    place = ties[len(ties) // 2].tolist()
    return found["thetas"][place[0]], 1.0 if alone else found["lams"][place[1]]
