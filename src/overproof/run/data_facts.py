"""How many images of each class, and of each subgroup, a run has: kept in the run, so that nobody has to read the data again."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from overproof.data import ImageSet, Splits
from overproof.data.streams import StreamSet
from overproof.errors import UsageError
from overproof.folder import RunFolder, write_json
from overproof.run.prepare import UserData

PARTS = ("train", "validation", "test")
DIGESTED = 64  # images by which a set is known again


def keep_data_facts(data: Splits | UserData, folder: RunFolder) -> None:
    """Write data.json, where the labels are known without reading the images.

    Raises:
        UsageError: the run was begun on other data.
    """
    facts = facts_of(data)
    _compare(facts, folder)
    if facts:
        write_json(folder.path / "data.json", facts)


def check_same_data(data: Splits | UserData, folder: RunFolder) -> None:
    """Refuse to go on with, or to take for done on these data, a run that was begun on others.

    Raises:
        UsageError: names the part.
    """
    _compare(facts_of(data), folder)


def _compare(facts: dict[str, Any], folder: RunFolder) -> None:
    known, found = folder.data.get("digests", {}), facts.get("digests", {})
    for part in known.keys() & found.keys():
        if known[part] != found[part]:
            raise UsageError(
                f"{folder.path} was begun on other {part} images or labels than these: give those again, or another out=."
            )


def facts_of(data: Splits | UserData) -> dict[str, Any]:
    """The content of data.json; {} where no labels are known."""
    sets = {part: getattr(data, part) for part in PARTS}
    counts = {
        part: _counts(labels, len(data.classes)) for part, images in sets.items() if (labels := _labels(images)) is not None
    }
    if not counts:
        return {}
    facts: dict[str, Any] = {"classes": list(data.classes), "counts": counts}
    shape = next((found for images in sets.values() if isinstance(found := getattr(images, "shape", None), tuple)), ())
    facts |= {"shape": list(shape)} if len(shape) == 3 else {}
    skipped = {name for images in sets.values() for name in getattr(images, "skipped", ())}  # parts of one source share them
    facts |= {"skipped": len(skipped)} if skipped else {}
    known = {part: images for part, images in sets.items() if getattr(images, "attribute", None) is not None}
    if known:
        first = next(iter(known.values())).attribute
        facts["attribute"] = {
            "name": first.name,
            "names": list(first.names),
            "counts": {part: _counts(images.groups, len(first.names)) for part, images in known.items()},
        }
    facts["digests"] = {part: _digest(images) for part, images in sets.items() if isinstance(images, ImageSet)}
    return facts


def _digest(images: ImageSet) -> int:
    """Of all labels and of a few images."""
    labels = zlib.crc32(images.labels.cpu().contiguous().numpy().tobytes())
    return zlib.crc32(images.images[:DIGESTED].cpu().contiguous().numpy().tobytes(), labels)


def _labels(images: Any) -> Tensor | None:
    if isinstance(images, ImageSet):
        return images.labels
    return images.known_labels if isinstance(images, StreamSet) else None


def _counts(numbers: Tensor, size: int) -> list[int]:
    counts: list[int] = torch.bincount(numbers.cpu(), minlength=size).tolist()
    return counts
