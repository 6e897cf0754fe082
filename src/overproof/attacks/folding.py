"""The same classifier, cheaper to attack: normalisation folded into convolutions, weights frozen, channels last."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from overproof.networks import in_mode

TOLERANCE = 1e-4  # of the largest logit; a copy that differs more is not used


class Folded(nn.Module):
    """A copy of a classifier that computes the same function in eval mode with fewer passes over memory.

    Args:
        net: the copy.
        folds: names of the convolutions and of the normalisations that went into them.
    """

    def __init__(self, net: nn.Module, folds: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__()
        self.net, self.folds = net, tuple(folds)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        if images.requires_grad:
            # Channels-last kernels return such gradients; the attacks' arithmetic is fastest in the images' own layout.
            images = images.view_as(images)
            images.register_hook(lambda gradient: gradient.contiguous())  # type: ignore[no-untyped-call]
        return self.net(images)  # type: ignore[no-any-return]

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Take over the present weights and statistics of the network this is a copy of."""
        mine, theirs = (
            dict(chain(net.named_parameters(remove_duplicate=False), net.named_buffers(remove_duplicate=False)))
            for net in (self.net, model)
        )
        made: dict[str, Tensor] = {}
        for first, second in self.folds:
            weight, bias = _fused(model.get_submodule(first), model.get_submodule(second))
            made |= {f"{first}.weight": weight, f"{first}.bias": bias}
        for name, value in mine.items():
            value.copy_(made[name] if name in made else theirs[name])


class Follower:
    """The folded copy of a classifier that is being trained: before each use it takes over the weights and statistics of the hour."""

    def __init__(self) -> None:
        self._made: tuple[nn.Module, tuple[torch.device, torch.dtype], nn.Module] | None = None

    def now(self, model: nn.Module, images: Tensor) -> nn.Module:
        """The copy as `model` is now, in eval mode; one that is compiled, hooked or has nothing to fold serves itself.

        What the copy answers differs by rounding only.

        Args:
            model: images -> logits (N, K), in eval mode; not registered, moved or changed.
            images: (N, C, H, W), a few of which show its layers the first time.
        """
        hooked = bool(model._forward_hooks or model._forward_pre_hooks)  # somebody wants to see every call
        if hooked or model._compiled_call_impl is not None or not any(type(m) is nn.BatchNorm2d for m in model.modules()):
            return model
        kind = images.device, images.dtype
        if self._made is None or self._made[0] is not model or self._made[1] != kind:
            with torch.autocast(images.device.type, enabled=False):
                self._made = (model, kind, folded(model, images.detach()))
        copied = self._made[2]
        if not isinstance(copied, Folded) or not copied.folds:
            return model
        copied.follow(model)
        return copied


def folded(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy of `model` with BatchNorm folded into the convolutions before it: W' = W g / s, b' = (b - m) g / s + beta.

    The copy is for attacks that need nothing but logits; what they find is judged with the model itself. A model that cannot
    be copied, is random, or whose copy gives other logits is returned as it is.

    Args:
        model: images -> logits (N, K); left untouched.
        images: (N, C, H, W), a few of which are used to see the order of layers and to compare.

    Returns:
        The copy in eval mode, or `model`.
    """
    if isinstance(model, Folded):
        return model
    few = images[:8]
    with in_mode(model), torch.no_grad():
        expected, pairs = _follow(model, few)
        if net := _copy(model, pairs, few, expected):
            return net
        # A convolution whose output also goes elsewhere (a shortcut) may not be folded: find out which.
        alone = [pair for pair in pairs if _copy(model, [pair], few, expected)]
        return _copy(model, alone, few, expected) or model


def _copy(model: nn.Module, pairs: list[tuple[str, str]], images: Tensor, expected: Tensor) -> Folded | None:
    """The copy with these pairs folded, or None if it gives other logits than expected."""
    try:
        net = copy.deepcopy(model)
        done = _fold(net, model, pairs)
        for parameter in net.parameters():
            parameter.requires_grad_(False)
        made = Folded(net.eval().to(memory_format=torch.channels_last), done)
        result = made(images)
    except Exception:  # foreign modules fail in ways of their own; the model itself always serves
        return None
    scale = max(float(expected.abs().amax()), 1.0) if expected.numel() else 1.0
    same = result.shape == expected.shape and bool(((result - expected).abs() <= TOLERANCE * scale).all())
    return made if same else None


def _follow(model: nn.Module, images: Tensor) -> tuple[Tensor, list[tuple[str, str]]]:
    """The logits, and names of each convolution and the normalisation that alone receives its output, once per forward."""
    made: dict[int, tuple[nn.Module, Tensor]] = {}
    pairs: list[tuple[nn.Module, nn.Module]] = []
    calls: dict[nn.Module, int] = {}

    def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            made[id(output)] = (module, output)
        elif args and id(args[0]) in made:
            pairs.append((made[id(args[0])][0], module))

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    hooks = [m.register_forward_hook(watch) for m in model.modules() if type(m) in kinds]
    try:
        logits: Tensor = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    names = {module: name for name, module in model.named_modules()}
    return logits, [(names[a], names[b]) for a, b in pairs if calls[a] == calls[b] == 1]


def _fold(net: nn.Module, model: nn.Module, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    done = []
    for first, second in pairs:
        conv, norm = net.get_submodule(first), net.get_submodule(second)
        if norm.running_mean is None or norm.running_var is None or _watched(model, first, second):
            continue
        conv.weight, conv.bias = _fused(conv, norm)
        parent, _, leaf = second.rpartition(".")
        setattr(net.get_submodule(parent), leaf, nn.Identity())
        done.append((first, second))
    return done


def _fused(conv: nn.Module, norm: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)


def _watched(model: nn.Module, *names: str) -> bool:
    """Whether somebody's hook or parametrisation looks at one of these layers."""
    modules = [model.get_submodule(name) for name in names]
    return any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "parametrizations") for m in modules)
