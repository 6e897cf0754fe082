"""Classifiers by name: the registry's networks, those of timm and torchvision, and the user's own."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from overproof.errors import OverproofError, UsageError
from overproof.models import MODELS
from overproof.models.classifier import Classifier, Statistic
from overproof.models.foreign import build_callable, build_timm, build_torchvision, pretrained_statistics

# Options through which a builder would read files or the network instead of building from the description.
_UNSAFE = (
    "cache_dir",
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "weights",
    "weights_backbone",
)


def create_model(
    name: str,
    classes: int,
    in_channels: int = 3,
    image_size: int = 32,
    *,
    mean: Statistic = None,
    std: Statistic = None,
    pretrained: bool = False,
    **options: Any,
) -> Classifier:
    """A classifier by name.

    Args:
        name: an entry of `MODELS` ("resnet20"), "timm:NAME", "torchvision:NAME", or "package.module:callable".
        classes: number of classes, at least 2.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels.
        mean: subtracted from the images, in pixel units; None is 0, or for pretrained weights what they were trained with.
        std: divides the images; likewise.
        pretrained: fetch trained weights (timm and torchvision only).
        options: the builder's own.

    Raises:
        UnknownNameError: no such model; offers the nearest.
        UsageError: a size or an option does not fit.
        OverproofError: the pretrained weights could not be fetched.
    """
    sizes = {"classes": classes, "in_channels": in_channels, "image_size": image_size}
    _check(name, sizes)
    net = _build(name, sizes, pretrained, options)
    if isinstance(net, Classifier):
        if mean is not None or std is not None:
            raise UsageError(f"Model {name!r} is a Classifier and normalises its images already; leave out mean and std.")
        net.spec = net.spec or _spec(name, sizes, options, net)
        return net
    if pretrained and mean is None and std is None:
        mean, std = pretrained_statistics(net)
    classifier = Classifier(net, mean=_each(mean, 0.0, in_channels), std=_each(std, 1.0, in_channels))
    classifier.spec = _spec(name, sizes, options, classifier)
    return classifier


def rebuild(spec: dict[str, Any], *, trusted: bool = False) -> Classifier:
    """The classifier a `spec` describes, untrained; load its weights next.

    Args:
        spec: `Classifier.spec`, or the same read from JSON.
        trusted: allow specs that name a callable of the user's, whose module is imported.

    Raises:
        OverproofError: the spec would execute code, or is not complete.
    """
    try:
        name, sizes = str(spec["name"]), {key: int(spec[key]) for key in ("classes", "in_channels", "image_size")}
        mean, std, options = spec["mean"], spec["std"], dict(spec["options"])
    except (KeyError, TypeError, ValueError) as error:
        raise OverproofError(f"This description of a model is not complete ({error!r}): {spec}.") from error
    if _is_callable(name) and not trusted:
        raise OverproofError(
            f"The model was built by {name!r}; importing it would execute code that the run folder names. Pass the network "
            "yourself, `overproof.load(run, model=...)`, or say trusted=True (--trust on the command line)."
        )
    if unsafe := [option for option in options if option in _UNSAFE]:
        raise OverproofError(f"The description of model {name!r} asks to read other files ({', '.join(unsafe)}); refused.")
    net = _build(name, sizes, False, options)
    if isinstance(net, Classifier):
        net.spec = dict(spec)
        return net
    return Classifier(net, mean=mean, std=std, spec=dict(spec))


def _check(name: str, sizes: dict[str, int]) -> None:
    for what, value in sizes.items():
        least = 2 if what == "classes" else 1
        if value < least:
            raise UsageError(f"Model {name!r}: {what}={value} must be at least {least}.")


def _is_callable(name: str) -> bool:
    return ":" in name and name.partition(":")[0] not in ("timm", "torchvision")


def _build(name: str, sizes: dict[str, int], pretrained: bool, options: dict[str, Any]) -> nn.Module:
    kind, _, rest = name.partition(":")
    if kind == "timm" and rest:
        return build_timm(rest, sizes, pretrained=pretrained, options=options)
    if kind == "torchvision" and rest:
        return build_torchvision(rest, sizes, pretrained=pretrained, options=options)
    if pretrained:
        raise UsageError(f"Model {name!r} has no pretrained weights; use 'timm:NAME' or 'torchvision:NAME', or leave it out.")
    if rest:
        return build_callable(name, sizes, options)
    net: nn.Module = MODELS.create(name, *sizes.values(), **options)
    return net


def _each(value: Statistic, default: float, channels: int) -> list[float]:
    if value is None or isinstance(value, int | float):
        return [default if value is None else float(value)] * channels
    if len(value) == channels:
        return [float(number) for number in value]
    raise UsageError(f"Normalisation: {list(value)} has {len(value)} numbers for {channels} channels.")


def _spec(name: str, sizes: dict[str, int], options: dict[str, Any], classifier: Classifier) -> dict[str, Any] | None:
    mean, std = classifier.normalize.mean.flatten().tolist(), classifier.normalize.std.flatten().tolist()
    spec: dict[str, Any] = {"name": name, **sizes, "options": options, "mean": mean, "std": std}
    try:
        plain: dict[str, Any] = json.loads(json.dumps(spec))
    except (TypeError, ValueError):  # an option such as a layer class cannot be written down
        return None
    return plain
