"""Generators, which make images of noise, and critics, which tell them from others; both by name, both plain stacks of layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from overproof.errors import UnknownNameError, UsageError
from overproof.models.blocks import Doubling

Law = Literal["normal", "uniform"]
Head = Literal["batchnorm", "tanh", "sigmoid"]
Shape = tuple[int, ...]


class Generator(nn.Module):
    """Noise (N, d) to images (N, C, H, W) in the units of a classifier's pixels, shift + scale net(z).

    What `net` gives is not pixels but numbers of its own range: those of normalised images, or [-1, 1] behind a tanh.

    Args:
        net: noise (N, d) -> (N, *shape).
        latent: d, length of the noise.
        shape: (C, H, W) of an image; or another, such as (2,) for points of the plane.
        law: of the noise, N(0, 1) or uniform on [-1, 1].
        shift: one number for all channels or one for each.
        scale: likewise.
        spec: how to build it again with `rebuild_generator`, or None for a network made elsewhere.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        latent: int,
        shape: Shape,
        law: Law = "normal",
        shift: float | Sequence[float] = 0.0,
        scale: float | Sequence[float] = 1.0,
        spec: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.net, self.latent, self.shape, self.law, self.spec = net, latent, tuple(shape), law, spec
        for name, given in (("shift", shift), ("scale", scale)):
            values = [float(v) for v in given] if isinstance(given, Sequence) else [float(given)] * shape[0]
            if len(values) != shape[0]:
                raise UsageError(f"Generator: {name}={given} has {len(values)} numbers for {shape[0]} channels.")
            self.register_buffer(name, torch.tensor(values).reshape(1, shape[0], *[1] * (len(shape) - 1)))

    def forward(self, noise: Tensor) -> Tensor:
        """Noise (N, d) -> images (N, C, H, W). They are not clamped to [0, 1]; see `sample` for pictures."""
        images: Tensor = self.shift + self.scale * self.net(noise)
        return images

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Noise for `count` images, from torch's global stream or the given one, on the device of the network."""
        device = self.shift.device if generator is None else generator.device
        how: dict[str, Any] = {"generator": generator, "device": device, "dtype": self.shift.dtype}
        if self.law == "uniform":
            return (2 * torch.rand(count, self.latent, **how) - 1).to(self.shift.device)
        return torch.randn(count, self.latent, **how).to(self.shift.device)


def make_generator(
    name: str,
    latent: int,
    shape: Shape,
    *,
    law: Law = "normal",
    shift: float | Sequence[float] = 0.0,
    scale: float | Sequence[float] = 1.0,
    **options: Any,
) -> Generator:
    """A generator by name.

    Args:
        name: "upsampling", "dcgan", "transposed" or "mlp".
        latent: length of the noise, at least 1.
        shape: (C, H, W) of an image.
        law, shift, scale: see `Generator`.
        options: the builder's own.

    Raises:
        UnknownNameError: no such generator, or option of it.
        UsageError: a size that it cannot make.
    """
    if name not in GENERATORS:
        raise UnknownNameError("generator", name, GENERATORS)
    for key, value in {"latent": latent, "width": options.get("width", 1), "depth": options.get("depth", 1)}.items():
        if value < 1:
            raise UsageError(f"Generator {name!r}: {key}={value} must be at least 1.")
    if law not in get_args(Law):
        raise UnknownNameError("law of the noise", law, get_args(Law))
    build = GENERATORS[name]
    known = (build.__kwdefaults__ or {}).keys()
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of generator {name!r}:", option, known)
    net = build(latent, tuple(shape), **options)
    spec = {
        "name": name,
        "latent": latent,
        "shape": list(shape),
        "law": law,
        "shift": shift,
        "scale": scale,
        "options": options,
    }
    plain: dict[str, Any] = json.loads(json.dumps(spec))
    return Generator(net, latent=latent, shape=shape, law=law, shift=shift, scale=scale, spec=plain)


def upsampling(latent: int, shape: Shape, *, width: int = 64, head: Head = "batchnorm") -> nn.Sequential:
    """A linear layer, then two rounds of doubling and convolution; height and width are any multiple of 4.

    Args:
        latent: length of the noise.
        shape: (C, H, W).
        width: channels of the last map; those before have twice as many.
        head: "batchnorm": a tanh, then each channel of a batch gets mean 0 and variance 1; "tanh": [-1, 1]; "sigmoid": [0, 1].
    """
    channels, height, breadth = _image(shape, "upsampling", divisor=4)
    rows, columns, wide = height // 4, breadth // 4, 2 * width
    layers: list[nn.Module] = [
        nn.Linear(latent, wide * rows * columns),
        nn.Unflatten(1, (wide, rows, columns)),
        nn.BatchNorm2d(wide),
    ]
    for inputs, outputs in ((wide, wide), (wide, width)):
        layers += [Doubling(inputs, outputs), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1), *_head(head, channels))


