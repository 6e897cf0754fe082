"""One attack at many radii."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from overproof.attacks.base import Attack
from overproof.attacks.threats import Linf
from overproof.errors import UsageError
from overproof.registry import convert


def check_curve(curve: Sequence[float], attacks: Mapping[str, Attack]) -> tuple[float, ...]:
    """The radii of a robustness curve, ascending; "8/255" is understood as in a configuration.

    Raises:
        UsageError: there is no attack to vary, it has no radius, or a radius is out of range.
    """
    if curve and not attacks:
        raise UsageError(
            "A robustness curve needs an attack to vary: name one (--attack pgd, or attacks={'pgd': PGD()} in Python)."
        )
    curve = [convert(eps, float, "The robustness curve") if isinstance(eps, str) else eps for eps in curve]
    for eps in curve:
        first = next(iter(attacks.values()))
        if not 0 <= eps < math.inf:
            raise UsageError(f"The robustness curve asks for the radius {eps}; give finite numbers of at least 0.")
        if not math.isinf(first.threat.eps):
            members_at(first, eps)
        elif isinstance(first.threat, Linf):
            replace(first.threat, eps=eps)
    return tuple(sorted(set(curve)))


def with_radius(attack: Attack, eps: float) -> Attack:
    """`attack` with the radius `eps`.

    Raises:
        UsageError: the attack has no radius, or this one is out of range.
    """
    # A step given in pixels was chosen for the attack's own radius: it grows with the ball, else large balls go unexplored.
    step = getattr(attack, "step_size", None)
    scaled = {"step_size": step * eps / attack.threat.eps} if step and attack.threat.eps else {}
    try:
        changed: Attack = replace(attack, eps=eps, **scaled)  # type: ignore[type-var]
    except TypeError:
        raise UsageError(f"{attack!r} has no radius `eps` to vary; a curve needs such an attack.") from None
    return changed


def members_of(attack: Attack) -> dict[str, Attack]:
    """The parts of a combination, by name and in order, those of parts included; an attack without parts is its own, "" ."""
    parts = getattr(attack, "members", None)
    if not isinstance(parts, Mapping) or not parts:
        return {"": attack}
    deep = ((name, inner, part) for name, member in parts.items() for inner, part in members_of(member).items())
    return {f"{name}/{inner}" if inner else str(name): part for name, inner, part in deep}


def members_at(attack: Attack, eps: float) -> dict[str, Attack]:
    """The parts of `attack`, each with the radius `eps`.

    Raises:
        UsageError: a part has no radius, or this one is out of range.
    """
    try:
        return members_of(with_radius(attack, eps))
    except UsageError:
        parts = members_of(attack)
        if "" in parts:
            raise
        return {name: with_radius(part, eps) for name, part in parts.items()}
