"""What pixels and labels must be, checked in one place and said in one way."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from overproof.errors import DataError

CHANNELS = (1, 3)


def check_images(images: Any, place: str) -> Tensor:
    """`images` if they are uint8, or float32 in [0, 1], of shape (N, C, H, W) with C 1 or 3.

    Other floating types become float32.

    Raises:
        DataError: empty, of another shape or type, not finite, or outside [0, 1]; names row and value.
    """
    if not isinstance(images, Tensor):
        raise DataError(f"{place}: images are {type(images).__name__}; expected a tensor of shape (N, C, H, W).")
    if not images.numel():
        raise DataError(f"{place} is empty: images of shape {tuple(images.shape)}. Give at least one image.")
    _check_shape(images, place)
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise DataError(f"{place}: images are {images.dtype}; expected uint8, or floats in [0, 1].")
    pixels: Tensor = images.float()
    low, high = (float(value) for value in torch.aminmax(pixels))
    if not (np.isfinite(low) and np.isfinite(high)):
        row = int((~pixels.isfinite()).flatten(1).any(dim=1).nonzero()[0])
        kind = "NaN" if bool(pixels[row].isnan().any()) else "an infinite value"
        raise DataError(f"{place}: image {row} holds {kind}. Repair or remove it.")
    if low < 0 or high > 1:
        raise DataError(f"{place}: pixels run from {low:.4g} to {high:.4g}. {_range_remedy(low, high)}")
    return pixels


def _check_shape(images: Tensor, place: str) -> None:
    shape = tuple(images.shape)
    if images.dim() != 4:
        hint = " Add the channel with images.unsqueeze(1)." if images.dim() == 3 else ""
        raise DataError(f"{place}: images have shape {shape}; expected (N, C, H, W).{hint}")
    if shape[1] not in CHANNELS:
        hint = " Move the channels forward with images.permute(0, 3, 1, 2)." if shape[3] in CHANNELS else ""
        raise DataError(f"{place}: images of shape {shape} have {shape[1]} channels; expected 1 or 3.{hint}")


def _range_remedy(low: float, high: float) -> str:
    if low >= 0 and high <= 255:
        return "Images must lie in [0, 1]: divide by 255."
    return (
        "Images must lie in [0, 1]; put the normalisation into the model: "
        "overproof.Classifier(net, mean=..., std=...), and leave it out of the data."
    )


def check_labels(labels: Any, count: int, place: str, *, classes: int | None = None) -> Tensor:
    """`labels` as int64 class numbers (N,), each in 0 to `classes` - 1.

    Raises:
        DataError: of another shape or type, not `count` of them, or out of range; names the row.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex() or labels.dim() != 1:
        found = f"{labels.dtype} of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise DataError(f"{place}: labels are {found}; expected int64 class numbers of shape (N,).")
    if len(labels) != count:
        raise DataError(f"{place}: {count} images, but {len(labels)} labels. Give one label per image.")
    numbers: Tensor = labels.long()
    low, high = (int(value) for value in torch.aminmax(numbers))
    if low < 0 or (classes is not None and high >= classes):
        wrong = (numbers < 0) | (numbers >= (high + 1 if classes is None else classes))
        row = int(wrong.nonzero()[0])
        known = f"expected 0 to {classes - 1}" if classes is not None else "class numbers start at 0"
        remedy = "Number the classes from 0 without gaps, or name all of them in `classes`."
        raise DataError(f"{place}: image {row} has the label {int(numbers[row])}; {known}. {remedy}")
    return numbers


def class_number(value: Any, row: int) -> int:
    """The label of one item as an integer; unlike int(), this does not cut off fractions.

    Raises:
        DataError: it is no integer; names the row.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise DataError(f"Item {row} of the Dataset has the label {value!r}; expected a class number.") from None


def to_float(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1]."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def as_image(value: Any, place: str) -> Tensor:
    """One image as a uint8 or floating tensor (C, H, W).

    Args:
        value: a PIL image, a tensor (C, H, W) or (H, W), or an array (H, W, C), (C, H, W) or (H, W).
        place: what to call the image in messages.

    Raises:
        DataError: something else.
    """
    if isinstance(value, Tensor):
        return value.unsqueeze(0) if value.dim() == 2 else value
    if not isinstance(value, np.ndarray):
        if not hasattr(value, "convert"):
            kind = type(value).__name__
            raise DataError(f"{place} is {kind}; expected a PIL image, a tensor (C, H, W) or an array (H, W, C).")
        grey = value.mode in ("1", "L", "LA")
        value = np.asarray(value.convert("L" if grey else "RGB"))
    if value.ndim == 2:
        value = value[..., None]
    if value.ndim == 3 and value.shape[-1] in CHANNELS:
        value = value.transpose(2, 0, 1)
    return torch.from_numpy(np.array(value))


def shape_error(images: dict[str, tuple[int, ...]], remedy: str) -> DataError:
    """The error for images that do not share one shape: the first two that differ, and what to do."""
    (first, shape), *others = images.items()
    other, different = next((name, found) for name, found in others if found != shape)
    return DataError(f"{other} has the shape {different}, but {first} has {shape} (channels, height, width). {remedy}")
