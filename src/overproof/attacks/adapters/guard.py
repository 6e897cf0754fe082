"""Lending a model to a stranger: whatever he does to it, it comes back as it was."""

from __future__ import annotations

import contextlib
import io
import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from overproof.attacks.base import logits_of
from overproof.networks import in_mode

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Shell(nn.Module):
    """The only thing a library sees of a model: a module in eval mode that takes images of any float type to logits.

    Some libraries take a model apart or read its attributes; there is nothing to take apart here, and the hooks of the model
    inside fire as always.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.model, self.dtype, self.place = model, images.dtype, images.device
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        return logits_of(self.model, images.to(self.place, self.dtype))


@contextmanager
def lent(model: nn.Module, seed: int, device: torch.device) -> Iterator[None]:
    """Inside, `model` is in eval mode with frozen parameters, and every global random generator starts from `seed`.

    Afterwards modes, parameters, buffers, gradients, flags, hooks and random generators are what they were. What the library
    prints is dropped.
    """
    with (
        in_mode(model),
        _tensors_kept(model),
        _hooks_kept(model),
        _random_kept(seed, device),
        torch.inference_mode(False),
        torch.enable_grad(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        yield


@contextmanager
def _tensors_kept(model: nn.Module) -> Iterator[None]:
    kept = [t for t in itertools.chain(model.parameters(), model.buffers()) if not t.is_inference()]
    copies = [(tensor, tensor.detach().clone()) for tensor in kept]
    gradients = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    for parameter, _, _ in gradients:
        # A library that calls backward() would add to a gradient in place; and weight gradients are of no use to it.
        parameter.grad = None
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in copies:
                # Writing to a tensor that did not change would break a graph of the caller that holds it.
                if not torch.equal(tensor, copy):
                    tensor.copy_(copy)
        for parameter, gradient, flag in gradients:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


@contextmanager
def _hooks_kept(model: nn.Module) -> Iterator[None]:
    before = [
        (table, dict(table)) for module in model.modules() for name in HOOKS if (table := getattr(module, name)) is not None
    ]
    try:
        yield
    finally:
        for table, hooks in before:
            if dict(table) != hooks:
                table.clear()
                table.update(hooks)


@contextmanager
def _random_kept(seed: int, device: torch.device) -> Iterator[None]:
    import numpy as np

    devices = list(range(torch.cuda.device_count())) if device.type == "cuda" else []
    plain, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)
            random.seed(seed)
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numbers)
