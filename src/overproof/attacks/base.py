"""The contract of an attack, and what gradient attacks have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from overproof.attacks.threats import AnyNorm, Norm, Threat, make_ball, make_threat, per_image
from overproof.errors import DataError, UsageError
from overproof.networks import in_mode


@runtime_checkable
class Attack(Protocol):
    """A value that turns images into adversarial ones.

    `attack(model, images, labels, generator=None)` returns images of the same shape inside [0, 1] and inside `threat`
    around the originals. With `targeted`, `labels` are the classes to be reached, otherwise the true ones. The model's
    modes, parameters, gradients, buffers and hooks are as before when it returns.
    """

    @property
    def threat(self) -> Threat:
        """What the attacker may do."""
        ...

    @property
    def targeted(self) -> bool:
        """Whether `labels` are classes to be reached."""
        ...

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        ...


@dataclass(frozen=True, kw_only=True)
class BudgetAttack:
    """An attack with a radius.

    Args:
        eps: radius in pixel units (8/255 is eight grey levels), at least 0.
        norm: "Linf", "L2" or "L1".
        targeted: labels are classes to be reached.

    Attributes:
        logits_only: the attack never looks inside the model, so that a cheaper copy that computes the same may be attacked.
    """

    logits_only: ClassVar[bool] = False

    eps: float = 8 / 255
    norm: Norm = "Linf"
    targeted: bool = False

    def __post_init__(self) -> None:
        make_ball(self.norm, self.eps)
        if isinstance(step := getattr(self, "step_size", None), str):
            raise UsageError(
                f"{type(self).__name__}(step_size={step!r}): in Python write a number, such as 2/255 without quotes."
            )

    @property
    def threat(self) -> Threat:
        """What the attacker may do."""
        return make_ball(self.norm, self.eps)


@dataclass(frozen=True, kw_only=True)
class MinimumNormAttack:
    """An attack that looks for the smallest change that succeeds.

    It returns the nearest adversarial image found; where none was found within `eps`, the image as it was.

    Args:
        eps: a found image counts only within this radius; infinite: whatever the size.
        norm: "Linf", "L2", "L1" or "L0", in which the size is measured; an attack may know only some.
        targeted: labels are classes to be reached.

    Raises:
        UsageError: a norm that the attack does not know.
    """

    logits_only: ClassVar[bool] = False
    norms: ClassVar[tuple[AnyNorm, ...]] = ("Linf", "L2", "L1", "L0")

    eps: float = math.inf
    norm: AnyNorm = "L2"
    targeted: bool = False

    def __post_init__(self) -> None:
        if self.norm not in self.norms:
            raise UsageError(f"{type(self).__name__} knows the norms {', '.join(self.norms)}, not {self.norm!r}.")
        make_threat(self.norm, self.eps)

    @property
    def threat(self) -> Threat:
        """What the attacker may do."""
        return make_threat(self.norm, self.eps)


class Nearest:
    """The nearest adversarial image to each of `images` that was offered so far.

    Attributes:
        images: (N, C, H, W), the originals where nothing was found.
        sizes: (N,), infinite where nothing was found.
    """

    def __init__(self, images: Tensor, threat: Threat) -> None:
        self.origin, self.threat = images.detach(), threat
        self.images = self.origin.clone()
        self.sizes = torch.full((len(images),), math.inf, dtype=images.dtype, device=images.device)

    @property
    def found(self) -> Tensor:
        """Mask (N,) of images with an adversarial one."""
        return self.sizes < math.inf

    def offer(self, candidates: Tensor, adversarial: Tensor, rows: Tensor | None = None) -> Tensor:
        """Keep those `candidates` (M, C, H, W) that are `adversarial` (M,) and nearer than what is known.

        Args:
            candidates: images inside [0, 1].
            adversarial: whether each fools the model.
            rows: numbers (M,) of the images they belong to; all in order if None. No number may occur twice.

        Returns:
            Mask (M,) of those that were kept.
        """
        rows = torch.arange(len(self.images), device=self.images.device) if rows is None else rows
        candidates = candidates.detach()
        sizes = self.threat.size(candidates - self.origin[rows])
        better = adversarial & (sizes < self.sizes[rows])
        self.sizes[rows[better]] = sizes[better]
        self.images[rows[better]] = candidates[better]
        return better

    def within(self, eps: float) -> Tensor:
        """The images found within `eps`; the originals elsewhere."""
        return torch.where(per_image(self.sizes <= eps, self.origin), self.images, self.origin)


def won(predicted: Tensor, labels: Tensor, targeted: bool) -> Tensor:
    """Whether each prediction (N,) is what the attacker wants."""
    return predicted == labels if targeted else predicted != labels


def predictions(model: nn.Module, images: Tensor) -> Tensor:
    """Predicted classes (N,) in eval mode, without gradients; see `classes_of`."""
    with in_mode(model), torch.no_grad():
        return classes_of(logits_of(model, images))


def classes_of(logits: Tensor) -> Tensor:
    """The class with the largest of the logits (N, K), (N,); -1, which is no class, where one of them is NaN."""
    return torch.where(logits.isnan().any(dim=1), -1, logits.argmax(dim=1))


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """The model's output, checked to be logits of shape (N, K)."""
    try:
        logits: Tensor = model(images)
    except RuntimeError as error:
        _refuse_other_precision(model, images, error)
        raise
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(f"The model returned {found} for {len(images)} images; a classifier returns logits of shape (N, K).")
    return logits


def _refuse_other_precision(model: nn.Module, images: Tensor, error: RuntimeError) -> None:
    """Say what is the matter if a forward failed because weights and images have different types."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()} - {images.dtype}
    if kinds and "type" in str(error):  # "dtype", "scalar type", "Input type ... and weight type"
        raise UsageError(
            f"The weights are {', '.join(sorted(map(str, kinds)))}, the images {images.dtype} ({str(error).splitlines()[0]}). Training, "
            "evaluation and attacks are in float32: call .float() on the model."
        ) from error
