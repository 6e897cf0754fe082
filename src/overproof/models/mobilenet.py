"""MobileNetV2 for small images."""

from __future__ import annotations

from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.models.blocks import Network, conv1x1, conv3x3, global_average, initialise

# Expansion (0 stands for the network's own), width, blocks and stride of each group.
GROUPS = ((1, 16, 1, 1), (0, 24, 2, 1), (0, 32, 3, 2), (0, 64, 4, 2), (0, 96, 3, 1), (0, 160, 3, 2), (0, 320, 1, 1))
LAST = 1280


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 convolution within each channel, 1x1 reduction without activation."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.conv1, self.bn1, self.relu1 = conv1x1(inputs, width), nn.BatchNorm2d(width), nn.ReLU()
        self.conv2 = conv3x3(width, width, stride=stride, groups=width)
        self.bn2, self.relu2 = nn.BatchNorm2d(width), nn.ReLU()
        self.conv3, self.bn3 = conv1x1(width, outputs), nn.BatchNorm2d(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        out = self.relu1(self.bn1(self.conv1(maps)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return out + maps if self.residual else out  # type: ignore[no-any-return]


class MobileNetV2(Network):
    """Seven groups of inverted residuals; the stages have linear outputs, so `preact_stages` are the same.

    Args:
        classes: number of classes.
        in_channels: channels of the images.
        width: factor on all widths but the last convolution's.
        expansion: factor T inside the blocks.
    """

    stages = ("blocks.1", "blocks.2", "blocks.4", "blocks.6")
    preact_stages = stages

    def __init__(self, classes: int, in_channels: int, *, width: float, expansion: int) -> None:
        super().__init__()
        if width < 1 / 16 or expansion < 1:
            raise UsageError(f"mobilenetv2: width={width} must be at least 1/16 and expansion={expansion} at least 1.")
        inputs = int(32 * width)
        self.stem = nn.Sequential(conv3x3(in_channels, inputs, stride=2), nn.BatchNorm2d(inputs), nn.ReLU())
        self.blocks = nn.ModuleList()
        for own, channels, count, stride in GROUPS:
            group, outputs = nn.Sequential(), int(channels * width)
            for i in range(count):
                step = stride if i == 0 else 1
                group.append(InvertedResidual(inputs, outputs, stride=step, expansion=own or expansion))
                inputs = outputs
            self.blocks.append(group)
        last = int(LAST * max(width, 1.0))
        self.head = nn.Sequential(conv1x1(inputs, last), nn.BatchNorm2d(last), nn.ReLU())
        self.fc = nn.Linear(last, classes)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        maps = self.stem(images)
        for group in self.blocks:
            maps = group(maps)
        return self.fc(global_average(self.head(maps)))  # type: ignore[no-any-return]


def mobilenetv2(classes: int, in_channels: int, image_size: int, *, width: float = 0.5, expansion: int = 6) -> nn.Module:
    """MobileNetV2; width: factor on the channels, expansion: factor inside the blocks."""
    return MobileNetV2(classes, in_channels, width=width, expansion=expansion)
