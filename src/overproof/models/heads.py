"""A trained network under a new last layer."""

from __future__ import annotations

import copy

from torch import nn

from overproof.features import last_linear
from overproof.models.classifier import Classifier


def with_new_head(model: nn.Module, classes: int) -> nn.Module:
    """A copy of `model` whose last linear layer is new, freshly drawn, with `classes` outputs; all else is as it was.

    Where the model says how to build it again, the copy says it too, with its own number of classes. A network with a method
    `shed` drops what no classifier needs, such as a decoder, and says with which options it would have been built so.

    Raises:
        OverproofError: the network has no linear layer.
    """
    made = copy.deepcopy(model)
    name = last_linear(made)
    old = made.get_submodule(name)
    assert isinstance(old, nn.Linear)
    new = nn.Linear(old.in_features, classes, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
    parent, _, attribute = name.rpartition(".")
    setattr(made.get_submodule(parent), attribute, new)
    shed = getattr(made.net if isinstance(made, Classifier) else made, "shed", None)
    left: dict[str, object] = shed() if callable(shed) else {}
    if isinstance(made, Classifier) and made.spec is not None:
        made.spec = {**made.spec, "classes": classes, "options": {**made.spec["options"], **left}}
    return made
