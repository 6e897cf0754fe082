"""How items vote: per class the logarithm of a sum of exponentials, block by block, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from overproof.guards.cache_items import Items

QUERIES = 1024  # compared at a time: what is in work stays in the processor's cache
FLOOR = -200.0  # log-probability of a class without an item: finite, and zero as a probability in single precision
SILENT = -1e4  # a logarithm that weighs nothing


def sweep(queries: Tensor, items: Items, thetas: Sequence[float], block: int) -> Tensor:
    """E_tnc = log sum_{i: y_i = c} n_i exp(theta_t q_n . k_i), for several theta from one comparison.

    Args:
        queries: (N, D) of length one.
        items: the cache.
        thetas: T inverse temperatures.
        block: keys in work at a time; memory grows with it, not with the number of items.

    Returns:
        (T, N, K), minus infinity for a class without items.
    """
    found = queries.new_full((len(thetas), len(queries), len(items.ends)), -math.inf)
    for start, keys in items.blocks(block, queries.dtype):
        weights = items.weights[start : start + len(keys)].to(queries.dtype)
        for rows, part in _chunks(queries):
            similarity = part @ keys.T
            for label, range_ in items.classes_in(start, start + len(keys)):
                for number, theta in enumerate(thetas):
                    sums = _log_sum(similarity[:, range_] * theta, weights[range_])
                    found[number, rows, label] = torch.logaddexp(found[number, rows, label], sums)
    return found


def _chunks(queries: Tensor) -> list[tuple[slice, Tensor]]:
    starts = range(0, len(queries), QUERIES)
    return [(slice(start, start + QUERIES), queries[start : start + QUERIES]) for start in starts]


def _log_sum(exponents: Tensor, weights: Tensor) -> Tensor:
    """log sum_i exp(exponents_i + weights_i) over the last dimension, in the memory of `exponents`."""
    if len(weights):
        exponents += weights
    top = exponents.amax(dim=1)
    return exponents.sub_(top[:, None]).exp_().sum(dim=1).log_().add_(top)


class _AllItems(torch.autograd.Function):
    """dE_c/dq = theta sum_{i: y_i = c} exp(theta q . k_i + log n_i - E_c) k_i, computed block by block again."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, items: Items, theta: float, block: int) -> Tensor:
        evidence = sweep(queries, items, (theta,), block)[0]
        ctx.save_for_backward(queries, evidence)
        ctx.items, ctx.theta, ctx.block = items, theta, block
        return evidence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        queries, evidence = ctx.saved_tensors
        found = torch.zeros_like(queries)
        for start, keys in ctx.items.blocks(ctx.block, queries.dtype):
            weights = ctx.items.weights[start : start + len(keys)].to(queries.dtype)
            for rows, part in _chunks(queries):
                shares = (part @ keys.T).mul_(ctx.theta)
                shares = shares.add_(weights) if len(weights) else shares
                for label, range_ in ctx.items.classes_in(start, start + len(keys)):
                    factor = ctx.theta * gradient[rows, label, None]
                    shares[:, range_].sub_(evidence[rows, label, None]).exp_().mul_(factor)
                found[rows].addmm_(shares, keys)
        return found, None, None, None


