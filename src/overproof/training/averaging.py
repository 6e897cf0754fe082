"""Weights averaged over the run."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_avg_fn

from overproof.config import TrainConfig


def make_averaged(student: nn.Module, config: TrainConfig) -> AveragedModel | None:
    """The average of `student` that `config` asks for (buffers too, so that BatchNorm fits the weights), or None.

    ema: w <- decay w + (1 - decay) student at each step; swa: the plain mean of the steps after the start.
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
