"""The purifier with a knob: noise, then an autoencoder that was pre-trained to remove it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from overproof.attacks.randomness import Streams, uniform
from overproof.data.images import channel_statistics
from overproof.data.pixels import to_float
from overproof.errors import UsageError
from overproof.guards.cache_build import for_model
from overproof.guards.purifier_base import Level, Purifier, checked, trained
from overproof.losses.denoising import NoiseLevels, add_noise, kept_patches, masked_patches, patch_errors, patchify, unpatchify
from overproof.models import create_model, rebuild
from overproof.models.autoencoder import Pretext, autoencoder_of, normalised
from overproof.models.rebuilding import denoised, inpainted

Statistics = Literal["input", "noisy", "none"]


class NIMPurifier(Purifier):
    """Every image gets noise and is rebuilt by a denoising autoencoder before the classifier sees it; gradients pass all of it.

    f(x; sigma) = C(clamp(D(x, x + sigma / 255 z))), z ~ N(0, I); C(x) where it is off

    It stands before any classifier. Where it takes mean and variance of each patch from the input itself (`stats`), these pass
    beside the noise, and attacks use that way.

    Args:
        sigma: level of the noise in grey levels, or "off"; with a masked autoencoder the share of masked patches.
        stats: whose patches lend mean and variance: of the "input", as published; of the "noisy" images; "none": the autoencoder
            was trained with norm_pix=false. None: "input", or "none" if it was trained so.
        draws: see `Purifier`.
        network: what `fit` pre-trains if it is given no autoencoder; None: vit-ae-digits below 16 pixels, vit-ae-small up to 64,
            vit-ae-b16 above.
        epochs, batch_size, lr, seed: of that pre-training, with the noise of `methods.nim.NIM`.

    Raises:
        UsageError: an option out of range.

    Reference: You, Liu, Han, Xu: Beyond Pretrained Features: Noisy Image Modeling Provides Adversarial Defense, NeurIPS 2023,
    arXiv 2302.01056.

    Differences from the paper: any classifier; stats "noisy"; draws, averaged over probabilities. Patches that a masked autoencoder
    sees stay as they are.
    """

    autoencoder: nn.Module | None

    def __init__(
        self,
        *,
        sigma: Level = 70.0,
        stats: Statistics | None = None,
        draws: int = 1,
        network: str | None = None,
        epochs: int = 50,
        batch_size: int = 128,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__(sigma=sigma, draws=draws, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
        if stats not in (None, "input", "noisy", "none"):
            raise UsageError(f"NIMPurifier(stats={stats!r}): known are input, noisy and none.")
        self.stats, self.network = stats, network
        self.register_module("autoencoder", None)

    def fit(self, model: nn.Module, images: Tensor, labels: Tensor, *, autoencoder: nn.Module | None = None) -> Self:
        """Take over a pre-trained autoencoder, or pre-train one.

        Args:
            model: before which the purifier will stand; it is not asked.
            images: (N, C, H, W), floats in [0, 1] or uint8.
            labels: not needed.
            autoencoder: pre-trained with nim or mim, made by `create_model`; copied. None: pre-train one on the images.

        Raises:
            UsageError: no pre-trained autoencoder, one for images of another shape, or one that `stats` or `sigma` does not fit.
            DataError: images that are none.
        """
        shape, like = checked(images, "purifier"), for_model(images[:1], model)
        made = self._pretrained(images, like.device) if autoencoder is None else copy.deepcopy(autoencoder)
        net = autoencoder_of(made)
        if net.shape != shape:
            raise UsageError(
                f"The autoencoder rebuilds images of shape {net.shape} (channels, height, width), these have {shape}."
            )
        if net.pretext.kind == "none":
            raise UsageError("This autoencoder has learned nothing yet: pre-train it with the method nim or mim first.")
        spec = getattr(made, "spec", None)
        if spec is None:
            raise UsageError("This autoencoder does not say how to build it again: make it with overproof.create_model.")
        stats = self._statistics(net.pretext)
        pretext = net.pretext  # in full precision
        self.autoencoder = made.to(like.device, like.dtype).requires_grad_(False).eval()
        facts = {"kind": pretext.kind, "stats": stats, "high": pretext.high, "shape": list(shape)}
        return self.settle(model, images, {**facts, "autoencoder": spec})

    def build(self, facts: Mapping[str, Any]) -> None:
        """The autoencoder, from its description; nothing is executed."""
        if facts["stats"] not in get_args(Statistics):
            raise ValueError(facts["stats"])
        with torch.random.fork_rng(devices=[]):  # weights are drawn, to be replaced at once
            self.autoencoder = rebuild(facts["autoencoder"]).requires_grad_(False).eval()

    def cleaned(self, images: Tensor, noisy: Tensor, level: float | Tensor) -> Tensor:
        """D(x, x~), with the statistics of the images as they are, as published, of the noisy ones, or none."""
        return denoised(self._net, noisy, {"input": images, "noisy": noisy, "none": None}[self.facts["stats"]])

    def purified(self, images: Tensor, level: float, streams: Streams) -> Tensor:
        """The images, spoiled and rebuilt; of a masked autoencoder, with guesses for the masked patches."""
        if self.facts["kind"] == "noise":
            return super().purified(images, level, streams)
        return inpainted(self._net, images, self._kept(images, level, streams), norm_pix=self.facts["stats"] != "none")

    def noisy(self, images: Tensor, level: float, streams: Streams) -> Tensor:
        """The images with noise; of a masked autoencoder, black where they are masked."""
        if self.facts["kind"] == "noise":
            return super().noisy(images, level, streams)
        net = autoencoder_of(self._net)
        seen = 1 - masked_patches(self._kept(images, level, streams), net.patches)[:, :, None].to(images.dtype)
        return unpatchify(patchify(images, net.patch_size) * seen, net.patch_size, net.shape)

    @property
    def _net(self) -> nn.Module:
        assert isinstance(self.autoencoder, nn.Module)
        return self.autoencoder

    def _kept(self, images: Tensor, level: float, streams: Streams) -> Tensor:
        numbers = images.new_empty(len(images), autoencoder_of(self._net).patches)
        return kept_patches(uniform(numbers, streams), level)

    def _statistics(self, pretext: Pretext) -> Statistics:
        found: Statistics = self.stats or ("input" if pretext.norm_pix else "none")
        if (found == "none") == pretext.norm_pix or (pretext.kind == "mask" and found == "noisy"):
            fitting = "input" if pretext.norm_pix else "none"
            raise UsageError(
                f"stats={found!r} does not fit an autoencoder trained with the pretext {pretext.kind!r} and norm_pix="
                f"{str(pretext.norm_pix).lower()}: use stats={fitting!r}."
            )
        return found

    def _pretrained(self, images: Tensor, device: torch.device) -> nn.Module:
        """An autoencoder that has learned to remove noise from these images."""
        channels, side, breadth = images.shape[1:]
        if side != breadth:
            raise UsageError(f"The purifier rebuilds square images, not {side} x {breadth}; resize them.")
        mean, std = channel_statistics(to_float(part) for part in torch.split(images[:10_000], 500))
        name = self.network or ("vit-ae-digits" if side < 16 else "vit-ae-small" if side <= 64 else "vit-ae-b16")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            made = create_model(name, 2, channels, side, mean=mean, std=std)
        net, levels, norm_pix = autoencoder_of(made), NoiseLevels(), self.stats != "none"
        net.learns(Pretext("noise", norm_pix, *levels.span))
        made.to(device)

        def loss(batch: Tensor) -> Tensor:
            spoiled = add_noise(batch, levels.draw(batch), torch.randn_like(batch))
            said, clean = net.said(net.tokens(normalised(made, spoiled))), normalised(made, batch)
            return patch_errors(said, clean, net.patch_size, norm_pix=norm_pix).mean()

        trained(made, images, loss, guard=self, device=device)
        return made
