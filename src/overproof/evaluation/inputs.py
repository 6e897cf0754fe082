"""Is the model what it is taken for? Images in [0, 1] in, logits out, normalised once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from overproof.networks import in_mode

SOFTMAX = (
    "The model's outputs are non-negative and sum to 1: it seems to end in a softmax. Attacks and distillation need logits; "
    "remove the softmax, or robust accuracy will look better than it is."
)
TWICE = (
    "The model normalises its images twice: the layer {name} receives pixels outside [0, 1]. Clean accuracy will be low and no "
    "figure here means what it says; build the model without its own normalisation, or wrap it with mean=0, std=1."
)


def seems_softmax(logits: Tensor) -> bool:
    """Whether `logits` (N, K) are probabilities."""
    return bool((logits >= 0).all()) and torch.allclose(logits.sum(dim=1), torch.ones_like(logits[:, 0]), atol=1e-4)


def normalised_twice(model: nn.Module, image: Tensor) -> str | None:
    """The name of a normalisation layer that receives images which were normalised before, if there is one.

    A black and a white image are sent through; a layer that normalises images should meet them inside [0, 1].

    Args:
        model: images -> logits.
        image: (1, C, H, W), for shape and device.
    """
    layers = {module: name for name, module in model.named_modules() if _normalises(module, image.shape[1])}
    met: list[str] = []

    def look(module: nn.Module, inputs: Any) -> None:
        x = inputs[0] if inputs else None
        if (
            isinstance(x, Tensor)
            and x.dim() == 4
            and x.shape[1] == image.shape[1]
            and bool((x < -0.01).any() | (x > 1.01).any())
        ):
            met.append(layers[module])

    if len(layers) < 2:
        return None
    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        with in_mode(model), torch.no_grad():
            model(torch.cat([torch.zeros_like(image), torch.ones_like(image)]))
    finally:
        for handle in handles:
            handle.remove()
    return met[0] if met else None


def _normalises(module: nn.Module, channels: int) -> bool:
    """Whether this is a layer such as ours or torchvision's: (images - mean) / std."""
    mean = next((getattr(module, name) for name in ("mean", "new_mean", "mu") if hasattr(module, name)), None)
    std = next((getattr(module, name) for name in ("std", "new_std", "sigma") if hasattr(module, name)), None)
    sizes = {torch.as_tensor(value).numel() for value in (mean, std) if isinstance(value, Tensor | list | tuple | float | int)}
    return "normali" in type(module).__name__.lower() and bool(sizes) and sizes <= {1, channels}
