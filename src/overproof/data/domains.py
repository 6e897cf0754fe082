"""Grey images in other surroundings: coloured, textured or blotchy grounds, edges alone, dark and light exchanged.

Every builder maps images in [0, 1] (N, C, H, W) to images of the same height and width; whatever it draws comes from its generator.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from overproof.data.steps import cut, draw
from overproof.errors import DataError

BRIGHTEST = 0.75  # of coloured grounds: a white figure can always be told from them
BLOTCHES = 3  # blobs per side


def grey_of(images: Tensor) -> Tensor:
    """The one channel (N, 1, H, W) of grey images, which may come with three equal ones.

    Raises:
        DataError: the images have colours.
    """
    first = images[:, :1]
    if images.shape[1] > 1 and not torch.equal(images, first.expand_as(images)):
        raise DataError("Coloured, textured and blotchy grounds are made for grey images; these have colours of their own.")
    return first


def in_colour(images: Tensor, generator: Generator) -> Tensor:
    """Three channels: grey ones are repeated, nothing is drawn."""
    return images.expand(-1, 3, -1, -1).contiguous()


def coloured(images: Tensor, generator: Generator) -> Tensor:
    """The figure x on a ground of one random colour c each, x + (1 - x) c, c uniform in [0, 3/4]^3."""
    figure = grey_of(images)
    ground = torch.empty(len(images), 3, 1, 1).uniform_(0, BRIGHTEST, generator=generator).to(figure)
    return figure + (1 - figure) * ground


def textured(images: Tensor, generator: Generator, pictures: Tensor) -> Tensor:
    """The figure x on a random patch p of a random picture each, |p - x|.

    Args:
        images: (N, C, H, W) in [0, 1].
        generator: draws pictures and places.
        pictures: uint8 or floats (M, 1 or 3, H', W'); smaller ones than the images are enlarged.

    Reference: Ganin and Lempitsky, ICML 2015, arXiv 1409.7495 (MNIST-M).
    """
    figure, (height, width) = grey_of(images), images.shape[2:]
    chosen = pictures[draw(len(pictures), len(images), generator, pictures.device)]
    chosen = (chosen.float() / 255 if chosen.dtype == torch.uint8 else chosen).to(figure)
    grown = [max(have, want) for have, want in zip(chosen.shape[2:], (height, width), strict=True)]
    if grown != list(chosen.shape[2:]):
        chosen = F.interpolate(chosen, grown, mode="bilinear", align_corners=False)
    top, left = (
        draw(have - want + 1, len(images), generator, figure.device) for have, want in zip(grown, (height, width), strict=True)
    )
    return (cut(chosen, top, left, (height, width)).expand(-1, 3, -1, -1) - figure).abs()


def blotchy(images: Tensor, generator: Generator) -> Tensor:
    """A dark figure on a light ground of smooth colour blobs, (1 - x) b."""
    figure = grey_of(images)
    coarse = torch.empty(len(images), 3, BLOTCHES, BLOTCHES).uniform_(0.4, 1.0, generator=generator).to(figure)
    ground = F.interpolate(coarse, images.shape[2:], mode="bilinear", align_corners=True)
    return (1 - figure) * ground


def inverted(images: Tensor, generator: Generator) -> Tensor:
    """Dark and light exchanged, 1 - x; nothing is drawn."""
    return 1 - images


def edges(images: Tensor, generator: Generator) -> Tensor:
    """Light edges on black: the length of Sobel's gradient of the mean channel, divided by its maximum in the image."""
    slope = images.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    kernels = torch.stack([slope, slope.T])[:, None]
    found = F.conv2d(F.pad(images.mean(dim=1, keepdim=True), [1] * 4, mode="replicate"), kernels)
    length: Tensor = found.norm(dim=1, keepdim=True)
    shown: Tensor = length / length.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)
    return shown.expand_as(images).contiguous()


def sketch(images: Tensor, generator: Generator) -> Tensor:
    """Dark lines on white: `edges` with dark and light exchanged."""
    return 1 - edges(images, generator)
