"""Sets changed on the way in: `mnist+color`, `digits+noise:3`, `mnist+mixed:color,textured:cifar10`.

A change depends on the set's part and on the change alone: every image gets the same one whoever reads the set, before anything is held
out or left out of it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Generator, Tensor

from overproof.data import DATA, domains
from overproof.data.corruptions import STRENGTHS, corrupted
from overproof.data.images import ImageSet
from overproof.data.order import generator_for
from overproof.data.pixels import to_float
from overproof.data.splits import Images, Parts
from overproof.errors import DataError, UnknownNameError, UsageError

Change = Callable[[Tensor, Generator], Tensor]
Read = Callable[[str], Parts]
"""The parts of another set, by name."""

CHUNK = 2048
PLAIN: dict[str, Change] = {
    "rgb": domains.in_colour,
    "color": domains.coloured,
    "blobs": domains.blotchy,
    "inverted": domains.inverted,
    "edges": domains.edges,
    "sketch": domains.sketch,
}
MODIFIERS = (*PLAIN, *STRENGTHS, "textured", "mixed")
_PLUS = re.compile(rf"\+(?=(?:{'|'.join(MODIFIERS)})(?:[:+]|$))")


@dataclass(frozen=True)
class Modifier:
    """One change by name, with what follows its colon."""

    name: str
    argument: str = ""

    @classmethod
    def parse(cls, text: str) -> Modifier:
        """From "noise:3".

        Raises:
            UnknownNameError: no such change.
            UsageError: an argument that is missing, not wanted or out of range.
        """
        name, _, argument = text.partition(":")
        if name not in MODIFIERS:
            raise UnknownNameError("change of a data set", name, MODIFIERS)
        if name in PLAIN and argument:
            raise UsageError(f"The change {name!r} takes nothing after a colon; {text!r} was given.")
        if name in STRENGTHS and argument not in ("", "1", "2", "3", "4", "5"):
            raise UsageError(f"The change {text!r}: its severity is 1 (mild) to 5, such as {name}:3.")
        if name == "textured" and not argument:
            raise UsageError("The change 'textured' needs the set whose pictures are the ground, such as textured:cifar10.")
        if name == "mixed":
            for part in argument.split(","):
                if cls.parse(part).name == "mixed":
                    raise UsageError(f"The change {text!r} mixes changes; mixed cannot be one of them.")
        return cls(name, argument)

    @property
    def copies(self) -> int:
        """How often each picture is shown afterwards."""
        return 2 + self.argument.count(",") if self.name == "mixed" else 1

    def __str__(self) -> str:
        return f"{self.name}:{self.argument}" if self.argument else self.name


def split_name(name: str) -> tuple[str, tuple[Modifier, ...]]:
    """The set that `name` begins with, and the changes that follow, each after a plus.

    A folder that is there under a name with a plus is meant itself; "folder:cats/+blur" means cats, blurred, beside a folder cats+blur.

    Raises:
        UnknownNameError: what follows the plus of a known set is no change.
        UsageError: a change with a wrong argument.
    """
    base, *changes = _PLUS.split(name)
    for taken in range(len(changes), 0, -1):  # a folder whose own name has a plus
        longer = "+".join((base, *changes[:taken]))
        place = _directory(longer)
        if place is not None and place.is_dir():
            base, changes = longer, changes[taken:]
            break
    head, plus, rest = base.partition("+")
    if plus and head in DATA:
        raise UnknownNameError("change of a data set", rest.partition(":")[0], MODIFIERS)
    return base, tuple(Modifier.parse(change) for change in changes)


def _directory(base: str) -> Path | None:
    """The folder that a set is read from, if its name tells."""
    kind, _, argument = base.partition(":")
    told = argument and kind in DATA and DATA.get(kind).positional()[:1] == ("directory",)
    return Path(argument).expanduser() if told else None


def same_source(one: str, other: str) -> bool:
    """Whether two names are of one set, however it is changed and its folder written."""
    first, second = split_name(one)[0], split_name(other)[0]
    places = [_directory(base) for base in (first, second)]
    if places[0] is None or places[1] is None or first.partition(":")[0] != second.partition(":")[0]:
        return first == second
    return places[0].resolve() == places[1].resolve()


def modified(parts: Parts, changes: Iterable[Modifier], read: Read) -> Parts:
    """All parts of a set under the changes, one after the other.

    Args:
        parts: of the set.
        changes: what is done to each.
        read: reads the set of pictures that "textured" names.

    Raises:
        DataError: a set that does not fit into memory, or images with colours where grey ones are needed.
    """
    known = cache(read)  # pictures are read once for all parts
    for change in changes:
        parts = {part: modify(images, change, part=part, read=known) for part, images in parts.items()}
    return parts


def modify(images: Images, change: Modifier, *, part: str, read: Read) -> ImageSet:
    """One part of a set under one change; "mixed" gives it in colour, followed by itself under each change in turn.

    Raises:
        DataError: see `modified`.
    """
    if not isinstance(images, ImageSet):
        raise DataError(
            f"{images.name}+{change}: sets that are changed are held in memory, and this one is too large. Raise memory_limit, or limit it."
        )
    name = f"{images.name}+{change}"
    if change.name != "mixed":
        changed = copy.copy(images)
        changed.name, changed.images = name, _changed(images.images, change, part, read)
        return changed
    each = [Modifier("rgb"), *map(Modifier.parse, change.argument.split(","))]
    shown = [_changed(images.images, one, part, read) for one in each]
    shown = [one.expand(-1, 3, -1, -1) for one in shown]
    return ImageSet(
        torch.cat(shown),
        images.labels.repeat(len(each)),
        classes=images.classes,
        name=name,
        skipped=images.skipped,
        attribute=images.attribute and replace(images.attribute, numbers=images.attribute.of(images.index).repeat(len(each))),
        files=[images.files[row] for row in images.index.tolist()] * len(each) if images.files else (),
        origin=images.origin.repeat(len(each)),
    )


def _changed(images: Tensor, change: Modifier, part: str, read: Read) -> Tensor:
    """uint8, as images come from files; drawn and made in pieces of a fixed size."""
    generator, act = generator_for("change", str(change), part), _action(change, part, read)
    pieces = (act(to_float(piece), generator) for piece in torch.split(images, CHUNK))
    return torch.cat([(piece.clamp(0, 1) * 255).round().to(torch.uint8) for piece in pieces])


def _action(change: Modifier, part: str, read: Read) -> Change:
    if change.name in STRENGTHS:
        severity = int(change.argument or 3)
        return lambda images, generator: corrupted(images, change.name, severity, generator)
    if change.name == "textured":
        found = read(change.argument)
        pictures = found.get(part, found["train"])
        if not isinstance(pictures, ImageSet):
            raise DataError(f"{change}: the pictures of {pictures.name} do not fit into memory; raise memory_limit.")
        return partial(domains.textured, pictures=pictures.images)
    return PLAIN[change.name]
