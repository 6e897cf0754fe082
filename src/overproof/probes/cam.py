"""Grad-CAM: where in the image the evidence for a class lies, for any network with a map before its head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof.errors import OverproofError, UsageError
from overproof.features import Tap, last_linear, penultimate, stages
from overproof.networks import in_mode

CLOSE = 1e-5


def grad_cam(
    model: nn.Module, images: Tensor, labels: Tensor, *, layer: str | None = None, closed: bool | None = None
) -> Tensor:
    """ReLU(sum_c w_c A_c) with w_c = mean_uv dz_y / dA_c,uv, for the map A and the class y.

    Where the head is a global average and one linear layer, w_c = W_yc / (h w) and no gradient is needed.

    Args:
        model: images -> logits (N, K); left as it is.
        images: (N, C, H, W) in [0, 1].
        labels: classes y (N,).
        layer: whose output is A; None: the last of the network's stages that has a spatial layout.
        closed: whether the head is of that kind; None: look.

    Returns:
        (N, h, w), without gradient; at least 0.

    Raises:
        UsageError: the network has no map, or `layer` gives none.

    Reference: Selvaraju et al., ICCV 2017, arXiv 1610.02391.

    Differences from the paper: none.
    """
    layer = layer or spatial_layer(model, images[:1])
    weight = closed_head(model, layer, images[:2]) if closed is None or closed else None
    with in_mode(model), torch.inference_mode(False):
        if weight is not None:
            with torch.no_grad():
                maps = _channels_first(model, _tapped(model, layer, images)[1])
            factors = weight[labels] / (maps.shape[2] * maps.shape[3])
        else:
            with torch.enable_grad():
                logits, maps = _tapped(model, layer, images, leaves=True)
                own = logits.gather(1, labels[:, None]).sum()
                (gradient,) = torch.autograd.grad(own, maps, allow_unused=True)
            if gradient is None:
                raise UsageError(
                    f"The logits of {type(model).__name__} do not depend on the layer {layer!r}; name another one."
                )
            factors = _channels_first(model, gradient).mean(dim=(2, 3))
            maps = _channels_first(model, maps)
        return torch.einsum("nc,nchw->nhw", factors, maps.detach()).relu()


def spatial_layer(model: nn.Module, image: Tensor) -> str:
    """Tap name of the last stage with a map of more than one cell; `image` is (1, C, H, W).

    Raises:
        UsageError: there is none.
    """
    try:
        names = stages(model)
        with in_mode(model), torch.no_grad():
            _, found = Tap(model, names)(image)
    except OverproofError as error:
        raise UsageError(f"{type(model).__name__} has no map to look at: {error}") from error
    maps = [name for name in names if found[name].dim() == 4 and _channels_first(model, found[name])[0, 0].numel() > 1]
    if not maps:
        shapes = ", ".join(f"{name} {tuple(found[name].shape[1:])}" for name in names)
        raise UsageError(f"{type(model).__name__} has no stage with a spatial layout ({shapes}).")
    return maps[-1]


def closed_head(model: nn.Module, layer: str, images: Tensor) -> Tensor | None:
    """The weights W (K, C) of a head that averages the map of `layer` and applies one linear layer; None for other heads."""
    try:
        vector, last = penultimate(model), model.get_submodule(last_linear(model))
    except OverproofError:
        return None
    assert isinstance(last, nn.Linear)
    with in_mode(model), torch.no_grad():
        try:
            logits, found = Tap(model, (layer, vector))(images)
        except OverproofError:  # the forward pass goes round it
            return None
        maps, read = _channels_first(model, found[layer]), found[vector]
        same = read.shape == maps.shape[:2] and torch.allclose(read, maps.mean(dim=(2, 3)), rtol=CLOSE, atol=CLOSE)
        if same and logits.shape[1] == last.out_features and torch.allclose(last(read), logits, rtol=CLOSE, atol=CLOSE):
            return last.weight.detach()
    return None


def resized(cams: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (N, h, w) bilinearly enlarged to `size`."""
    if tuple(cams.shape[1:]) == size:
        return cams
    return F.interpolate(cams[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def _channels_first(model: nn.Module, maps: Tensor) -> Tensor:
    """Maps (N, C, h, w) of a network that may keep its channels last, as timm's Swin does and says."""
    last = any(str(getattr(part, "output_fmt", "")) in ("NHWC", "Format.NHWC") for part in model.modules())
    return maps.permute(0, 3, 1, 2) if last and maps.dim() == 4 else maps


def _tapped(model: nn.Module, layer: str, images: Tensor, *, leaves: bool = False) -> tuple[Tensor, Tensor]:
    logits, found = Tap(model, (layer,), leaves=leaves)(images)
    maps = found[layer]
    if maps.dim() != 4:
        raise UsageError(f"The layer {layer!r} of {type(model).__name__} gives {tuple(maps.shape[1:])}, no map (C, h, w).")
    return logits, maps
