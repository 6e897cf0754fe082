"""Two views of each image that a network may or may not tell apart; what is drawn belongs to the image and is shared by all models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from overproof.attacks.randomness import Streams, integers, uniform
from overproof.attacks.threats import per_image
from overproof.data.steps import cut

Pair = tuple[Tensor, Tensor]
RANDOM, HUE = 0.4, 0.2
EYE = (0.2989, 0.587, 0.114)
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
    drawn = uniform(images.new_empty(len(images), 4), streams, -1, 1)
    sizes = [strength] * 3 + [strength / 2] if strength else [RANDOM] * 3 + [HUE]
    drawn = (drawn.sign() if strength else drawn) * images.new_tensor(sizes)
    bright, contrast, saturation, hue = (per_image(column, images) for column in drawn.unbind(dim=1))
    seen = (images * (1 + bright)).clamp(0, 1)
    seen = _blend(seen, grey(seen).mean(dim=(1, 2, 3), keepdim=True), contrast)
    if images.shape[1] == 3:
        seen = turned(_blend(seen, grey(seen), saturation), hue)
    return images, seen


def _blend(images: Tensor, other: Tensor, more: Tensor) -> Tensor:
    return (other + (1 + more) * (images - other)).clamp(0, 1)


def grey(images: Tensor) -> Tensor:
    """Brightness as the eye weighs colours (N, 1, H, W); grey images are their own."""
    return images if images.shape[1] == 1 else (images * per_image(images.new_tensor(EYE), images[0])).sum(dim=1, keepdim=True)


def turned(images: Tensor, by: Tensor) -> Tensor:
    """Colours (N, 3, H, W) with the hue turned; 1 is a full turn, shaped to act on images."""
    top, place = images.max(dim=1, keepdim=True)
    span = top - images.amin(dim=1, keepdim=True)
    after, before = (images.gather(1, (place + step) % 3) for step in (1, 2))
    sixth = 2 * place + (after - before) / span.where(span > 0, 1.0) + 6 * by
    offsets = images.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)
    wheel = (offsets + sixth) % 6
    return top - span * torch.minimum(wheel, 4 - wheel).clamp(0, 1)


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


def shift_room(images: Tensor, strength: float) -> tuple[int, int]:
    """By how many pixels the windows of `shift_views` may lie apart, down and across."""
    down, across = (max(round(strength * side / CROPPED), 1) for side in images.shape[2:])
    return down, across


def shift_views(images: Tensor, streams: Streams, strength: float = 8.0) -> Pair:
    """Two random windows of the image's size in the middle of the slightly enlarged image, m pixels larger than a window.

    Args:
        images: (N, C, H, W).
        streams: one per image.
        strength: m for windows of 224 pixels out of 256; of other sizes the same share, at least one pixel.
    """
    height, width = images.shape[2:]
    large = [round(side * RESIZED / CROPPED) for side in (height, width)]
    room = shift_room(images, strength)
    grown = [max(big, side + more) for big, side, more in zip(large, (height, width), room, strict=True)]
    big = F.interpolate(images, grown, mode="bilinear", align_corners=False)
    first = [(whole - side - more) // 2 for whole, side, more in zip(grown, (height, width), room, strict=True)]
    views = []
    for _ in range(2):
        top, left = (begin + integers(more + 1, (), streams, images.device) for begin, more in zip(first, room, strict=True))
        views.append(cut(big, top, left, (height, width)))
    return views[0], views[1]
