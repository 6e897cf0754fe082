"""Weights averaged over the run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_avg_fn

from overproof.config import TrainConfig
from overproof.methods.objective import Objective
from overproof.networks import buffers_unchanged, unchanged
from overproof.types import Batch, Progress

STATISTICS = 20  # batches, at most, on which the running statistics of averaged weights are measured


def make_averaged(student: nn.Module, config: TrainConfig) -> AveragedModel | None:
    """The average of `student` that `config` asks for, or None.

    ema: w <- decay w + (1 - decay) student at each step; swa: the plain mean of the steps after the start. Buffers are averaged, too,
    but BatchNorm's statistics of many weights are not those of their mean: `measure_statistics` finds them.
    """
    if config.averaging == "none":
        return None
    if config.averaging == "ema":
        ema = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
        averaged = AveragedModel(student, multi_avg_fn=ema, use_buffers=True)
    else:
        # Tensor by tensor: the fused form cannot divide BatchNorm's whole-numbered counters on an accelerator.
        averaged = AveragedModel(student, avg_fn=get_swa_avg_fn(), use_buffers=True)  # type: ignore[no-untyped-call]
    return averaged.requires_grad_(False).eval()


def measure_statistics(
    averaged: AveragedModel, objective: Objective, batches: Iterable[Batch], *, progress: Progress, fabric: Any
) -> None:
    """Give averaged weights BatchNorm statistics of their own: plain means over `batches`, as the method shows them.

    A robust method shows adversarial images, crafted on the averaged weights. The student lends its place; its weights and
    buffers, and the method's, come back to the same bits.

    Args:
        averaged: whose running means and variances are written; left alone while it is empty.
        objective: the method, in train mode.
        batches: some of training.
        progress: where training stands.
        fabric: of the run; its processes share their means.
    """
    student, mean = objective.student, averaged.module
    norms = [(a, b) for a, b in zip(student.modules(), mean.modules(), strict=True) if _tracks(a) and _tracks(b)]
    if not norms or not int(averaged.n_averaged):
        return
    momenta: list[Any] = [norm.momentum for norm, _ in norms]
    with unchanged(student.parameters()), buffers_unchanged(objective, besides=objective.teacher), torch.no_grad():
        for ours, theirs in zip(_tensors(student), _tensors(mean), strict=True):
            ours.copy_(theirs)  # the averaged statistics serve the attack on the first batch, and go with it
        try:
            for norm, _ in norms:
                _set(norm, momentum=None)
                norm.get_buffer("num_batches_tracked").zero_()
            with fabric.autocast():
                for given in batches:
                    batch, seen = given.to(fabric.device), _seen(norms)
                    objective(batch, progress, objective.phases[0])
                    if _seen(norms) == seen:
                        student(batch.images)  # a stage in which the features stand still shows them nothing
        finally:
            for (norm, _), momentum in zip(norms, momenta, strict=True):
                _set(norm, momentum=momentum)
        for norm, own in norms:
            for name in ("running_mean", "running_var"):
                own.get_buffer(name).copy_(fabric.all_reduce(norm.get_buffer(name), reduce_op="mean"))


def _seen(norms: list[tuple[nn.Module, nn.Module]]) -> int:
    return int(torch.stack([norm.get_buffer("num_batches_tracked") for norm, _ in norms]).sum())


def _tracks(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _set(norm: nn.Module, *, momentum: float | None) -> None:
    """None: the running statistics are the plain mean of the batches since the counter was zero."""
    assert isinstance(norm, _BatchNorm)
    norm.momentum = momentum


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
