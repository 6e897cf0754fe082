"""One paper, one file: what a method adds to training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from overproof.methods.data_free_entries import WITHOUT_DATA
from overproof.methods.nim_entries import NOISY_IMAGES
from overproof.methods.plain_entries import PLAIN
from overproof.methods.robust_entries import ROBUST
from overproof.registry import Registry

if TYPE_CHECKING:
    from overproof.methods.feature_objective import FeatureObjective
    from overproof.methods.objective import Objective
    from overproof.methods.robust_objective import RobustObjective

METHODS = Registry("method", "overproof.methods")
PARTS = {
    "FeatureObjective": "feature_objective",
    "Objective": "objective",
    "RobustObjective": "robust_objective",
}  # when asked for

for _name, _about in {**PLAIN, **ROBUST, **NOISY_IMAGES, **WITHOUT_DATA}.items():
    METHODS.add(_name, **_about)

__all__ = ["METHODS", "FeatureObjective", "Objective", "RobustObjective"]


def __getattr__(name: str) -> Any:
    if name in PARTS:
        return getattr(import_module(f"overproof.methods.{PARTS[name]}"), name)
    raise AttributeError(f"module 'overproof.methods' has no attribute {name!r}")
