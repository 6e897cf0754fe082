"""Numbers about predictions and about models."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from overproof.networks import in_mode


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error over 15 equal bins of confidence, in [0, 1] (torchmetrics)."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    probabilities = logits.softmax(dim=1)
    return float(multiclass_calibration_error(probabilities, labels, num_classes=logits.shape[1], n_bins=15))


def per_class(labels: np.ndarray, hits: np.ndarray, classes: int) -> list[float | None]:
    """Share of `hits` within each class; None for a class without samples."""
    count = np.bincount(labels, minlength=classes)
    hit = np.bincount(labels, weights=hits, minlength=classes)
    return [float(h / n) if n else None for h, n in zip(hit, count, strict=True)]


def multiply_adds(model: nn.Module, image: Tensor) -> int | None:
    """Multiply-accumulate operations of one forward pass on `image` (1, C, H, W); None if an operator defies counting."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    try:
        with in_mode(model), torch.no_grad(), counter:
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
