"""Attacks of Foolbox."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import Tensor

from overproof.attacks.adapters.library import Builder, Call, Facts, Library, parameters_of
from overproof.attacks.threats import AnyNorm
from overproof.errors import UsageError

NORMS: dict[float, AnyNorm] = {math.inf: "Linf", 2: "L2", 1: "L1", 0: "L0"}
POWERS = {norm: power for power, norm in NORMS.items()}


class Foolbox(Library):
    """`foolbox:NAME` is a class of `foolbox.attacks`; its step sizes are relative to the radius unless given in pixels."""

    prefix, module, install = "foolbox", "foolbox", "foolbox==3.3.4"
    taken = frozenset({"distance", "constraint"})

    def attacks(self) -> dict[str, Builder]:
        """The classes of `foolbox.attacks`."""
        home = self.load().attacks
        found = {name: value for name, value in vars(home).items() if inspect.isclass(value) and issubclass(value, home.Attack)}
        return {name: value for name, value in found.items() if not inspect.isabstract(value)}

    def facts(self, builder: Builder) -> Facts:
        """The attack's distance tells its norm; an attack that minimises takes no radius."""
        base = self.load().attacks.base
        if not issubclass(builder, base.AttackWithDistance):  # type: ignore[arg-type]
            raise UsageError(f"foolbox:{builder.__name__} measures no distance, so no radius can be set for it.")
        power = getattr(getattr(builder, "distance", None), "p", None)
        known = parameters_of(builder)
        norms: tuple[AnyNorm, ...]
        if "constraint" in known:  # HopSkipJump, whose class says another distance than its argument
            norms = ("L2", "Linf")
        elif power is not None:
            norms = (NORMS[power],)
        else:
            norms = ("L2", "Linf", "L1", "L0")
        options, required = self.options_of(builder)
        return Facts(issubclass(builder, base.MinimizationAttack), norms, options, required)  # type: ignore[arg-type]

    def run(self, builder: Builder, call: Call) -> Tensor:
        """The library's answer for one batch."""
        foolbox, known = self.load(), parameters_of(builder)
        choice: dict[str, Any] = {}
        if "constraint" in known:
            choice["constraint"] = call.norm.lower()
        elif "distance" in known:
            choice["distance"] = foolbox.distances.LpDistance(POWERS[call.norm])
        model = foolbox.PyTorchModel(call.model, bounds=(0, 1), device=call.images.device)
        wanted = foolbox.TargetedMisclassification if call.targeted else foolbox.Misclassification
        minimum = issubclass(builder, foolbox.attacks.base.MinimizationAttack)  # type: ignore[arg-type]
        attack = builder(**choice, **call.options)
        _, found, _ = attack(model, call.images, wanted(call.labels), epsilons=None if minimum else call.eps)
        result: Tensor = found
        return result
