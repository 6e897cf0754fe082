"""Attacks of other libraries behind our contract: `foolbox:LinfPGD`, `torchattacks:PGD`, `art:DeepFool`, `advlib:fmn`, `secml:PGD`.

None of the libraries is a dependency; each is imported when one of its attacks is first asked for.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

from overproof.attacks.adapters.foreign import ForeignAttack, ForeignMinimumNorm
from overproof.attacks.adapters.library import Facts, Library
from overproof.errors import UnknownNameError, UsageError
from overproof.registry import convert

HOMES = {
    "foolbox": "foolbox:Foolbox",
    "torchattacks": "torchattacks:TorchAttacks",
    "art": "art:ART",
    "advlib": "advlib:AdvLib",
    "secml": "secml:SecML",
}


def is_foreign(name: str) -> bool:
    """Whether an attack's name has the form LIBRARY:NAME."""
    return ":" in name


def library_of(prefix: str) -> Library:
    """The adapter of a library.

    Raises:
        UnknownNameError: no such prefix.
    """
    if prefix not in HOMES:
        raise UnknownNameError("attack library", prefix, HOMES, "An attack of a library is named such as foolbox:LinfPGD.")
    module, _, name = HOMES[prefix].partition(":")
    library: Library = getattr(importlib.import_module(f"{__name__}.{module}"), name)()
    return library


def foreign_attack(
    name: str, *, eps: Any = None, norm: Any = None, targeted: bool = False, **options: Any
) -> ForeignAttack | ForeignMinimumNorm:
    """An attack of another library as one of ours.

    Args:
        name: LIBRARY:NAME, where NAME is the library's own name of the attack.
        eps: radius in pixel units. None: 8/255 for an attack with a radius, infinite for one that looks for the smallest change.
        norm: "Linf", "L2", "L1" or "L0"; the attack's own if None.
        targeted: labels are classes to be reached.
        options: of the library's constructor, by its own names; "8/255" becomes the exact quotient.

    Raises:
        UsageError: the library is not installed or cannot be imported; it has no such attack, option, norm or targeted form.
    """
    prefix, _, attack = name.partition(":")
    library = library_of(prefix)
    facts = library.facts(library.builder(attack))
    options = {key: convert(value, Any, f"attack {name!r}, option {key!r}") for key, value in options.items()}
    _check(name, facts, options, norm, targeted)
    radius = (math.inf if facts.minimum else 8 / 255) if eps is None else convert(eps, float, f"attack {name!r}, option 'eps'")
    kind = ForeignMinimumNorm if facts.minimum else ForeignAttack
    chosen: Any = norm or facts.norms[0]
    return kind(name=name, eps=radius, norm=chosen, targeted=targeted, options=options)


def _check(name: str, facts: Facts, options: dict[str, Any], norm: Any, targeted: bool) -> None:
    for option in options:
        if option not in facts.options:
            raise UnknownNameError(f"option of attack {name!r}:", option, {*facts.options, "eps", "norm", "targeted"})
    if missing := sorted(facts.required - set(options)):
        raise UsageError(f"{name} needs the option {', '.join(missing)}: the library gives it no default.")
    if norm is not None and norm not in facts.norms:
        raise UsageError(f"{name} knows the norm {' or '.join(facts.norms)}, not {norm!r}.")
    if targeted and not facts.targeted:
        raise UsageError(f"{name} has no targeted form; leave out targeted=True.")
