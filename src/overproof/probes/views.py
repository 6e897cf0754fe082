"""Two views of each image that a network may or may not tell apart; what is drawn belongs to the image and is shared by all models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from overproof.attacks.randomness import Streams, integers, uniform
from overproof.data.steps import cut

Pair = tuple[Tensor, Tensor]
RANDOM, HUE = 0.4, 0.2
ASPECT = 4 / 3
RESIZED, CROPPED = 256, 224  # the paper's sizes; other images keep their proportion


def colour_views(images: Tensor, streams: Streams, strength: float = 0.0) -> Pair:
    """The image, and brightness, contrast, saturation and hue of it changed, in this order.

    Args:
        images: (N, C, H, W) in [0, 1]; grey ones have neither saturation nor hue.
        streams: one per image.
        strength: s > 0: factors 1 - s or 1 + s, hue turned by s / 2 to either side (1 is a full turn); 0: factors uniform in [0.6, 1.4], hue in
            [-0.2, 0.2].
    """
    from torchvision.transforms.v2 import functional as change

    drawn = uniform(images.new_empty(len(images), 4), streams, -1, 1)
    if strength:
        drawn = drawn.sign() * images.new_tensor([strength] * 3 + [strength / 2])
    else:
        drawn = drawn * images.new_tensor([RANDOM] * 3 + [HUE])
    found = []
    for image, (bright, contrast, saturation, hue) in zip(images, drawn.tolist(), strict=True):
        image = change.adjust_contrast(change.adjust_brightness(image, 1 + bright), 1 + contrast)
        found.append(change.adjust_hue(change.adjust_saturation(image, 1 + saturation), hue))
    return images, torch.stack(found)


def crop_views(images: Tensor, streams: Streams, strength: float = 0.5) -> Pair:
    """Two random crops of the same share of the area, each of its own aspect ratio, in the image's size again.

    Args:
        images: (N, C, H, W).
        streams: one per image.
        strength: the share, above 0 and at most 1. Aspect ratios lie between 3/4 and 4/3, or as near to 1 as the image demands.
    """
    return _crop(images, streams, strength), _crop(images, streams, strength)


def _crop(images: Tensor, streams: Streams, share: float) -> Tensor:
    drawn = uniform(images.new_empty(len(images), 3), streams)
    aspect = ASPECT ** (2 * drawn[:, 0] - 1)
    widest = images.new_tensor(share).clamp(min=1e-6)
    aspect = aspect.clamp(widest, 1 / widest)  # neither side may be longer than the image
    height, width = (share / aspect).sqrt(), (share * aspect).sqrt()
    top, left = drawn[:, 1] * (1 - height), drawn[:, 2] * (1 - width)
    return window(images, (top, left), (height, width))


def window(images: Tensor, place: Pair, size: Pair) -> Tensor:
    """A window of each image, bilinearly in the image's size; place and size are shares of height and width, (N,) each."""
    theta = images.new_zeros(len(images), 2, 3)
    for axis, (first, length) in enumerate(zip(reversed(place), reversed(size), strict=True)):
        theta[:, axis, axis] = length
        theta[:, axis, 2] = 2 * first + length - 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False).clamp(0, 1)


def shift_views(images: Tensor, streams: Streams, strength: float = 8.0) -> Pair:
    """Two random windows of the image's size in the middle of the slightly enlarged image, m pixels larger than a window.

    Args:
        images: (N, C, H, W).
        streams: one per image.
        strength: m for windows of 224 pixels out of 256; of other sizes the same share, at least one pixel.
    """
    height, width = images.shape[2:]
    large = [round(side * RESIZED / CROPPED) for side in (height, width)]
    room = [max(round(strength * side / CROPPED), 1) for side in (height, width)]
    grown = [max(big, side + more) for big, side, more in zip(large, (height, width), room, strict=True)]
    big = F.interpolate(images, grown, mode="bilinear", align_corners=False)
    first = [(whole - side - more) // 2 for whole, side, more in zip(grown, (height, width), room, strict=True)]
    views = []
    for _ in range(2):
        top, left = (begin + integers(more + 1, (), streams, images.device) for begin, more in zip(first, room, strict=True))
        views.append(cut(big, top, left, (height, width)))
    return views[0], views[1]

