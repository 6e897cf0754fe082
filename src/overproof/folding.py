"""The same classifier, cheaper to ask: normalisation folded into convolutions, weights frozen, channels last."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from overproof.networks import full_precision, in_mode

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
            last = not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
            layout = torch.channels_last if last else torch.contiguous_format
            images = images.view_as(images)
            # No gradient at all arrives behind operators that have none, such as those of quantised layers.
            images.register_hook(lambda gradient: gradient if gradient is None else gradient.contiguous(memory_format=layout))  # type: ignore[no-untyped-call]
        return self.net(images)  # type: ignore[no-any-return]

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Take over the present weights and statistics of the network this is a copy of."""
        written = set()
        for first, second in self.folds:
            conv = self.net.get_submodule(first)
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            for mine, theirs in zip((conv.weight, conv.bias), _fused(model, first, second), strict=True):
                mine.copy_(theirs)
                written.add(id(mine))
        known = dict(_tensors(model))
        for name, value in _tensors(self.net):
            if id(value) not in written:  # a layer may have several names
                value.copy_(known[name])


class Follower:
    """The folded copy of a classifier that is being trained: before each use it takes over the present weights and statistics.

    Args:
        frozen: the classifier never changes, and a copy that was made once is right for good.
    """

    def __init__(self, *, frozen: bool = False) -> None:
        self.frozen = frozen
        self._made: tuple[nn.Module, tuple[torch.device, torch.dtype], nn.Module] | None = None

    def now(self, model: nn.Module, images: Tensor) -> nn.Module:
        """The copy as `model` is now, in eval mode; one that is compiled, hooked or has nothing to fold serves itself.

        What the copy answers differs by rounding only. Layers may be exchanged between two calls, but not what a layer computes.

        Args:
            model: images -> logits (N, K), in eval mode; not registered, moved or changed.
            images: (N, C, H, W), a few of which show its layers the first time.
        """
        hooked = bool(model._forward_hooks or model._forward_pre_hooks)  # somebody wants to see every call
        if hooked or model._compiled_call_impl is not None or not any(type(m) is nn.BatchNorm2d for m in model.modules()):
            return model
        kind = images.device, images.dtype
        if self._made is not None and self._made[0] is model and self._made[1] == kind:
            try:
                return self._made[2] if self.frozen else _following(self._made[2], model)
            except (AssertionError, AttributeError, KeyError, RuntimeError):
                pass  # other layers than before
        with full_precision(images.device):
            copied = folded(model, images.detach()) if self.frozen else _following(_provable(model, images), model)
        self._made = (model, kind, copied)
        return copied


def _following(copied: nn.Module, model: nn.Module) -> nn.Module:
    if isinstance(copied, Folded):
        copied.follow(model)
    return copied


def _provable(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy with what may be folded whatever the weights will be, or the model.

    A network that was never trained cannot tell: its normalisations hardly change what passes them, and folding the wrong one makes no
    difference yet. So the folds are chosen on a copy whose normalisations do something.
    """
    draw = torch.Generator().manual_seed(0)
    try:
        with torch.inference_mode(False), torch.no_grad():
            probe = copy.deepcopy(model)
            for norm in (m for m in probe.modules() if type(m) is nn.BatchNorm2d and m.running_mean is not None):
                for tensor, low in ((norm.running_mean, -0.5), (norm.running_var, 0.5), (norm.weight, 0.5), (norm.bias, -0.5)):
                    if tensor is not None:
                        tensor.copy_(low + torch.rand(tensor.shape, generator=draw))
    except Exception:  # see `_copy`
        return model
    dice = torch.random.fork_rng(devices=[images.device] if images.is_cuda else [])  # nobody shall notice that it was tried
    with dice:
        copied = folded(probe, images.detach())
    return copied if isinstance(copied, Folded) and copied.folds else model


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
    with in_mode(model), torch.inference_mode(False), torch.no_grad():
        few = images[:8].clone()  # a copy made of and for tensors that may be differentiated
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
        norm = model.get_submodule(second)
        if norm.running_mean is None or norm.running_var is None or _watched(model, first, second):
            continue
        conv = net.get_submodule(first)
        conv.weight, conv.bias = _fused(model, first, second)
        parent, _, leaf = second.rpartition(".")
        setattr(net.get_submodule(parent), leaf, nn.Identity())
        done.append((first, second))
    return done


def _fused(model: nn.Module, first: str, second: str) -> tuple[nn.Parameter, nn.Parameter]:
    conv, norm = model.get_submodule(first), model.get_submodule(second)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under all of their names."""
    return chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))


def _watched(model: nn.Module, *names: str) -> bool:
    """Whether somebody's hook or parametrisation looks at one of these layers."""
    modules = [model.get_submodule(name) for name in names]
    return any(m._forward_hooks or m._forward_pre_hooks or hasattr(m, "parametrizations") for m in modules)
