"""Backward pass differentiable approximation: gradients through parts that have none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from overproof.attacks.combined import Wrapper
from overproof.errors import UsageError


@dataclass(frozen=True, kw_only=True, eq=False)
class BPDA(Wrapper):
    """Run an attack on a model some of whose parts keep their output but get the gradient of a stand-in.

    Forward f(x), backward dg(x)/dx, with g the stand-in; g(x) = x where none is given.

    Args:
        inner, eps, norm, targeted: see `Wrapper`.
        parts: dotted names of submodules of the attacked model (`model.named_modules()`), such as "defence".
        stand_in: differentiable function of the part's input with the shape of its output; None means the input itself,
            for parts f(x) that are near x (quantisers, denoisers, JPEG).

    Raises:
        UsageError: no part, a name the model does not have, or a stand-in of another shape.

    Reference: Athalye, Carlini, Wagner, ICML 2018, arXiv 1802.00420.

    Differences from the paper: none.
    """

    parts: tuple[str, ...] = ()
    stand_in: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parts:
            raise UsageError("BPDA(parts=()): name the submodules without a useful gradient, such as parts=('defence',).")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        with _replaced_backward(model, self.parts, self.stand_in or _identity):
            return self.attack(model, images, labels, generator)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, stand_in: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def straight_through(value: Tensor, stand_in: Tensor) -> Tensor:
    """`value` forward, the gradient of `stand_in` (same shape) backward."""
    result: Tensor = _StraightThrough.apply(value.detach(), stand_in)
    return result


def _identity(x: Tensor) -> Tensor:
    return x


@contextmanager
def _replaced_backward(model: nn.Module, parts: tuple[str, ...], stand_in: Callable[[Tensor], Tensor]) -> Iterator[None]:
    modules = dict(model.named_modules())
    for name in parts:
        if name not in modules:
            raise UsageError(f"BPDA: the model has no part {name!r}; it has {', '.join(list(modules)[1:12])}.")

    def replace(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        replacement = stand_in(args[0])
        if replacement.shape != output.shape:
            raise UsageError(
                f"BPDA: the stand-in gives {tuple(replacement.shape)} where {type(module).__name__} gives "
                f"{tuple(output.shape)}; pass stand_in=function with that shape."
            )
        return straight_through(output, replacement)

    hooks = [modules[name].register_forward_hook(replace) for name in parts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
