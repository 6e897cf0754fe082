"""A vision transformer for small images."""

from __future__ import annotations

from torch import nn

from overproof.errors import UsageError

SMALL_IMAGE = 16


def vit_tiny(
    classes: int,
    in_channels: int,
    image_size: int,
    *,
    patch_size: int | None = None,
    embed_dim: int = 192,
    depth: int = 6,
    num_heads: int = 3,
) -> nn.Module:
    """timm's VisionTransformer with small patches; its stages are tokens (N, T, d) after each third of the depth.

    Args:
        classes: number of classes.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels, a multiple of the patch size.
        patch_size: height and width of a patch in pixels; by default 4, below 16 pixels 2.
        embed_dim: length d of a token, a multiple of `num_heads`.
        depth: transformer blocks, at least 1.
        num_heads: attention heads.

    Raises:
        UsageError: sizes that do not divide each other.
    """
    patch = patch_size or (2 if image_size < SMALL_IMAGE else 4)
    _check(patch, image_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": image_size, "patch_size": patch, "in_chans": in_channels, "num_classes": classes}
    network: nn.Module = VisionTransformer(embed_dim=embed_dim, depth=depth, num_heads=num_heads, **sizes)
    ends = sorted({max(0, round(depth * third / 3) - 1) for third in (1, 2, 3)})
    stages = tuple(f"blocks.{i}" for i in ends)
    for name, value in (("stages", stages), ("preact_stages", stages), ("penultimate", "head:input")):
        setattr(network, name, value)
    return network


def _check(patch: int, image_size: int, *, embed_dim: int, depth: int, num_heads: int) -> None:
    if patch < 1 or image_size % patch:
        raise UsageError(f"vit-tiny: patch_size={patch} does not divide image_size={image_size}.")
    if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
        raise UsageError(f"vit-tiny: num_heads={num_heads} does not divide embed_dim={embed_dim}.")
    if depth < 1:
        raise UsageError(f"vit-tiny: depth={depth} must be at least 1.")
