"""Attacks of Adversarial Library (adv-lib)."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import Tensor

from overproof.attacks.adapters.library import Builder, Call, Facts, Library, parameters_of
from overproof.attacks.threats import AnyNorm

# Where the radius goes; `fab` and `tr` have arguments of that name which are something else.
RADII = {"apgd": "eps", "apgd_targeted": "eps", "pgd_linf": "ε"}
# Where the norm goes and what the function knows, its default or most common one first.
CHOICES: dict[str, tuple[str, tuple[AnyNorm, ...]]] = {
    "alma": ("distance", ("L2", "L1")),
    "apgd": ("norm", ("Linf", "L2", "L1")),
    "apgd_targeted": ("norm", ("Linf", "L2", "L1")),
    "df": ("norm", ("L2", "Linf")),
    "fab": ("norm", ("Linf", "L2", "L1")),
    "fmn": ("norm", ("L2", "Linf", "L1", "L0")),
    "pdpgd": ("norm", ("L2", "Linf", "L1", "L0")),
    "tr": ("p", ("L2", "Linf")),
}
FIXED: dict[str, AnyNorm] = {
    "carlini_wagner_linf": "Linf", "pgd_linf": "Linf", "fga": "L0", "sigma_zero": "L0", "str_attack": "L2", "vfga": "L0",
}  # fmt: skip
POWERS = {"Linf": math.inf, "L2": 2.0, "L1": 1.0, "L0": 0.0}


class AdvLib(Library):
    """`advlib:NAME` is a function of `adv_lib.attacks`."""

    prefix, module, install = (
        "advlib",
        "adv_lib.attacks",
        '"setuptools<81" wheel && pip install --no-build-isolation adv-lib==0.2.8',
    )
    taken = frozenset({"model", "inputs", "images", "labels", "targeted", "num_classes"})

    def attacks(self) -> dict[str, Builder]:
        """The functions of `adv_lib.attacks` that take a model."""
        functions = {name: value for name, value in vars(self.load()).items() if inspect.isfunction(value)}
        return {name: value for name, value in functions.items() if next(iter(parameters_of(value)), "") == "model"}

    def facts(self, builder: Builder) -> Facts:
        """Which functions take a radius and which a norm cannot be read from their signatures; the tables above say it."""
        name = builder.__name__
        ours = {RADII.get(name), CHOICES.get(name, ("", ()))[0]}
        options, required = self.options_of(builder)
        norms = CHOICES[name][1] if name in CHOICES else (FIXED.get(name, "L2"),)
        return Facts(name not in RADII, norms, options - ours, required - ours, targeted="targeted" in parameters_of(builder))

    def run(self, builder: Builder, call: Call) -> Tensor:
        """The library's answer for one batch."""
        name, known = builder.__name__, parameters_of(builder)
        given: dict[str, Any] = {"targeted": call.targeted, "num_classes": call.classes}
        given = {option: value for option, value in given.items() if option in known}
        if name in RADII:
            given[RADII[name]] = call.eps
        if name in CHOICES:
            given[CHOICES[name][0]] = call.norm.lower() if name == "alma" else POWERS[call.norm]
        found: Tensor = builder(call.model, call.images, call.labels, **{**given, **call.options})
        return found
