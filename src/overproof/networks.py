"""Borrowing a network: whatever is changed about it for a while is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn


@contextmanager
def in_mode(model: nn.Module, mode: Literal["eval", "train", "keep"] = "eval") -> Iterator[None]:
    """`model` in the given mode inside the block; afterwards every submodule has its own mode again."""
    before = [(module, module.training) for module in model.modules()]
    if mode != "keep":
        model.train(mode == "train")
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer is; the CPU for a model without any."""
    tensor = next(iter(model.parameters()), next(iter(model.buffers()), None))
    return tensor.device if tensor is not None else torch.device("cpu")


@contextmanager
def on_device(model: nn.Module | None, device: torch.device) -> Iterator[None]:
    """`model` on `device` inside the block."""
    before = device_of(model) if model is not None else device
    if model is not None and before != device:
        model.to(device)
    try:
        yield
    finally:
        if model is not None and before != device:
            model.to(before)


@contextmanager
def borrowed(model: nn.Module | None) -> Iterator[None]:
    """After the block `model` has the modes, gradient flags, device and calling convention it had before."""
    if model is None:
        yield
        return
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    compiled, device = model._compiled_call_impl, device_of(model)
    lazy = torch.nn.UninitializedParameter
    strides = {name: p.stride() for name, p in model.named_parameters() if not isinstance(p, lazy)}
    try:
        with in_mode(model, "keep"):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model._compiled_call_impl = compiled
        if device_of(model) != device:
            model.to(device)
        if any(p.stride() != strides.get(name, p.stride()) for name, p in model.named_parameters() if not isinstance(p, lazy)):
            model.to(memory_format=torch.contiguous_format)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Honest float32: no autocast, and no TensorFloat-32 in convolutions and products, whose rounding misleads attacks."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
