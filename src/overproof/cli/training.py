"""train, distill, probe-linear, resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from overproof.cli.options import (
    Json,
    Names,
    Plugin,
    Seeds,
    Set,
    Trust,
    attacks_of,
    devices_of,
    layer,
    numbers,
    plugins,
    show_runs,
    shown,
)


def _execute(
    table: dict[str, Any], overrides: Sequence[str], *, config: Path | None, out: Path, seeds: str, trust: bool, as_json: bool
) -> None:
    from overproof.config import read_config, resolve
    from overproof.run.prepare import refuse_code
    from overproof.run.without_data import unnamed_data

    weakest: dict[str, Any] = {"method": {"name": "kd"}} if table["verb"] == "distill" else {}
    given = read_config(config) if config else {}
    weakest |= unnamed_data(resolve(weakest, given, table, overrides=overrides))
    if config:
        weakest = refuse_code(resolve(weakest, given), str(config), trust).table()
    resolved = resolve(weakest, table, overrides=overrides)
    chosen = numbers(seeds)
    with shown(out / "report.html", as_json) as folders:
        if len(chosen) > 1:
            from overproof.run.seeds import execute_seeds

            folders += execute_seeds(resolved, out, chosen, trusted=trust)
        else:
            from overproof.run.execute import execute
            from overproof.run.prepare import Parts

            if chosen:
                resolved = resolve(resolved.table(), {"seed": chosen[0]})
            folders.append(execute(resolved, out, parts=Parts(trusted=trust)).folder)


def train(
    *,
    data: str | None = None,
    model: str | None = None,
    method: str | None = None,
    out: Path,
    config: Path | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    extra_data: str | None = None,
    long_tail: float | None = None,
    augment: Names = (),
    attack: Names = (),
    devices: str | None = None,
    nodes: int | None = None,
    precision: str | None = None,
    seed: int | None = None,
    seeds: Seeds = "",
    set_: Set = (),
    plugin: Plugin = (),
    trust: Trust = False,
    json_: Json = False,
) -> None:
    """Train a classifier: alone, adversarially, or with any method that needs no teacher.

    Parameters
    ----------
    data
        A registered set, parquet:DIR, hub:NAME or folder:DIR.
    model
        A registered model, timm:NAME, torchvision:NAME or module.path:callable.
    method
        A registered method without teacher (`overproof list methods`).
    out
        The run folder to be made.
    config
        TOML file to begin with, such as RUN/config.toml.
    extra_data
        Images of a generator, named as data are: 0.7 of every batch (--set data.extra_share=...) are theirs.
    long_tail
        Thin the training images out, so that the first class has so many times those of the last, such as 100.
    augment
        crop, flip, cutout:8, randaugment:2:9, mixup:0.2, cutmix:1.0; repeatable.
    attack
        NAME[:key=value,...] for the final evaluation; repeatable.
    """
    plugins(plugin)
    attacks, overrides = attacks_of(attack, set_)
    table = layer(
        verb="train", data__name=data, data__augment=augment, data__extra=extra_data, data__long_tail=long_tail, model__name=model,
        method__name=method, seed=seed,
        train__epochs=epochs, train__batch_size=batch_size, train__lr=lr, train__devices=devices_of(devices), train__nodes=nodes,
        train__precision=precision, evaluation__attacks=attacks or None,
    )  # fmt: skip
    _execute(table, overrides, config=config, out=out, seeds=seeds, trust=trust, as_json=json_)


def distill(
    *,
    teacher: str | None = None,
    standard_teacher: str | None = None,
    student: str | None = None,
    data: str | None = None,
    method: str | None = None,
    out: Path,
    config: Path | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    extra_data: str | None = None,
    long_tail: float | None = None,
    augment: Names = (),
    attack: Names = (),
    devices: str | None = None,
    nodes: int | None = None,
    precision: str | None = None,
    seed: int | None = None,
    seeds: Seeds = "",
    set_: Set = (),
    plugin: Plugin = (),
    trust: Trust = False,
    json_: Json = False,
) -> None:
    """Train a student that learns from a teacher.

    Parameters
    ----------
    teacher
        The run folder of the teacher (other teachers: --set teacher.name=timm:NAME --set teacher.pretrained=true).
    standard_teacher
        The run folder of a second teacher, trained without attacks, for methods with two (iad-2, akd2).
    student
        A registered model, timm:NAME, torchvision:NAME or module.path:callable.
    data
        A registered set, parquet:DIR, hub:NAME or folder:DIR; for methods without data what the student is evaluated on, if anything.
    method
        A registered method with a teacher (`overproof list methods`); kd if nothing else is said.
    out
        The run folder to be made.
    config
        TOML file to begin with, such as RUN/config.toml.
    extra_data
        Images of a generator, named as data are: 0.7 of every batch (--set data.extra_share=...) are theirs.
    long_tail
        Thin the training images out, so that the first class has so many times those of the last, such as 100.
    augment
        crop, flip, cutout:8, randaugment:2:9, mixup:0.2, cutmix:1.0; repeatable.
    attack
        NAME[:key=value,...] for the final evaluation; repeatable.
    """
    plugins(plugin)
    attacks, overrides = attacks_of(attack, set_)
    table = layer(
        verb="distill", data__name=data, data__augment=augment, data__extra=extra_data, data__long_tail=long_tail, model__name=student,
        method__name=method,
        teacher__run=teacher,
        standard_teacher__run=standard_teacher, seed=seed, train__epochs=epochs, train__batch_size=batch_size, train__lr=lr,
        train__devices=devices_of(devices), train__nodes=nodes, train__precision=precision, evaluation__attacks=attacks or None,
    )  # fmt: skip
    _execute(table, overrides, config=config, out=out, seeds=seeds, trust=trust, as_json=json_)


def probe_linear(
    run: Path,
    *,
    out: Path,
    data: str | None = None,
    images: Literal["clean", "adv"] | None = None,
    which: Literal["best", "last"] = "best",
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    augment: Names = (),
    attack: Names = (),
    devices: str | None = None,
    precision: str | None = None,
    seed: int | None = None,
    seeds: Seeds = "",
    set_: Set = (),
    plugin: Plugin = (),
    trust: Trust = False,
    json_: Json = False,
) -> None:
    """Train a new last layer on the frozen features of a run: what are they worth, and for other data?

    Parameters
    ----------
    run
        The run folder whose features are taken.
    out
        The run folder to be made.
    data
        A registered set, parquet:DIR, hub:NAME or folder:DIR with images of the same channels; the run's own if absent.
    images
        What the last layer learns from: clean images, or adversarial ones against the whole network (adv).
    which
        Weights of the run.
    augment
        crop, flip, cutout:8, randaugment:2:9, mixup:0.2, cutmix:1.0; repeatable. None if absent, whatever the run had.
    attack
        NAME[:key=value,...] for the final evaluation, through the whole network; repeatable. The run's own if absent.
    """
    plugins(plugin)
    attacks, overrides = attacks_of(attack, set_)
    from overproof.config import merge
    from overproof.run.probing import probe_table

    table = probe_table(run, data=data, which=which)
    if attacks:
        table["evaluation"]["attacks"] = attacks
    given = layer(
        data__augment=augment, method__images=images, seed=seed, train__epochs=epochs, train__batch_size=batch_size, train__lr=lr,
        train__devices=devices_of(devices), train__precision=precision,
    )  # fmt: skip
    _execute(merge(table, given), overrides, config=None, out=out, seeds=seeds, trust=trust, as_json=json_)


def resume(run: Path, *, set_: Set = (), trust: Trust = False, plugin: Plugin = (), json_: Json = False) -> None:
    """Continue an interrupted run to the end; with --set also with other train.workers, evaluation.batch_size and the like."""
    plugins(plugin)
    from overproof.run.execute import resume as continue_run

    show_runs([continue_run(run, overrides=set_, trusted=trust).folder], run / "report.html", json_)
