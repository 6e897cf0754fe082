"""Overproof: distil image classifiers that are small, accurate and hard to fool.

The public names below are imported when first used: `import overproof` itself is light.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from overproof.attacks import ATTACKS as ATTACKS
    from overproof.attacks import FGSM as FGSM
    from overproof.attacks import L1 as L1
    from overproof.attacks import L2 as L2
    from overproof.attacks import PGD as PGD
    from overproof.attacks import Linf as Linf
    from overproof.attacks import ascend as ascend
    from overproof.data import DATA as DATA
    from overproof.data import ImageSet as ImageSet
    from overproof.data import Splits as Splits
    from overproof.data import load_data as load_data
    from overproof.errors import OverproofError as OverproofError
    from overproof.errors import UsageError as UsageError
    from overproof.evaluation import Evaluation as Evaluation
    from overproof.evaluation import boundary_similarity as boundary_similarity
    from overproof.evaluation import compare as compare
    from overproof.evaluation import evaluate as evaluate
    from overproof.evolution import CEGAN as CEGAN
    from overproof.evolution import EVOLUTIONS as EVOLUTIONS
    from overproof.evolution import Evolution as Evolution
    from overproof.features import Tap as Tap
    from overproof.folder import RunFolder as RunFolder
    from overproof.guards import GUARDS as GUARDS
    from overproof.guards import Cache as Cache
    from overproof.guards import Detector as Detector
    from overproof.guards import Guarded as Guarded
    from overproof.losses import fisher as fisher
    from overproof.methods import METHODS as METHODS
    from overproof.methods import Objective as Objective
    from overproof.methods import RobustObjective as RobustObjective
    from overproof.models import MODELS as MODELS
    from overproof.models import Classifier as Classifier
    from overproof.models import create_model as create_model
    from overproof.probes import PROBES as PROBES
    from overproof.probes import explain as explain
    from overproof.report import write_report as write_report
    from overproof.run.api import distill as distill
    from overproof.run.api import load as load
    from overproof.run.api import train as train
    from overproof.run.evolving import evolve as evolve
    from overproof.run.execute import Run as Run
    from overproof.run.execute import resume as resume
    from overproof.run.generating import generate as generate
    from overproof.run.grouping import group_report as group_report
    from overproof.run.guard_evaluation import evaluate_guarded as evaluate_guarded
    from overproof.run.guarding import fit_guards as fit_guards
    from overproof.run.guarding import load_guarded as load_guarded
    from overproof.run.predicting import predict as predict
    from overproof.run.probing import probe_linear as probe_linear
    from overproof.types import Batch as Batch
    from overproof.types import Output as Output
    from overproof.types import Progress as Progress

_HOMES = {
    "attacks": ("ATTACKS", "FGSM", "L1", "L2", "PGD", "Linf", "ascend"),
    "data": ("DATA", "ImageSet", "Splits", "load_data"),
    "errors": ("OverproofError", "UsageError"),
    "evaluation": ("Evaluation", "boundary_similarity", "compare", "evaluate"),
    "evolution": ("CEGAN", "EVOLUTIONS", "Evolution"),
    "features": ("Tap",),
    "folder": ("RunFolder",),
    "guards": ("GUARDS", "Cache", "Detector", "Guarded"),
    "methods": ("METHODS", "Objective", "RobustObjective"),
    "models": ("MODELS", "Classifier", "create_model"),
    "probes": ("PROBES", "explain"),
    "report": ("write_report",),
    "run.api": ("distill", "load", "train"),
    "run.evolving": ("evolve",),
    "run.execute": ("Run", "resume"),
    "run.generating": ("generate",),
    "run.guard_evaluation": ("evaluate_guarded",),
    "run.grouping": ("group_report",),
    "run.guarding": ("fit_guards", "load_guarded"),
    "run.predicting": ("predict",),
    "run.probing": ("probe_linear",),
    "types": ("Batch", "Output", "Progress"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = {"fisher": "losses.fisher"}

__all__ = sorted({*_HOME_OF, *_MODULES})

try:
    __version__ = _version("overproof")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"overproof.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        globals()[name] = importlib.import_module(f"overproof.{_MODULES[name]}")
        return globals()[name]
    raise AttributeError(f"module 'overproof' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
