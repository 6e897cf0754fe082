"""Optimisers by name, and the learning rate as a pure function of the step: nothing to save, nothing to drift."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from overproof.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Learning rate at optimiser step `step` (zero-based) of `total`.

    cosine: lr (1 + cos(pi t)) / 2; multi-step: lr gamma^(milestones passed); one-cycle: up to lr over the first 30 %,
    then down to lr / 1e4 by cosine; constant: lr. t in [0, 1] is the share of the training done. Warm-up multiplies by
    (step + 1) / warm-up steps.
    """
    done = step / max(total, 1)
    if config.schedule == "cosine":
        factor = (1 + math.cos(math.pi * done)) / 2
    elif config.schedule == "multi-step":
        factor = config.gamma ** sum(done >= milestone for milestone in config.milestones)
    elif config.schedule == "one-cycle":
        factor = _one_cycle(done)
    else:
        factor = 1.0
    warmup = config.warmup * total / config.epochs
    return config.lr * factor * min(1.0, (step + 1) / warmup if warmup else 1.0)


def _one_cycle(done: float, rise: float = 0.3, first: float = 1 / 25, last: float = 1e-4) -> float:
    low, part = (first, 1 - done / rise) if done < rise else (last, (done - rise) / (1 - rise))
    return low + (1 - low) * (1 + math.cos(math.pi * part)) / 2


def make_optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter | dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser named in `config` over `parameters`, or over groups of them with options of their own."""
    groups: list[Any] = list(parameters)
    decay = config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups, config.lr, config.momentum, weight_decay=decay, nesterov=config.nesterov and config.momentum > 0
        )
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, config.lr, momentum=config.momentum, weight_decay=decay)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, config.lr, betas=config.betas, weight_decay=decay)
