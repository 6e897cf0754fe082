"""What Overproof raises: every message names the value, the place and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OverproofError(Exception):
    """Something went wrong that the reader of the message can put right (exit code 1)."""


class UsageError(OverproofError, ValueError):
    """A name, option or value was wrong before any work began (exit code 2)."""


class UnknownNameError(UsageError):
    """A name is not among the known ones; the message offers the nearest."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        offer = f"Did you mean {' or '.join(repr(n) for n in near)}?" if near else f"Known: {', '.join(known) or 'none'}."
        super().__init__(" ".join(part for part in (f"Unknown {kind} {name!r}.", offer, hint) if part))


class DataError(OverproofError):
    """Images or labels are not what a classifier can be trained or judged on."""


class FolderError(OverproofError):
    """A run folder or a file in it cannot be used."""


class NonFiniteLossError(OverproofError):
    """Training met a loss that is NaN or infinite."""


class NoGradientError(OverproofError):
    """A gradient attack met a model through which no gradient reaches the images."""


class DerivativeError(UsageError):
    """An operator of a network cannot be differentiated in the way that is needed.

    Args:
        what: what needs the derivative.
        operator: the operator's name, or what kind of thing it is.
        remedy: what works instead.
    """

    def __init__(self, what: str, operator: str, remedy: str) -> None:
        super().__init__(f"{what} does not work through {operator}, which this network contains. {remedy}")
        self.operator = operator
