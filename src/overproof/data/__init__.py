"""Images and labels: sources, splits, augmentation and the loaders that make batches of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from overproof.registry import Registry

if TYPE_CHECKING:
    from overproof.data.attributes import Attribute
    from overproof.data.augmentation import Augment, build_augment
    from overproof.data.extra import MixedLoader, load_extra, make_mixed
    from overproof.data.images import ImageSet
    from overproof.data.iterables import IterableLoader
    from overproof.data.load import load_data
    from overproof.data.loaders import DeviceLoader, Loader, make_loader
    from overproof.data.mixing import CutMix, Mixup
    from overproof.data.nothing import NoImages
    from overproof.data.splits import Splits, long_tailed, stratified_split, stratified_subset
    from overproof.data.steps import Cutout, HorizontalFlip, RandAugment, RandomCrop
    from overproof.data.stream_loader import StreamLoader
    from overproof.data.streams import StreamSet

DATA = Registry("data", "overproof.data")

_SOURCES = {
    "digits": ("sources:digits", "1,797 handwritten digits, 8x8 grey, shipped with scikit-learn: needs no download."),
    "mnist": ("idx:mnist", "70,000 handwritten digits, 28x28 grey.", "http://yann.lecun.com/exdb/mnist/"),
    "fashion-mnist": (
        "idx:fashion_mnist",
        "70,000 pieces of clothing, 28x28 grey.",
        "https://arxiv.org/abs/1708.07747",
    ),
    "kmnist": ("idx:kmnist", "70,000 cursive Japanese characters, 28x28 grey.", "https://arxiv.org/abs/1812.01718"),
    "cifar10": (
        "sources:cifar10",
        "60,000 photographs of 10 classes, 32x32 colour.",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    "cifar100": (
        "sources:cifar100",
        "60,000 photographs of 100 classes, 32x32 colour.",
        "https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    "svhn": (
        "sources:svhn",
        "99,289 house numbers cut into digits, 32x32 colour.",
        "http://ufldl.stanford.edu/housenumbers/",
    ),
    "gtsrb": (
        "sources:gtsrb",
        "About 40,000 German traffic signs of 43 classes, colour, resized.",
        "https://benchmark.ini.rub.de/",
    ),
    "stl10": (
        "sources:stl10",
        "13,000 labelled photographs of 10 classes, 96x96 colour.",
        "https://cs.stanford.edu/~acoates/stl10/",
    ),
    "parquet": ("parquet:parquet", "parquet:DIR - Parquet files in the layout of the Hugging Face Hub."),
    "hub": ("hub:hub", "hub:NAME - a set of the Hugging Face Hub (pip install overproof[hub])."),
    "folder": ("folders:folder", "folder:DIR - images in one folder per class, or in DIR/{train,test}/CLASS."),
    "none": ("nothing:none", "No images at all, for methods that train without data."),
}
for _name, (_target, _summary, *_url) in _SOURCES.items():
    DATA.add(_name, f"overproof.data.{_target}", summary=_summary, url=_url[0] if _url else "")
# What a generator makes takes networks, so that a room above serves it, when it is asked for.
DATA.add(
    "generator", "overproof.run.generating:generated", summary="generator:RUN - images of the generator that a run has trained."
)

_HOMES = {
    **dict.fromkeys(("Augment", "build_augment"), "augmentation"),
    **dict.fromkeys(("Cutout", "HorizontalFlip", "RandAugment", "RandomCrop"), "steps"),
    **dict.fromkeys(("CutMix", "Mixup"), "mixing"),
    **dict.fromkeys(("DeviceLoader", "Loader", "make_loader"), "loaders"),
    **dict.fromkeys(("Splits", "long_tailed", "stratified_split", "stratified_subset"), "splits"),
    **dict.fromkeys(("MixedLoader", "load_extra", "make_mixed"), "extra"),
    "Attribute": "attributes",
    "StreamLoader": "stream_loader",
    "StreamSet": "streams",
    "ImageSet": "images",
    "IterableLoader": "iterables",
    "load_data": "load",
    "NoImages": "nothing",
}

__all__ = [
    "DATA", "Attribute", "Augment", "CutMix", "Cutout", "DeviceLoader", "HorizontalFlip", "ImageSet", "IterableLoader", "Loader",
    "MixedLoader", "Mixup", "NoImages", "RandAugment", "RandomCrop", "Splits", "StreamLoader", "StreamSet", "build_augment", "load_data",
    "load_extra", "long_tailed", "make_loader", "make_mixed", "stratified_split", "stratified_subset",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"overproof.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'overproof.data' has no attribute {name!r}")
