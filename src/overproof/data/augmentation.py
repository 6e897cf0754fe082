"""A chain of augmentations, built from names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Protocol, get_type_hints

from torch import Generator, Tensor

from overproof.data.mixing import CutMix, Mixup
from overproof.data.steps import Cutout, HorizontalFlip, RandAugment, RandomCrop
from overproof.errors import UnknownNameError, UsageError
from overproof.registry import convert

__all__ = ["Augment", "CutMix", "Cutout", "HorizontalFlip", "Mixup", "RandAugment", "RandomCrop", "build_augment"]


class Step(Protocol):
    """One augmentation: a batch of images in [0, 1] (N, C, H, W) and labels to the same, images of the same size."""

    def __call__(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Augmented images and their labels."""
        ...


_STEPS: dict[str, type[Any]] = {
    "crop": RandomCrop,
    "flip": HorizontalFlip,
    "cutout": Cutout,
    "randaugment": RandAugment,
    "mixup": Mixup,
    "cutmix": CutMix,
}


@dataclass(frozen=True)
class Augment:
    """Augmentations one after the other, in the order given.

    Args:
        steps: each `step(images, labels, generator) -> (images, labels)`.
    """

    steps: tuple[Step, ...]

    @property
    def mixes(self) -> bool:
        """Whether labels become class weights (N, K)."""
        return any(isinstance(step, Mixup | CutMix) for step in self.steps)

    def __call__(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Augmented images (N, C, H, W) and labels: (N,), or class weights (N, K) after mixup or cutmix."""
        for step in self.steps:
            images, labels = step(images, labels, generator)
        return images, labels


def build_augment(names: Sequence[str] | str | None, *, classes: int = 0) -> Augment | None:
    """The augmentation described by names, or None for "none" or an empty list.

    Args:
        names: "crop:PADDING:FILL", "flip:P", "cutout:SIZE:FILL", "randaugment:OPS:MAGNITUDE", "mixup:ALPHA" or
            "cutmix:ALPHA", in the order in which they are applied; values that are left out keep their defaults. A
            single string may hold several, separated by commas.
        classes: number of classes, for mixup and cutmix.

    Raises:
        UnknownNameError: no such augmentation.
        UsageError: a value that is missing, too many, of the wrong type or out of range.
    """
    given = names.split(",") if isinstance(names, str) else list(names or ())
    wanted = [name.strip() for name in given if name.strip() not in ("", "none")]
    return Augment(tuple(_step(name, classes) for name in wanted)) if wanted else None


def _step(text: str, classes: int) -> Step:
    name, *values = text.split(":")
    if name not in _STEPS:
        raise UnknownNameError("augmentation", name, _STEPS)
    kind = _STEPS[name]
    hints = get_type_hints(kind)
    own = [field for field in fields(kind) if field.name != "classes"]
    needed = sum(field.default is MISSING for field in own)
    if not needed <= len(values) <= len(own):
        form = ":".join([name, *(field.name.upper() for field in own)])
        raise UsageError(f"The augmentation {text!r} has {len(values)} values; write {form} ({needed} needed).")
    options: dict[str, Any] = {
        field.name: convert(value, hints[field.name], f"augmentation {text!r}, {field.name}")
        for field, value in zip(own, values, strict=False)
    }
    if any(field.name == "classes" for field in fields(kind)):
        options["classes"] = classes
    step: Step = kind(**options)
    return step
