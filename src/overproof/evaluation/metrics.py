"""Numbers about predictions and about models."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from overproof.evaluation.intervals import Z as Z
from overproof.evaluation.intervals import wilson as wilson
from overproof.networks import in_mode


class Estimate(float):
    """A share, printed in % with half the width of its 95 % interval."""

    half: float

    def __new__(cls, value: float, half: float) -> Estimate:
        made = super().__new__(cls, value)
        made.half = half
        return made

    def __format__(self, spec: str) -> str:
        return f"{100 * float(self):.1f} ± {100 * self.half:.1f} %"


def surviving(stages: Iterable[tuple[int, int]]) -> Estimate:
    """The share that survives all stages, from (met, lost) of each: their product, with Greenwood's interval.

    Images that still wait for a later stage count where they have been, so the estimate is not drawn to either side.
    """
    share, spread, fewest = 1.0, 0.0, 0
    for met, lost in stages:
        if met:
            share *= 1 - lost / met
            spread += lost / (met * (met - lost)) if lost < met else 0.0
            fewest = met
    low, high = wilson(share * fewest, fewest)
    return Estimate(share, max(Z * share * spread**0.5, (high - low) / 2 if share in (0.0, 1.0) else 0.0))


def quantile(values: np.ndarray, share: float) -> float:
    """The quantile of `values`, some of which may be infinite: linear between neighbours, as in NumPy."""
    ordered = np.sort(values)
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return float(low if low == high else low + (high - low) * (place - math.floor(place)))


def roc(negative: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of negatives and of positives with a score of at least s, for falling s: from (0, 0) to (1, 1)."""
    levels = np.unique(np.concatenate([negative, positive]))[::-1]
    shares = [1 - np.searchsorted(np.sort(part), levels) / max(len(part), 1) for part in (negative, positive)]
    return np.concatenate([[0.0], shares[0]]), np.concatenate([[0.0], shares[1]])


def area(false: np.ndarray, true: np.ndarray) -> float:
    """Area under such a curve: how often a positive has the higher score than a negative, ties counting half."""
    return float(np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2))


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error over equal bins of confidence, in [0, 1].

    Reference: Guo, Pleiss, Sun, Weinberger, ICML 2017, arXiv 1706.04599.
    """
    places = np.clip(
        np.searchsorted(np.linspace(0, 1, bins + 1, dtype=confidence.dtype), confidence, side="right") - 1, 0, bins
    )
    gaps = np.bincount(places, weights=right.astype(float) - confidence, minlength=bins + 1)
    return float(np.abs(gaps).sum() / max(len(right), 1))


def per_class(labels: np.ndarray, hits: np.ndarray, classes: int) -> list[float | None]:
    """Share of `hits` within each class; None for a class without samples."""
    count = np.bincount(labels, minlength=classes)
    hit = np.bincount(labels, weights=hits, minlength=classes)
    return [float(h / n) if n else None for h, n in zip(hit, count, strict=True)]


def multiply_adds(model: nn.Module, image: Tensor) -> int | None:
    """Multiply-accumulate operations of one forward pass on `image` (1, C, H, W); None if an operator defies counting."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    try:
        # Fused attention is one operator, which nobody counts on a CPU.
        with in_mode(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(image)
    except (RuntimeError, NotImplementedError, TypeError, AssertionError):
        return None
    return counter.get_total_flops() // 2


def latency(model: nn.Module, image: Tensor, *, repeats: int = 20, seconds: float = 2.0) -> dict[str, Any]:
    """Milliseconds of a forward pass on one image: median over up to `repeats` after three warm-up passes."""
    times: list[float] = []
    with in_mode(model), torch.no_grad():
        started = time.perf_counter()
        for turn in range(repeats + 3):
            begin = time.perf_counter()
            model(image)
            if image.is_cuda:
                torch.cuda.synchronize(image.device)
            if turn >= 3:
                times.append(1e3 * (time.perf_counter() - begin))
            if times and time.perf_counter() - started > seconds:
                break
    return {"batch": 1, "median": float(np.median(times)), "repeats": len(times)}
