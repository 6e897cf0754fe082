"""Named intermediate features of any network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from overproof.errors import OverproofError, UnknownNameError

INPUT = ":input"
WRAPPED = ("net", "module", "_orig_mod")
PROBE_SIZES = (64, 32, 28, 8, 224)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


class _Store:
    """Where hooks leave features while their tap is called; `features` is None at all other times."""

    def __init__(self, copies: bool, leaves: bool) -> None:
        self.features: dict[str, Tensor] | None = None
        self.copies, self.leaves = copies, leaves

    def put(self, name: str, value: Any) -> Tensor | None:
        """Keep the feature; returns what the network is to go on with, None for what it has."""
        if self.features is None:
            return None
        if not isinstance(value, Tensor):
            raise OverproofError(f"The layer {name!r} gives {type(value).__name__}, not a tensor; tap a layer inside it.")
        if self.leaves:
            self.features[name] = value.detach().requires_grad_()
            return self.features[name].clone()  # which layers that work in place may overwrite
        self.features[name] = value.clone() if self.copies else value
        return None


class _Output:
    """Forward hook; an object rather than a closure, so that copies of the network get hooks of their own."""

    def __init__(self, store: _Store, name: str) -> None:
        self.store, self.name = store, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        return self.store.put(self.name, output)


class _Input:
    """Forward pre-hook."""

    def __init__(self, store: _Store, name: str) -> None:
        self.store, self.name = store, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = self.store.put(self.name, args[0] if args else next(iter(kwargs.values()), None))
        if changed is None:
            return None
        return ((changed, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): changed})


class Tap:
    """Reads intermediate features of a network while it runs.

    `output, features = tap(images)` calls the network and returns what it returned, and a tensor per name. Only calls
    through the tap are recorded; the same network called directly costs nothing more than an idle hook. A layer that
    runs several times in one call keeps its last value. Gradients flow through the features.

    Works on networks compiled in place (`module.compile()`) and inside distributed wrappers. Where layers work in place
    (`nn.ReLU(inplace=True)`), features are copies, taken before they are overwritten.

    Args:
        module: the network; the tap refers to it and registers none of its parameters.
        names: "layer1" for the output of that submodule, "layer1.relu:input" for its first input.
        leaves: gradients begin at the features instead of flowing through them: each is a leaf, and nothing before it is remembered.

    Raises:
        UnknownNameError: no such submodule; offers the nearest.
    """

    def __init__(self, module: nn.Module, names: Iterable[str], *, leaves: bool = False) -> None:
        self.module, self.names = module, tuple(names)
        known = dict(module.named_modules())
        for name in self.names:
            if name.removesuffix(INPUT) not in known:
                hint = f"A layer of {type(module).__name__} is a submodule's path, with {INPUT!r} appended for its input."
                raise UnknownNameError("layer", name, known.keys() - {""}, hint)
        in_place = any(getattr(layer, "inplace", False) for layer in known.values())
        if any(getattr(layer, "_compiled_call_impl", None) or hasattr(layer, "_orig_mod") for layer in known.values()):
            torch.compiler.reset()  # graphs compiled before this tap would leave its hooks out
        self._store = _Store(in_place, leaves)
        self._handles = []
        for name in self.names:
            layer = known[name.removesuffix(INPUT)]
            if name.endswith(INPUT):
                handle = layer.register_forward_pre_hook(_Input(self._store, name), with_kwargs=True)
            else:
                handle = layer.register_forward_hook(_Output(self._store, name))
            self._handles.append(handle)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """The network's output and {name: feature}, in the order of `names`.

        Raises:
            OverproofError: the forward pass does not reach a layer, or the layer gives no tensor.
        """
        outer = self._store.features
        self._store.features = {}
        try:
            output = self.module(*args, **kwargs)
            found = self._store.features
        finally:
            self._store.features = outer
        for name in self.names:
            if name not in found:
                raise OverproofError(
                    f"The forward pass of {type(self.module).__name__} does not call the layer {name!r}. Tap another layer; "
                    "or, if the network is part of something compiled earlier, make the tap before compiling."
                )
        return output, {name: found[name] for name in self.names}

    def close(self) -> None:
        """Take the hooks off the network."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", ()):
            handle.remove()


