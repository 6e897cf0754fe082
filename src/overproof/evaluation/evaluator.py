"""Judge a classifier: untouched, attacked, and beside its teacher."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from overproof import console
from overproof.attacks import ATTACKS
from overproof.attacks.base import Attack
from overproof.data import load_data, make_loader
from overproof.errors import DataError, UsageError
from overproof.evaluation.curves import check_curve
from overproof.evaluation.judge import Judge
from overproof.evaluation.records import Evaluation
from overproof.networks import device_of, in_mode, on_device


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    attacks: Mapping[str, Attack | Mapping[str, Any]] | Sequence[str | Attack] = (),
    curve: Sequence[float] = (),
    teacher: nn.Module | None = None,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str | None = None,
    classes: Sequence[str] = (),
) -> Evaluation:
    """Measure clean and robust accuracy, agreement, calibration and cost of `model` in fp32.

    An image is robust if it is classified correctly both untouched and attacked; the worst case asks this for all attacks
    at once, image by image. Images that are wrong already are not attacked.

    Args:
        model: images in [0, 1] -> logits (N, K). Its modes, parameters and buffers stay as they are.
        data: a registered name (its test part), an `ImageSet`, a Dataset of (image, label), a pair of tensors, or an iterable of (images, labels).
        attacks: by name: attack values, or options with the key "attack"; or a sequence of registered names.
        curve: radii for which the first attack is repeated; an image broken at a smaller radius counts as broken at every
            larger one and is not attacked again.
        teacher: for agreement: share of images on which both predict the same class.
        batch_size: images per step. Random starts are drawn per batch, so it belongs to the seed.
        seed: of the attacks' randomness.
        device: where to run, the model's own device if None; model and teacher are moved there for the call.
        classes: class names for the record; taken from `data` when it knows them.

    Raises:
        DataError: empty data, bad pixels or labels, or a model that does not return (N, K).
        UsageError: an unknown attack or option.
    """
    started = time.perf_counter()
    attacks = make_attacks(attacks)
    curve = check_curve(curve, attacks)
    device = torch.device(device) if device is not None else device_of(model)
    data = load_data(data).test if isinstance(data, str) else data
    loader = make_loader(data, batch_size, device=device)
    judge = Judge(model, attacks, curve, teacher, seed)
    with (
        torch.random.fork_rng(devices=[]),  # a loader's order may draw from the global generator
        on_device(model, device),
        on_device(teacher, device),
        in_mode(model),
        console.bar("evaluating", len(loader) if hasattr(loader, "__len__") else 0) as bar,
    ):
        for number, batch in enumerate(loader.batches(0)):
            judge.see(batch.to(device), number)
            bar.update(number + 1, images=judge.seen, **judge.so_far())
        if not judge.seen:
            raise DataError("There is nothing to evaluate: the data holds no image.")
        names = tuple(classes) or tuple(getattr(data, "classes", ())) or tuple(map(str, range(judge.classes)))
        return judge.conclude(names, time.perf_counter() - started)


def make_attacks(attacks: Mapping[str, Any] | Sequence[Any]) -> dict[str, Attack]:
    """Attack values by name, from values, registered names, or options such as {"attack": "pgd", "steps": 20}."""
    if isinstance(attacks, str):
        attacks = [attacks]
    given = dict(attacks) if isinstance(attacks, Mapping) else dict(map(_named, attacks))
    made: dict[str, Attack] = {}
    for name, attack in given.items():
        if isinstance(attack, Mapping):
            options = dict(attack)
            made[name] = ATTACKS.create(options.pop("attack", name), **options)
        elif isinstance(attack, Attack):
            made[name] = attack
        else:
            raise UsageError(f"attacks[{name!r}] is {attack!r}; expected an attack such as PGD(eps=8/255).")
    return made


def _named(attack: Any) -> tuple[str, Any]:
    return (attack, {"attack": attack}) if isinstance(attack, str) else (type(attack).__name__.lower(), attack)
