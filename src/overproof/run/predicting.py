"""What a run says about image files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from overproof.attacks.randomness import Streams
from overproof.data.pictures import Picture, find_pictures, read_pictures
from overproof.data.pixels import to_float
from overproof.errors import OverproofError, UsageError
from overproof.folder import RunFolder, read_json
from overproof.guards.cache_keys import fingerprints
from overproof.guards.guarded import Guarded
from overproof.guards.storage import HOME
from overproof.models.weights import load_model
from overproof.networks import device_of
from overproof.run.guarding import load_guarded

BATCH = 64


@dataclass(frozen=True)
class Prediction:
    """One file: label and probability, with guards a score and "accepted" or "rejected"; or the `problem` with it."""

    file: str
    label: str | None = None
    probability: float | None = None
    score: float | None = None
    verdict: str | None = None
    problem: str | None = None


def predict(
    run: str | Path,
    images: Sequence[str | Path] | str | Path,
    *,
    model: nn.Module | None = None,
    guarded: bool = False,
    which: str = "best",
    image_shape: tuple[int, int, int] | None = None,
    seed: int = 0,
    trusted: bool = False,
) -> list[Prediction]:
    """Classify image files with the model of a run folder.

    Files may have any mode and size, see `data.decoding.decode` for what becomes of them; one that cannot be read has a
    `problem` instead of a label.

    Args:
        run: a run folder.
        images: image files, and folders of them.
        model: a module of the same structure to fill, for a model that Overproof did not build itself; not behind guards.
        guarded: put the model behind the guards of the run.
        which: weights, "best" or "last"; guards belong to those that they were fitted for.
        image_shape: (channels, height, width) of the images that the model takes; None: what the run knows of it.
        seed: of the guards' randomness, which depends on this and on the pixels alone.
        trusted: allow a folder that names a package.module:callable to import and run it.

    Raises:
        FolderError: no such run, weights or guards.
        DataError: no image there.
        UsageError: nobody says what images the model takes, they are not square, or `which` or `model` beside guards.
    """
    if guarded and (which != "best" or model is not None):
        raise UsageError(
            f"which={which!r}, model=...: guards belong to the weights that they were fitted for, and to their model."
        )
    paths = find_pictures([images] if isinstance(images, str | Path) else images)
    folder = RunFolder(run).require()
    asked: nn.Module = (
        load_guarded(folder.path, trusted=trusted) if guarded else load_model(folder.path, which, model, trusted=trusted)
    )
    channels, side = _images_of(asked, folder, image_shape)
    asked.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    names, pictures = _class_names(folder), read_pictures(paths, channels=channels, side=side)
    return [row for batch in _batches(pictures) for row in _rows(asked, batch, names, seed)]


def _images_of(model: nn.Module, folder: RunFolder, given: Sequence[int] | None) -> tuple[int, int]:
    """Channels and side of the images that a run's model takes."""
    spec = getattr(model.model if isinstance(model, Guarded) else model, "spec", None)
    if given is None and isinstance(spec, dict) and {"in_channels", "image_size"} <= spec.keys():
        return int(spec["in_channels"]), int(spec["image_size"])
    shape = [int(number) for number in (folder.data.get("shape", ()) if given is None else given)]
    if len(shape) != 3 or shape[1] != shape[2]:
        raise UsageError(
            f"{folder.path} does not say what images its model takes, or they are not square ({shape or 'unknown'}): give image_shape="
            "(channels, height, width), or predict in Python: load(run, model=...)(images)."
        )
    return shape[0], shape[1]


def _class_names(folder: RunFolder) -> list[str]:
    """Names of the classes that the run was trained on; [] if it does not know them.

    Evaluations may be of other data, whose classes have other names: they are asked last, and first those that training made.
    """
    made = folder.path / "evaluations"
    paths = [
        folder.path / "data.json",
        *sorted((folder.path / HOME).glob("*.json")),
        made / "test-best.json",
        made / "test-last.json",
    ]
    for path in (*paths, *sorted(made.glob("*.json"))):
        with contextlib.suppress(OverproofError):  # what is absent or damaged matters only to those who ask for it
            facts = read_json(path)
            facts = facts.get("about", facts) if isinstance(facts, dict) else {}
            if facts.get("classes"):
                return [str(name) for name in facts["classes"]]
    return []


def _batches(pictures: Iterable[Picture]) -> Iterator[list[tuple[int, Picture]]]:
    waiting: list[tuple[int, Picture]] = []
    for pair in enumerate(pictures):
        waiting.append(pair)
        if len(waiting) == BATCH:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _rows(model: nn.Module, batch: list[tuple[int, Picture]], names: list[str], seed: int) -> list[Prediction]:
    read = [(number, picture.pixels) for number, picture in batch if picture.pixels is not None]
    found: dict[int, Prediction] = {}
    if read:
        device = device_of(model)
        images = to_float(torch.stack([pixels for _, pixels in read])).to(device)
        streams = Streams.named(fingerprints(images), seed, "predict")
        found = dict(zip((number for number, _ in read), _said(model, images, streams, names), strict=True))
    return [
        Prediction(str(picture.path), problem=picture.problem)
        if number not in found
        else replace(found[number], file=str(picture.path))
        for number, picture in batch
    ]


def _said(model: nn.Module, images: Tensor, streams: Streams, names: list[str]) -> list[Prediction]:
    with torch.no_grad():
        verdict: Any = model(images, streams) if isinstance(model, Guarded) else None
        shares = model(images).softmax(dim=1) if verdict is None else verdict.probabilities
    top, classes = shares.max(dim=1)
    rows = []
    for place, (label, probability) in enumerate(zip(classes.tolist(), top.tolist(), strict=True)):
        facts: dict[str, Any] = {"label": names[label] if label < len(names) else str(label), "probability": probability}
        if verdict is not None:
            facts |= {
                "score": float(verdict.score[place]),
                "verdict": "rejected" if bool(verdict.rejected[place]) else "accepted",
            }
        rows.append(Prediction("", **facts))
    return rows