def stages(model: nn.Module) -> tuple[str, ...]:
    """Tap names of a network's feature stages, shallow to deep.

    What the network publishes as `stages`; else timm's `feature_info`; else, by a trial run on an image of zeros, the
    last layer at each resolution among the children (or, where one child does everything, among its children).

    Raises:
        OverproofError: none of these tells; name the layers yourself.
    """
    published = getattr(model, "stages", None)
    if isinstance(published, tuple):
        return published
    if names := _timm_stages(model):
        return names
    for wrapped in WRAPPED:
        inner = getattr(model, wrapped, None)
        if isinstance(inner, nn.Module):
            return tuple(f"{wrapped}.{name}" for name in stages(inner))
    if names := _stages_by_trial(model):
        return names
    children = ", ".join(name for name, _ in model.named_children()) or "none"
    raise OverproofError(
        f"Cannot tell the feature stages of {type(model).__name__} (children: {children}). Name the layers explicitly, or "
        "give the network an attribute `stages`, a tuple of submodule paths."
    )


def penultimate(model: nn.Module) -> str:
    """Tap name of the vector (N, d) that the last linear layer reads: published by the network, or found.

    Raises:
        OverproofError: the network has no linear layer.
    """
    published = getattr(model, "penultimate", None)
    if isinstance(published, str):
        return published
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name]
    if not linear:
        raise OverproofError(f"{type(model).__name__} has no linear layer; name the layer that gives its feature vector.")
    return f"{linear[-1]}{INPUT}"


def last_linear(model: nn.Module) -> str:
    """Name of the linear layer that makes the logits: the one that reads the penultimate vector, else the last one.

    Raises:
        OverproofError: the network has no linear layer.
    """
    named = penultimate(model).removesuffix(INPUT)
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name]
    if not linear:
        raise OverproofError(f"{type(model).__name__} has no linear layer that could be trained alone.")
    return named if named in linear else linear[-1]


def _timm_stages(model: nn.Module) -> tuple[str, ...]:
    info = getattr(model, "feature_info", None)
    info = getattr(info, "info", info)
    if not isinstance(info, list):
        return ()
    names = tuple(str(stage["module"]) for stage in info if isinstance(stage, dict) and "module" in stage)
    known = dict(model.named_modules())
    return names if all(name in known for name in names) else ()


def _stages_by_trial(model: nn.Module) -> tuple[str, ...]:
    conv = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    if conv is None:
        return ()
    prefix, parent = "", model
    while len(busy := [(n, c) for n, c in parent.named_children() if any(isinstance(m, nn.Conv2d) for m in c.modules())]) == 1:
        prefix, parent = f"{prefix}{busy[0][0]}.", busy[0][1]
    names = [f"{prefix}{name}" for name, layer in parent.named_children() if not isinstance(layer, POOLS)]
    last: dict[int, str] = {}
    for name, side in _resolutions(model, names, conv).items():
        last[side] = name
    return tuple(last.values()) if len(last) > 1 else ()


def _resolutions(model: nn.Module, names: list[str], conv: nn.Conv2d) -> dict[str, int]:
    layers, found = dict(model.named_modules()), {}

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                found[name] = output.shape[-1]

        return record

    modes = [(layer, layer.training) for layer in layers.values()]
    handles = [layers[name].register_forward_hook(hook(name)) for name in names]
    model.eval()
    try:
        for size in PROBE_SIZES:
            found.clear()
            with contextlib.suppress(Exception), torch.no_grad():
                model(torch.zeros(1, conv.in_channels, size, size, dtype=conv.weight.dtype, device=conv.weight.device))
                return found
        return {}
    finally:
        for handle in handles:
            handle.remove()
        for layer, mode in modes:
            layer.training = mode
