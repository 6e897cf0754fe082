"""Borrowing a network: whatever is changed about it for a while is put back."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from overproof.errors import UsageError


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


def require_network(given: object, place: str, also: str = "") -> None:
    """See that `given` is a network.

    Args:
        given: what a caller named.
        place: what it is called.
        also: what else it could have been.

    Raises:
        UsageError: a class instead of an instance, or something else; names the remedy.
    """
    if isinstance(given, type):
        raise UsageError(f"{place} is the class {given.__name__}; pass an instance, {given.__name__}().")
    if not isinstance(given, nn.Module):
        raise UsageError(f"{place} is {type(given).__name__} ({str(given)[:80]!r}); pass a torch.nn.Module{also}.")


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
def frozen(model: nn.Module) -> Iterator[None]:
    """A forward inside the block builds no gradients for the weights of `model`, but lets them through to its inputs."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


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


@contextmanager
def unchanged(tensors: Iterable[Tensor]) -> Iterator[None]:
    """After the block each of `tensors` holds the very bits it held before."""
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, bits in before:
                tensor.copy_(bits)


@contextmanager
def buffers_unchanged(module: nn.Module, *, besides: nn.Module | None = None) -> Iterator[None]:
    """After the block all buffers of `module` are the tensors they were, bit for bit, those of its part `besides` excepted."""
    known = _buffers(module, besides)
    with unchanged(buffer for _, _, buffer in known):
        try:
            yield
        finally:
            for part, name, buffer in known:  # a forward may have put another tensor in its place
                setattr(part, name, buffer)


def copied_buffers(module: nn.Module, *, besides: nn.Module | None = None) -> Callable[[], None]:
    """Copies all buffers of `module`, those of its part `besides` excepted; calling the result puts the copies in their places."""
    copies = [(part, name, buffer.clone()) for part, name, buffer in _buffers(module, besides)]

    def put() -> None:
        for part, name, buffer in copies:
            setattr(part, name, buffer)

    return put


@contextmanager
def spare_buffers(module: nn.Module) -> Iterator[None]:
    """Inside the block `module` works on copies of its buffers; a graph that saved the real ones does not notice."""
    known = _buffers(module, None)
    copied_buffers(module)()
    try:
        yield
    finally:
        for part, name, buffer in known:
            setattr(part, name, buffer)


def _buffers(module: nn.Module, besides: nn.Module | None) -> list[tuple[nn.Module, str, Tensor]]:
    left_out = {id(part) for part in besides.modules()} if besides is not None else set()
    return [
        (part, name, buffer)
        for part in module.modules()
        if id(part) not in left_out
        for name, buffer in part.named_buffers(recurse=False)
    ]


Dice = tuple[Tensor, Tensor | None]


def dice(device: torch.device) -> Dice:
    """Where the generators of the CPU and of `device` stand."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def put_dice(device: torch.device, state: Dice) -> None:
    """Set the generators back to where `dice` found them."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def digest(model: nn.Module) -> str:
    """What identifies a network: its structure, and the bits of its weights and buffers, wherever they are."""
    found = hashlib.blake2b(f"{type(model).__qualname__} {anonymous(model)}".encode(), digest_size=16)
    for name, value in model.state_dict().items():
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        if isinstance(value, Tensor):
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def anonymous(value: object) -> str:
    """What `value` looks like, without the places of objects in memory."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
