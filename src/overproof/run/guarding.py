"""Fit guards for a finished run, and put it behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from overproof import console
from overproof.config import RunConfig, resolve
from overproof.data import ImageSet, Splits, make_loader
from overproof.data.splits import stratified_subset
from overproof.data.streams import StreamSet
from overproof.errors import UsageError
from overproof.folder import RunFolder, write_arrays
from overproof.guards import GUARDS
from overproof.guards.base import Guard
from overproof.guards.cache import Cache
from overproof.guards.guarded import Guarded
from overproof.guards.purifier_base import Purifier
from overproof.guards.storage import HOME, describe_guards, load_guards, save_guard
from overproof.models.weights import load_model
from overproof.networks import device_of
from overproof.run.prepare import USER, data_of, with_data
from overproof.run.purifying import fit_purifier, purifier_of, shown

SHOWN, NEIGHBOURS = 8, 5  # test images in the report, and neighbours of each
READ = 1024  # images of a streamed set at a time
Part = ImageSet | StreamSet


def fit_guards(
    run: str | Path,
    guards: Mapping[str, Mapping[str, Any]],
    *,
    which: Literal["best", "last"] = "best",
    data: str | None = None,
    tune: bool = True,
    pretrained: str | Path | None = None,
    overrides: Sequence[str] = (),
    trusted: bool = False,
) -> dict[str, dict[str, Any]]:
    """Fit guards for the model of a run folder and keep them in it.

    A cache remembers the training images, is tuned on the validation part, and then remembers that part too, as the paper does.
    A detector is fitted on the validation part, as a purifier shows it to the model if the run has one. Test images are looked at
    by nobody, but for a few pictures in the report.
    There is one purifier: a new one takes the place of any other.

    Args:
        run: a run folder with weights.
        guards: options by registered name, such as {"cache": {"top_k": 50}, "detector": {"fpr": 0.1}}.
        which: weights, "best" or "last".
        data: another set than the run's own.
        tune: choose the options that can be tuned on the validation part; False leaves them as they are given.
        pretrained: of purifiers: a run with the method nim or mim, whose autoencoder is taken; None: they train on the training images.
        overrides: "data.key=value" for the configuration of the data.
        trusted: allow a folder that names a package.module:callable to import and run it.

    Returns:
        What was fitted, by name.

    Raises:
        UsageError: no guard, an unknown one or an unknown option, no validation part for a detector, or a pre-training for no purifier.
        FolderError: no such run or weights.
    """
    if not guards:
        raise UsageError(f"Name the guards to be fitted; known are {', '.join(GUARDS.names())}.")
    made: dict[str, Guard] = {name: GUARDS.create(name, **options) for name, options in guards.items()}
    made = dict(sorted(made.items(), key=lambda pair: pair[1].place != "purifier"))  # the detector sees what it purifies
    purifiers = [name for name, guard in made.items() if guard.place == "purifier"]
    if len(purifiers) > 1 or (pretrained is not None and not purifiers):
        raise UsageError(
            f"Purifiers named: {', '.join(purifiers) or 'none'}. A model has one, and a pre-training is for it: choose nim or "
            "purifier-small."
        )
    folder = RunFolder(run).require()
    splits = guard_data(resolve(folder.config), data, overrides)
    model = load_model(folder.path, which, trusted=trusted).to("cuda" if torch.cuda.is_available() else "cpu")
    for name, guard in made.items():
        console.note(f"fitting the {name} of {folder.path}")
        if isinstance(guard, Cache):
            _fit_cache(guard, model, splits, tune=tune, given=guards[name])
        elif isinstance(guard, Purifier):
            fit_purifier(guard, model, *_tensors(splits.train), run=folder.path, pretrained=pretrained, trusted=trusted)
        else:
            images, labels = _tensors(_needed(splits, guard.place) if guard.place == "detector" else splits.train)
            guard.fit(model, shown(folder.path, model, images) if guard.place == "detector" else images, labels)
            if tune and splits.validation is not None:
                guard.tune(model, *_tensors(splits.validation))
        about: dict[str, Any] = {"weights": which, "data": splits.name, "classes": list(splits.classes)}
        if guard.place == "detector":
            held = purifier_of(describe_guards(folder.path))
            about["behind"] = held and held[1]
        save_guard(guard, folder.path, name, **about)
        if guard.place == "purifier":
            _replace_others(folder.path, name)
        if isinstance(guard, Cache):
            write_arrays(folder.path / HOME / f"{name}.npz", _pictures(guard, model, splits))
    return {name: guard.describe() for name, guard in made.items()}


def _replace_others(run: Path, name: str) -> None:
    for other, facts in describe_guards(run).items():
        if other != name and facts.get("place") == "purifier":
            console.note(f"note: {name} takes the place of the purifier {other}.")
            for suffix in ("json", "safetensors"):
                (run / HOME / f"{other}.{suffix}").unlink(missing_ok=True)


def guard_data(config: RunConfig, data: str | None, overrides: Sequence[str] = ()) -> Splits:
    """The data that guards of a run are fitted and judged on.

    Raises:
        UsageError: the run was made on data of a program, and no other set is named.
    """
    config = resolve(with_data(config, data).table(), overrides=overrides)
    if config.data.name == USER:
        raise UsageError(
            "This run was trained on data of a program. Name a data set with --data, or use the guards in Python: "
            "Cache().fit(model, images, labels)."
        )
    return data_of(config)


def _needed(splits: Splits, place: str) -> Part:
    if splits.validation is None:
        raise UsageError(
            f"The data have no validation part, which the {place} needs: set data.validation=0.1. (Training images will not do, "
            "the model is too sure of them.)"
        )
    return splits.validation


def _tensors(part: Part) -> tuple[Tensor, Tensor]:
    if isinstance(part, ImageSet):
        return part.images, part.labels
    batches = list(make_loader(part, READ).batches(0))
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


def _fit_cache(cache: Cache, model: nn.Module, splits: Splits, *, tune: bool, given: Mapping[str, Any]) -> None:
    """Positions count through the training part and go on in the validation part; what was `given` is not tuned."""
    if cache.centres is not None and not isinstance(splits.train, ImageSet):
        raise UsageError(
            f"cache.centres={cache.centres} are found among all images at once, but these are read as they are needed. Say how many "
            "are remembered instead (cache.limit), or let all of them into memory (data.memory_limit)."
        )
    _learn(cache, model, splits.train, first=True)
    if splits.validation is None:
        console.note("note: the data have no validation part, so theta and lam stay as they are.")
        return
    if tune:
        fixed: dict[str, Any] = {f"{name}s": (getattr(cache, name),) for name in ("theta", "lam") if name in given}
        cache.tune(model, *_tensors(splits.validation), **fixed)
    if cache.centres is None and cache.limit is None:
        _learn(cache, model, splits.validation, first=False, offset=len(splits.train))


def _learn(cache: Cache, model: nn.Module, part: Part, *, first: bool, offset: int = 0) -> None:
    if isinstance(part, ImageSet):
        positions = torch.arange(offset, offset + len(part))
        (cache.fit if first else cache.add)(model, part.images, part.labels, index=positions)
        return
    rows = torch.arange(len(part)) if cache.limit is None else stratified_subset(part.labels, cache.limit, cache.seed)
    for number, batch in enumerate(make_loader(part.subset(rows), READ).batches(0)):
        positions = rows[number * READ :][: len(batch)] + offset
        (cache.fit if first and not number else cache.add)(model, batch.images, batch.labels, index=positions)


def _pictures(cache: Cache, model: nn.Module, splits: Splits) -> dict[str, np.ndarray]:
    """A few test images with their neighbours in the cache; always the same, and not those that look best."""
    batch = next(iter(make_loader(splits.test, SHOWN, shuffle=True, device=device_of(model)).batches(0)))
    images = batch.images[:SHOWN]
    with torch.no_grad():
        answer, near = cache(model, images), cache.neighbours(model, images, NEIGHBOURS)
    arrays = {
        "images": (images * 255).round().byte(),
        "labels": batch.labels[:SHOWN],
        "predictions": answer.logits.argmax(dim=1),
    }
    arrays |= {name: answer.parts[name].exp() for name in ("network", "cache") if name in answer.parts}
    arrays |= {"neighbour_labels": near.labels, "similarity": near.similarity}
    found = {name: value.detach().cpu().numpy() for name, value in arrays.items()}
    if isinstance(splits.train, ImageSet):
        found["neighbours"] = _looked_up(splits, near.positions.cpu(), near.mirrored.cpu()).numpy()
    return found


def _looked_up(splits: Splits, positions: Tensor, mirrored: Tensor) -> Tensor:
    """Pixels (N, k, C, H, W) of the remembered images at `positions` (N, k)."""
    parts = [part.images.cpu() for part in (splits.train, splits.validation) if isinstance(part, ImageSet)]
    sizes, found = len(parts[0]), []
    for place, flipped in zip(positions.flatten().tolist(), mirrored.flatten().tolist(), strict=True):
        image = parts[0][place] if place < sizes else parts[1][place - sizes]
        image = image if image.dtype == torch.uint8 else (image * 255).round().byte()
        found.append(image.flip(-1) if flipped else image)
    return torch.stack(found).reshape(*positions.shape, *found[0].shape)


def load_guarded(run: str | Path, *, which: str | None = None, trusted: bool = False) -> Guarded:
    """The model of a run folder behind the guards that were fitted for it, in eval mode on the CPU.

    Args:
        run: a run folder with guards.
        which: weights; those that the guards were fitted for if None.
        trusted: allow a folder that names a package.module:callable to import and run it.

    Raises:
        FolderError: no such run or guards, or damaged ones. Nothing read is executed.
        UsageError: the guards were fitted for other weights, or the detector behind another purifier.
    """
    folder = RunFolder(run).require()
    guards, described = load_guards(folder.path), describe_guards(folder.path)
    abouts = [dict(facts.get("about", {})) for facts in described.values()]
    model = load_model(folder.path, which or str(abouts[0].get("weights", "best")), trusted=trusted)
    held = purifier_of(described)
    if any("behind" in about and about["behind"] != (held and held[1]) for about in abouts):
        raise UsageError(
            f"The detector of {folder.path} was fitted behind another purifier than the run has now, so its rate of false alarms is "
            f"not known. Fit it again: overproof guard fit {folder.path} --detector."
        )
    return Guarded(model, **guards).eval()
