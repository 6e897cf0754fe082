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
    guarded: bool = False,
    which: str = "best",
    seed: int = 0,
    trusted: bool = False,
) -> list[Prediction]:
    """Classify image files with the model of a run folder.

    Files may have any mode and size, see `data.decoding.decode` for what becomes of them; one that cannot be read has a
    `problem` instead of a label.

    Args:
        run: a run folder.
        images: image files, and folders of them.
        guarded: put the model behind the guards of the run.
        which: weights, "best" or "last"; guards belong to those that they were fitted for.
        seed: of the guards' randomness, which depends on this and on the pixels alone.
        trusted: allow a folder that names a package.module:callable to import and run it.

    Raises:
        FolderError: no such run, weights or guards.
        DataError: no image there.
        UsageError: the run does not say what images its model takes, or `which` beside guards.
    """
    if guarded and which != "best":
        raise UsageError(f"which={which!r}: guards belong to the weights that they were fitted for.")
    paths = find_pictures([images] if isinstance(images, str | Path) else images)
    folder = RunFolder(run).require()
    model: nn.Module = (
        load_guarded(folder.path, trusted=trusted) if guarded else load_model(folder.path, which, trusted=trusted)
    )
    spec = getattr(model.model if isinstance(model, Guarded) else model, "spec", None)
    if not isinstance(spec, dict) or not {"in_channels", "image_size"} <= spec.keys():
        raise UsageError(f"{folder.path} does not say what images its model takes; predict in Python: load(run)(images).")
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    names = _class_names(folder)
    pictures = read_pictures(paths, channels=int(spec["in_channels"]), side=int(spec["image_size"]))
    return [row for batch in _batches(pictures) for row in _rows(model, batch, names, seed)]


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
