"""Networks by name, and the classifier that carries its own normalisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from overproof.registry import Registry

if TYPE_CHECKING:
    from overproof.models.classifier import Classifier, Normalize, as_classifier, parameters_of
    from overproof.models.factory import create_model, rebuild

MODELS = Registry("model", "overproof.models")

_RESNET = {
    "paper": "He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016",
    "url": "https://arxiv.org/abs/1512.03385",
}
_WRN = {
    "paper": "Zagoruyko, Komodakis: Wide Residual Networks, BMVC 2016",
    "url": "https://arxiv.org/abs/1605.07146",
}
_VGG = {
    "paper": "Simonyan, Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015",
    "url": "https://arxiv.org/abs/1409.1556",
}
_LENET = {
    "paper": "LeCun, Bottou, Bengio, Haffner: Gradient-Based Learning Applied to Document Recognition, 1998",
    "url": "https://doi.org/10.1109/5.726791",
}


def _add(module: str, name: str, summary: str, tags: tuple[str, ...], **about: Any) -> None:
    target = f"overproof.models.{module}:{name.replace('-', '_')}"
    MODELS.add(name, target, summary=summary, tags=tags, **about)


_add("small", "mlp", "Fully connected layers with ReLU.", ("tiny",))
_add("small", "cnn", "Plain convolutions, fast on a CPU.", ("tiny", "cnn"))
_add("small", "lenet5", "LeNet-5 with ReLU and max pooling.", ("tiny", "cnn"), **_LENET)
_add("small", "lenet5-half", "LeNet-5 with half the channels and units.", ("tiny", "cnn"), **_LENET)
_add(
    "small", "mnist-net", "Two convolutions and two linear layers with dropout, as in PyTorch's MNIST example.", ("tiny", "cnn")
)
for _depth in (8, 14, 20, 26, 32, 44, 56, 110):
    _add("resnet", f"resnet{_depth}", f"CIFAR ResNet, {_depth} layers, widths 16-32-64.", ("cnn", "cifar"), **_RESNET)
for _depth in (8, 32):
    _add(
        "resnet",
        f"resnet{_depth}x4",
        f"CIFAR ResNet, {_depth} layers, four times as wide.",
        ("cnn", "cifar"),
        **_RESNET,
    )
for _depth in (18, 34, 50):
    _add("resnet", f"resnet{_depth}", f"ResNet-{_depth}, widths 64-512, for small images.", ("cnn", "large"), **_RESNET)
for _depth, _factor in ((16, 1), (16, 2), (40, 1), (40, 2), (28, 10), (34, 10)):
    _tags = ("cnn", "cifar", "large") if _factor == 10 else ("cnn", "cifar")
    _add("wrn", f"wrn-{_depth}-{_factor}", f"Wide ResNet, {_depth} layers, {_factor} times as wide.", _tags, **_WRN)
_add(
    "wrn",
    "preact-resnet18",
    "Pre-activation ResNet-18 for small images.",
    ("cnn", "large"),
    paper="He, Zhang, Ren, Sun: Identity Mappings in Deep Residual Networks, ECCV 2016",
    url="https://arxiv.org/abs/1603.05027",
)
for _depth in (8, 11, 13, 16, 19):
    _add("vgg", f"vgg{_depth}", f"VGG-{_depth} with batch normalisation and one linear layer.", ("cnn", "cifar"), **_VGG)
_add(
    "mobilenet",
    "mobilenetv2",
    "MobileNetV2 at half width for small images.",
    ("cnn", "cifar", "mobile"),
    paper="Sandler, Howard, Zhu, Zhmoginov, Chen: MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018",
    url="https://arxiv.org/abs/1801.04381",
)
_add(
    "shufflenet",
    "shufflenetv1",
    "ShuffleNet with three groups for small images.",
    ("cnn", "cifar", "mobile"),
    paper="Zhang, Zhou, Lin, Sun: ShuffleNet: An Extremely Efficient Convolutional Neural Network, CVPR 2018",
    url="https://arxiv.org/abs/1707.01083",
)
_add(
    "shufflenet",
    "shufflenetv2",
    "ShuffleNetV2 (1x) for small images.",
    ("cnn", "cifar", "mobile"),
    paper="Ma, Zhang, Zheng, Sun: ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, ECCV 2018",
    url="https://arxiv.org/abs/1807.11164",
)
_add(
    "vit",
    "vit-tiny",
    "Vision transformer for small images.",
    ("transformer",),
    paper="Dosovitskiy et al.: An Image is Worth 16x16 Words, ICLR 2021",
    url="https://arxiv.org/abs/2010.11929",
)
for _size, _about in (
    ("digits", "for images of 8 pixels"),
    ("small", "for images of 28 or 32 pixels, on a CPU"),
    ("cifar", "for images of 28 or 32 pixels"),
    ("b16", "of the size of ViT-B/16, for images of 224 pixels"),
    ("l16", "of the size of ViT-L/16, for images of 224 pixels"),
):
    _add(
        "autoencoder_sizes",
        f"vit-ae-{_size}",
        f"Vision transformer with a decoder, {_about}: for nim and mim.",
        ("transformer", "autoencoder", "large") if _size.endswith("16") else ("transformer", "autoencoder"),
        paper="He, Chen, Xie, Li, Dollar, Girshick: Masked Autoencoders Are Scalable Vision Learners, CVPR 2022",
        url="https://arxiv.org/abs/2111.06377",
    )

_HOMES = {
    "Classifier": "classifier",
    "Normalize": "classifier",
    "as_classifier": "classifier",
    "parameters_of": "classifier",
    "create_model": "factory",
    "rebuild": "factory",
}

__all__ = [
    "MODELS", "Classifier", "Normalize", "as_classifier", "create_model", "parameters_of", "rebuild",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"overproof.models.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'overproof.models' has no attribute {name!r}")
