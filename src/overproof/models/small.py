"""Networks that train in seconds: fully connected, plain convolutional, LeNet-5."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.models.blocks import Network, global_average, initialise


def _positive(model: str, option: str, widths: Sequence[int]) -> None:
    if any(width < 1 for width in widths):
        raise UsageError(f"{model}: every number in {option}={tuple(widths)} must be at least 1.")


class MLP(Network):
    """Pixels in a row, layers with ReLU, a linear layer. Its stages are vectors (N, d)."""

    def __init__(self, classes: int, inputs: int, *, hidden: Sequence[int]) -> None:
        super().__init__()
        _positive("mlp", "hidden", hidden)
        self.layers = nn.ModuleList()
        for width in hidden:
            self.layers.append(nn.Sequential(nn.Linear(inputs, width), nn.ReLU()))
            inputs = width
        self.fc = nn.Linear(inputs, classes)
        self.stages = tuple(f"layers.{i}" for i in range(len(hidden)))
        self.preact_stages = tuple(f"layers.{i}.1:input" for i in range(len(hidden)))

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        vectors = images.flatten(1)
        for layer in self.layers:
            vectors = layer(vectors)
        return self.fc(vectors)  # type: ignore[no-any-return]


class CNN(Network):
    """3x3 convolution, normalisation, ReLU per stage; every stage but the first halves the resolution.

    Args:
        classes: number of classes.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels.
        widths: channels of each stage.
        pooled: whether the last maps are averaged before the linear layer, or else enter it place by place.
    """

    def __init__(self, classes: int, in_channels: int, image_size: int, *, widths: Sequence[int], pooled: bool) -> None:
        super().__init__()
        _positive("cnn", "widths", widths)
        if not widths:
            raise UsageError("cnn: widths is empty; give at least one number of channels, such as widths=(16, 32).")
        self.layers, inputs = nn.ModuleList(), in_channels
        for width in widths:
            conv = nn.Conv2d(inputs, width, 3, stride=2 if len(self.layers) else 1, padding=1, bias=False)
            self.layers.append(nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()))
            inputs = width
        self.pooled, side = pooled, -(-image_size // 2 ** (len(widths) - 1))
        self.fc = nn.Linear(inputs if pooled else inputs * side**2, classes)
        self.stages = tuple(f"layers.{i}" for i in range(len(widths)))
        self.preact_stages = tuple(f"layers.{i}.2:input" for i in range(len(widths)))
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        maps = images
        for layer in self.layers:
            maps = layer(maps)
        return self.fc(global_average(maps) if self.pooled else maps.flatten(1))  # type: ignore[no-any-return]


class LeNet(Network):
    """Two 5x5 convolutions with max pooling and three linear layers.

    Below 32 pixels the first convolution is padded (28 pixels then behave as the paper's 32), below 12 the second too.

    Args:
        classes: number of classes.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels, at least 4.
        widths: channels of the convolutions and units of the two hidden linear layers.
    """

    stages = ("relu1", "relu2")
    preact_stages = ("relu1:input", "relu2:input")

    def __init__(self, classes: int, in_channels: int, image_size: int, *, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        if image_size < 4:
            raise UsageError(f"LeNet-5 halves the image twice: image_size={image_size} must be at least 4.")
        first, second, third, fourth = widths
        padding1, padding2 = 2 * (image_size < 32), 2 * (image_size < 12)
        side = (image_size - 4 + 2 * padding1) // 2
        side = (side - 4 + 2 * padding2) // 2
        self.conv1, self.relu1 = nn.Conv2d(in_channels, first, 5, padding=padding1), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(first, second, 5, padding=padding2), nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.fc1, self.relu3 = nn.Linear(second * side * side, third), nn.ReLU()
        self.fc2, self.relu4 = nn.Linear(third, fourth), nn.ReLU()
        self.fc = nn.Linear(fourth, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        maps = self.pool(self.relu1(self.conv1(images)))
        maps = self.pool(self.relu2(self.conv2(maps)))
        vectors = self.relu3(self.fc1(maps.flatten(1)))
        return self.fc(self.relu4(self.fc2(vectors)))  # type: ignore[no-any-return]


class MnistNet(Network):
    """Two 3x3 convolutions without padding, max pooling, and two linear layers, with dropout before each of these.

    Args:
        classes: number of classes.
        in_channels: channels of the images.
        image_size: height and width of the images in pixels, at least 6.
    """

    stages = ("relu1", "relu2")
    preact_stages = ("relu1:input", "relu2:input")
    penultimate = "fc2:input"

    def __init__(self, classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        if image_size < 6:
            raise UsageError(
                f"mnist-net cuts a border of two pixels and halves the rest: image_size={image_size} must be at least 6."
            )
        side = (image_size - 4) // 2
        self.conv1, self.relu1 = nn.Conv2d(in_channels, 32, 3), nn.ReLU()
        self.conv2, self.relu2 = nn.Conv2d(32, 64, 3), nn.ReLU()
        self.pool, self.dropout1 = nn.MaxPool2d(2), nn.Dropout(0.25)
        self.fc1, self.relu3, self.dropout2 = nn.Linear(64 * side * side, 128), nn.ReLU(), nn.Dropout(0.5)
        self.fc2 = nn.Linear(128, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        maps = self.relu2(self.conv2(self.relu1(self.conv1(images))))
        vectors = self.fc1(self.dropout1(self.pool(maps)).flatten(1))
        return self.fc2(self.dropout2(self.relu3(vectors)))  # type: ignore[no-any-return]


def mlp(classes: int, in_channels: int, image_size: int, *, hidden: tuple[int, ...] = (256, 256)) -> nn.Module:
    """Fully connected layers with ReLU; hidden: units of each (empty: a linear classifier)."""
    return MLP(classes, in_channels * image_size**2, hidden=hidden)


def cnn(
    classes: int, in_channels: int, image_size: int, *, widths: tuple[int, ...] = (16, 32, 64), pooled: bool = True
) -> nn.Module:
    """Plain convolutions with normalisation and ReLU; widths: channels of each stage; pooled: whether the last maps are averaged."""
    return CNN(classes, in_channels, image_size, widths=widths, pooled=pooled)


def lenet5(classes: int, in_channels: int, image_size: int) -> nn.Module:
    """LeNet-5 with ReLU and max pooling."""
    return LeNet(classes, in_channels, image_size, widths=(6, 16, 120, 84))


def lenet5_half(classes: int, in_channels: int, image_size: int) -> nn.Module:
    """LeNet-5 with half the channels and units."""
    return LeNet(classes, in_channels, image_size, widths=(3, 8, 60, 42))


def mnist_net(classes: int, in_channels: int, image_size: int) -> nn.Module:
    """The network of PyTorch's MNIST example."""
    return MnistNet(classes, in_channels, image_size)
