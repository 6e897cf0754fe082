"""Pre-training that rebuilds images: from noise, or, as the baseline, from a few of their patches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.losses.denoising import Law, NoiseLevels, add_noise, kept_patches, masked_patches, patch_errors
from overproof.losses.divergences import cross_entropy
from overproof.methods.nim_groups import decay_groups
from overproof.methods.objective import Objective
from overproof.models.autoencoder import Pretext, VitAutoencoder, autoencoder_of, normalised
from overproof.types import Batch, Output, Progress

BETAS = (0.9, 0.95)


class _Rebuilding(Objective):
    """What both have in common: the autoencoder in the student, its loss, and a linear probe that leaves no trace in it."""

    partial: ClassVar[bool] = True
    name: ClassVar[str]

    def __init__(self, student: nn.Module, pretext: Pretext, *, probe: bool) -> None:
        super().__init__(student)
        self.norm_pix, self.probe = pretext.norm_pix, probe
        if pretext.norm_pix and self.network.patch_size**2 * self.network.shape[0] < 2:
            raise UsageError(
                f"{self.name}: norm_pix needs patches of two pixels or more; set method.norm_pix=false, or larger patches."
            )
        self.network.learns(pretext)

    @property
    def answers(self) -> bool:
        """No: labels do not say how good it is."""
        return False

    @property
    def network(self) -> VitAutoencoder:
        """The autoencoder, which is the student or stands behind its normalisation."""
        return autoencoder_of(self.student)

    @abstractmethod
    def look(self, images: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """The encoder's tokens of spoiled images, the places of the patches that it saw (None: all), and what is worth logging."""

    def trainable(self, phase: str = "train") -> Iterator[nn.Parameter]:
        """All that the loss reaches."""
        return (parameter for _, parameter in self._reached())

    def groups(self, phase: str = "train") -> list[dict[str, Any]]:
        """With adam and adamw betas are (0.9, 0.95), whatever train.betas says; no weight decay for biases and norms."""
        return decay_groups(self._reached(), betas=BETAS)

    def compiled(self) -> list[nn.Module]:
        """Block by block: encoder and decoder are called apart."""
        return self.network.all_blocks()

    def _reached(self) -> Iterator[tuple[str, nn.Parameter]]:
        idle = set() if self.probe else {id(p) for part in (self.network.fc_norm, self.network.head) for p in part.parameters()}
        if self.network.pretext.kind == "noise" and self.network.decoder is not None:
            idle.add(id(self.network.decoder.mask_token))
        return ((name, p) for name, p in self.student.named_parameters() if p.requires_grad and id(p) not in idle)

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's losses."""
        net = self.network
        tokens, kept, logs = self.look(batch.images)
        clean = normalised(self.student, batch.images)
        errors = patch_errors(net.said(tokens, kept), clean, net.patch_size, norm_pix=self.norm_pix)
        if kept is not None:
            masked = masked_patches(kept, net.patches)
            errors = errors * masked * (net.patches / masked.sum(dim=1, keepdim=True))
        losses = {self.name: errors.mean()}
        with torch.set_grad_enabled(self.probe and torch.is_grad_enabled()):
            logits = net.classify(tokens.detach())
        if self.probe:
            losses["probe"] = cross_entropy(logits, batch.labels).mean()
        return Output(losses, logits, logs)


class NIM(_Rebuilding):
    """Noisy image modelling: an autoencoder learns to remove strong noise from whole images.

    L = mean_nl ||D(E(x_n + sigma_n / 255 z_n))_l - (T_nl - mu_nl) / sqrt(v_nl + 1e-6)||^2 / P, T_nl the patches of the clean image,
    all of them, mu and v mean and unbiased variance of their P values, sigma_n ~ Gamma(25, scale 3), z_n ~ N(0, I)

    Nothing but images is needed. Labels serve a linear probe on the encoder's tokens, which hands nothing back: it tells how far
    the training is. The last weights are the best. With `guards.NIMPurifier` the autoencoder stands before a classifier.

    Args:
        student: an autoencoder such as vit-ae-digits, images -> logits (N, K) of the probe.
        noise: law of sigma, one level per image, in grey levels: "gamma", "uniform" (0 to high), "fixed" (sigma).
        shape, scale, high, sigma: of these laws, see `NoiseLevels`.
        norm_pix: whether the truth is patches scaled to mean 0 and variance 1, or else (normalised) pixels. Their statistics then
            come from the input at test time, past the noise: a way for attacks.
        probe: whether labels train the linear classifier.

    Raises:
        UsageError: the student is no autoencoder, an option out of range, or norm_pix with patches of a single value.

    Reference: You, Liu, Han, Xu: Beyond Pretrained Features: Noisy Image Modeling Provides Adversarial Defense, NeurIPS 2023,
    arXiv 2302.01056.

    Differences from the paper: the probe; images of any size.
    """

    name = "nim"

    def __init__(
        self,
        student: nn.Module,
        *,
        noise: Law = "gamma",
        shape: float = 25.0,
        scale: float = 3.0,
        high: float = 150.0,
        sigma: float = 75.0,
        norm_pix: bool = True,
        probe: bool = True,
    ) -> None:
        levels = NoiseLevels(law=noise, shape=shape, scale=scale, high=high, sigma=sigma)
        super().__init__(student, Pretext("noise", norm_pix, *levels.span), probe=probe)
        self.levels = levels

    def look(self, images: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Tokens of noisy images."""
        sigma = self.levels.draw(images)
        spoiled = add_noise(images, sigma, torch.randn_like(images))
        return self.network.tokens(normalised(self.student, spoiled)), None, {"noise level": sigma.mean()}


class MIM(_Rebuilding):
    """Masked image modelling: an autoencoder learns to guess the patches that it does not see.

    L = mean_n (1 / |M_n|) sum_{l in M_n} ||D(E(x_n without M_n))_l - (T_nl - mu_nl) / sqrt(v_nl + 1e-6)||^2 / P, M_n the masked
    patches, drawn at random

    The baseline of noisy image modelling, with the same network and the same probe; see `NIM`.

    Args:
        student: an autoencoder such as vit-ae-digits.
        ratio: share of masked patches, in (0, 1).
        norm_pix, probe: see `NIM`.

    Raises:
        UsageError: the student is no autoencoder, or a ratio that masks or leaves nothing.

    Reference: He, Chen, Xie, Li, Dollar, Girshick: Masked Autoencoders Are Scalable Vision Learners, CVPR 2022, arXiv 2111.06377.

    Differences from the paper: the probe; images of any size.
    """

    name = "mim"

    def __init__(self, student: nn.Module, *, ratio: float = 0.75, norm_pix: bool = True, probe: bool = True) -> None:
        patches = autoencoder_of(student).patches
        if not 0 < ratio < 1 or not 0 < round((1 - ratio) * patches) < patches:
            raise UsageError(
                f"mim: ratio={ratio} must lie in (0, 1), mask at least one of the {patches} patches and leave one."
            )
        super().__init__(student, Pretext("mask", norm_pix, ratio, ratio), probe=probe)
        self.ratio = ratio

    def look(self, images: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Tokens of the patches that are not masked."""
        kept = kept_patches(torch.rand(len(images), self.network.patches, device=images.device), self.ratio)
        return self.network.tokens(normalised(self.student, images), kept), kept, {}
