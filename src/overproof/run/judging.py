"""Evaluate a finished run, or any model with weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overproof import console
from overproof.attacks.base import Attack
from overproof.config import RunConfig, resolve
from overproof.data import Splits, stratified_subset
from overproof.data.extra import check_numbers_of_classes
from overproof.errors import OverproofError, UsageError
from overproof.evaluation.evaluator import evaluate, make_attacks
from overproof.evaluation.partial import discard
from overproof.evaluation.records import Evaluation, fingerprint
from overproof.folder import RunFolder, plain
from overproof.methods.objective import Objective
from overproof.models import create_model
from overproof.models.weights import fill, fill_foreign, load_model, read_state
from overproof.registry import convert
from overproof.run.naming import check_name, free_name, name_of
from overproof.run.prepare import USER, UserData, data_of, with_data
from overproof.run.robust import watched

SANITY = 64  # images of the sanity panel when training ends


def evaluate_run(
    run: str | Path, *, which: str = "best", name: str | None = None, trusted: bool = False, **options: Any
) -> Evaluation:
    """Evaluate the model of a run folder and keep the result in it.

    Args:
        run: a run folder with weights.
        which: "best" or "last".
        trusted: allow a folder that names a package.module:callable to import and run it.
        name: under which the evaluation is kept; made from the attacks if None.
        **options: attacks, curve, data, split, limit, seed, teacher, overrides, sanity, fisher, transfer_from.

    An interrupted evaluation leaves what it knows in the folder, and the same call goes on from there.
    """
    folder = RunFolder(run).require()
    config = resolve(folder.config)
    if config.data.name == USER and not options.get("data"):
        raise UsageError(
            f"{folder.path} was trained on data of a program; name a data set with --data, or use overproof.evaluate."
        )
    wanted = check_name(name) or name_of(options["attacks"], options.get("split", "test"))
    unfinished = _unfinished(folder, wanted)
    made_of = fingerprint(folder.path, which)  # before they are read: training may go on meanwhile
    model = load_model(folder.path, which, trusted=trusted)
    result = _measure(model, config, trusted=trusted, resume=unfinished, names=folder.data.get("classes", ()), **options)
    summary = {**result.summary, "weights": which, "fingerprint": made_of, "model": config.model.name}
    summary["protocol"] = plain({**summary["protocol"], "weights": which})
    summary["name"] = free_name(folder, wanted, summary["protocol"])
    result = Evaluation(summary, result.samples, result.gallery)
    if console.leading():
        result.save(folder.path, summary["name"])
        discard(unfinished)
    return result


def _unfinished(folder: RunFolder, name: str) -> Path:
    return folder.path / "evaluations" / f".partial-{name}.npz"


def evaluate_model(name: str, weights: str | Path | None, **options: Any) -> Evaluation:
    """Evaluate a model built by name with weights from a file.

    Pretrained ones of timm and torchvision need no file, nor does a package.module:callable that brings its own weights.
    """
    # Nothing has to be held out of the training images unless they are asked for.
    kept = {"validation": 0} if options.get("split", "test") == "test" else {}
    table = {"data": {"name": options["data"], **kept}, "model": {"name": name}}
    config = resolve(table, overrides=options.get("overrides", ()))
    foreign = name.partition(":")[0] in ("timm", "torchvision")
    if weights is None and ":" not in name:
        raise UsageError(
            f"The model {name!r} has no weights: give --weights FILE (safetensors, or a state dict of plain tensors)."
        )
    splits = data_of(config)
    size = (len(splits.classes), splits.channels, splits.image_size)
    model = create_model(name, *size, pretrained=weights is None and foreign, **config.model.options)
    if weights is not None:
        fill_foreign(model, read_state(weights), Path(weights))
    result = _measure(model.eval(), resolve({"data": kept}), **options)
    return Evaluation({**result.summary, "model": name}, result.samples, result.gallery)


def _measure(
    model: nn.Module,
    config: RunConfig,
    *,
    attacks: Mapping[str, Any],
    curve: str = "",
    data: str | None = None,
    split: str = "test",
    limit: int | None = None,
    seed: int = 0,
    teacher: str | Path | None = None,
    overrides: Sequence[str] = (),
    trusted: bool = False,
    sanity: int = 128,
    fisher: bool | None = None,
    resume: Path | None = None,
    transfer_from: str | Path | None = None,
    names: Sequence[str] = (),
) -> Evaluation:
    config = resolve(with_data(config, data).table(), overrides=overrides)
    fisher = watched(config) if fisher is None else fisher
    chosen = part_of(data_of(config), split, limit)
    check_numbers_of_classes(names, getattr(chosen, "classes", ()), "the run", config.data.name)
    master = _teacher_of(config, teacher, use_own=data is None, trusted=trusted)
    used = config.teacher if teacher is None and master is not None else None
    teacher = teacher or (used.run if used else None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if transfer_from is not None:
        source = load_model(RunFolder(transfer_from).require().path, trusted=trusted).to(device)
        attacks = _with_transfer(attacks, source)
    result = evaluate(
        model.to(device),
        chosen,
        attacks=attacks,
        curve=[convert(part, float, "--curve") for part in curve.split(",") if part.strip()],
        teacher=master,
        batch_size=config.evaluation.batch_size,
        seed=seed,
        sanity=sanity,
        fisher=fisher,
        resume=resume,
    )
    summary = result.summary
    protocol = {
        "attacks": {name: facts["attack"] for name, facts in summary["attacks"].items()},
        "curve": summary["curve"] and summary["curve"]["eps"],
        "data": config.table()["data"],
        "split": split,
        "limit": limit,
        "seed": seed,
        "teacher": str(teacher) if teacher else None,
        **({"teacher_weights": used.which} if used and used.which != "best" else {}),
        **({"transfer_from": str(transfer_from)} if transfer_from is not None else {}),
        **({"fisher": True} if fisher else {}),
        "batch_size": config.evaluation.batch_size,
    }
    facts: dict[str, Any] = {"data": config.data.name, "split": split, "protocol": protocol}
    if teacher and result.summary["agreement"]:
        facts["agreement"] = {**result.summary["agreement"], "teacher": str(teacher)}
    return Evaluation({**result.summary, **facts}, result.samples, result.gallery)


def _with_transfer(attacks: Mapping[str, Any], source: nn.Module) -> dict[str, Attack]:
    """The attacks, and the first once more: crafted on `source`."""
    from overproof.attacks.transfer import Transfer

    made = make_attacks(attacks)
    if not made:
        raise UsageError("--transfer-from needs an attack to craft with, for example --attack pgd.")
    return {**made, "transfer": Transfer(inner=next(iter(made.values())), source=source)}


def _teacher_of(config: RunConfig, wanted: str | Path | None, *, use_own: bool, trusted: bool) -> nn.Module | None:
    """The teacher asked for; else the run's own, if it is still there and may be loaded."""
    if wanted is not None:
        return load_model(RunFolder(wanted).require().path, trusted=trusted)
    own = config.teacher.run if use_own and config.teacher is not None else None
    if config.teacher is None or not own or not RunFolder(own).exists:
        return None
    try:
        return load_model(own, config.teacher.which, trusted=trusted)
    except OverproofError as error:
        console.note(f"note: no agreement with the teacher in {own}: {error}")
        return None