class _NearestItems(torch.autograd.Function):
    """The same over the items that were found to be nearest."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, items: Items, rows: Tensor, exponents: Tensor, theta: float) -> Tensor:
        evidence = gathered(exponents, items.labels[rows], len(items.ends))
        ctx.save_for_backward(queries, rows, exponents, evidence)
        ctx.items, ctx.theta = items, theta
        return evidence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        queries, rows, exponents, evidence = ctx.saved_tensors
        labels, found = ctx.items.labels[rows], torch.zeros_like(queries)
        shares = (exponents - evidence.gather(1, labels)).exp_().mul_(ctx.theta * gradient.gather(1, labels))
        for place in range(rows.shape[1]):  # one neighbour of each query at a time: memory of N keys
            found.addcmul_(shares[:, place, None], ctx.items.take(rows[:, place], queries.dtype))
        return found, None, None, None, None


def gathered(exponents: Tensor, labels: Tensor, classes: int) -> Tensor:
    """log sum_{j: y_nj = c} exp(e_nj), (N, K), of exponents (N, k) with their classes (N, k)."""
    top = exponents.new_full((len(exponents), classes), -math.inf).scatter_reduce(1, labels, exponents, "amax")
    parts = (exponents - top.gather(1, labels)).exp()
    sums = torch.zeros_like(top).scatter_add_(1, labels, parts)
    return torch.where(sums > 0, sums.log() + top, top)


def nearest(queries: Tensor, items: Items, count: int, block: int) -> tuple[Tensor, Tensor]:
    """Similarities (N, k) and rows (N, k) of the `count` nearest items, the nearest first."""
    count = min(count, len(items))
    if items.index is not None:
        near: tuple[Tensor, Tensor] = items.index.search(queries, count)
        return near
    best = queries.new_full((len(queries), 0), -math.inf)
    rows = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start, keys in items.blocks(block, queries.dtype):
        numbers = torch.arange(start, start + len(keys), device=queries.device).expand(len(queries), -1)
        candidates, rows = torch.cat([best, queries @ keys.T], dim=1), torch.cat([rows, numbers], dim=1)
        best, where = candidates.topk(min(count, candidates.shape[1]), dim=1)
        rows = rows.gather(1, where)
    return best, rows


def sweep_nearest(queries: Tensor, items: Items, thetas: Sequence[float], block: int, count: int) -> Tensor:
    """The same, (T, N, K), from the `count` nearest items alone."""
    similarity, rows = nearest(queries, items, count, block)
    weights = items.weights[rows].to(queries.dtype) if len(items.weights) else 0.0
    labels = items.labels[rows]
    return torch.stack([gathered(_votes(similarity, theta) + weights, labels, len(items.ends)) for theta in thetas])


def evidence_of_all(queries: Tensor, items: Items, theta: float, block: int) -> Tensor:
    """E_nc of all items, (N, K), differentiable in the queries with memory for one block."""
    found: Tensor = _AllItems.apply(queries, items, theta, block)
    return found


def evidence_of_nearest(queries: Tensor, items: Items, theta: float, block: int, count: int) -> tuple[Tensor, Tensor]:
    """E_nc of the `count` nearest items, (N, K), and a bound (N,) on what that changes.

    With s_k the least similarity among those kept, what is left out weighs at most (sum_i n_i - sum_kept n_i) exp(theta s_k);
    relative to what is kept this bounds the total variation between both distributions. It is never larger than the bound
    (M - k) exp(-theta (s_1 - s_k)), and holds if the search for neighbours is exact.
    """
    with torch.no_grad():
        similarity, rows = nearest(queries.detach(), items, count, block)
        exponents = _votes(similarity, theta)
        kept = exponents.new_full((len(queries),), rows.shape[1])
        total = float(len(items))
        if len(items.weights):
            exponents = exponents + items.weights[rows].to(queries.dtype)
            kept, total = items.weights[rows].exp().sum(dim=1).to(queries.dtype), float(items.weights.double().exp().sum())
        missing = (total - kept).clamp(min=0).log() + theta * similarity[:, -1]
        bound = (missing - exponents.logsumexp(dim=1)).exp().clamp(max=1)
        bound = torch.where(similarity[:, -1] < -1.5, torch.ones_like(bound), bound)  # cells were left out
    found: Tensor = _NearestItems.apply(queries, items, rows, exponents, theta)
    return found, bound


def _votes(similarity: Tensor, theta: float) -> Tensor:
    """The exponents; an index that found nobody further (a similarity of -2) says nothing."""
    return torch.where(similarity < -1.5, SILENT, theta * similarity)


def log_shares(evidence: Tensor, classes: int) -> Tensor:
    """log p_cache (..., K) = log_softmax of the evidence; a class without items gets the log-probability -200."""
    evidence = pad(evidence, (0, classes - evidence.shape[-1]), value=-math.inf)
    shares = evidence.log_softmax(dim=-1)
    return torch.where(evidence.isneginf(), FLOOR, shares)
