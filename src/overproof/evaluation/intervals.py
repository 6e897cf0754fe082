"""How sure a share or a difference is. Nothing here needs torch."""

from __future__ import annotations

import numpy as np

Z = 1.959964  # of a 95 % interval
_T = (
    12.7062,
    4.3027,
    3.1824,
    2.7764,
    2.5706,
    2.4469,
    2.3646,
    2.3060,
    2.2622,
    2.2281,
)  # the same for 1 to 10 degrees of freedom


def wilson(hits: float, count: int) -> list[float]:
    """The 95 % interval of a share by Wilson's score: low, high; [0, 1] where nothing was counted."""
    if not count:
        return [0.0, 1.0]
    share, z = hits / count, Z / count**0.5
    middle, half = share + z * z / 2, z * (share * (1 - share) + z * z / 4) ** 0.5
    return [max((middle - half) / (1 + z * z), 0.0), min((middle + half) / (1 + z * z), 1.0)]


def paired(differences: np.ndarray) -> list[float]:
    """The 95 % interval of the difference of two accuracies on the same images, honest for few images too.

    One image more is taken to be gained and one lost, as Bonett and Price propose. The errors over images and, with several seeds, over
    these (by Student's t) are added as if they were independent.

    Args:
        differences: (S, N) by seed and image: 1 where only the first model is right, -1 where only the second is, else 0.

    Reference: Bonett and Price, Journal of Educational and Behavioral Statistics 37, 2012.
    """
    seeds, images = differences.shape
    by_image, count = differences.mean(axis=0), images + 2
    middle = float(by_image.sum()) / count
    variance = (float((by_image**2).sum()) + 2) / count - middle**2
    half = Z**2 * variance / count
    if seeds > 1:
        half += student(seeds - 1) ** 2 * float(differences.mean(axis=1).var(ddof=1)) / seeds
    return [max(middle - half**0.5, -1.0), min(middle + half**0.5, 1.0)]


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with `freedom` degrees of freedom, at least 1, to three decimals."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    # Cornish and Fisher's expansion in 1 / freedom.
    first, second = (Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / freedom + second / freedom**2 + third / freedom**3
