"""Images as bad cameras and tight files leave them, at five severities.

Reference: Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261; strengths as for small images (CIFAR-10-C).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from io import BytesIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from overproof.errors import UnknownNameError, UsageError

SEVERITIES = (1, 2, 3, 4, 5)
STRENGTHS: dict[str, tuple[float, ...]] = {
    "noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation, pixel units
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # standard deviation of the Gaussian, pixels
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # what is left of it
    "jpeg": (80, 65, 58, 50, 40),  # quality
}


def corrupted(images: Tensor, kind: str, severity: int, generator: Generator) -> Tensor:
    """The images under one corruption.

    Args:
        images: (N, C, H, W) in [0, 1].
        kind: "noise", "blur", "contrast" or "jpeg".
        severity: 1 (mild) to 5.
        generator: of the noise.

    Returns:
        The same shape, in [0, 1].

    Raises:
        UnknownNameError: no such corruption.
        UsageError: no such severity.
    """
    if kind not in STRENGTHS:
        raise UnknownNameError("corruption", kind, STRENGTHS)
    if severity not in SEVERITIES:
        raise UsageError(f"The severity of {kind} is {severity}; give 1 (mild) to {SEVERITIES[-1]}.")
    return _CHANGES[kind](images, STRENGTHS[kind][severity - 1], generator).clamp(0, 1)


def _noise(images: Tensor, std: float, generator: Generator) -> Tensor:
    return images + std * torch.empty(images.shape).normal_(generator=generator).to(images)


def _blur(images: Tensor, std: float, generator: Generator) -> Tensor:
    reach, channels = math.ceil(3 * std), images.shape[1]
    places = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    bell = (-0.5 * (places / std).square()).exp()
    bell = (bell / bell.sum()).expand(channels, 1, 1, -1)
    wide = F.pad(images, [reach] * 4, mode="replicate")
    return F.conv2d(F.conv2d(wide, bell, groups=channels), bell.transpose(2, 3), groups=channels)


def _contrast(images: Tensor, left: float, generator: Generator) -> Tensor:
    mean = images.mean(dim=(2, 3), keepdim=True)
    return mean + left * (images - mean)


def _jpeg(images: Tensor, quality: float, generator: Generator) -> Tensor:
    bytes_ = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    found = np.stack([_through_file(image, int(quality)) for image in bytes_])
    return torch.from_numpy(found).permute(0, 3, 1, 2).to(images) / 255


def _through_file(pixels: np.ndarray, quality: int) -> np.ndarray:
    from PIL import Image

    buffer, grey = BytesIO(), pixels.shape[2] == 1
    Image.fromarray(pixels[:, :, 0] if grey else pixels).save(buffer, "JPEG", quality=quality)
    array = np.asarray(Image.open(buffer))
    return array[:, :, None] if grey else array


_CHANGES: dict[str, Callable[[Tensor, float, Generator], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "jpeg": _jpeg,
}