def part_of(splits: Splits, split: str, limit: int | None) -> Any:
    """The part of the data called `split`, at most `limit` images of it.

    Raises:
        UsageError: the data have no such part.
    """
    chosen = getattr(splits, split)
    if chosen is None:
        raise UsageError(f"The data have no {split} split; use --split train, or set data.validation or data.test.")
    return chosen if limit is None else chosen.subset(stratified_subset(chosen.labels, limit))


def judge_run(
    config: RunConfig,
    objective: Objective,
    data: Splits | UserData,
    *,
    folder: RunFolder,
    attacks: Mapping[str, Attack] | None = None,
) -> None:
    """Evaluate the best and the last weights on the test set, once if they are the same; all processes share the work."""
    if data.test is None:
        return
    wanted = list(config.evaluation.weights)
    same = folder.status.get("best_epoch") == config.train.epochs - 1
    done: Evaluation | None = None
    for which in wanted:
        if done is None or not same:
            fill(objective.student, read_state(folder.path / "weights" / f"{which}.safetensors"), folder.path)
            done = evaluate(
                objective.student,
                data.test,
                attacks=attacks or config.evaluation.attacks,
                curve=config.evaluation.curve,
                teacher=objective.teacher,
                batch_size=config.evaluation.batch_size,
                seed=config.seed,
                classes=data.classes,
                sanity=SANITY,
                fisher=watched(config),
                resume=_unfinished(folder, f"test-{which}"),
            )
        facts: dict[str, Any] = {"weights": which, "data": config.data.name, "split": "test", "model": config.model.name}
        facts["fingerprint"] = fingerprint(folder.path, which)
        if done.summary["agreement"] and config.teacher is not None:
            facts["agreement"] = {**done.summary["agreement"], "teacher": config.teacher.run or config.teacher.name}
        if console.leading():
            Evaluation({**done.summary, **facts}, done.samples, done.gallery).save(folder.path, f"test-{which}")
    if console.leading():  # only now: a run stopped between the two does not repeat the first
        for which in wanted:
            discard(_unfinished(folder, f"test-{which}"))
