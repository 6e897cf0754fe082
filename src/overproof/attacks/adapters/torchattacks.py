"""Attacks of Torchattacks."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from overproof.attacks.adapters.library import Builder, Call, Facts, Library, parameters_of, scaled_step
from overproof.attacks.threats import AnyNorm

# The names do not say it of these; all others are Linf.
NORMS: dict[str, AnyNorm] = {
    "CW": "L2", "DeepFool": "L2", "PGDL2": "L2", "PGDRSL2": "L2",
    "EADL1": "L1", "EADEN": "L1",
    "JSMA": "L0", "OnePixel": "L0", "Pixle": "L0", "SparseFool": "L0",
}  # fmt: skip


class TorchAttacks(Library):
    """`torchattacks:NAME` is a class of `torchattacks`. Its steps count in pixels; they are scaled with the radius unless given."""

    prefix, module, install = "torchattacks", "torchattacks", "torchattacks==3.5.1"
    taken = frozenset({"model", "eps", "norm"})

    def attacks(self) -> dict[str, Builder]:
        """The classes of `torchattacks` that take a model."""
        classes = {name: value for name, value in vars(self.load()).items() if inspect.isclass(value)}
        return {name: value for name, value in classes.items() if next(iter(parameters_of(value)), "") == "model"}

    def facts(self, builder: Builder) -> Facts:
        """An attack without `eps` looks for the smallest change."""
        known = parameters_of(builder)
        norms: tuple[AnyNorm, ...] = ("Linf", "L2", "L1") if "norm" in known else (NORMS.get(builder.__name__, "Linf"),)
        return Facts("eps" not in known, norms, *self.options_of(builder))

    def run(self, builder: Builder, call: Call) -> Tensor:
        """The library's answer for one batch."""
        given: dict[str, Any] = {"eps": call.eps, "norm": call.norm, "n_classes": call.classes, "seed": call.seed % 2**32}
        given = {name: value for name, value in given.items() if name in parameters_of(builder)}
        attack = builder(call.model, **{**given, **scaled_step(builder, call, "alpha"), **call.options})
        attack.set_device(call.images.device)
        if call.targeted:
            attack.set_mode_targeted_by_label(quiet=True)
        found: Tensor = attack(call.images, call.labels)
        return found
