"""Autoencoders of usual sizes, by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from overproof.models.autoencoder import VitAutoencoder


def _preset(
    about: str, patch: int | None, encoder: tuple[int, int, int], decoder: tuple[int, int, int]
) -> Callable[..., nn.Module]:
    """A builder of autoencoders with these sizes (dim, depth, heads); no patch: 2 pixels below 16, else 4."""

    def build(
        classes: int, in_channels: int, image_size: int, *, patch_size: int | None = patch,
        embed_dim: int = encoder[0], depth: int = encoder[1], num_heads: int = encoder[2],
        decoder_dim: int = decoder[0], decoder_depth: int = decoder[1], decoder_heads: int = decoder[2],
    ) -> nn.Module:  # fmt: skip
        return VitAutoencoder(
            classes, in_channels, image_size, patch_size=patch_size or (2 if image_size < 16 else 4), embed_dim=embed_dim, depth=depth,
            num_heads=num_heads, decoder_dim=decoder_dim, decoder_depth=decoder_depth, decoder_heads=decoder_heads,
        )  # fmt: skip

    build.__doc__ = f"{about} Options: see `VitAutoencoder`."
    return build


vit_ae_digits = _preset("For images of 8 pixels.", None, (48, 3, 4), (48, 2, 4))
vit_ae_small = _preset("For images of 28 or 32 pixels, on a CPU.", None, (96, 4, 4), (64, 2, 4))
vit_ae_cifar = _preset("For images of 28 or 32 pixels.", None, (192, 9, 3), (128, 4, 4))
vit_ae_b16 = _preset("ViT-B/16 for images of 224 pixels.", 16, (768, 12, 12), (512, 8, 16))
vit_ae_l16 = _preset("ViT-L/16 for images of 224 pixels.", 16, (1024, 24, 16), (512, 8, 16))