def dcgan(latent: int, shape: Shape, *, width: int = 64, head: Head = "tanh") -> nn.Sequential:
    """A linear layer, then four transposed convolutions with normalisation; height and width are multiples of 16."""
    channels, height, breadth = _image(shape, "dcgan", divisor=16)
    rows, columns = height // 16, breadth // 16
    widths = (8 * width, 4 * width, 2 * width, width, width)
    layers: list[nn.Module] = [
        nn.Linear(latent, widths[0] * rows * columns),
        nn.Unflatten(1, (widths[0], rows, columns)),
        nn.BatchNorm2d(widths[0]),
    ]
    for inputs, outputs in pairwise(widths):
        layers += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]
    return small_weights(nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1), *_head(head, channels)))


def transposed(latent: int, shape: Shape, *, width: int = 128, head: Head = "tanh") -> nn.Sequential:
    """Transposed convolutions with ReLU and no normalisation, from one pixel; for any even square size."""
    channels, side, doublings = _doublings(shape, "transposed")
    widths = [width * 2**i for i in reversed(range(doublings))]
    layers: list[nn.Module] = [nn.Unflatten(1, (latent, 1, 1)), nn.ConvTranspose2d(latent, widths[0], side), nn.ReLU()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.ReLU()]
    return small_weights(nn.Sequential(*layers, nn.ConvTranspose2d(width, channels, 4, 2, 1), *_head(head, channels)))


def mlp(latent: int, shape: Shape, *, width: int = 512, depth: int = 3, head: Head | None = None) -> nn.Sequential:
    """Linear layers with ReLU, for points and small images; `depth` hidden ones. head: None for any number."""
    outputs = int(torch.Size(shape).numel())
    layers = [*_dense(latent, width, depth), nn.Linear(width, outputs), nn.Unflatten(1, tuple(shape))]
    return nn.Sequential(*layers, *(_head(head, shape[0]) if head else ()))


def critic(shape: Shape, *, width: int = 128) -> nn.Sequential:
    """Images (N, C, H, W) -> raw logits (N,): strided convolutions, normalised but for the first; any even square size."""
    channels, side, halvings = _doublings(shape, "critic")
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for i in range(1, halvings):
        inputs, outputs = width * 2 ** (i - 1), width * 2**i
        layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]
    last = width * 2 ** (halvings - 1) * side**2
    return small_weights(nn.Sequential(*layers, nn.Flatten(), nn.Linear(last, 1), nn.Flatten(0)))


def mlp_critic(shape: Shape, *, width: int = 512, depth: int = 3) -> nn.Sequential:
    """Points or small images -> raw logits (N,), through linear layers with ReLU."""
    inputs = int(torch.Size(shape).numel())
    return nn.Sequential(nn.Flatten(), *_dense(inputs, width, depth), nn.Linear(width, 1), nn.Flatten(0))


GENERATORS: dict[str, Callable[..., nn.Sequential]] = {build.__name__: build for build in (upsampling, dcgan, transposed, mlp)}


def small_weights(network: nn.Sequential) -> nn.Sequential:
    """Weights N(0, 0.02^2) without bias, scales of normalisations N(1, 0.02^2), as the DCGAN paper starts; in place."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.02)
            nn.init.zeros_(module.bias)
    return network


def _head(head: Head, channels: int) -> list[nn.Module]:
    if head not in ("batchnorm", "tanh", "sigmoid"):
        raise UnknownNameError("head of a generator", head, ("batchnorm", "tanh", "sigmoid"))
    last: list[nn.Module] = [nn.Sigmoid() if head == "sigmoid" else nn.Tanh()]
    return [*last, nn.BatchNorm2d(channels, affine=False)] if head == "batchnorm" else last


def _dense(inputs: int, width: int, depth: int) -> list[nn.Module]:
    pairs = ((nn.Linear(width if i else inputs, width), nn.ReLU()) for i in range(depth))
    return [layer for pair in pairs for layer in pair]


def _image(shape: Shape, name: str, *, divisor: int) -> tuple[int, int, int]:
    if len(shape) != 3 or any(side < divisor or side % divisor for side in shape[1:]):
        raise UsageError(
            f"The generator {name!r} makes images whose height and width are multiples of {divisor}, not {tuple(shape)} (channels, height, "
            f"width). {'Take upsampling, for multiples of 4' if divisor > 4 else 'Resize the images'}."
        )
    return shape[0], shape[1], shape[2]


def _doublings(shape: Shape, name: str) -> tuple[int, int, int]:
    """Channels, the side to begin with (3 to 7 for common sizes), and how often it doubles."""
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] % 2 or shape[1] < 4:
        raise UsageError(
            f"{name!r} is for square images of even size, at least 4, not {tuple(shape)} (channels, height, width)."
        )
    side, times = shape[1], 0
    while side % 2 == 0 and (side > 4 or not times):
        side, times = side // 2, times + 1
    return shape[0], side, times
