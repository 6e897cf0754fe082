"""What evaluations are called in a run folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from overproof.errors import UsageError
from overproof.folder import RunFolder


def check_name(name: str | None) -> str | None:
    """`name`, if it can name a file."""
    if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(f"--name {name!r}: use letters, digits, dots, dashes and underscores.")
    return name


def free_name(folder: RunFolder, wanted: str, protocol: dict[str, Any]) -> str:
    """`wanted`, unless it stands for a measurement made differently: that one is kept and the new one numbered."""
    known, name, number = folder.evaluations, wanted, 2
    while name in known and known[name].get("protocol") != protocol:
        name, number = f"{wanted}-{number}", number + 1
    return name


def name_of(attacks: Mapping[str, Any], split: str) -> str:
    """What an evaluation is called that nobody has named."""
    text = "-".join([split, *attacks]) if attacks else split
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in text)[:80]
