"""Purifiers in a run: fitted from a pre-training, and judged over the levels of their noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from overproof import console
from overproof.attacks.base import Attack, predictions
from overproof.attacks.randomness import Streams
from overproof.data import make_loader
from overproof.data.pixels import to_float
from overproof.errors import UsageError
from overproof.evaluation.evaluator import evaluate
from overproof.folder import RunFolder
from overproof.guards.guarded import Guarded
from overproof.guards.purifier import NIMPurifier
from overproof.guards.purifier_base import MEASURED, Level, Purifier
from overproof.guards.purifier_small import SmallPurifier
from overproof.guards.storage import HOME, describe_guards, load_guard
from overproof.models.weights import load_model
from overproof.networks import device_of, full_precision

BATCH = 64  # images purified at a time


def fit_purifier(
    guard: Purifier,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    run: Path,
    pretrained: str | Path | None,
    trusted: bool = False,
) -> None:
    """Fit a purifier for the model of a run.

    Args:
        guard: of the kinds nim and purifier-small.
        model: of the run.
        images, labels: of its training part.
        run: the run folder; the purifier nim that it holds already teaches purifier-small.
        pretrained: folder of a run with the method nim or mim; None: something is pre-trained on the images.
        trusted: see `load_model`.

    Raises:
        UsageError: the pre-training does not fit the images, or the teacher of the present purifier-small is gone.
        FolderError: no such run.
    """
    place, source = device_of(model), None
    if pretrained is not None:
        source = load_model(RunFolder(pretrained).require().path, "last", trusted=trusted)
    if isinstance(guard, SmallPurifier):
        known, teacher = run / HOME / "nim.json", None
        if source is not None:
            teacher = NIMPurifier(sigma="off").fit(model, images[:MEASURED], labels[:MEASURED], autoencoder=source)
        elif known.exists() and isinstance(held := load_guard(known), NIMPurifier):
            console.note(f"purifier-small learns from {known}")
            teacher = held.to(place)
        if teacher is None:
            _refuse_other_teacher(run)
        guard.fit(model, images, labels, teacher=teacher)
        guard.facts["taught"] = teacher is not None
    elif isinstance(guard, NIMPurifier):
        if source is None:
            console.note(f"no --pretrained RUN: an autoencoder is trained for {guard.epochs} epochs")
        guard.fit(model, images, labels, autoencoder=source)
    else:
        guard.fit(model, images, labels)


def _refuse_other_teacher(run: Path) -> None:
    """A second purifier-small must not learn, unasked, from another teacher than the first, whose files it has replaced."""
    mine = describe_guards(run).get("purifier-small", {})
    if mine.get("facts", {}).get("taught"):
        raise UsageError(
            f"The purifier-small of {run} learned from a purifier whose place it took, so that one cannot teach again: give --pretrained RUN, "
            "the run of its autoencoder, or fit the purifier nim first."
        )
    console.note(f"{run} holds no purifier nim, and there is no --pretrained RUN: an autoencoder is trained first")


def purifier_of(described: Mapping[str, Mapping[str, Any]]) -> tuple[str, str] | None:
    """Name and stamp of the purifier among the guards of a run, as `describe_guards` tells them."""
    found = ((name, str(facts.get("stamp"))) for name, facts in described.items() if facts.get("place") == "purifier")
    return next(found, None)


def shown(run: Path, model: nn.Module, images: Tensor) -> Tensor:
    """Images as the purifier of the run shows them to the model; themselves if there is none."""
    held = purifier_of(describe_guards(run))
    if held is None:
        return images
    place, found = device_of(model), []
    purifier = load_guard(run / HOME / f"{held[0]}.json").to(place)
    for rows in torch.split(torch.arange(len(images)), BATCH):
        with torch.no_grad(), full_precision(place):
            clean = to_float(images[rows.to(images.device)]).to(place)
            found.append(purifier(model, clean, Streams.named(rows.to(place), "shown")).cpu())
    return torch.cat(found)


def levels_of(text: str) -> list[Level]:
    """Levels from "off,0,35,70".

    Raises:
        UsageError: a part that is neither a number nor "off".
    """
    found: list[Level] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            found.append("off" if part == "off" else float(part))
        except ValueError:
            raise UsageError(f'--sigma {part!r}: levels of noise in grey levels, or "off", such as off,0,35,70.') from None
    return found


def check_levels(guarded: Guarded, levels: Sequence[Level]) -> None:
    """Refuse levels where there is no knob to turn, or that are none.

    Raises:
        UsageError: says why.
    """
    if levels and not isinstance(guarded.purifier, Purifier):
        raise UsageError("A curve over sigma needs a purifier with that knob: overproof guard fit RUN --nim.")
    for level in levels:
        assert isinstance(guarded.purifier, Purifier)
        guarded.purifier.level(level)


def sigma_curve(
    guarded: Guarded, data: Any, attacks: Mapping[str, Attack], levels: Sequence[Level], **common: Any
) -> dict[str, Any]:
    """The knob as a curve.

    Args:
        guarded: with a `Purifier`.
        data, attacks: as in `overproof.evaluate`; attacks go through the guards at each level.
        levels: "off" or grey levels.
        **common: batch_size, seed, device of `overproof.evaluate`.

    Returns:
        "sigma": the levels; "clean": accuracies; "attacks": robust accuracies by attack; "noisy" and "purified": mean squared errors of
        untouched images before and after they are rebuilt, None where the purifier is off.
    """
    check_levels(guarded, levels)
    rows = []
    for level in levels:
        console.note(f"the purifier at sigma={level}")
        rows.append(evaluate(guarded.logits_model(sigma=level), data, attacks=attacks, sanity=0, **common))
    errors = [_errors(guarded, data, level) for level in levels]
    return {
        "sigma": [_level(guarded, level) for level in levels],
        "clean": [row.clean for row in rows],
        "attacks": {name: [row.robust[name] for row in rows] for name in attacks},
        "noisy": [pair and pair[0] for pair in errors],
        "purified": [pair and pair[1] for pair in errors],
    }


def _level(guarded: Guarded, sigma: Level) -> Level:
    assert isinstance(guarded.purifier, Purifier)
    level = guarded.purifier.level(sigma)
    return "off" if level is None else level


def _errors(guarded: Guarded, data: Any, sigma: Level) -> tuple[float, float] | None:
    purifier, place = guarded.purifier, device_of(guarded)
    assert isinstance(purifier, Purifier)
    if (level := purifier.level(sigma)) is None:
        return None
    batch = next(iter(make_loader(data, MEASURED).batches(0))).to(place)
    streams = Streams.named(batch.index, "errors")
    with torch.no_grad(), full_precision(place):
        noisy = purifier.noisy(batch.images, level, streams.fork(0))
        purified = purifier(guarded.model, batch.images, streams.fork(0), sigma=sigma)
    return float((noisy - batch.images).square().mean()), float((purified - batch.images).square().mean())


def purifier_pictures(guarded: Guarded, gallery: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The attacked images of a gallery as they come: with noise, and rebuilt; and what the model says with and without; {} if off."""
    purifier, place = guarded.purifier, device_of(guarded)
    if not isinstance(purifier, Purifier) or "adversarial" not in gallery or (level := purifier.level()) is None:
        return {}
    attacked = torch.from_numpy(gallery["adversarial"]).float().to(place)
    streams = Streams.named(torch.arange(len(attacked), device=place), "pictures")
    with torch.no_grad(), full_precision(place):
        noisy = purifier.noisy(attacked, level, streams.fork(0))
        purified = purifier.purified(attacked, level, streams.fork(0))
        said = {
            "bare_prediction": predictions(guarded.model, attacked),
            "purified_prediction": predictions(guarded.model, purified),
        }
    shown = {"noisy": noisy, "purified": purified}
    arrays = {name: (images.clamp(0, 1) * 255).round().byte() for name, images in shown.items()} | said
    return {name: value.cpu().numpy() for name, value in arrays.items()}
