"""Fine-tuning behind a purifier: a classifier gets used to images that were denoised."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.losses.denoising import NoiseLevels, add_noise, kept_patches
from overproof.methods.nim_groups import layer_groups
from overproof.methods.objective import Objective
from overproof.models.autoencoder import VitAutoencoder, autoencoder_of
from overproof.models.classifier import Classifier
from overproof.models.rebuilding import denoised, inpainted
from overproof.types import Batch, Output, Progress

HIGH = {"noise": 30.0, "mask": 0.3}


class NIMTuning(Objective):
    """A classifier learns from images that noise has spoiled, weakly, and the autoencoder has rebuilt.

    L = mean_n CE((1 - s) y_n + s / K, softmax(S(D(x_n, x_n + sigma_n / 255 z_n)))), sigma_n ~ U(0, high), z_n ~ N(0, I)

    D is the frozen autoencoder, see `models.rebuilding.denoised`; its result is clamped to [0, 1]. With a masked autoencoder a
    share of the patches, U(0, high) anew in each step, is masked and guessed instead. The levels are far below those of the test:
    so the classifier stays good where the purifier is off.

    Args:
        student: images -> logits (N, K): the encoder of the autoencoder under a new last layer (model.run), or any other network.
        teacher: the autoencoder, pre-trained with nim or mim; frozen.
        high: largest level, at least 0: sigma in grey levels, or the share of masked patches, below 1; None: 30, or 0.3.
        on_original: learn from the images as they are: the ablation without purifier and noise.
        no_denoising: learn from the noisy images, not clamped: the ablation without denoising.
        label_smoothing: s in [0, 1).
        drop_path: stochastic depth of a transformer student's last block in [0, 1), growing linearly from 0 at its first.
        layer_decay: factor of the learning rate from each block of a transformer student to the one before, in (0, 1].

    Raises:
        UsageError: the teacher is no pre-trained autoencoder, or an option out of range.

    Reference: You, Liu, Han, Xu: Beyond Pretrained Features: Noisy Image Modeling Provides Adversarial Defense, NeurIPS 2023,
    arXiv 2302.01056.

    Differences from the paper: any student; levels of the masked autoencoder are ours. Augmentations are the data's (data.augment), before
    the noise, as there, but torchvision's: RandAugment counts its strength in 31 steps instead of 10, mixup and cutmix named together are
    both applied, not one of them by a coin, and for random erasing there is cutout, one square in every image. A new last layer begins as
    PyTorch begins one.
    """

    partial: ClassVar[bool] = True
    needs_same_classes = False

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        high: float | None = None,
        on_original: bool = False,
        no_denoising: bool = False,
        label_smoothing: float = 0.1,
        drop_path: float = 0.1,
        layer_decay: float = 0.75,
    ) -> None:
        super().__init__(student, teacher)
        self.pretext = autoencoder_of(teacher).pretext
        self.masks = self.pretext.kind == "mask"
        if self.pretext.kind == "none":
            raise UsageError(
                "nim-tune: the teacher is an autoencoder that has learned nothing yet; pre-train it with nim or mim first."
            )
        self.high = HIGH[self.pretext.kind] if high is None else high
        if not 0 <= self.high < math.inf or (self.masks and self.high >= 1):
            raise UsageError(f"nim-tune: high={high} must be at least 0, and with a masked autoencoder below 1.")
        if on_original and no_denoising:
            raise UsageError("nim-tune: on_original has no noise, no_denoising nothing but noise; choose one.")
        if no_denoising and self.masks:
            raise UsageError("nim-tune: no_denoising needs an autoencoder trained with nim; a masked one has no noisy images.")
        if not (0 <= label_smoothing < 1 and 0 <= drop_path < 1 and 0 < layer_decay <= 1):
            raise UsageError(
                f"nim-tune: label_smoothing={label_smoothing} and drop_path={drop_path} must lie in [0, 1), layer_decay={layer_decay} in "
                "(0, 1]."
            )
        self.on_original, self.no_denoising = on_original, no_denoising
        self.label_smoothing, self.layer_decay = label_smoothing, layer_decay
        self.drop_path = drop_path

    @property
    def _transformer(self) -> VitAutoencoder | None:
        """The student's network, if it is an encoder of ours."""
        net = self.student.net if isinstance(self.student, Classifier) else self.student
        return net if isinstance(net, VitAutoencoder) else None

    def trainable(self, phase: str = "train") -> Iterator[nn.Parameter]:
        """The student, without a decoder that it may still have."""
        return (parameter for _, parameter in self._reached())

    def groups(self, phase: str = "train") -> list[dict[str, Any]]:
        """Layer by layer for a transformer of ours; no weight decay for biases and norms."""
        net = self._transformer
        depth, decay = (0, 1.0) if net is None else (len(net.blocks), self.layer_decay)
        return layer_groups(self._reached(), depth, decay)

    def compiled(self) -> list[nn.Module]:
        """The student, and the autoencoder's blocks."""
        return [self.student, *autoencoder_of(self.teacher).all_blocks()] if self.teacher is not None else [self.student]

    def _reached(self) -> Iterator[tuple[str, nn.Parameter]]:
        net = self._transformer
        idle = set() if net is None or net.decoder is None else {id(p) for p in net.decoder.parameters()}
        return ((name, p) for name, p in self.student.named_parameters() if p.requires_grad and id(p) not in idle)

    def shown(self, images: Tensor) -> Tensor:
        """What the student sees of `images` (N, C, H, W)."""
        assert self.teacher is not None
        if self.on_original:
            return images
        if self.masks:
            net = autoencoder_of(self.teacher)
            share = self.high * float(torch.rand(()))
            kept = kept_patches(torch.rand(len(images), net.patches, device=images.device), share)
            with torch.no_grad():
                return inpainted(self.teacher, images, kept, norm_pix=self.pretext.norm_pix)
        sigma = NoiseLevels(law="uniform", high=self.high).draw(images)
        spoiled = add_noise(images, sigma, torch.randn_like(images))
        if self.no_denoising:
            return spoiled
        with torch.no_grad():
            return denoised(self.teacher, spoiled, images if self.pretext.norm_pix else None)

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's loss."""
        net = self._transformer
        with shallower(net, self.drop_path) if net is not None and net.training else nullcontext():
            logits = self.student(self.shown(batch.images))
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
        return Output({"ce": loss}, logits)


@contextmanager
def shallower(net: VitAutoencoder, largest: float) -> Iterator[None]:
    """Inside, each block is left out for some images, the last with probability `largest`; afterwards the network is as it was."""
    from timm.layers import DropPath

    blocks: list[Any] = list(net.blocks)
    before = [(block.drop_path1, block.drop_path2) for block in blocks]
    for number, block in enumerate(blocks):
        block.drop_path1 = block.drop_path2 = DropPath(largest * number / max(len(blocks) - 1, 1))
    try:
        yield
    finally:
        for block, (first, second) in zip(blocks, before, strict=True):
            block.drop_path1, block.drop_path2 = first, second
