"""Parameters sorted for the optimiser as transformers want them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

Named = Iterable[tuple[str, nn.Parameter]]


def decay_groups(parameters: Named, *, exempt: str = "", **shared: Any) -> list[dict[str, Any]]:
    """Matrices with the optimiser's weight decay, vectors (biases, norms) and `exempt` without; both with the options `shared`."""
    kept = [(p, p.dim() > 1 and name.removeprefix("net.") != exempt) for name, p in parameters]
    matrices = {"params": [p for p, decays in kept if decays], **shared}
    vectors = {"params": [p for p, decays in kept if not decays], "weight_decay": 0.0, **shared}
    return [group for group in (matrices, vectors) if group["params"]]


def layer_groups(parameters: Named, depth: int, decay: float) -> list[dict[str, Any]]:
    """The same, layer by layer: the rate of layer i of `depth` blocks is scaled by decay^(depth + 1 - i).

    The embedding is layer 0, block i is layer i + 1, and all behind the blocks has the full rate. The class token does not decay.

    Reference: Clark et al., ICLR 2020; as used by He et al., CVPR 2022, arXiv 2111.06377.
    """
    layers: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters:
        layers.setdefault(_layer(name, depth), []).append((name, parameter))
    return [
        group
        for layer in sorted(layers)
        for group in decay_groups(layers[layer], exempt="cls", lr_scale=decay ** (depth + 1 - layer))
    ]


def _layer(name: str, depth: int) -> int:
    if block := re.match(r"(?:net\.)?blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    return 0 if re.match(r"(?:net\.)?(embed|cls)\b", name) else depth + 1
