"""ShuffleNet and ShuffleNetV2 for small images, both with a 1x1 stem.

In each block the last ReLU comes after joining and shuffling the branches. Both act on single values, so the result is
that of the papers, and what the ReLU reads lines up with the stage's output channel by channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof.models.blocks import Network, conv1x1, conv3x3, global_average, initialise, shuffle

STEM = 24
DEPTHS = (4, 8, 4)


class GroupedBlock(nn.Module):
    """Grouped 1x1, shuffle, 3x3 within each channel, grouped 1x1; at stride 2 the pooled input is joined, not added."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, groups: int) -> None:
        super().__init__()
        own = outputs - inputs if stride == 2 else outputs
        width = own // 4
        self.groups = 1 if inputs == STEM else groups
        self.stride = stride
        self.conv1, self.bn1, self.relu1 = conv1x1(inputs, width, groups=self.groups), nn.BatchNorm2d(width), nn.ReLU()
        self.conv2 = conv3x3(width, width, stride=stride, groups=width)
        self.bn2, self.relu2 = nn.BatchNorm2d(width), nn.ReLU()
        self.conv3, self.bn3 = conv1x1(width, own, groups=groups), nn.BatchNorm2d(own)
        self.relu = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        out = shuffle(self.relu1(self.bn1(self.conv1(maps))), self.groups)
        out = self.bn3(self.conv3(self.relu2(self.bn2(self.conv2(out)))))
        if self.stride == 1:
            return self.relu(out + maps)  # type: ignore[no-any-return]
        return self.relu(torch.cat((out, F.avg_pool2d(maps, 3, stride=2, padding=1)), dim=1))  # type: ignore[no-any-return]


class Branch(nn.Module):
    """1x1, 3x3 within each channel, 1x1; the last ReLU is the block's."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = conv1x1(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU()
        self.conv2 = conv3x3(outputs, outputs, stride=stride, groups=outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv3, self.bn3 = conv1x1(outputs, outputs), nn.BatchNorm2d(outputs)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        out = self.relu1(self.bn1(self.conv1(maps)))
        return self.bn3(self.conv3(self.bn2(self.conv2(out))))  # type: ignore[no-any-return]


class SplitBlock(nn.Module):
    """Half of the channels pass, the other half goes through a branch.

    The passing half comes out of a ReLU already, so that the joint ReLU leaves it as it is.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = Branch(width // 2, width // 2, 1)
        self.relu = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, width, H, W) -> the same shape."""
        passing, worked = maps.chunk(2, dim=1)
        return self.relu(shuffle(torch.cat((passing, self.branch(worked)), dim=1), 2))  # type: ignore[no-any-return]


class DownBlock(nn.Module):
    """Two branches that halve the resolution, joined."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.left = nn.Sequential(
            conv3x3(inputs, inputs, stride=2, groups=inputs),
            nn.BatchNorm2d(inputs),
            conv1x1(inputs, half),
            nn.BatchNorm2d(half),
        )
        self.right = Branch(inputs, half, 2)
        self.relu = nn.ReLU()

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) -> (N, outputs, H / 2, W / 2)."""
        return self.relu(shuffle(torch.cat((self.left(maps), self.right(maps)), dim=1), 2))  # type: ignore[no-any-return]


class ShuffleNet(Network):
    """A 1x1 stem, the stages `layer1` to `layer3`, an optional 1x1 convolution, global pooling and a linear layer.

    Args:
        stem: images -> maps with 24 channels.
        layers: the three stages, each ending in a block whose last module is called `relu`.
        head: maps of the last stage -> maps that are pooled.
        fc: the linear layer.
    """

    stages = ("layer1", "layer2", "layer3")

    def __init__(self, stem: nn.Module, layers: Sequence[nn.Sequential], head: nn.Module, fc: nn.Linear) -> None:
        super().__init__()
        self.stem = stem
        self.layer1, self.layer2, self.layer3 = layers
        self.head, self.fc = head, fc
        self.preact_stages = tuple(
            f"{name}.{len(layer) - 1}.relu:input" for name, layer in zip(self.stages, layers, strict=True)
        )
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        maps = self.layer3(self.layer2(self.layer1(self.stem(images))))
        return self.fc(global_average(self.head(maps)))  # type: ignore[no-any-return]


def _conv_bn_relu(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(conv1x1(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU())


def shufflenetv1(classes: int, in_channels: int, image_size: int) -> nn.Module:
    """ShuffleNet with three groups and widths 240-480-960."""
    inputs, layers = STEM, []
    for depth, width in zip(DEPTHS, (240, 480, 960), strict=True):
        rest = [GroupedBlock(width, width, 1, groups=3) for _ in range(depth - 1)]
        layers.append(nn.Sequential(GroupedBlock(inputs, width, 2, groups=3), *rest))
        inputs = width
    return ShuffleNet(_conv_bn_relu(in_channels, STEM), layers, nn.Identity(), nn.Linear(inputs, classes))


def shufflenetv2(classes: int, in_channels: int, image_size: int) -> nn.Module:
    """ShuffleNetV2 with widths 116-232-464 and 1024 channels before pooling."""
    inputs, layers = STEM, []
    for depth, width in zip(DEPTHS, (116, 232, 464), strict=True):
        rest = [SplitBlock(width) for _ in range(depth - 1)]
        layers.append(nn.Sequential(DownBlock(inputs, width), *rest))
        inputs = width
    head = _conv_bn_relu(inputs, 1024)
    return ShuffleNet(_conv_bn_relu(in_channels, STEM), layers, head, nn.Linear(1024, classes))
