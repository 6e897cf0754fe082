"""One attack at many radii."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from overproof.attacks.base import Attack
from overproof.errors import UsageError


def check_curve(curve: Sequence[float], attacks: Mapping[str, Attack]) -> tuple[float, ...]:
    """The radii of a robustness curve, ascending.

    Raises:
        UsageError: there is no attack to vary, it has no radius, or a radius is out of range.
    """
    if curve and not attacks:
        raise UsageError(
            "A robustness curve needs an attack to vary: name one (--attack pgd, or attacks={'pgd': PGD()} in Python)."
        )
    for eps in curve:
        with_radius(next(iter(attacks.values())), eps)
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
