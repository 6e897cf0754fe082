"""Accuracy, robustness and calibration, with a record per sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from overproof.evaluation.evaluator import evaluate
    from overproof.evaluation.records import Evaluation
    from overproof.evaluation.verdicts import Verdict, verdict

__all__ = ["Evaluation", "Verdict", "evaluate", "verdict"]
_HOMES = {"evaluate": "evaluator", "Evaluation": "records", "Verdict": "verdicts", "verdict": "verdicts"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"overproof.evaluation.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'overproof.evaluation' has no attribute {name!r}")
