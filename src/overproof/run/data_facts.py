"""How many images of each class, and of each subgroup, a run has: kept in the run, so that nobody has to read the data again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from overproof.data import ImageSet, Splits
from overproof.data.streams import StreamSet
from overproof.folder import RunFolder, write_json
from overproof.run.prepare import UserData

PARTS = ("train", "validation", "test")


def keep_data_facts(data: Splits | UserData, folder: RunFolder) -> None:
    """Write data.json, where the labels are known without reading the images."""
    sets = {part: getattr(data, part) for part in PARTS}
    counts = {
        part: _counts(labels, len(data.classes)) for part, images in sets.items() if (labels := _labels(images)) is not None
    }
    if not counts:
        return
    facts: dict[str, Any] = {"classes": list(data.classes), "counts": counts}
    known = {part: images for part, images in sets.items() if getattr(images, "attribute", None) is not None}
    if known:
        first = next(iter(known.values())).attribute
        facts["attribute"] = {
            "name": first.name,
            "names": list(first.names),
            "counts": {part: _counts(images.groups, len(first.names)) for part, images in known.items()},
        }
    write_json(folder.path / "data.json", facts)


def _labels(images: Any) -> Tensor | None:
    if isinstance(images, ImageSet):
        return images.labels
    return images.known_labels if isinstance(images, StreamSet) else None


def _counts(numbers: Tensor, size: int) -> list[int]:
    counts: list[int] = torch.bincount(numbers.cpu(), minlength=size).tolist()
    return counts
