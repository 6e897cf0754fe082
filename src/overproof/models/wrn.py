"""Residual networks whose blocks normalise and activate before each convolution: wide ResNets and PreActResNet-18."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.models.blocks import Builder, Network, conv1x1, conv3x3, global_average, initialise


class PreActBlock(nn.Module):
    """(normalise, ReLU, 3x3 convolution) twice; where the shape changes, the shortcut is a 1x1 convolution of the
    activated input."""

    def __init__(self, inputs: int, width: int, stride: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1, self.relu1, self.conv1 = nn.BatchNorm2d(inputs), nn.ReLU(), conv3x3(inputs, width, stride=stride)
        self.bn2, self.relu2, self.conv2 = nn.BatchNorm2d(width), nn.ReLU(), conv3x3(width, width)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        same = stride == 1 and inputs == width
        self.shortcut = None if same else conv1x1(inputs, width, stride=stride)

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) -> (N, width, H / stride, W / stride)."""
        active = self.relu1(self.bn1(maps))
        out = self.relu2(self.bn2(self.conv1(active)))
        out = self.conv2(self.dropout(out))
        return out + (maps if self.shortcut is None else self.shortcut(active))  # type: ignore[no-any-return]


class PreActResNet(Network):
    """A 3x3 stem, stages `layer1`, `layer2`, ... of pre-activation blocks, then normalisation and ReLU.

    `preact_stages` are what the next activation reads, hence normalised.

    Args:
        classes: number of classes.
        in_channels: channels of the images.
        blocks: blocks of each stage.
        widths: width of the stem, then of each stage.
        dropout: probability inside the blocks, in [0, 1).
    """

    def __init__(
        self, classes: int, in_channels: int, *, blocks: Sequence[int], widths: Sequence[int], dropout: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise UsageError(f"Wide ResNet: dropout={dropout} must be at least 0 and below 1.")
        inputs, *stage_widths = widths
        self.conv1 = conv3x3(in_channels, inputs)
        names = []
        for number, (count, width) in enumerate(zip(blocks, stage_widths, strict=True), 1):
            stage = nn.Sequential()
            for i in range(count):
                stage.append(PreActBlock(inputs, width, 2 if number > 1 and i == 0 else 1, dropout=dropout))
                inputs = width
            names.append(f"layer{number}")
            self.add_module(names[-1], stage)
        self.bn, self.relu = nn.BatchNorm2d(inputs), nn.ReLU()
        self.fc = nn.Linear(inputs, classes)
        self.stages = tuple(names)
        self.preact_stages = (*(f"{name}.0.relu1:input" for name in names[1:]), "relu:input")
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        maps = self.conv1(images)
        for name in self.stages:
            maps = self.get_submodule(name)(maps)
        return self.fc(global_average(self.relu(self.bn(maps))))  # type: ignore[no-any-return]


def _wide(depth: int, factor: int) -> Builder:
    def build(classes: int, in_channels: int, image_size: int, *, dropout: float = 0.0) -> nn.Module:
        blocks = [(depth - 4) // 6] * 3
        widths = (16, 16 * factor, 32 * factor, 64 * factor)
        return PreActResNet(classes, in_channels, blocks=blocks, widths=widths, dropout=dropout)

    build.__doc__ = f"Wide ResNet, {depth} layers, {factor} times as wide; dropout: probability inside the blocks."
    return build


def preact_resnet18(classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Pre-activation ResNet-18 with a 3x3 stem."""
    return PreActResNet(classes, in_channels, blocks=(2, 2, 2, 2), widths=(64, 64, 128, 256, 512))


wrn_16_1 = _wide(16, 1)
wrn_16_2 = _wide(16, 2)
wrn_40_1 = _wide(40, 1)
wrn_40_2 = _wide(40, 2)
wrn_28_10 = _wide(28, 10)
wrn_34_10 = _wide(34, 10)
