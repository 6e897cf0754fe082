"""Vision transformers that rebuild their image: an encoder, a decoder, and a classifier upon the encoder."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from overproof.errors import DataError, UsageError
from overproof.losses.denoising import patchify
from overproof.models.blocks import Network
from overproof.models.classifier import Classifier

Kind = Literal["none", "noise", "mask"]
KINDS: tuple[Kind, ...] = ("none", "noise", "mask")


@dataclass(frozen=True)
class Pretext:
    """What an autoencoder was trained to undo.

    Args:
        kind: "noise", "mask", or "none": nothing yet.
        norm_pix: whether it speaks of patches scaled to mean 0 and variance 1.
        low, high: levels that training saw: sigma of the noise in grey levels, or the share of masked patches.
    """

    kind: Kind = "none"
    norm_pix: bool = False
    low: float = 0.0
    high: float = 0.0


def _transformer(dim: int, depth: int, heads: int) -> nn.ModuleList:
    from timm.models.vision_transformer import Block

    return nn.ModuleList(Block(dim, heads, qkv_bias=True) for _ in range(depth))


def _positions(side: int, dim: int) -> Tensor:
    """Sines and cosines of the places of side^2 patches, (1 + side^2, dim); zeros for the class token."""
    from timm.layers import build_sincos2d_pos_embed

    return torch.cat([torch.zeros(1, dim), build_sincos2d_pos_embed([side, side], dim)])


class Decoder(nn.Module):
    """Tokens of the encoder -> what is said of the pixels of each patch.

    Args:
        inputs: length of the encoder's tokens.
        outputs: numbers per patch.
        side: patches in a row.
        dim, depth, heads: of the decoder's own blocks.
    """

    positions: Tensor

    def __init__(self, inputs: int, outputs: int, side: int, *, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.norm, self.embed = nn.LayerNorm(inputs, eps=1e-6), nn.Linear(inputs, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim).normal_(std=0.02))
        self.register_buffer("positions", _positions(side, dim))
        self.blocks = _transformer(dim, depth, heads)
        self.last_norm, self.pixels = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, outputs)

    def forward(self, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
        """Tokens (N, 1 + M, inputs), of the patches at `kept` (N, M) or of all in order -> (N, L, outputs)."""
        tokens = self.embed(self.norm(tokens))
        if kept is not None:
            blank = self.mask_token.to(tokens.dtype).expand(len(tokens), len(self.positions) - 1, -1)
            whole = blank.scatter(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]), tokens[:, 1:])
            tokens = torch.cat([tokens[:, :1], whole], dim=1)
        tokens = tokens + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        said: Tensor = self.pixels(self.last_norm(tokens[:, 1:]))
        return said


class VitAutoencoder(Network):
    """Encoder with class token and fixed positions; a decoder; a linear classifier on the normalised mean of the patch tokens.

    Its stages are tokens (N, 1 + L, d) after each third of the encoder.

    Args:
        classes, in_channels, image_size: as of every network; the patch size divides the image size.
        patch_size: pixels.
        embed_dim, depth, num_heads: of the encoder; the length of a token is a multiple of 4 and of the heads.
        decoder_dim, decoder_depth, decoder_heads: of the decoder; depth 0: there is none, which leaves a classifier.

    Attributes:
        patch_size: pixels.
        shape: channels, height and width of the images.
        decoder: None without one.

    Raises:
        UsageError: sizes that do not divide each other.

    Reference: He et al., CVPR 2022, arXiv 2111.06377.
    """

    decoder: Decoder | None
    positions: Tensor
    lesson: Tensor  # what it was trained to undo, so that it travels with the weights

    def __init__(
        self, classes: int, in_channels: int, image_size: int, *, patch_size: int, embed_dim: int, depth: int, num_heads: int,
        decoder_dim: int, decoder_depth: int, decoder_heads: int,
    ) -> None:  # fmt: skip
        super().__init__()
        _check(
            patch_size, image_size, depth, decoder_depth, encoder=(embed_dim, num_heads), decoder=(decoder_dim, decoder_heads)
        )
        self.patch_size, self.shape = patch_size, (in_channels, image_size, image_size)
        side, pixels = image_size // patch_size, patch_size**2 * in_channels
        self.embed, self.cls = nn.Linear(pixels, embed_dim), nn.Parameter(torch.empty(1, 1, embed_dim).normal_(std=0.02))
        self.register_buffer("positions", _positions(side, embed_dim))
        self.register_buffer("lesson", torch.zeros(4))
        self.blocks = _transformer(embed_dim, depth, num_heads)
        sizes = {"dim": decoder_dim, "depth": decoder_depth, "heads": decoder_heads}
        self.register_module("decoder", Decoder(embed_dim, pixels, side, **sizes) if decoder_depth else None)
        self.fc_norm, self.head = nn.LayerNorm(embed_dim, eps=1e-6), nn.Linear(embed_dim, classes)
        ends = sorted({max(0, round(depth * third / 3) - 1) for third in (1, 2, 3)})
        self.stages = self.preact_stages = tuple(f"blocks.{i}" for i in ends)
        self.penultimate = "head:input"
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    @property
    def patches(self) -> int:
        """L, the patches of an image."""
        return len(self.positions) - 1

    @property
    def pretext(self) -> Pretext:
        """What it was trained to undo."""
        kind, norm_pix, low, high = self.lesson.tolist()
        return Pretext(KINDS[int(kind)], bool(norm_pix), low, high)

    def learns(self, pretext: Pretext) -> None:
        """Note down what it is trained to undo."""
        kind, *rest = astuple(pretext)
        self.lesson.copy_(torch.tensor([float(KINDS.index(kind)), *map(float, rest)]))

    def tokens(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Normalised images -> tokens (N, 1 + M, d) behind the last block, of the patches at `kept` (N, M) or of all.

        Raises:
            DataError: images of another shape.
        """
        if images.shape[1:] != self.shape:
            raise DataError(
                f"This network reads images of shape {self.shape}, not {tuple(images.shape[1:])}; convert or resize them."
            )
        tokens = self.embed(patchify(images, self.patch_size)) + self.positions[1:]
        if kept is not None:
            tokens = tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
        tokens = torch.cat([self.cls.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        found: Tensor = tokens
        return found

    def said(self, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
        """What the decoder says of each patch, (N, L, patch_size^2 C), from the encoder's tokens."""
        assert self.decoder is not None, "autoencoder_of has looked for the decoder"
        said: Tensor = self.decoder(tokens, kept)
        return said

    def classify(self, tokens: Tensor) -> Tensor:
        """Logits (N, K) from the encoder's tokens."""
        logits: Tensor = self.head(self.fc_norm(tokens[:, 1:].mean(dim=1)))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) -> logits (N, K); the decoder is not asked."""
        return self.classify(self.tokens(images))

    def all_blocks(self) -> list[nn.Module]:
        """Those of the encoder, and of the decoder if there is one."""
        return [*self.blocks, *(self.decoder.blocks if self.decoder is not None else ())]

    def shed(self) -> dict[str, int]:
        """Drop what a classifier does not need; returns the options with which it would have been built so."""
        self.decoder = None
        return {"decoder_depth": 0}


def _check(
    patch: int, image_size: int, depth: int, decoder_depth: int, *, encoder: tuple[int, int], decoder: tuple[int, int]
) -> None:
    if patch < 1 or image_size % patch:
        raise UsageError(
            f"vit-ae: patch_size={patch} does not divide image_size={image_size}. Resize the images (data.image_size), or pre-train with another "
            "model.patch_size."
        )
    if depth < 1 or decoder_depth < 0:
        raise UsageError(f"vit-ae: depth={depth} must be at least 1, decoder_depth={decoder_depth} at least 0.")
    for name, (dim, heads) in (("embed_dim", encoder), ("decoder_dim", decoder)):
        if heads < 1 or dim < 4 or dim % heads or dim % 4:
            raise UsageError(f"vit-ae: {name}={dim} must be a multiple of 4 and of its {heads} heads.")


def autoencoder_of(model: nn.Module) -> VitAutoencoder:
    """The autoencoder that `model` is, or that stands behind its normalisation.

    Raises:
        UsageError: it is none, or has lost its decoder.
    """
    net = model.net if isinstance(model, Classifier) else model
    if not isinstance(net, VitAutoencoder) or net.decoder is None:
        what = "has no decoder (any more)" if isinstance(net, VitAutoencoder) else "is no autoencoder"
        raise UsageError(f"This {type(net).__name__} {what}. Take a model such as vit-ae-digits, vit-ae-small or vit-ae-b16.")
    return net


def normalised(model: nn.Module, images: Tensor) -> Tensor:
    """Images in [0, 1] as the network behind the model's first layer reads them.

    Raises:
        DataError: images of another shape than the network's.
    """
    net = model.net if isinstance(model, Classifier) else model
    if isinstance(net, VitAutoencoder) and tuple(images.shape[1:]) != net.shape:
        raise DataError(
            f"The autoencoder takes images of shape {net.shape} (channels, height, width), not {tuple(images.shape[1:])}."
        )
    return model.normalize(images) if isinstance(model, Classifier) else images
