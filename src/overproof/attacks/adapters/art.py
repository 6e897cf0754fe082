"""Attacks of the Adversarial Robustness Toolbox."""

from __future__ import annotations

import importlib
import inspect
import math
from typing import Any

from torch import Tensor

from overproof.attacks.adapters.library import Builder, Call, Facts, Library, parameters_of, scaled_step
from overproof.attacks.threats import AnyNorm

# Attacks without an argument for the norm; those that have one know Linf, L2 and L1.
NORMS: dict[str, AnyNorm] = {
    "BasicIterativeMethod": "Linf", "CarliniLInfMethod": "Linf", "ThresholdAttack": "Linf",
    "ElasticNet": "L1",
    "CarliniL0Method": "L0", "PixelAttack": "L0", "SaliencyMapMethod": "L0",
}  # fmt: skip
POWERS = {"Linf": math.inf, "L2": 2, "L1": 1}


class ART(Library):
    """`art:NAME` is a class of `art.attacks.evasion`, run on NumPy arrays. Its step is scaled with the radius unless given."""

    prefix, module, install = "art", "art.attacks.evasion", "adversarial-robustness-toolbox==1.20.1 packaging multiprocess"
    taken = frozenset({"classifier", "estimator", "eps", "norm", "targeted"})

    def attacks(self) -> dict[str, Builder]:
        """The classes of `art.attacks.evasion` that take a classifier."""
        classes = {name: value for name, value in vars(self.load()).items() if inspect.isclass(value)}
        takers = ("classifier", "estimator")
        return {name: value for name, value in classes.items() if next(iter(parameters_of(value)), "") in takers}

    def facts(self, builder: Builder) -> Facts:
        """An attack without `eps` looks for the smallest change."""
        known = parameters_of(builder)
        norms: tuple[AnyNorm, ...] = (NORMS.get(builder.__name__, "L2"),)
        if "norm" in known:
            norms = ("L2", "Linf", "L1") if known["norm"].default == 2 else ("Linf", "L2", "L1")
        return Facts("eps" not in known, norms, *self.options_of(builder), targeted="targeted" in known)

    def run(self, builder: Builder, call: Call) -> Tensor:
        """The library's answer for one batch."""
        import numpy as np
        import torch

        estimators = importlib.import_module("art.estimators.classification")
        classifier = estimators.PyTorchClassifier(
            model=call.model,
            loss=torch.nn.CrossEntropyLoss(),
            input_shape=tuple(call.images.shape[1:]),
            nb_classes=call.classes,
            clip_values=(0.0, 1.0),
            device_type="gpu" if call.images.is_cuda else "cpu",
        )
        given: dict[str, Any] = {
            "eps": call.eps, "norm": POWERS.get(call.norm), "targeted": call.targeted,
            "batch_size": len(call.images), "verbose": False,
        }  # fmt: skip
        given = {name: value for name, value in given.items() if name in parameters_of(builder)}
        attack = builder(classifier, **{**given, **scaled_step(builder, call, "eps_step"), **call.options})
        labels = np.eye(call.classes, dtype=np.float32)[call.labels.cpu().numpy()]
        found = attack.generate(x=call.images.float().cpu().numpy(), y=labels)
        # float32 cannot say what a float64 image was; unchanged pixels keep their full precision.
        change = torch.from_numpy(np.asarray(found)).to(call.images) - call.images.float().to(call.images)
        return call.images + change
