"""What two networks have to show: their layers and shapes, found by a dry forward, and which layers belong together."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from overproof.errors import OverproofError, UsageError
from overproof.features import PROBE_SIZES, Tap, penultimate, stages
from overproof.networks import device_of, in_mode

ImageShape = tuple[int, int, int]
IMAGES = 2


@dataclass(frozen=True)
class Place:
    """Where a feature of the student meets one of the teacher.

    Args:
        student, teacher: tap names.
        student_shape, teacher_shape: (C, H, W) of maps, (d,) of vectors; without the batch.
        signed: whether the teacher's feature has negative values (it is not behind a ReLU).
        spatial: maps are compared, not vectors.
    """

    student: str
    teacher: str
    student_shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]
    signed: bool
    spatial: bool

    def __str__(self) -> str:
        return f"{self.student!r} {self.student_shape} of the student and {self.teacher!r} {self.teacher_shape} of the teacher"


def as_map(feature: Tensor, name: str) -> Tensor:
    """A map (N, C, H, W); the tokens (N, T, d) of a transformer become the largest square that fits, leading extra tokens dropped.

    Raises:
        UsageError: the layer gives vectors.
    """
    if feature.dim() == 4:
        return feature
    if feature.dim() == 3:
        side = math.isqrt(feature.shape[1])
        return feature[:, -side * side :].transpose(1, 2).reshape(len(feature), -1, side, side)
    raise UsageError(
        f"The layer {name!r} gives vectors of shape {tuple(feature.shape[1:])}, but this method compares maps (C, H, W). Name a "
        "convolutional layer (student_layers, teacher_layers), or use a method over vectors: crd, rkd."
    )


def as_vector(feature: Tensor) -> Tensor:
    """A vector (N, d): maps and tokens are averaged over their places."""
    return feature.flatten(2).mean(dim=2) if feature.dim() == 4 else feature.mean(dim=1) if feature.dim() == 3 else feature


def stage_layers(model: nn.Module, images: Tensor) -> tuple[str, ...]:
    """The network's stages, or the last map of a network that keeps one resolution; see `features.stages`."""
    try:
        return stages(model)
    except OverproofError:
        found = _outputs(model, images, lambda out: out.dim() == 4 and out.shape[-1] > 1)
        if not found:
            raise
        widest = max(out.shape[-1] for out in found.values())
        return ([name for name, out in found.items() if out.shape[-1] == widest][-1],)


def preact_layers(model: nn.Module, images: Tensor) -> tuple[str, ...]:
    """The stages before their activation where the network publishes them, else the stages."""
    published = getattr(model, "preact_stages", None)
    return published if isinstance(published, tuple) else stage_layers(model, images)


def pooled_map(model: nn.Module, images: Tensor) -> str | None:
    """Name of the map whose average over its places is the penultimate vector; None where there is none."""
    with in_mode(model), torch.no_grad():
        images = images.to(device_of(model))
        vector = Tap(model, [penultimate(model)])(images)[1][penultimate(model)]

    def pools_to_vector(out: Tensor) -> bool:
        return out.dim() == 4 and out.shape[1] == vector.shape[-1] and torch.allclose(as_vector(out), vector, atol=1e-5)

    found = list(_outputs(model, images, pools_to_vector)) if vector.dim() == 2 else []
    return found[0] if found else None


def pair_up(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Stages that belong together: all in order if there are as many, else the choice whose sizes fit best, deep ones first."""
    short_is_ours = len(ours) <= len(theirs)
    small, large = (ours, theirs) if short_is_ours else (theirs, ours)

    def misfit(chosen: Sequence[str]) -> tuple[float, list[int]]:
        gaps = [abs(math.log(_side(small[a]) / _side(large[b]))) for a, b in zip(small, chosen, strict=True)]
        return sum(gaps), [-list(large).index(name) for name in reversed(chosen)]

    best = min(itertools.combinations(large, len(small)), key=misfit)
    pairs = list(zip(small, best, strict=True))
    return pairs if short_is_ours else [(b, a) for a, b in pairs]


def _side(feature: Tensor) -> int:
    if feature.dim() == 4:
        return int(feature.shape[-1])
    return math.isqrt(feature.shape[1]) if feature.dim() == 3 else 1


def read(model: nn.Module, names: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """The named features of an untouched network: eval mode, no gradients.

    Raises:
        UnknownNameError: no such layer.
    """
    tap = Tap(model, dict.fromkeys(names))
    try:
        with in_mode(model), torch.no_grad():
            features: dict[str, Tensor] = tap(images.to(device_of(model)))[1]
        return features
    finally:
        tap.close()


def sample_images(student: nn.Module, teacher: nn.Module, shape: ImageShape | None) -> Tensor:
    """Random images that both networks take: of `shape`, else of the shape a network was built for, else of one that works.

    Raises:
        UsageError: none is found, or the networks refuse the given shape.
    """
    found = [shape] if shape else [s for model in (student, teacher) for s in _known_shapes(model)]
    first = next((m for model in (student, teacher) for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = [first.in_channels] if first is not None else [3, 1]
    found += [] if shape else [(c, size, size) for size in PROBE_SIZES for c in channels]
    problem = ""
    for candidate in found:
        images = torch.rand(IMAGES, *candidate, generator=torch.Generator().manual_seed(0))
        try:
            for model in (student, teacher):
                with in_mode(model), torch.no_grad():
                    model(images.to(device_of(model)))
            return images
        except Exception as error:
            problem = problem or f"{tuple(candidate)}: {type(error).__name__}: {error}"
    raise UsageError(
        f"No image shape was found that student and teacher both take ({problem}). Give image_shape=(channels, height, width)."
    )


def _known_shapes(model: nn.Module) -> list[ImageShape]:
    shapes: list[ImageShape] = []
    for part in model.modules():
        spec, defaults = getattr(part, "spec", None), getattr(part, "pretrained_cfg", None)
        with contextlib.suppress(KeyError, TypeError, ValueError):
            if isinstance(spec, dict):
                shapes.append((int(spec["in_channels"]), int(spec["image_size"]), int(spec["image_size"])))
        with contextlib.suppress(KeyError, TypeError, ValueError):
            if isinstance(defaults, dict):
                channels, height, width = defaults["input_size"]
                shapes.append((int(channels), int(height), int(width)))
    return shapes


def _outputs(model: nn.Module, images: Tensor, wanted: Callable[[Tensor], bool]) -> dict[str, Tensor]:
    """Outputs of submodules that satisfy `wanted`, in the order in which they are computed."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and wanted(output):
                found.pop(name, None)
                found[name] = output.clone()

        return record

    handles = [layer.register_forward_hook(hook(name)) for name, layer in model.named_modules() if name]
    try:
        with in_mode(model), torch.no_grad():
            model(images.to(device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return found
