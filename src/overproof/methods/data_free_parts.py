"""Parts of training without data: the rules of the game, where the images come from, and what is said about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from overproof.errors import UnknownNameError, UsageError
from overproof.features import penultimate
from overproof.losses.divergences import kl_divergence
from overproof.losses.synthesis import absolute_difference, squared_difference
from overproof.methods.data_free_pool import said_of_black
from overproof.methods.feature_probe import ImageShape, sample_images
from overproof.models.classifier import normalisation_of
from overproof.models.generators import Generator, Head, make_generator

Criterion = Literal["l1", "mse", "kl"]
Images = Literal["generated", "untrained", "noise"]
Made = Literal["upsampling", "dcgan"]
Mode = Literal["train", "eval"]
Scale = float | tuple[float, ...] | None

DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": absolute_difference,
    "mse": squared_difference,
    "kl": kl_divergence,
}
NAMED = 20  # classes whose shares are logged one by one


@dataclass(frozen=True, kw_only=True)
class Game:
    """What student and generator play for.

    Args:
        criterion: distance of the logits, "l1", "mse", or "kl" of the predictions.
        adversarial: weight of that distance in the generator's loss.
        log_form: the generator gets log(1 + D) instead of D, so that it slows down where D is large.
        onehot, balance, statistics, activation: weights of what else the generator looks for, see `DataFree`.
        student_steps: turns of the student for each of the generator, at least 1.
        student_mode: of the student's BatchNorm while the generator learns.
        shared: the generator's backward pass is the student's first turn too; an approximation.
        replay: share of the student's images taken from a pool of earlier ones, with the teacher's answers; an approximation.
        pool: images in it.

    Raises:
        UsageError: values out of range.
    """

    criterion: Criterion = "l1"
    adversarial: float = 1.0
    log_form: bool = False
    onehot: float = 0.0
    balance: float = 0.0
    statistics: float = 0.0
    activation: float = 0.0
    student_steps: int = 5
    student_mode: Mode = "train"
    shared: bool = False
    replay: float = 0.0
    pool: int = 2048

    def __post_init__(self) -> None:
        _among(self, criterion=Criterion, student_mode=Mode)
        names = ("adversarial", "onehot", "balance", "statistics", "activation")
        weights = {name: getattr(self, name) for name in names}
        if not all(value >= 0 for value in weights.values()) or not any(weights.values()):
            raise UsageError(
                f"The generator looks for nothing: of its weights {weights} none may be below 0, and not all of them 0."
            )
        if self.student_steps < 1 or self.pool < 1 or not 0 <= self.replay < 1:
            raise UsageError(
                f"Training without data needs student_steps >= 1, pool >= 1 and 0 <= replay < 1, not {self.student_steps}, {self.pool} and "
                f"{self.replay}."
            )
        if self.shared and not self.adversarial:
            raise UsageError("shared=true takes the student's gradient from the adversarial term, whose weight is 0: drop it.")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the images come from.

    Args:
        images: "generated" by a generator that learns, by an "untrained" one, or "noise" (Gaussian pixels).
        generator: "upsampling" (sizes that are multiples of 4) or "dcgan" (of 16).
        latent: length of the noise.
        width: channels of the generator's last map.
        head: its end, see `models.generators.upsampling`; None: "batchnorm", of a dcgan "tanh".
        lr: of its Adam.
        betas: likewise.
        mean, std: of the images that the teacher was trained on, in pixel units; None: those of its own normalisation, and 0.5 and
            0.25 if it has none. What the generator gives, and Gaussian noise, are numbers on the scale of normalised images, so that
            x = mean + std G(z): the teacher's first layer then sees G(z) itself, not clamped. A sigmoid, or a dcgan's tanh, fills [0, 1].
        image_shape: (channels, height, width); None: what the networks were built for, or the first usual shape that works.

    Raises:
        UsageError: values out of range, or a scale for a generator that fills [0, 1].
    """

    images: Images = "generated"
    generator: Made = "upsampling"
    latent: int = 256
    width: int = 64
    head: Head | None = None
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    mean: Scale = None
    std: Scale = None
    image_shape: ImageShape | None = None

    def __post_init__(self) -> None:
        _among(self, images=Images, generator=Made)
        if not (self.lr > 0 and all(0 <= beta < 1 for beta in self.betas)):
            raise UsageError(f"generator_lr={self.lr} must be above 0, and generator_betas={self.betas} in [0, 1).")
        if self.width < 1 or self.latent < 1:
            raise UsageError(f"width={self.width} and latent={self.latent} must be at least 1.")
        if self.bounded and (self.mean is not None or self.std is not None):
            raise UsageError(
                f"mean={self.mean} and std={self.std} have no effect with generator={self.generator!r} and head={self.ending!r}, whose images "
                "fill [0, 1]: leave them out, or say head=batchnorm."
            )

    @property
    def ending(self) -> Head:
        """The generator's head."""
        return self.head or ("batchnorm" if self.generator == "upsampling" else "tanh")

    @property
    def bounded(self) -> bool:
        """Whether the images fill [0, 1] whatever the teacher's normalisation."""
        own = self.ending == "sigmoid" or (self.ending == "tanh" and self.generator == "dcgan")
        return own and self.images != "noise"

    def build(self, student: nn.Module, teacher: nn.Module) -> Generator:
        """The generator, untrained; for noise one without weights."""
        shape = self.image_shape or sample_images(student, teacher, None).shape[1:]
        shift, scale = _scales(teacher, self.mean, self.std, channels=shape[0])
        if self.images == "noise":
            flat = nn.Unflatten(1, tuple(shape))
            return Generator(flat, latent=math.prod(shape), shape=tuple(shape), shift=shift, scale=scale)
        head = self.ending
        if self.bounded:
            shift, scale = ([0.0], [1.0]) if head == "sigmoid" else ([0.5], [0.5])
        every = shape[0] if len(shift) == 1 else 1
        how = {"shift": shift * every, "scale": scale * every, "width": self.width, "head": head}
        return make_generator(self.generator, self.latent, tuple(shape), **how)  # type: ignore[arg-type]


