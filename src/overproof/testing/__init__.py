"""For tests, yours as well as ours: conformance suites, small models, and defences that are broken on purpose."""

from overproof.testing.conformance import CLASSES, check_attack, check_method, small_batch, small_model
from overproof.testing.doubles import NoisyInput, Quantised, Saturated, Thermometer
from overproof.testing.guard_conformance import check_guard

__all__ = [
    "CLASSES",
    "NoisyInput",
    "Quantised",
    "Saturated",
    "Thermometer",
    "check_attack",
    "check_guard",
    "check_method",
    "small_batch",
    "small_model",
]
