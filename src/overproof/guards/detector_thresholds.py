"""Joint thresholds from natural scores alone: one rank for all criteria, found by sorting."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from overproof.errors import UsageError


def suspicion(natural: Tensor, scores: Tensor) -> Tensor:
    """The most natural scores that any criterion of an image exceeds, R = max_i #{n : natural_in < score_i}.

    A common quantile q for all criteria is a common rank: with t_i the r-th smallest natural score of criterion i, some score
    exceeds its t_i exactly where R >= r. So one number per image holds the verdicts at every threshold.

    Args:
        natural: scores of natural images (k, n), k criteria.
        scores: of the images in question (k, N); NaN was not measured and counts as the least.

    Returns:
        Integers (N,), 0 to n.
    """
    below = torch.searchsorted(natural.to(scores.device).float().sort(dim=1).values, scores.float().contiguous())
    return below.masked_fill(scores.isnan(), 0).amax(dim=0)


def joint_rank(natural: Tensor, fpr: float) -> int:
    """The least rank r, 1 to n, at which at most the share `fpr` of the `natural` images (k, n) themselves is rejected."""
    joint = suspicion(natural, natural).sort(descending=True).values
    return int(joint[math.floor(fpr * len(joint) + 1e-9)]) + 1


def thresholds_at(natural: Tensor, rank: int) -> Tensor:
    """The rank-th smallest natural score of each criterion, (k,)."""
    return natural.float().sort(dim=1).values[:, rank - 1]


def parts_of(count: int, criteria: int, fpr: float, held_out: float) -> int:
    """How many of `count` natural images are held out, the rest being enough for thresholds at the rate `fpr`.

    Each of k criteria gets about fpr / k of the rate, which less than k / fpr images cannot resolve.

    Raises:
        UsageError: they are too few; says how many are needed.
    """
    held = max(math.floor(held_out * count), 1)
    needed = math.ceil(criteria / fpr - 1e-9)
    if count - held < needed:
        kept = count - held
        total = next(n for n in itertools.count(needed) if n - max(math.floor(held_out * n), 1) >= needed)
        lowest = math.ceil(1000 * criteria / max(kept, 1)) / 1000
        other = f", or ask for a rate of at least {lowest:g}" if lowest < 1 else ""
        raise UsageError(
            f"fpr={fpr:g} with {criteria} {'criterion' if criteria == 1 else 'criteria'} needs at least {total} natural images "
            f"that the model classifies rightly ({needed} for the thresholds, the others are held out); there are {count}. Give "
            f"more images{other}."
        )
    return held


def check_rate(fpr: float) -> float:
    """`fpr`, if it is a rate that can be wanted.

    Raises:
        UsageError: it is not in (0, 1).
    """
    if not 0 < fpr < 1:
        raise UsageError(f"fpr={fpr}: the wanted share of rejected natural images lies in (0, 1), such as 0.1.")
    return fpr