def _among(rules: Game | Source, **kinds: Any) -> None:
    for name, kind in kinds.items():
        if (value := getattr(rules, name)) not in get_args(kind):
            raise UnknownNameError(name, str(value), get_args(kind))


def _scales(teacher: nn.Module, mean: Scale, std: Scale, *, channels: int) -> tuple[list[float], list[float]]:
    """What the teacher subtracts from pixels and divides them by, per channel."""
    first = normalisation_of(teacher)
    known: dict[str, list[float]] = {"mean": [0.5], "std": [0.25]}
    if first is not None and (bool(first.mean.any()) or bool((first.std != 1).any())):
        known = {"mean": first.mean.flatten().tolist(), "std": first.std.flatten().tolist()}
    found = []
    for name, given in (("mean", mean), ("std", std)):
        values = known[name] if given is None else [given] if isinstance(given, float | int) else list(given)
        values = [float(value) for value in values] * (channels if len(values) == 1 else 1)
        if len(values) != channels or (name == "std" and min(values) <= 0):
            raise UsageError(f"{name}={given}: give a number, or one for each of the {channels} channels; std above 0.")
        found.append(values)
    return found[0], found[1]


def normalisations(teacher: nn.Module, shape: tuple[int, ...]) -> dict[str, nn.Module]:
    """The teacher's layers that remember statistics of the training images and that images of `shape` pass, by name.

    Raises:
        UsageError: it has none.
    """
    known: dict[str, nn.Module] = {
        n: m for n, m in teacher.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None
    }
    passed: set[nn.Module] = set()
    hooks = [m.register_forward_hook(lambda module, *_: passed.add(module)) for m in known.values()]
    said_of_black(teacher, shape)
    for hook in hooks:
        hook.remove()
    found = {name: module for name, module in known.items() if module in passed}
    if not found:
        kind = type(getattr(teacher, "net", teacher)).__name__
        raise UsageError(
            f"method.statistics compares with what the teacher's BatchNorm layers remember of its training, and this teacher ({kind}) has "
            "none. Say method.statistics=0, or use a method without it (dfad, zskt, dafl)."
        )
    return found


def watched_layers(teacher: nn.Module, norms: Mapping[str, nn.Module], *, last: bool) -> list[str]:
    """Tap names: what the normalisations receive, and at the end the penultimate features."""
    return [*(f"{name}:input" for name in norms), *([penultimate(teacher)] if last else [])]


def figures(images: Tensor, target: Tensor) -> dict[str, Tensor]:
    """What a batch of made images is like: how the teacher classifies it, and how much pixels differ from image to image.

    Returns:
        Shares between 0 and 1: classes in use (exp of the entropy, over K), the largest class, diversity (the mean standard
        deviation of a pixel over the images, over that of all pixels); of up to 20 classes the share of each.
    """
    classes = torch.arange(target.shape[1], device=target.device)
    share = (target.argmax(dim=1)[:, None] == classes).float().mean(dim=0)
    pixels = images.float()
    logs = {
        "fakes/classes in use": torch.special.entr(share).sum().exp() / len(classes),
        "fakes/largest class": share.max(),
        "fakes/diversity": pixels.std(dim=0).mean() / pixels.std().clamp_min(1e-12),
    }
    return logs | ({f"fakes by class/{k}": share[k] for k in range(len(classes))} if len(classes) <= NAMED else {})
