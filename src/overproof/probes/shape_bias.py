"""Does it go by the shape or by the texture?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from overproof.attacks.base import logits_of
from overproof.data.decoding import decode
from overproof.data.pictures import find_pictures
from overproof.data.pixels import to_float
from overproof.errors import DataError
from overproof.probes.base import Probe, Result, SkipProbe
from overproof.probes.lab import Lab
from overproof.probes.material import Cues
from overproof.probes.store import fingerprint

_NUMBER = re.compile(r"\d+$")


@dataclass(frozen=True, kw_only=True)
class ShapeBias(Probe):
    """On images whose shape and texture say different things: how often does the shape win?

    shape bias = #(decision = class of the shape) / #(decision = class of the shape or of the texture)

    Args:
        seed, resamples: see `Probe`.

    Reference: Geirhos et al., ICLR 2019, arXiv 1811.12231; Ojha et al., NeurIPS 2023, arXiv 2205.16004.

    Differences from the paper: images whose two cues agree are left out; intervals.
    """

    name: ClassVar[str] = "shape-bias"
    question: ClassVar[str] = "Does it go by the shape or by the texture?"

    def measure(self, lab: Lab) -> Result:
        """Shape bias of every model."""
        cues = lab.material.cues
        if cues is None:
            raise SkipProbe("No images with conflicting cues are given (--cues DIR, or cues=... in Python).")
        known = fingerprint(cues.images, *([] if cues.merged is None else [cues.merged]))
        columns = {}
        for name in lab.watched:
            parts = lab.about(name, "cues", known)
            made = lab.store.tensor(parts, partial(self._decided, lab, name, cues), lasting=lab.lasting(name))
            columns[name] = shape_or_texture(made, cues.shape, cues.texture)
        told = {name: int(column.isfinite().sum()) for name, column in columns.items()}
        notes = tuple(f"{name} never decides for shape or texture." for name, count in told.items() if not count)
        return self.found(
            self.row(lab, "shape bias", columns), notes=notes, facts={"decided": told, "images": len(cues.images)}
        )

    @staticmethod
    def _decided(lab: Lab, name: str, cues: Cues) -> Tensor:
        found = []
        with lab.running(name) as (model, device), torch.no_grad():
            for part in torch.split(cues.images, lab.batch_size):
                found.append(decisions(logits_of(model, part.to(device)).cpu(), cues.merged))
        return torch.cat(found)


def decisions(logits: Tensor, merged: Tensor | None) -> Tensor:
    """The class of the cues each image (N, K) is taken for: the one whose classes have the largest mean probability.

    Args:
        logits: (N, K).
        merged: for each of the K classes the number of its class of cues, -1 for none; None: they are the same.

    Returns:
        (N,).
    """
    if merged is None:
        return logits.argmax(dim=1)
    kept = merged >= 0
    members = F.one_hot(merged[kept]).to(logits.dtype)
    means = logits.softmax(dim=1)[:, kept] @ members / members.sum(dim=0).clamp(min=1)
    return means.argmax(dim=1)


def shape_or_texture(decided: Tensor, shape: Tensor, texture: Tensor) -> Tensor:
    """1 where the shape was decided for, 0 where the texture was, NaN elsewhere and where both are the same class; (N,)."""
    counts = ((decided == shape) | (decided == texture)) & (shape != texture)
    return (decided == shape).double().where(counts, torch.nan)


def read_cues(folder: str | Path, classes: Sequence[str], *, channels: int, side: int, merged: Tensor | None = None) -> Cues:
    """Images called SHAPE-TEXTURE, each perhaps with a number behind it: cat1-bottle2.png has the shape of a cat.

    A word that is the name of a class is that class, whatever digits it ends in.

    Args:
        folder: of images, searched with all below it.
        classes: names that shapes and textures have, in the order of the models' classes (of `merged`, if that is given).
        channels: 1 or 3.
        side: height and width that the models take, in pixels.
        merged: see `Cues`.

    Raises:
        DataError: no images, a name of another form, or a class that is not among `classes`.
    """
    places = {name.lower(): number for number, name in enumerate(classes)}
    paths, pairs = find_pictures([folder]), []
    for path in paths:
        found = [_class_of(word, places) for word in path.stem.lower().split("-")]
        if len(found) != 2 or None in found:
            raise DataError(
                f"{path} should be called SHAPE-TEXTURE, such as {classes[0]}1-{classes[-1]}2.png, with classes among {', '.join(classes[:20])}."
            )
        pairs.append(found)
    numbers = torch.tensor(pairs, dtype=torch.long)
    images = torch.stack([torch.tensor(decode(path, channels=channels, image_size=side)) for path in paths])
    return Cues(to_float(images), numbers[:, 0], numbers[:, 1], merged)


def _class_of(word: str, places: Mapping[str, int]) -> int | None:
    word = word.strip()
    return places[word] if word in places else places.get(_NUMBER.sub("", word).strip())
