"""Augmentations of the images alone, a whole batch at once; every choice is drawn from the generator that is passed in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from overproof.errors import UsageError


def draw(high: int, count: int, generator: Generator, device: torch.device) -> Tensor:
    """`count` integers in 0 to `high` - 1, drawn on the generator's device."""
    drawn = torch.randint(high, (count,), generator=generator, device=generator.device)
    return drawn.to(device, non_blocking=True)


def draw_seed(generator: Generator) -> int:
    """A seed for a generator of another library."""
    return int(torch.randint(1 << 62, (1,), generator=generator, device=generator.device))


def cut(images: Tensor, top: Tensor, left: Tensor, size: tuple[int, int]) -> Tensor:
    """A window of each image (N, C, H, W) whose upper left pixel is at `top`, `left` (N,), of height and width `size`."""
    channels, rows, columns = images.shape[1:]
    # one gather over flattened images is several times faster than indexing four dimensions
    c, y, x = (torch.arange(length, device=images.device) for length in (channels, *size))
    window = (c[:, None, None] * (rows * columns) + y[:, None] * columns + x).flatten()
    places = (top * columns + left)[:, None] + window
    return images.flatten(1).gather(1, places).view(-1, channels, *size)


def require(holds: bool, message: str) -> None:
    """Raise UsageError with `message` unless `holds`."""
    if not holds:
        raise UsageError(message)


@dataclass(frozen=True)
class RandomCrop:
    """Pad every side, then cut a window of the original size at a random place, another one for each image.

    Args:
        padding: pixels added on every side, at least 0.
        fill: value of the added pixels, in [0, 1].
    """

    padding: int = 4
    fill: float = 0.0

    def __post_init__(self) -> None:
        require(self.padding >= 0, f"crop: padding is {self.padding}; give 0 or more pixels.")
        require(0 <= self.fill <= 1, f"crop: fill is {self.fill}; give a value in [0, 1].")

    def __call__(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Cropped images, and the labels as they are."""
        count, _, height, width = images.shape
        top, left = (draw(2 * self.padding + 1, count, generator, images.device) for _ in range(2))
        padded = F.pad(images, [self.padding] * 4, value=self.fill)
        return cut(padded, top, left, (height, width)), labels


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirror each image left to right with probability `p`."""

    p: float = 0.5

    def __post_init__(self) -> None:
        require(0 <= self.p <= 1, f"flip: the probability is {self.p}; give a value in [0, 1].")

    def __call__(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Mirrored images, and the labels as they are."""
        chosen = torch.rand(len(images), generator=generator, device=generator.device) < self.p
        return torch.where(chosen.to(images.device)[:, None, None, None], images.flip(3), images), labels


@dataclass(frozen=True)
class Cutout:
    """Blank a square of each image around a random pixel; the part beyond the border is lost.

    Args:
        size: side of the square in pixels, at least 1.
        fill: value of the blanked pixels, in [0, 1]. The paper blanks normalised images with 0, their mean; here images
            are not normalised yet, and 0 is black.

    Reference:
        DeVries, Taylor: Improved Regularization of Convolutional Neural Networks with Cutout, 2017. arXiv:1708.04552
    """

    size: int
    fill: float = 0.0

    def __post_init__(self) -> None:
        require(self.size >= 1, f"cutout: the size is {self.size}; give at least 1 pixel.")
        require(0 <= self.fill <= 1, f"cutout: fill is {self.fill}; give a value in [0, 1].")

    def __call__(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Images with a square blanked, and the labels as they are."""
        count, _, height, width = images.shape
        rows, columns = (self._hit(length, count, generator, images.device) for length in (height, width))
        square = rows[:, None, :, None] & columns[:, None, None, :]
        return images.masked_fill(square, self.fill), labels

    def _hit(self, length: int, count: int, generator: Generator, device: torch.device) -> Tensor:
        first = draw(length, count, generator, device)[:, None] - self.size // 2
        place = torch.arange(length, device=device)
        return (place >= first) & (place < first + self.size)


@dataclass(frozen=True)
class RandAugment:
    """Random operations of one common strength for each image, through torchvision; images are rounded to 8 bits.

    Args:
        num_ops: operations per image.
        magnitude: strength, 0 to 30.

    Reference:
        Cubuk, Zoph, Shlens, Le: RandAugment, NeurIPS 2020. arXiv:1909.13719
    """

    num_ops: int = 2
    magnitude: int = 9

    def __post_init__(self) -> None:
        require(self.num_ops >= 1, f"randaugment: {self.num_ops} operations; give at least 1.")
        require(0 <= self.magnitude <= 30, f"randaugment: the magnitude is {self.magnitude}; give 0 to 30.")

    def __call__(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Changed images, and the labels as they are."""
        from torchvision.transforms import v2

        change = v2.RandAugment(num_ops=self.num_ops, magnitude=self.magnitude)
        eight_bit = (images * 255).round().to(torch.uint8)
        seed = draw_seed(generator)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global CPU generator
            torch.default_generator.manual_seed(seed)
            changed = torch.stack([change(image) for image in eight_bit])
        return changed.to(images.dtype).div_(255), labels
