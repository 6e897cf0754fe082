"""What guards are worth: the guarded model beside the bare one, under attacks made on each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from overproof import console
from overproof.attacks.base import Attack
from overproof.attacks.combined import patient
from overproof.attacks.transfer import Transfer
from overproof.config import resolve
from overproof.data import ImageSet, make_loader
from overproof.data.extra import check_numbers_of_classes
from overproof.errors import UsageError
from overproof.evaluation.evaluator import evaluate, images_of, make_attacks
from overproof.evaluation.records import Evaluation
from overproof.folder import RunFolder, plain
from overproof.guards.cache_keys import fingerprints
from overproof.guards.cache_memory import CacheMemory
from overproof.guards.detector import Detector
from overproof.guards.guarded import Guarded
from overproof.guards.purifier_base import Level
from overproof.networks import device_of, on_device
from overproof.run.guard_detection import TRANSFER, detection_of
from overproof.run.guarding import guard_data, load_guarded
from overproof.run.judging import part_of
from overproof.run.naming import check_name, free_name, name_of
from overproof.run.purifying import check_levels, purifier_pictures, sigma_curve

BLIND = (
    "The cache asks an index for the nearest items: where these agree there is no gradient, so attacks through the cache are weaker than "
    'they could be. Measure with index="matrix".'
)


def evaluate_guarded(
    guarded: Guarded,
    data: Any,
    *,
    attacks: Mapping[str, Any] | Sequence[Any] = (),
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str | None = None,
    sanity: int = 128,
    sigma: Sequence[Level] = (),
) -> Evaluation:
    """Measure a guarded model: clean, under attacks through its guards, and under attacks made on the bare model.

    Only the first kind of attack says whether the model is robust; the second shows what its guards stop in those who do not
    know of them. With a detector, every attack also starts a search for points that the detector takes for natural. Before a
    purifier or a cache no attack stops early: where dice are rolled a lucky pass is no success, and a cache of few neighbours is attacked
    by way of all of them.

    Args:
        guarded: the model with its guards.
        data, attacks, batch_size, seed, device, sanity: as in `overproof.evaluate`.
        sigma: levels of the purifier's noise, or "off", at which everything is measured once more: the knob as a curve.

    Returns:
        An evaluation of the model behind its guards, each attack also as "NAME-transfer". Its summary has a table "guard":
        "clean" and "clean_without", "clean_rejected", for each attack the share "wrong_and_not_rejected" of the images that are
        right untouched ("without": of the bare model), and the "strongest"; with a detector there is a table "detection" too, with
        `sigma` a table "purifier", see `sigma_curve`.

    Raises:
        UsageError: the images are in the cache, an unknown attack, a detector of another kind than `Detector`, or levels where no
            purifier has that knob.
    """
    check_levels(guarded, sigma)
    made, images = make_attacks(attacks), images_of(data)
    if guarded.purifier is not None or guarded.cache is not None:
        made = {name: patient(attack) for name, attack in made.items()}
    place = torch.device(device) if device is not None else device_of(guarded.model)
    common: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "device": place}
    if guarded.detector is not None and not isinstance(guarded.detector, Detector):
        raise UsageError(
            f"How the detector {type(guarded.detector).__name__} is searched for what it overlooks is not known; measure it with "
            "overproof.evaluation.detection.measure_detector, or leave it out."
        )
    known = _refuse_remembered(guarded, images, batch_size)
    changes = guarded.cache is not None or guarded.purifier is not None
    tried: dict[str, Attack] = dict(made)
    if changes:
        tried |= {f"{name}{TRANSFER}": Transfer(inner=attack, source=guarded.model) for name, attack in made.items()}
    bare = evaluate(guarded.model, images, attacks=made, sanity=0, **common) if changes else None
    result = evaluate(guarded.logits_model(), images, attacks=tried, sanity=sanity, **common)
    detection: dict[str, Any] | None = None
    rejected: dict[str, np.ndarray] = {}
    if guarded.detector is not None:
        detection, rejected = detection_of(guarded, images, tried, **common)
    facts = {**_table(result, bare or result, detection), "guards": _places(guarded), "remembered": known}
    facts |= {"caution": BLIND if getattr(guarded.cache, "index", None) == "faiss" else None}
    more = {} if detection is None else {"detection": detection}
    if sigma:
        with on_device(guarded, place):
            more["purifier"] = sigma_curve(guarded, images, tried, sigma, **common)
    shown = purifier_pictures(guarded, result.gallery)
    return Evaluation({**result.summary, "guard": facts, **more}, result.samples, {**result.gallery, **shown, **rejected})


def _places(guarded: Guarded) -> list[str]:
    return [place for place in ("purifier", "cache", "detector") if getattr(guarded, place) is not None]


def _refuse_remembered(guarded: Guarded, images: Any, batch_size: int) -> int:
    """How many of the images are in the cache all the same."""
    if not isinstance(guarded.cache, CacheMemory):
        return 0
    parts = [images.images] if isinstance(images, ImageSet) else (b.images for b in make_loader(images, batch_size).batches(0))
    return guarded.cache.check_marks(torch.cat([fingerprints(part) for part in parts]))


def _table(result: Evaluation, bare: Evaluation, detection: dict[str, Any] | None) -> dict[str, Any]:
    attacks: dict[str, dict[str, Any]] = {}
    names = list(result.summary["attacks"]) if detection is None else list(detection["attacks"])
    for name in names:
        own = name.removesuffix(TRANSFER)
        if detection is None:
            through, detected = result.summary["attacks"][name]["success_rate"], None
        else:
            through, detected = detection["attacks"][name]["wrong_and_not_rejected"], detection["attacks"][name]["detected"]
        if name in result.summary["attacks"] and result.summary["attacks"][name]["no_gradient"]:
            through = None  # nothing was attacked: no robustness
        without = bare.summary["attacks"].get(own, {}).get("success_rate")
        attacks[name] = {"wrong_and_not_rejected": through, "detected": detected, "without": without, "transfer": own != name}
    shares = {name: share for name, facts in attacks.items() if (share := facts["wrong_and_not_rejected"]) is not None}
    return {
        "clean": result.clean,
        "clean_without": bare.clean,
        "clean_rejected": 0.0 if detection is None else detection["clean_rejected"],
        "attacks": attacks,
        "strongest": max(shares, key=shares.__getitem__) if shares else None,
    }


def evaluate_guarded_run(
    run: str | Path,
    *,
    attacks: Mapping[str, Any],
    data: str | None = None,
    split: str = "test",
    limit: int | None = None,
    name: str | None = None,
    seed: int = 0,
    sanity: int = 128,
    sigma: Sequence[Level] = (),
    overrides: Sequence[str] = (),
    trusted: bool = False,
) -> Evaluation:
    """Evaluate the model of a run folder behind its guards and keep the result in it; options as in `evaluate_run` and `evaluate_guarded`.

    Raises:
        FolderError: no such run or guards.
        UsageError: the images are in the cache, or an unknown attack.
    """
    folder = RunFolder(run).require()
    config = resolve(folder.config, overrides=[text for text in overrides if not text.startswith("data.")])
    wanted = check_name(name) or f"guarded-{name_of(attacks, split)}"[:80]
    splits = guard_data(config, data, overrides)
    check_numbers_of_classes(folder.data.get("classes", ()), splits.classes, "the run", splits.name)
    guarded = load_guarded(folder.path, trusted=trusted)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = evaluate_guarded(
        guarded.to(device),
        part_of(splits, split, limit),
        attacks=attacks,
        batch_size=config.evaluation.batch_size,
        seed=seed,
        sanity=sanity,
        sigma=sigma,
    )
    described = {place: _short(getattr(guarded, place).describe()) for place in _places(guarded)}
    protocol: dict[str, Any] = {
        "attacks": {key: facts["attack"] for key, facts in result.summary["attacks"].items()},
        "guards": described,
    }
    protocol |= {"data": splits.name, "split": split, "limit": limit, "seed": seed, **({"sigma": list(sigma)} if sigma else {})}
    summary = {**result.summary, "data": splits.name, "split": split, "model": config.model.name, "protocol": plain(protocol)}
    summary["name"] = free_name(folder, wanted, summary["protocol"])
    done = Evaluation(summary, result.samples, result.gallery)
    if console.leading():
        done.save(folder.path, summary["name"])
    return done


def _short(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in facts.items() if key != "tuning" and isinstance(value, str | int | float | bool | list)
    }
