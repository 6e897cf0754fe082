"""What an attacker may do: stay in [0, 1] and within a distance of the image. Distances are in pixel units."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from overproof.attacks.randomness import normal, uniform
from overproof.errors import UsageError

Norm = Literal["Linf", "L2", "L1"]
AnyNorm = Literal["Linf", "L2", "L1", "L0"]


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """A number for each image (N,), shaped to act on tensors such as `like` (N, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))


@dataclass(frozen=True)
class Threat(ABC):
    """A ball of radius `eps` around each image, cut with the box [0, 1].

    Args:
        eps: radius in pixel units, at least 0; infinite where only the size of a change matters (minimum-norm attacks).

    Raises:
        UsageError: the radius is negative or NaN, or a random start is asked of an infinite ball.
    """

    eps: float

    def __post_init__(self) -> None:
        try:
            fits = bool(self.eps >= 0)
        except TypeError:  # such as "8/255", which options in text may say
            raise UsageError(
                f"{type(self).__name__}(eps={self.eps!r}): the radius must be a number; in Python write 8/255 without quotes."
            ) from None
        if not fits:
            raise UsageError(f"{type(self).__name__}(eps={self.eps}): the radius must be a number and at least 0.")
        if isinstance(self, Linf) and 1 < self.eps < math.inf:
            raise UsageError(f"Linf(eps={self.eps:g}): pixels lie in [0, 1]; write 8/255 for eight grey levels.")

    @abstractmethod
    def size(self, delta: Tensor) -> Tensor:
        """Norm of each perturbation, (N,)."""

    @abstractmethod
    def steepest(self, gradient: Tensor, at: Tensor) -> Tensor:
        """Direction of size 1 with the largest inner product with `gradient`, from images `at` that stay in the box."""

    @abstractmethod
    def project(self, candidates: Tensor, images: Tensor) -> Tensor:
        """Points of the cut ball around `images` that are near `candidates`."""

    def random(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A start drawn uniformly from the ball, then cut to the box."""
        if not math.isfinite(self.eps):
            raise UsageError(f"{type(self).__name__}(eps={self.eps}) has no uniform start; give a finite radius.")
        return self._random(images, generator)

    @abstractmethod
    def _random(self, images: Tensor, generator: torch.Generator | None) -> Tensor: ...


@dataclass(frozen=True)
class Linf(Threat):
    """No pixel changes by more than `eps`."""

    def size(self, delta: Tensor) -> Tensor:
        return delta.flatten(1).abs().amax(dim=1)

    def steepest(self, gradient: Tensor, at: Tensor) -> Tensor:
        return gradient.sign()

    def project(self, candidates: Tensor, images: Tensor) -> Tensor:
        low, high = (images - self.eps).clamp_(min=0), (images + self.eps).clamp_(max=1)
        return torch.minimum(torch.maximum(candidates, low), high)

    def _random(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        return (images + uniform(images, generator, -self.eps, self.eps)).clamp_(0, 1)


@dataclass(frozen=True)
class L2(Threat):
    """The Euclidean length of the change is at most `eps`.

    `project` scales to the ball and then cuts to the box: always inside both, though not the nearest point of their
    intersection where the box is active.
    """

    def size(self, delta: Tensor) -> Tensor:
        norms: Tensor = delta.flatten(1).norm(dim=1)
        return norms

    def steepest(self, gradient: Tensor, at: Tensor) -> Tensor:
        gradient = movable(gradient, at)
        return gradient / per_image(self.size(gradient).clamp(min=1e-12), gradient)

    def project(self, candidates: Tensor, images: Tensor) -> Tensor:
        if math.isinf(self.eps):
            return candidates.clamp(0, 1)
        delta = candidates - images
        scale = (self.eps / self.size(delta).clamp(min=1e-12)).clamp(max=1)
        return (images + delta * per_image(scale, delta)).clamp_(0, 1)

    def _random(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        direction = normal(images, generator)
        radius = self.eps * uniform(images[:, 0, 0, 0], generator) ** (1 / images[0].numel())
        return (images + direction * per_image(radius / self.size(direction), images)).clamp_(0, 1)


@dataclass(frozen=True)
class L1(Threat):
    """The sum of absolute changes is at most `eps`.

    `project` is the exact nearest point of ball and box together (see `project_l1`): cutting to the box
    after projecting on the ball would waste most of an L1 budget (Croce and Hein, ICML 2021).
    """

    def size(self, delta: Tensor) -> Tensor:
        return delta.flatten(1).abs().sum(dim=1)

    def steepest(self, gradient: Tensor, at: Tensor) -> Tensor:
        flat = movable(gradient, at).flatten(1)
        best = flat.abs().argmax(dim=1, keepdim=True)
        return torch.zeros_like(flat).scatter_(1, best, flat.gather(1, best).sign()).view_as(gradient)

    def project(self, candidates: Tensor, images: Tensor) -> Tensor:
        if math.isinf(self.eps):
            return candidates.clamp(0, 1)
        return project_l1(candidates, images, self.eps, rounds=30)

    def _random(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        # Exponential variables divided by the sum of themselves and one more are uniform in the simplex's interior.
        parts = -torch.log1p(-uniform(images, generator).clamp(max=1 - 1e-7))
        rest = -torch.log1p(-uniform(images[:, 0, 0, 0], generator).clamp(max=1 - 1e-7))
        signs = uniform(images, generator, -1, 1).sign()
        return (images + self.eps * signs * parts / per_image(self.size(parts) + rest, parts)).clamp_(0, 1)


@dataclass(frozen=True)
class L0(Threat):
    """At most `eps` of the C * H * W values change, each by any amount.

    It measures and projects (the largest changes are kept); `steepest` moves the one most promising value.
    """

    def size(self, delta: Tensor) -> Tensor:
        return (delta.flatten(1) != 0).sum(dim=1).to(delta.dtype)

    def steepest(self, gradient: Tensor, at: Tensor) -> Tensor:
        return L1(self.eps).steepest(gradient, at)

    def project(self, candidates: Tensor, images: Tensor) -> Tensor:
        inside = candidates.clamp(0, 1)
        delta = (inside - images).flatten(1)
        if self.eps >= delta.shape[1]:
            return inside
        kept = delta.abs().topk(int(self.eps), dim=1).indices
        mask = torch.zeros_like(delta, dtype=torch.bool).scatter_(1, kept, True)
        return torch.where(mask.view_as(images), inside, images)

    def _random(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        return self.project(uniform(images, generator), images)


def movable(gradient: Tensor, at: Tensor) -> Tensor:
    """The gradient without the components that would only push a saturated pixel out of the box."""
    stuck = ((at <= 0) & (gradient < 0)) | ((at >= 1) & (gradient > 0))
    return gradient.masked_fill(stuck, 0)


def project_l1(points: Tensor, images: Tensor, eps: float, rounds: int = 10) -> Tensor:
    """The nearest point of the L1 ball and the box together.

    The change shrinks to min(max(|d_i| - t, 0), room_i); its size is piecewise linear in t, whose root Newton's method,
    kept between brackets, finds in a handful of rounds. Should any be missing, scaling brings the change into the ball.
    """
    change = (points - images).flatten(1)
    room = torch.where(change > 0, 1 - images.flatten(1), images.flatten(1))
    length = change.abs()
    low, high = torch.zeros_like(length[:, :1]), length.amax(dim=1, keepdim=True)
    threshold = low
    for _ in range(rounds):
        rest = torch.minimum((length - threshold).clamp_(min=0), room)
        over = rest.sum(dim=1, keepdim=True) - eps
        slope = ((rest > 0) & (rest < room)).sum(dim=1, keepdim=True).clamp_(min=1)
        low, high = torch.where(over > 0, threshold, low), torch.where(over > 0, high, threshold)
        newton = threshold + over / slope
        threshold = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
    rest = torch.minimum((length - threshold).clamp_(min=0), room)
    rest.mul_(eps / rest.sum(dim=1, keepdim=True).clamp_(min=max(eps, 1e-12))).mul_(change.sign())
    return rest.view_as(images).add_(images).clamp_(0, 1)


THREATS: dict[str, type[Threat]] = {"Linf": Linf, "L2": L2, "L1": L1, "L0": L0}


def make_threat(norm: str, eps: float) -> Threat:
    """The threat `norm` ("Linf", "L2", "L1", "L0") of radius `eps`.

    Raises:
        UsageError: unknown norm, or a radius out of range.
    """
    if norm not in THREATS:
        raise UsageError(f"Unknown norm {norm!r}; known: {', '.join(THREATS)}.")
    return THREATS[norm](eps)


def make_ball(norm: str, eps: float) -> Threat:
    """A threat for an attack that needs a radius: "Linf", "L2" or "L1", of finite size.

    Raises:
        UsageError: another norm, or a radius out of range.
    """
    if norm not in ("Linf", "L2", "L1"):
        raise UsageError(f"Unknown norm {norm!r} for an attack with a radius; known: Linf, L2, L1.")
    if eps == math.inf:
        raise UsageError(f"{norm}(eps=inf): an attack with a radius needs a finite one, such as 8/255.")
    return make_threat(norm, eps)
