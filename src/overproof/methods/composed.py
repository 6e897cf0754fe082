"""Several methods at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.methods.feature_parts import Compound, make_part
from overproof.methods.feature_probe import ImageShape
from overproof.methods.shared_forward import Seen
from overproof.types import Batch, Progress


class Composed(Compound):
    """The sum of several methods, over one forward pass of each network.

    L = ce_weight mean_n CE(y_n, S(x_n)) + sum_i weights_i L_i, where L_i is method i without its own cross-entropy

    Args:
        student: images -> logits (N, K).
        teacher: images -> logits (N, K), frozen.
        methods: names of methods, each at most once.
        weights: one for each method, at least 0; None: 1 each.
        options: options of the methods by name, such as {"kd": {"temperature": 2.0}}.
        ce_weight: weight of the labels, at least 0; what the methods say about it is not used, but by gacd for adversarial images.
        samples: number of training images, for methods that remember each.
        image_shape: see `FeatureObjective`.

    Raises:
        UsageError: no or repeated methods, options of others, another number of weights, or a negative one.

    Reference: the default is what Tian, Krishnan, Isola (ICLR 2020, arXiv 1910.10699) call CRD+KD.

    Differences from the paper: none; there too knowledge distillation has its full weight beside the labels.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        methods: tuple[str, ...] = ("kd", "crd"),
        weights: tuple[float, ...] | None = None,
        options: dict[str, dict[str, Any]] | None = None,
        ce_weight: float = 1.0,
        samples: int | None = None,
        image_shape: ImageShape | None = None,
    ) -> None:
        super().__init__(student, teacher, ce_weight=ce_weight, image_shape=image_shape)
        given = _checked_options(methods, weights, options or {})
        self.names, self.weights = methods, weights or (1.0,) * len(methods)
        parts = [
            make_part(name, student, teacher, options=given.get(name, {}), image_shape=image_shape, samples=samples)
            for name in methods
        ]
        self.parts = nn.ModuleList(parts)
        self.watch([place for part in parts for place in part.places])

    def terms(self, seen: Seen, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The terms of all parts, each under its method's name."""
        found = {}
        for name, weight, part in zip(self.names, self.weights, self.parts, strict=True):
            for term, value in part.terms(seen, batch, progress).items():  # type: ignore[operator]
                found[term if term.startswith(name) else f"{name}-{term}"] = weight * value
        return found


def _checked_options(
    methods: tuple[str, ...], weights: tuple[float, ...] | None, options: Mapping[str, dict[str, Any]]
) -> Mapping[str, dict[str, Any]]:
    if not methods or len({*methods}) < len(methods):
        raise UsageError(f"methods={list(methods)}: name at least one method, and each only once.")
    if weights is not None and (len(weights) != len(methods) or min(weights) < 0):
        raise UsageError(f"weights={list(weights)}: give one weight, at least 0, for each of the methods {list(methods)}.")
    for name in options:
        if name not in methods:
            raise UsageError(f"options are given for the method {name!r}, which is not among {list(methods)}.")
    return options
