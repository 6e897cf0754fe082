"""What purifiers with a knob have in common: noise at a level that is chosen at call time, draws, and how they are trained."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from overproof import console
from overproof.attacks.randomness import Streams, normal
from overproof.data.pixels import check_images, to_float
from overproof.errors import FolderError, OverproofError, UsageError
from overproof.guards.base import Guard, Place
from overproof.guards.cache_build import for_model
from overproof.losses.denoising import add_noise
from overproof.models.classifier import parameters_of

Level = float | Literal["off"]
MEASURED = 256  # images by which a fitted purifier is described
LEVELS: dict[str, tuple[float, ...]] = {"noise": (35.0, 70.0, 140.0), "mask": (0.25, 0.5, 0.75)}


class Purifier(Guard):
    """Spoils an image by a chosen amount, and rebuilds it.

    Args:
        sigma: the level if none is said at call time, in grey levels; "off", or anything negative: images pass untouched, bit for
            bit. 0 is not off: the image is rebuilt without noise.
        draws: over how many draws of the noise `Guarded` averages the probabilities, in one batch; at least 1.
        epochs, batch_size, lr, seed: of what `fit` trains.

    Raises:
        UsageError: an option out of range.
    """

    place: ClassVar[Place] = "purifier"

    def __init__(self, *, sigma: Level, draws: int, epochs: int, batch_size: int, lr: float, seed: int) -> None:
        super().__init__()
        self.sigma, self.draws, self.seed = sigma, draws, seed
        self.epochs, self.batch_size, self.lr = epochs, batch_size, lr
        if min(epochs, batch_size) < 1 or not lr > 0:
            raise UsageError(
                f"{type(self).__name__}(epochs={epochs}, batch_size={batch_size}, lr={lr}): at least 1, 1, and above 0."
            )
        self.repeats()

    @abstractmethod
    def build(self, facts: Mapping[str, Any]) -> None:
        """Make the (untrained) parts that `facts` describe, frozen."""

    @abstractmethod
    def cleaned(self, images: Tensor, noisy: Tensor, level: float | Tensor) -> Tensor:
        """What is rebuilt from `noisy`, in [0, 1]; `images` are those that were asked about, all (N, C, H, W)."""

    def level(self, sigma: Level | None = None) -> float | None:
        """The level that is meant, the option's if None; None where the purifier is off.

        Raises:
            UsageError: neither a number nor "off", or, once a masked autoencoder is fitted, no share of patches.
        """
        chosen = self.sigma if sigma is None else sigma
        if chosen == "off":
            return None
        if isinstance(chosen, bool) or not isinstance(chosen, int | float) or not math.isfinite(chosen):
            raise UsageError(f'sigma={chosen!r} is no level of noise: give grey levels, such as 70, or "off".')
        if self.facts.get("kind") == "mask" and chosen >= 1:
            raise UsageError(
                f"sigma={chosen:g}: of a masked autoencoder it is the share of patches that are masked, below 1, such as sigma=0.75 "
                "(--set nim.sigma=0.75)."
            )
        return None if chosen < 0 else float(chosen)

    def repeats(self, *, sigma: Level | None = None, draws: int | None = None) -> int:
        """How many draws are averaged; one where the purifier is off.

        Raises:
            UsageError: fewer than one, or no whole number.
        """
        count = self.draws if draws is None else draws
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UsageError(f"draws={count!r}: a purifier needs a whole number of draws of its noise, at least one.")
        return 1 if self.level(sigma) is None else count

    def forward(
        self, model: nn.Module, images: Tensor, streams: Streams | None = None, *, sigma: Level | None = None
    ) -> Tensor:
        """Images (N, C, H, W) in [0, 1] -> rebuilt images in [0, 1], one draw; differentiable in the images, by every way.

        Args:
            model: not asked.
            images: floats.
            streams: of the noise.
            sigma: the level; the option's own if None.

        Raises:
            UsageError: not fitted, a level that is none, or images of another shape. A level above those of the training warns.
        """
        self.require_fitted()
        level = self.level(sigma)
        if level is None:
            return images
        self._look(images, level)
        return self.purified(images, level, Streams.of(streams, images))

    def purified(self, images: Tensor, level: float, streams: Streams) -> Tensor:
        """The images, spoiled and rebuilt."""
        return self.cleaned(images, self.noisy(images, level, streams), level)

    def noisy(self, images: Tensor, level: float, streams: Streams) -> Tensor:
        """The images with noise, not clamped; from equal streams the noise that `purified` puts in."""
        return add_noise(images, level, normal(images, streams))

    def _look(self, images: Tensor, level: float) -> None:
        shape, high = tuple(self.facts["shape"]), self.facts["high"]
        if tuple(images.shape[1:]) != shape:
            raise UsageError(
                f"This purifier rebuilds images of shape {shape} (channels, height, width), not {tuple(images.shape[1:])}: convert them, "
                "or fit it on such images."
            )
        if level > high * (1 + 1e-6):
            warnings.warn(
                f"sigma={level:g} is above what the purifier was trained for (up to {high:g}): do not trust what it rebuilds.",
                stacklevel=2,
            )

    def train(self, mode: bool = True) -> Self:
        """Purifiers stay in eval mode."""
        return super().train(False)

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        """Take over what `state` and `facts` were.

        Raises:
            FolderError: tensors are missing, others are there, or the facts describe no purifier.
        """
        try:
            float(facts["high"]), LEVELS[facts["kind"]], tuple(facts["shape"])
            self.build(facts)
        except (KeyError, TypeError, ValueError, OverproofError) as error:
            raise FolderError(
                f"These findings describe no {type(self).__name__} ({error!r}). Fit it again: overproof guard fit."
            ) from error
        return super().restore(tensors, facts)

    def settle(self, model: nn.Module, images: Tensor, facts: Mapping[str, Any]) -> Self:
        """Keep the `facts`, measure what was fitted on a few images, and belong to `model` from now on.

        `facts` need "kind" ("noise" or "mask"), "shape" of an image, and the "high"est level of the training.

        Raises:
            UsageError: the option sigma is no level for what was fitted.
        """
        self.facts = {**facts, "parameters": parameters_of(self)}
        try:
            self.level()
        except UsageError:
            self.facts = {}
            raise
        few, rows = for_model(images[:MEASURED], model), torch.arange(min(len(images), MEASURED))
        errors: dict[str, dict[str, float]] = {}
        with torch.no_grad():
            for level in LEVELS[self.facts["kind"]]:
                spoiled, found = (
                    call(few, level, Streams.named(rows.to(few.device), "errors")) for call in (self.noisy, self.purified)
                )
                errors[f"sigma {level:g}"] = {
                    "noisy": float((spoiled - few).square().mean()),
                    "purified": float((found - few).square().mean()),
                }
        self.facts["errors"] = errors
        self.remember(model)
        return self

    def describe(self) -> dict[str, Any]:
        """Level, draws, size, and mean squared errors of rebuilt images at three levels, beside those of the noisy ones."""
        self.require_fitted()
        told = {key: value for key, value in self.facts.items() if key not in ("model", "autoencoder")}
        return {"sigma": self.sigma, "draws": self.draws, **told}


def checked(images: Tensor, place: str) -> tuple[int, int, int]:
    """The shape (C, H, W) of images that can be learned from."""
    check_images(images, place)
    channels, height, width = images.shape[1:]
    return channels, height, width


def trained(
    network: nn.Module, images: Tensor, loss: Callable[[Tensor], Tensor], *, guard: Purifier, device: torch.device
) -> None:
    """Minimise `loss(batch)` over `images` with AdamW and a cosine, as the guard's options say; float32.

    Random numbers are those of the guard's seed, and the caller's go on as if none had been drawn.
    """
    with torch.enable_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(guard.seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(guard.seed)
        optimizer = torch.optim.AdamW(network.parameters(), guard.lr, betas=(0.9, 0.95), weight_decay=0.05)
        steps = guard.epochs * -(-len(images) // guard.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with console.bar(f"fitting {type(guard).__name__}", steps) as bar:
            for _ in range(guard.epochs):
                for rows in torch.split(torch.randperm(len(images)), guard.batch_size):
                    batch = to_float(images[rows.to(images.device)]).to(device, torch.float32)
                    optimizer.zero_grad()
                    loss(batch).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    schedule.step()
                    bar.update(bar.done + 1)
