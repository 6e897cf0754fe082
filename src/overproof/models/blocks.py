"""What the convolutional families have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Builder = Callable[..., nn.Module]


class Network(nn.Module):
    """A bare network that says where its features are; all names are for `features.Tap`.

    `stages` are the feature stages from shallow to deep, `preact_stages` the same before the activation, and
    `penultimate` the vector (N, d) that the last linear layer reads.
    """

    stages: tuple[str, ...] = ()
    preact_stages: tuple[str, ...] = ()
    penultimate: str = "fc:input"


def conv3x3(inputs: int, outputs: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias that keeps the resolution at stride 1."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, groups=groups, bias=False)


def conv1x1(inputs: int, outputs: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(inputs, outputs, 1, stride=stride, groups=groups, bias=False)


class Doubling(nn.Conv2d):
    """Each pixel becomes four, then a 3x3 convolution: as one transposed convolution, 4 products for an output pixel instead of 9.

    Among the nine taps of an output pixel are four different pixels at most, so that taps may be added up first:
    K = A w A^T with rows of A for (w_2), (w_1 + w_2), (w_0 + w_1), (w_0). Zeros beyond the border mean the same on both sides.

    Args:
        inputs, outputs: channels.
    """

    taps: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        rows = [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
        self.register_buffer("taps", torch.tensor(rows), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C, H, W) -> (N, C', 2 H, 2 W)."""
        kernel = torch.einsum("ka,oiab,lb->iokl", self.taps, self.weight, self.taps)
        return F.conv_transpose2d(input, kernel, self.bias, stride=2, padding=1)


def global_average(maps: Tensor) -> Tensor:
    """Feature maps (N, C, H, W) -> vectors (N, C)."""
    return maps.mean(dim=(2, 3))


def shuffle(maps: Tensor, groups: int) -> Tensor:
    """Channels (N, C, H, W) dealt out anew, so that the next grouped convolution sees all `groups`."""
    count, channels, height, width = maps.shape
    split = maps.reshape(count, groups, channels // groups, height, width)
    return split.transpose(1, 2).flatten(1, 2)


def initialise(network: nn.Module) -> None:
    """He-normal convolutions (fan-out) without bias; batch normalisation and linear layers keep torch's start."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
