"""VGG networks for small images: batch normalisation, global pooling and one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.models.blocks import Builder, Network, global_average, initialise

WIDTHS = (64, 128, 256, 512, 512)


class VGG(Network):
    """Five stages `block0` to `block4` of 3x3 convolutions, with max pooling between the first four.

    The fourth pooling, between `block3` and `block4`, is there only from 64 pixels on.

    Args:
        classes: number of classes.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels, at least 8.
        depths: convolutions in each stage.
    """

    def __init__(self, classes: int, in_channels: int, image_size: int, *, depths: Sequence[int]) -> None:
        super().__init__()
        if image_size < 8:
            raise UsageError(f"VGG halves the image three times: image_size={image_size} must be at least 8.")
        inputs, poolings = in_channels, 4 if image_size >= 64 else 3
        self.pools = nn.ModuleList(nn.MaxPool2d(2) if i < poolings else nn.Identity() for i in range(5))
        for number, (depth, width) in enumerate(zip(depths, WIDTHS, strict=True)):
            block = nn.Sequential()
            for _ in range(depth):
                block.extend((nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()))
                inputs = width
            self.add_module(f"block{number}", block)
        self.fc = nn.Linear(inputs, classes)
        self.stages = tuple(f"block{number}" for number in range(5))
        self.preact_stages = tuple(f"block{number}.{3 * depth - 1}:input" for number, depth in enumerate(depths))
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        maps = images
        for name, pool in zip(self.stages, self.pools, strict=True):
            maps = pool(self.get_submodule(name)(maps))
        return self.fc(global_average(maps))  # type: ignore[no-any-return]


def _vgg(*depths: int) -> Builder:
    def build(classes: int, in_channels: int, image_size: int) -> nn.Module:
        return VGG(classes, in_channels, image_size, depths=depths)

    build.__doc__ = f"VGG-{sum(depths) + 3} with batch normalisation and one linear layer."
    return build


vgg8 = _vgg(1, 1, 1, 1, 1)
vgg11 = _vgg(1, 1, 2, 2, 2)
vgg13 = _vgg(2, 2, 2, 2, 2)
vgg16 = _vgg(2, 2, 3, 3, 3)
vgg19 = _vgg(2, 2, 4, 4, 4)
