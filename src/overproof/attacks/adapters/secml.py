"""Attacks of SecML-Torch."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import torch
from torch import Tensor

from overproof.attacks.adapters.library import Builder, Call, Facts, Library, parameters_of
from overproof.attacks.threats import AnyNorm


class SecML(Library):
    """`secml:NAME` is an attack creator of `secmlt.adv.evasion`; its own implementation is taken where it has one.

    (Its other implementations call Foolbox and Adversarial Library, which have adapters of their own.)
    """

    prefix, module, install = "secml", "secmlt.adv.evasion", "secml-torch==1.5"
    taken = frozenset({"perturbation_model", "epsilon", "y_target", "lb", "ub", "trackers"})

    def attacks(self) -> dict[str, Builder]:
        """The attack creators in the modules of `secmlt.adv.evasion`."""
        home = self.load()
        base = importlib.import_module(f"{self.module}.base_evasion_attack").BaseEvasionAttackCreator
        modules = [
            importlib.import_module(f"{self.module}.{m.name}") for m in pkgutil.iter_modules(home.__path__) if not m.ispkg
        ]
        classes = [value for module in modules for value in vars(module).values() if inspect.isclass(value)]
        return {value.__name__: value for value in classes if issubclass(value, base) and value is not base}

    def facts(self, builder: Builder) -> Facts:
        """An attack without `epsilon` looks for the smallest change."""
        known = parameters_of(builder)
        minimum = "epsilon" not in known
        norms: tuple[AnyNorm, ...] = ("L2",)
        if "perturbation_model" in known:
            norms = ("L2", "Linf", "L1", "L0") if minimum else ("Linf", "L2", "L1")
        return Facts(minimum, norms, *self.options_of(builder), targeted="y_target" in known)

    def run(self, builder: Builder, call: Call) -> Tensor:
        """The library's answer for one batch."""
        if not call.targeted:
            return self._once(builder, call, call.images, call.labels, {})
        # The library reaches for one class in a call.
        found = call.images.clone()
        for target in torch.unique(call.labels).tolist():
            rows = call.labels == target
            found[rows] = self._once(builder, call, call.images[rows], call.labels[rows], {"y_target": target}).to(found)
        return found

    def _once(self, builder: Builder, call: Call, images: Tensor, labels: Tensor, target: dict[str, int]) -> Tensor:
        from torch.utils.data import DataLoader, TensorDataset

        given: dict[str, Any] = {"perturbation_model": call.norm.lower(), "epsilon": call.eps, **target}
        if "native" in builder.get_backends():  # type: ignore[attr-defined]
            given["backend"] = "native"
        given = {name: value for name, value in given.items() if name in parameters_of(builder)}
        attack = builder(**{**given, **call.options})
        loader = DataLoader(TensorDataset(images, labels), batch_size=len(images))
        return torch.cat([found for found, _ in attack(call.model, loader)])
