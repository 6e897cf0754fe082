"""Residual networks for small images: the CIFAR family (6n + 2 layers, three stages) and ResNet-18/34/50 (four stages)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from overproof.models.blocks import Builder, Network, conv1x1, conv3x3, global_average, initialise

Shortcut = Literal["pad", "projection"]
NARROW = (16, 16, 32, 64)
FOURFOLD = (32, 64, 128, 256)


class Pad(nn.Module):
    """The shortcut without parameters: every `stride`-th pixel, and zeros in the new channels."""

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, C, H, W) -> (N, C + extra, H / stride, W / stride)."""
        return F.pad(maps[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


def make_shortcut(inputs: int, outputs: int, stride: int, *, kind: Shortcut) -> nn.Module:
    """Identity where the shape stays, otherwise zero padding or a normalised 1x1 convolution."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if kind == "pad":
        return Pad(outputs - inputs, stride)
    return nn.Sequential(conv1x1(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    expansion = 1
    last_relu = "relu2"

    def __init__(self, inputs: int, width: int, stride: int, *, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = conv3x3(inputs, width, stride=stride), nn.BatchNorm2d(width), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = conv3x3(width, width), nn.BatchNorm2d(width), nn.ReLU()
        self.shortcut = make_shortcut(inputs, width, stride, kind=shortcut)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) -> (N, width, H / stride, W / stride)."""
        out = self.relu1(self.bn1(self.conv1(maps)))
        out = self.bn2(self.conv2(out)) + self.shortcut(maps)
        return self.relu2(out)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 convolutions around a shortcut; the stride is in the 3x3."""

    expansion = 4
    last_relu = "relu3"

    def __init__(self, inputs: int, width: int, stride: int, *, shortcut: Shortcut) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1, self.bn1, self.relu1 = conv1x1(inputs, width), nn.BatchNorm2d(width), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = conv3x3(width, width, stride=stride), nn.BatchNorm2d(width), nn.ReLU()
        self.conv3, self.bn3, self.relu3 = conv1x1(width, outputs), nn.BatchNorm2d(outputs), nn.ReLU()
        self.shortcut = make_shortcut(inputs, outputs, stride, kind=shortcut)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) -> (N, 4 width, H / stride, W / stride)."""
        out = self.relu1(self.bn1(self.conv1(maps)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out)) + self.shortcut(maps)
        return self.relu3(out)  # type: ignore[no-any-return]


class ResNet(Network):
    """A 3x3 stem, then stages `layer1`, `layer2`, ... of residual blocks, each but the first halving the resolution.

    Args:
        classes: number of classes.
        in_channels: channels of the images.
        blocks: blocks of each stage.
        widths: width of the stem, then of each stage.
        block: `BasicBlock` or `Bottleneck`.
        shortcut: "pad" (option A of the paper, no parameters) or "projection" (1x1 convolution and normalisation).
    """

    def __init__(
        self,
        classes: int,
        in_channels: int,
        *,
        blocks: Sequence[int],
        widths: Sequence[int],
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock,
        shortcut: Shortcut,
    ) -> None:
        super().__init__()
        inputs, *stage_widths = widths
        self.conv1, self.bn1, self.relu = conv3x3(in_channels, inputs), nn.BatchNorm2d(inputs), nn.ReLU()
        names = []
        for number, (count, width) in enumerate(zip(blocks, stage_widths, strict=True), 1):
            stage = nn.Sequential()
            for i in range(count):
                stage.append(block(inputs, width, 2 if number > 1 and i == 0 else 1, shortcut=shortcut))
                inputs = width * block.expansion
            names.append(f"layer{number}")
            self.add_module(names[-1], stage)
        self.fc = nn.Linear(inputs, classes)
        self.stages = tuple(names)
        ends = zip(names, blocks, strict=True)
        self.preact_stages = tuple(f"{name}.{count - 1}.{block.last_relu}:input" for name, count in ends)
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        maps = self.relu(self.bn1(self.conv1(images)))
        for name in self.stages:
            maps = self.get_submodule(name)(maps)
        return self.fc(global_average(maps))  # type: ignore[no-any-return]


def _cifar(depth: int, widths: Sequence[int], default: Shortcut) -> Builder:
    def build(classes: int, in_channels: int, image_size: int, *, shortcut: Shortcut = default) -> nn.Module:
        blocks = [(depth - 2) // 6] * 3
        return ResNet(classes, in_channels, blocks=blocks, widths=widths, shortcut=shortcut)

    build.__doc__ = f"CIFAR ResNet, {depth} layers, widths {widths}; shortcut: 'pad' (no parameters) or 'projection'."
    return build


def _imagenet(depth: int, blocks: Sequence[int], block: type[BasicBlock] | type[Bottleneck]) -> Builder:
    def build(classes: int, in_channels: int, image_size: int) -> nn.Module:
        widths = (64, 64, 128, 256, 512)
        return ResNet(classes, in_channels, blocks=blocks, widths=widths, block=block, shortcut="projection")

    build.__doc__ = f"ResNet-{depth} with a 3x3 stem and no pooling after it."
    return build


resnet8 = _cifar(8, NARROW, "pad")
resnet14 = _cifar(14, NARROW, "pad")
resnet20 = _cifar(20, NARROW, "pad")
resnet26 = _cifar(26, NARROW, "pad")
resnet32 = _cifar(32, NARROW, "pad")
resnet44 = _cifar(44, NARROW, "pad")
resnet56 = _cifar(56, NARROW, "pad")
resnet110 = _cifar(110, NARROW, "pad")
resnet8x4 = _cifar(8, FOURFOLD, "projection")
resnet32x4 = _cifar(32, FOURFOLD, "projection")
resnet18 = _imagenet(18, (2, 2, 2, 2), BasicBlock)
resnet34 = _imagenet(34, (3, 4, 6, 3), BasicBlock)
resnet50 = _imagenet(50, (3, 4, 6, 3), Bottleneck)
