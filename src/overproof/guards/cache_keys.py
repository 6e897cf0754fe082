"""What the cache compares: features of a network as vectors of length one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

from overproof.errors import DataError, OverproofError, UsageError
from overproof.features import INPUT, Tap, penultimate, stages

TINY = 1e-12  # below this length a vector has no direction
STAGES = 2  # of a network without a published set of layers

# The layers of the paper, by the names that this package, torchvision and timm give them. An inner activation is what the
# next convolution reads, an outer one what the block returns.
PRESETS = {
    "resnet20": ("layer3.0.conv2:input", "layer3.1.conv2:input", "layer3.2.conv2:input"),
    "resnet32": ("layer3.0", "layer3.2.conv2:input", "layer3.3"),
    "resnet56": ("layer3.0.conv2:input", "layer3.4.conv2:input", "layer3.8.conv2:input"),
    "densenet40": ("denseblock3.denselayer8.conv1:input", "denseblock3.denselayer12.conv1:input"),
    "densenet100": ("denseblock3.denselayer31.conv1:input",),
    "resnet50": ("layer4.0.conv3:input",),
}


def choose_layers(model: nn.Module, given: Sequence[str] | str | None) -> tuple[str, ...]:
    """Tap names of the layers that make the keys.

    Args:
        model: the classifier.
        given: tap names, whose wrappers ("net.") may be left out; the name of a preset; or None: the preset of the model's
            architecture, else its last two feature stages, else what its last linear layer reads.

    Raises:
        UsageError: no such preset, or no layer at all.
        UnknownNameError: (by the tap) no such layer.
    """
    if given is None:
        given = PRESETS.get(_architecture(model)) or _deepest(model)
    elif isinstance(given, str):
        if given not in PRESETS:
            raise UsageError(
                f"There is no published set of cache layers called {given!r}; known are {', '.join(PRESETS)}. Name a sequence of "
                "layers instead: layers=('layer3', 'layer4')."
            )
        given = PRESETS[given]
    if not given:
        raise UsageError("layers=() leaves the cache nothing to compare; name at least one layer.")
    return tuple(_full_name(model, name) for name in given)


def _architecture(model: nn.Module) -> str:
    spec = getattr(model, "spec", None)
    return str(spec.get("name", "")).rpartition(":")[2] if isinstance(spec, Mapping) else ""


def _deepest(model: nn.Module) -> tuple[str, ...]:
    try:
        return stages(model)[-STAGES:]
    except OverproofError:
        return (penultimate(model),)


def _full_name(model: nn.Module, name: str) -> str:
    """The shortest path of a submodule that is `name` or ends with it; `name` itself if there is none."""
    path = name.removesuffix(INPUT)
    found = [known for known, _ in model.named_modules() if known == path or known.endswith(f".{path}")]
    return min(found, key=len, default=path) + name[len(path) :]


class KeyReader:
    """Runs a network and returns its logits with the keys of the images.

    k = f / max(|f|_2, 1e-12), with f the features of all layers in a row: one norm over all of them.

    Args:
        model: images (N, C, H, W) -> logits (N, K).
        layers: tap names.
        pool: side to which maps (N, C, H, W) are averaged first, 1 for their mean (tokens (N, T, C) know only 1); None leaves
            them as they are.
        separate: give each layer length one before all are joined, so that none outweighs the others.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], *, pool: int | None = None, separate: bool = False) -> None:
        self.model, self.pool, self.separate = model, pool, separate
        self._tap = Tap(model, layers)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) -> logits (N, K), keys (N, D) in at least single precision."""
        logits, features = self._tap(images)
        parts = [self._flat(name, value) for name, value in features.items()]
        if self.separate:
            parts = [normalize(part, dim=1, eps=TINY) for part in parts]
        return logits, normalize(torch.cat(parts, dim=1), dim=1, eps=TINY)

    def _flat(self, name: str, value: Tensor) -> Tensor:
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        if self.pool is not None and value.dim() == 4:
            height, width = value.shape[2:]
            value = adaptive_avg_pool2d(value, (min(self.pool, height), min(self.pool, width)))
        elif self.pool is not None and value.dim() == 3:
            if self.pool != 1:
                raise UsageError(
                    f"The layer {name!r} gives tokens {tuple(value.shape)}; pool={self.pool} must be 1 or None there."
                )
            value = value.mean(dim=1)
        return value.flatten(1)


def check_keys(keys: Tensor, rows: Tensor, layers: Sequence[str]) -> None:
    """Assert that keys (N, D) of the images number `rows` (N,) have a direction.

    Raises:
        DataError: one is zero or not finite; names the image.
    """
    wrong = ~(keys.square().sum(dim=1) > 0.5)  # of length one, if it is not zero; NaN fails too
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        kind = "are all zero" if bool((keys[row] == 0).all()) else "are not finite"
        raise DataError(
            f"cache: the features of image {int(rows[row])} at {', '.join(layers)} {kind}, so it resembles no other image. Choose "
            "other layers, or look at the network: its units may be dead."
        )


def fingerprints(images: Tensor) -> Tensor:
    """A number (N,) for each image (N, C, H, W), the same for the same pixels in 256 grey levels."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(2**62, (images[0].numel(),), generator=generator).to(images.device)
    parts = ((part * 255).round() if part.is_floating_point() else part for part in torch.split(images, 1024))
    return torch.cat([(part.flatten(1).long() * factors).sum(dim=1) for part in parts])
