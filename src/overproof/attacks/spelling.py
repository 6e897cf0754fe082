"""Attacks in one word, as the command line and Python write them: `pgd`, `pgd:steps=20,eps=4/255`, `foolbox:LinfPGD:steps=20`."""

from __future__ import annotations

from typing import Any

from overproof.errors import UsageError


def spelled(text: str) -> dict[str, Any]:
    """The options that NAME[:key=value,...] stands for, the name under the key "attack"; NAME may be LIBRARY:NAME.

    Raises:
        UsageError: a part of the options is no key=value.
    """
    from overproof.config import parse_override

    name, rest = _name_and_options(text)
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        if not all(side.strip() for side in part.partition("=")):
            raise UsageError(
                f"Attack {text!r}: {part!r} is no key=value; write NAME:key=value,key=value, such as pgd:steps=20."
            )
        options |= parse_override(part)
    return {"attack": name, **options}


def _name_and_options(text: str) -> tuple[str, str]:
    """What has no equals sign belongs to the name."""
    parts = text.split(":")
    last = next((i for i, part in enumerate(parts) if "=" in part), len(parts))
    return ":".join(parts[:last]), ":".join(parts[last:])


def refuse_class(attack: Any, place: str) -> None:
    """See that an attack is a value and not its class.

    Raises:
        UsageError: names the class and what to write.
    """
    if isinstance(attack, type):
        raise UsageError(f"{place} is the class {attack.__name__}; an attack is a value of it: {attack.__name__}().")
