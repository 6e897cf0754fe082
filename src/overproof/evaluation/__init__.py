"""Accuracy, robustness and calibration, with a record per sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from overproof.evaluation.boundaries import BoundarySimilarity, boundary_similarity
    from overproof.evaluation.comparison import Comparison, compare
    from overproof.evaluation.evaluator import evaluate
    from overproof.evaluation.records import Evaluation
    from overproof.evaluation.verdicts import Verdict, verdict

__all__ = [
    "BoundarySimilarity", "Comparison", "Evaluation", "Verdict", "boundary_similarity", "compare", "evaluate", "verdict",
]  # fmt: skip
_HOMES = {
    **dict.fromkeys(("BoundarySimilarity", "boundary_similarity"), "boundaries"),
    **dict.fromkeys(("Comparison", "compare"), "comparison"),
    **{"evaluate": "evaluator", "Evaluation": "records", "Verdict": "verdicts", "verdict": "verdicts"},
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"overproof.evaluation.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'overproof.evaluation' has no attribute {name!r}")
