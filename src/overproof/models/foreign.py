"""Networks made elsewhere: timm, torchvision, and the user's own callables."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from overproof.errors import OverproofError, UnknownNameError, UsageError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build_timm(name: str, sizes: dict[str, int], *, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """timm's network `name`; those for one image size only are made for `image_size`."""
    import timm

    remote = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if not remote:
        if not timm.is_model(name):
            _unknown("timm model", name, timm.list_models(), "`timm.list_models()` shows all.")
        default = timm.get_pretrained_cfg(name, allow_unregistered=True)
        if default is not None and default.fixed_input_size:
            options = {"img_size": sizes["image_size"], **options}
    wanted = {"num_classes": sizes["classes"], "in_chans": sizes["in_channels"], **options}
    net: nn.Module = _made(f"timm:{name}", pretrained or remote, timm.create_model, name, pretrained=pretrained, **wanted)
    return net


def build_torchvision(name: str, sizes: dict[str, int], *, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """torchvision's network `name`, with a new last layer if the pretrained one has other classes."""
    import torchvision

    if name not in (known := torchvision.models.list_models(module=torchvision.models)):
        _unknown("torchvision model", name, known, "`torchvision.models.list_models()` shows all.")
    label, channels = f"torchvision:{name}", sizes["in_channels"]
    net: nn.Module
    if not pretrained:
        net = _made(label, False, torchvision.models.get_model, name, num_classes=sizes["classes"], **options)
        if channels != 3:
            _read_channels(net, channels)
        return net
    if channels != 3:
        raise UsageError(f"{label}: the pretrained weights read 3 channels, not {channels}; 'timm:NAME' can adapt them.")
    net = _made(label, True, torchvision.models.get_model, name, weights="DEFAULT", **options)
    replace_head(net, sizes["classes"])
    return net


def build_callable(path: str, sizes: dict[str, int], options: dict[str, Any]) -> nn.Module:
    """Call the user's "package.module:callable" with the sizes its signature accepts, and the options.

    Raises:
        UsageError: it cannot be imported, its arguments do not fit, or it returns something other than a network.
    """
    module, _, attribute = path.partition(":")
    try:
        builder: Any = importlib.import_module(module)
        for part in attribute.split("."):
            builder = getattr(builder, part)
    except (ImportError, AttributeError, ValueError) as error:
        remedy = "Write package.module:callable, and see that the package is installed or on PYTHONPATH."
        raise UsageError(f"Model {path!r} could not be imported ({error}). {remedy}") from error
    parameters = inspect.signature(builder).parameters.values()
    accepted = {p.name for p in parameters if p.kind not in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    offered = {"num_classes": sizes["classes"], **sizes}
    arguments = {key: value for key, value in offered.items() if key in accepted}
    net = _made(path, False, builder, **{**arguments, **options})
    if not isinstance(net, nn.Module):
        raise UsageError(f"Model {path!r} gave {type(net).__name__}; it must return a torch.nn.Module.")
    return net


def pretrained_statistics(net: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std that pretrained weights expect: timm's record, else those of ImageNet."""
    record = getattr(net, "pretrained_cfg", None) or {}
    return tuple(record.get("mean") or IMAGENET_MEAN), tuple(record.get("std") or IMAGENET_STD)


def replace_head(net: nn.Module, classes: int) -> None:
    """Put a new last layer in `net` unless it has `classes` outputs already.

    Raises:
        UsageError: the last layer is not where torchvision's networks have it.
    """
    for path in ("fc", "classifier", "heads", "head"):
        part = _submodule(net, path)
        layers = [] if part is None else [(n, m) for n, m in part.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        if not layers:
            continue
        name, last = layers[-1]
        biased = last.bias is not None
        new: nn.Module
        if isinstance(last, nn.Linear):
            outputs, new = last.out_features, nn.Linear(last.in_features, classes, bias=biased)
        else:
            outputs, new = last.out_channels, nn.Conv2d(last.in_channels, classes, 1, bias=biased)
        if outputs != classes:
            _put(net, f"{path}.{name}".rstrip("."), new)
        return
    raise UsageError(
        f"{type(net).__name__}: no last layer for {classes} classes found; replace it yourself and pass the network."
    )


def _put(net: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(net.get_submodule(parent), name, layer)


def _submodule(net: nn.Module, path: str) -> nn.Module | None:
    try:
        return net.get_submodule(path)
    except AttributeError:
        return None


def _read_channels(net: nn.Module, channels: int) -> None:
    for path, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            sizes: dict[str, Any] = {key: getattr(layer, key) for key in ("kernel_size", "stride", "padding", "dilation")}
            new = nn.Conv2d(channels, layer.out_channels, bias=layer.bias is not None, **sizes)
            _put(net, path, new)
            return
    raise UsageError(f"{type(net).__name__} has no convolution that could read {channels} channels.")


def _unknown(kind: str, name: str, known: Iterable[str], hint: str) -> None:
    raise UnknownNameError(kind, name, difflib.get_close_matches(name, list(known), n=5, cutoff=0.0), hint)


def _made(label: str, fetches: bool, builder: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
    try:
        return builder(*args, **options)
    except OverproofError:
        raise
    except TypeError as error:
        raise UsageError(f"Model {label!r} does not take these options: {error}.") from error
    except Exception as error:
        if not fetches:
            raise UsageError(f"Model {label!r} could not be built: {error}") from error
        raise OverproofError(
            f"The pretrained weights of {label!r} could not be fetched ({type(error).__name__}: {error}). Check the "
            "network connection, fetch them once where there is one (they are cached), or use pretrained=False."
        ) from error
