"""Selection: who lives on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from overproof.evolution.individual import Individual


def select(
    candidates: Sequence[Individual], count: int, *, at_random: bool = False, stream: torch.Generator
) -> list[Individual]:
    """`count` of the candidates, the best first; of equals the earlier. A score that is no number is the worst.

    Args:
        candidates: evaluated individuals, at least `count`.
        count: how many live on.
        at_random: any of them instead: what remains of a result then is not owed to the fitness.
        stream: draws them.
    """
    if at_random:
        order = torch.randperm(len(candidates), generator=stream).tolist()
    else:
        worth = [-math.inf if math.isnan(candidate.score) else candidate.score for candidate in candidates]
        order = sorted(range(len(candidates)), key=lambda i: -worth[i])
    return [candidates[i] for i in order[:count]]


def shares(survivors: Sequence[Individual], origins: Sequence[str]) -> dict[str, float]:
    """The part of the survivors that each origin made; 0 for those that made none."""
    counts = Counter(survivor.origin for survivor in survivors)
    return {origin: counts[origin] / len(survivors) for origin in origins}
