"""Values as an evaluation's file may hold them: of the expected kind, or left out. Evaluations of any age can be read."""

from __future__ import annotations

import math
from typing import Any


def number(value: Any) -> float | None:
    """`value` as a finite float, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:
        return None


def table(value: Any) -> dict[str, Any]:
    """`value` if it is a table, else an empty one."""
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    """`value` if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def attack_facts(raw: dict[str, Any]) -> dict[str, Any]:
    """What is known of one attack, every part of the expected kind; None or empty where it was not recorded."""
    figures = (
        "eps",
        "robust",
        "success_rate",
        "success_denominator",
        "fooling_ratio",
        "mean_size",
        "invalid",
        "seconds",
    )
    members = table(raw.get("members")).items()
    return {
        **{key: str(raw.get(key, "unknown")) for key in ("attack", "threat")},
        **{key: number(raw.get(key)) for key in figures},
        "interval": interval(raw.get("interval")),
        "sizes": numbers(raw.get("sizes")),
        "passes": numbers(raw.get("passes")),
        "members": {str(name): member for name, facts in members if (member := _member(facts))},
        "confusion": matrix(raw.get("confusion")) or matrix(table(raw.get("targeted")).get("successes")),
        "targeted": bool(raw.get("targeted")),
        "no_gradient": raw.get("no_gradient") is True,
    }


def _member(raw: Any) -> dict[str, float]:
    return {"broken": count} if (count := number(raw)) is not None else numbers(raw)


def sanity_facts(raw: Any) -> dict[str, Any]:
    """The sanity panel, or {} where none was made."""
    found = table(raw)
    checks = [_check(check) for check in items(found.get("checks")) if isinstance(check, dict)]
    if not checks:
        return {}
    suspected = found.get("suspected")
    return {
        "suspected": suspected if isinstance(suspected, bool) else not all(check["passed"] for check in checks),
        "checks": checks,
        "threat": str(found.get("threat", "unknown")),
        **{key: number(found.get(key)) for key in ("samples", "eps", "seconds")},
    }


def _check(raw: dict[str, Any]) -> dict[str, Any]:
    words = {key: str(raw.get(key, "")) for key in ("name", "text")}
    return {**words, "passed": raw.get("passed") is True, **{key: number(raw.get(key)) for key in ("value", "limit")}}


def numbers(value: Any) -> dict[str, float]:
    """The finite numbers of a table."""
    return {str(key): kept for key, entry in table(value).items() if (kept := number(entry)) is not None}


def interval(value: Any) -> list[float] | None:
    """Two numbers, or None."""
    ends = [end for entry in items(value) if (end := number(entry)) is not None]
    return ends if len(ends) == 2 else None


def matrix(value: Any) -> list[list[float]]:
    """A square matrix of numbers, or []."""
    rows = [[number(entry) for entry in items(row)] for row in items(value)]
    whole = [[entry for entry in row if entry is not None] for row in rows]
    return whole if whole and all(len(row) == len(whole) for row in whole) else []
