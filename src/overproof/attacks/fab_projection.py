"""The shortest way from points of the box [0, 1] onto hyperplanes, without sorting."""

from __future__ import annotations

import torch
from torch import Tensor

from overproof.attacks.threats import AnyNorm

_ROUNDS = 100


def to_hyperplane(points: Tensor, normals: Tensor, gaps: Tensor, norm: AnyNorm) -> Tensor:
    """Shortest d with <w, d> = gap and 0 <= x + d <= 1; where the box allows no such d, the one that comes nearest.

    With s = sign(gap * w) and the room u_i that pixel i has in direction s_i, the solution is d = s * min(u, level) for Linf
    and d = s * min(u, level * |w|) for L2; the level solves a concave, piecewise linear equation, on which Newton's method
    ends after few rounds, as it skips many breakpoints at once. For L1 the pixels with the largest |w| use up their room; the
    threshold is found by bisection.

    Args:
        points: (M, N, D) in [0, 1]: M points for each of N hyperplanes.
        normals: w, (N, D).
        gaps: what <w, d> shall be, (M, N).
        norm: "Linf", "L2" or "L1".

    Returns:
        (M, N, D).

    Reference: Croce and Hein, ICML 2020, arXiv 1907.02044, eq. (2).

    Differences from the paper: no sorting of the breakpoints; the result is the same.
    """
    size = normals.abs()
    # Only the direction matters: a normal of largest entry 1 keeps the squares of tiny gradients above the smallest float.
    scale = size.amax(dim=-1).clamp(min=torch.finfo(size.dtype).tiny)
    size, gaps = size / scale[:, None], gaps / scale
    signs = normals.sign() * torch.where(gaps < 0, -1, 1)[..., None].to(normals.dtype)
    room = torch.gt(signs, 0, out=torch.empty_like(points)).sub_(points).abs_()
    if norm == "Linf":
        return _filled(room, size, gaps.abs()).mul_(signs)
    if norm == "L2":
        reach = room.div_(size.clamp(min=torch.finfo(size.dtype).tiny ** 0.5))
        return _filled(reach, size * size, gaps.abs()).mul_(size).mul_(signs)
    return room.mul_(_used(room * size, size, gaps.abs())).mul_(signs)


def _filled(reach: Tensor, slopes: Tensor, gaps: Tensor) -> Tensor:
    """min(reach, level) with the smallest level at which sum slopes * min(reach, level) = gap."""
    # Tangents of a concave function lie above it: every round ends at or below the solution, and at least one breakpoint on.
    slopes = slopes.expand_as(reach)
    level = gaps / slopes.sum(dim=-1).clamp(min=torch.finfo(reach.dtype).tiny)
    close = 8 * torch.finfo(reach.dtype).eps * gaps
    buffer = torch.empty_like(reach)
    for _ in range(_ROUNDS):
        torch.minimum(reach, level[..., None], out=buffer)
        missing = gaps - torch.linalg.vecdot(buffer, slopes)
        short = (missing > close) & level.isfinite()
        if not bool(short.any()):
            break
        torch.gt(reach, level[..., None], out=buffer)
        level = torch.where(short, level + missing / torch.linalg.vecdot(buffer, slopes), level)
    return torch.minimum(reach, level[..., None], out=buffer)


def _used(gains: Tensor, size: Tensor, gaps: Tensor) -> Tensor:
    """Share of its room that each pixel uses: 1 above a threshold of `size`, 0 below, and the rest evenly on it."""
    low, high = torch.zeros_like(gaps), torch.ones_like(gaps)
    size = size.expand_as(gains)
    buffer = torch.empty_like(gains)
    for _ in range(24):
        middle = (low + high) / 2
        enough = torch.linalg.vecdot(torch.gt(size, middle[..., None], out=buffer), gains) >= gaps
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    above = torch.gt(size, high[..., None], out=buffer)
    missing = gaps - torch.linalg.vecdot(above, gains)
    edge = torch.gt(size, low[..., None], out=torch.empty_like(gains)).sub_(above)
    share = missing / torch.linalg.vecdot(edge, gains).clamp(min=torch.finfo(gains.dtype).tiny)
    return edge.mul_(share.clamp(0, 1)[..., None]).add_(above)
