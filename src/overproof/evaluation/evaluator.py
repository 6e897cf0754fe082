"""Judge a classifier: untouched, attacked, and beside its teacher."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from overproof import console
from overproof.attacks.base import Attack
from overproof.attacks.combined import build
from overproof.attacks.spelling import refuse_class, spelled
from overproof.attacks.threats import L1, L2, Linf, Threat
from overproof.data import ImageSet, load_data
from overproof.errors import DataError, UsageError
from overproof.evaluation.curves import check_curve
from overproof.evaluation.findings import Findings
from overproof.evaluation.judge import Changed, Judge
from overproof.evaluation.metrics import per_class
from overproof.evaluation.partial import Partial, fingerprint
from overproof.evaluation.plan import Plan
from overproof.evaluation.records import Evaluation
from overproof.evaluation.sharing import Group, Share
from overproof.evaluation.summary import conclude, running
from overproof.evaluation.watch import with_margin
from overproof.networks import device_of, in_mode, on_device, require_network


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
    sanity: int = 128,
    fisher: bool = False,
    resume: str | Path | None = None,
) -> Evaluation:
    """Measure clean and robust accuracy, agreement, calibration and cost of `model` in fp32.

    An image is robust if it is classified correctly both untouched and attacked; the worst case asks this for all attacks
    with a radius at once, image by image. Images that are wrong already are not attacked, and those that one member of a
    combined attack has broken are not handed to the next. Where `torch.distributed` runs, all its processes have to call:
    each judges a part, and all return the same.

    Args:
        model: images in [0, 1] -> logits (N, K). Its modes, parameters and buffers stay as they are.
        data: a registered name (its test part), an `ImageSet`, a Dataset of (image, label), a pair of tensors, or an iterable of (images, labels).
        attacks: by name: attack values, or options with the key "attack"; or a sequence of registered names, also with options ("pgd:steps=20").
        curve: radii for which the first attack is repeated; an image broken at a smaller radius counts as broken at every
            larger one and is not attacked again. The curve of a minimum-norm attack is read off its sizes.
        teacher: for agreement: share of images on which both predict the same class.
        batch_size: images per step. The verdicts do not depend on it, unless the model rolls dice of its own.
        seed: of the attacks' randomness, which is drawn per image.
        device: where to run, the model's own device if None; model and teacher are moved there for the call.
        classes: class names for the record; taken from `data` when it knows them.
        sanity: on so many images, right untouched, the sanity panel looks for masked gradients if there is an attack with a
            radius; 0 switches it off.
        fisher: measure trace and largest eigenvalue of the Fisher information at each image (columns "fisher/trace" and
            "fisher/lambda_max"), and repeat each attack on the cross-entropy with the margin: what a model has to show that was
            trained to be flat.
        resume: a file that keeps what is known (written every 20 seconds, and when the evaluation is interrupted), so that the
            same call goes on from there; it stays when all is done, to be removed when the result is kept.

    Raises:
        DataError: empty data, bad pixels or labels, or a model that does not return (N, K).
        UsageError: an unknown attack or option.
    """
    require_network(model, "model", " (overproof.load(RUN) gives that of a run)")
    attacks = with_margin(make_attacks(attacks)) if fisher else make_attacks(attacks)
    plan = Plan(attacks, check_curve(curve, attacks), seed, fisher)
    device = torch.device(device) if device is not None else device_of(model)
    data, group = images_of(data), Group.current()
    partial = Partial(resume, fingerprint(model, data, plan, teacher, group) if resume is not None else "", group)
    with (
        # A loader's order may draw from the global generator, and so may the model.
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        on_device(model, device),
        on_device(teacher, device),
        in_mode(model),
        group.speaking(),
    ):
        judge = Judge(model, plan, partial, teacher=teacher, batch_size=batch_size, keep=sanity if _ball(plan) else 0)
        share = Share(data, batch_size, device, group)
        packs = group.everyone(lambda: _judged(judge, share).pack())
        found = Findings.merged(judge.columns, [Findings.unpack(judge.columns, pack) for pack in packs])
        if not found.count:
            raise DataError("There is nothing to evaluate: the data holds no image.")
        known = tuple(classes) or tuple(getattr(data, "classes", ()))
        names = known or tuple(map(str, range(int(found.facts["classes"]))))
        examples = _examples(judge, found, group)
        return group.first(lambda: _with_panel(_with_subgroups(_concluded(judge, found, names), data), judge, examples))


def images_of(data: Any) -> Any:
    """What `make_loader` takes: the test part of a set given by name, a pair of tensors as an `ImageSet`, all else as it is."""
    if isinstance(data, str):
        return load_data(data).test
    pair = isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)
    return ImageSet(*data) if pair else data


def _judged(judge: Judge, share: Share) -> Findings:
    judge.begin(judge.partial.load(judge.columns))
    try:
        return _walked(judge, share)
    except Changed:
        console.note("note: these are not the images that the unfinished evaluation began with; starting anew.")
    judge.begin(Findings(judge.columns))
    return _walked(judge, share)


def _walked(judge: Judge, share: Share) -> Findings:
    number = 0
    with judge.partial.kept(judge.write), console.bar("evaluating", len(share)) as bar:

        def tell() -> None:
            done = number * (1 - judge.pending / max(judge.seen, 1))
            bar.update(int(done), images=judge.seen, **running(judge.found, judge.plan, judge.seen))

        for rows, batch in share:
            judge.see(rows, batch)
            number += 1
            tell()
        judge.finish(tell)
    return judge.found


def _examples(judge: Judge, found: Findings, group: Group) -> list[tuple[Tensor, Tensor]]:
    """The first images that are right untouched, with their labels, whichever process has them."""
    rows = found["_row"][found["prediction"] == found["label"]][: judge.keep].tolist()
    if group.size == 1:
        return [judge.kept[row] for row in rows]
    mine = {row: tuple(part.cpu() for part in judge.kept[row]) for row in rows if row in judge.kept}
    everyone: dict[int, Any] = {row: pair for part in group.everyone(lambda: mine) for row, pair in part.items()}
    return [everyone[row] for row in rows]


def _concluded(judge: Judge, found: Findings, classes: tuple[str, ...]) -> Evaluation:
    assert judge.image is not None, "the first process has the first image"
    return conclude(judge.model, found, judge.plan, classes, judge.image)


def _with_subgroups(done: Evaluation, data: Any) -> Evaluation:
    """The evaluation with the subgroup of every image and the accuracy of each, if the data know."""
    attribute = getattr(data, "attribute", None)
    if attribute is None:
        return done
    rows, names = done.samples, list(attribute.names)
    group = attribute.numbers.numpy()[rows["index"]]
    shares = per_class(group, rows["prediction"] == rows["label"], len(names))
    counts = np.bincount(group, minlength=len(names)).tolist()
    facts = {"name": attribute.name, "names": names, "count": counts, "clean": shares}
    return Evaluation({**done.summary, "attribute": facts}, {**rows, "group": group}, done.gallery)


def _ball(plan: Plan) -> Threat | None:
    """The threat of the first attack with a radius: that of the sanity panel."""
    threats = (plan.attacks[name].threat for name in plan.bounded)
    return next((threat for threat in threats if isinstance(threat, Linf | L2 | L1) and threat.eps > 0), None)


def _with_panel(done: Evaluation, judge: Judge, examples: list[tuple[Tensor, Tensor]]) -> Evaluation:
    threat = _ball(judge.plan)
    if threat is None or not examples or judge.image is None:
        return done
    from overproof.evaluation.sanity import panel

    begun, place = time.perf_counter(), judge.image.device
    images, labels = (torch.stack(parts).to(place) for parts in zip(*examples, strict=True))
    console.note(f"looking for masked gradients on {len(labels)} images")
    found = panel(judge.model, images, labels, threat, seed=judge.plan.seed)
    summary = {"seconds": time.perf_counter() - begun, **found.summary}
    return Evaluation({**done.summary, "sanity": summary}, done.samples, {**done.gallery, **found.arrays})


def make_attacks(attacks: Mapping[str, Any] | Sequence[Any]) -> dict[str, Attack]:
    """Attack values by name, from values, registered names, also with options ("pgd:steps=20"), or {"attack": "pgd", "steps": 20}."""
    if isinstance(attacks, str):
        attacks = [attacks]
    given = dict(attacks) if isinstance(attacks, Mapping) else dict(map(_named, attacks))
    made: dict[str, Attack] = {}
    for name, attack in given.items():
        refuse_class(attack, f"attacks[{name!r}]")
        if isinstance(attack, Mapping):
            made[name] = build({**({} if "attack" in attack else spelled(name)), **attack})
        elif isinstance(attack, str | Attack):
            made[name] = build(attack)
        else:
            raise UsageError(f"attacks[{name!r}] is {attack!r}; expected an attack such as PGD(eps=8/255).")
    return made


def _named(attack: Any) -> tuple[str, Any]:
    if isinstance(attack, str):
        return attack, spelled(attack)
    return getattr(attack, "__name__", type(attack).__name__).lower(), attack
