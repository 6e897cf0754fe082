"""The command line: thin, quick to start, and honest in its exit code (0 done, 1 failed, 2 bad usage)."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Group, Parameter

from overproof import console
from overproof.errors import OverproofError, UsageError

app = App(name="overproof", help="Distil image classifiers that are small, accurate and hard to fool.", version_flags=["--version"])

Set = Annotated[tuple[str, ...], Parameter(name="--set", negative="", help="section.key=value of the configuration; repeatable.")]
Plugin = Annotated[tuple[Path, ...], Parameter(negative="", help="Python file that registers more methods, attacks, models or data.")]
Json = Annotated[bool, Parameter(name="--json", negative="", help="The result as one JSON object on standard output.")]
Seeds = Annotated[str, Parameter(help="Comma-separated seeds: one run each, mean ± standard error.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit."""
    sys.exit(call(list(sys.argv[1:] if arguments is None else arguments)))


def call(arguments: list[str]) -> int:
    """Run one command; returns the exit code."""
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except KeyboardInterrupt:
        return _fail("Stopped.", 1, debug)
    except UsageError as error:
        return _fail(str(error), 2, debug)
    except OverproofError as error:
        return _fail(str(error), 1, debug)
    except BrokenPipeError:
        return 1
    except Exception as error:
        if type(error).__module__.startswith("cyclopts"):
            return _fail(str(error), 2, debug)
        return _fail(f"{type(error).__name__}: {error} (--debug shows where.)", 1, debug)
    return 0


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"overproof: {message}", file=sys.stderr)
    return code


def _plugins(paths: Sequence[Path]) -> None:
    from overproof.registry import load_plugin

    for path in paths:
        load_plugin(path)


def _print(value: Any, as_json: bool, text: str) -> None:
    print(json.dumps(value, default=str) if as_json else text)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"--seeds {text!r}: write whole numbers separated by commas, for example 0,1,2.") from None


def _attacks(specs: Sequence[str], overrides: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """`--attack NAME[:key=value,...]` with `--set attack.key=value` for all of them; returns the other overrides too."""
    from overproof.config import parse_override

    common: dict[str, Any] = {}
    for text in overrides:
        if text.startswith("attack."):
            common |= parse_override(text)["attack"]
    named: dict[str, dict[str, Any]] = {}
    for spec in specs:
        name, _, rest = spec.partition(":")
        own: dict[str, Any] = {}
        for part in filter(None, rest.split(",")):
            own |= parse_override(part)
        named[spec] = {"attack": name, **common, **own}
    if common and not named:
        raise UsageError("--set attack.… needs an --attack to belong to, for example --attack pgd.")
    return named, [text for text in overrides if not text.startswith("attack.")]


def _layer(**given: Any) -> dict[str, Any]:
    """Command-line values as a configuration table; what was not given stays out."""
    table: dict[str, Any] = {}
    for path, value in given.items():
        if value is None or value == ():
            continue
        section, _, key = path.partition("__")
        if key:
            table.setdefault(section, {})[key] = list(value) if isinstance(value, tuple) else value
        else:
            table[section] = value
    return table


def _execute(layer: dict[str, Any], overrides: Sequence[str], *, config: Path | None, out: Path, seeds: str, as_json: bool) -> None:
    from overproof.config import read_config, resolve

    resolved = resolve(read_config(config) if config else {}, layer, overrides=overrides)
    chosen = _numbers(seeds)
    if len(chosen) > 1:
        from overproof.run.seeds import execute_seeds

        folders = execute_seeds(resolved, out, chosen)
    else:
        from overproof.run.execute import execute

        if chosen:
            resolved = resolved.model_copy(update={"seed": chosen[0]})
        folders = [execute(resolved, out).folder]
    _report(folders, out / "report.html", as_json)


def _report(folders: Sequence[Any], output: Path, as_json: bool, title: str = "Overproof") -> None:
    """Write the report and print the table."""
    from overproof.report import summarise, text_table, write_report

    paths = [folder.path for folder in folders]
    rows = summarise(paths)
    page = write_report(paths, output, title=title)
    result = {"runs": rows, "report": str(page)}
    if len(paths) > 1:
        result |= _over_seeds(folders)
    _print(result, as_json, f"{text_table(rows)}\n\nreport: {page}")


@app.command
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
    augment: tuple[str, ...] = (),
    attack: tuple[str, ...] = (),
    devices: str | None = None,
    nodes: int | None = None,
    precision: str | None = None,
    seed: int | None = None,
    seeds: Seeds = "",
    set_: Set = (),
    plugin: Plugin = (),
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
    augment
        crop, flip, cutout:8, randaugment:2:9, mixup:0.2, cutmix:1.0; repeatable.
    attack
        NAME[:key=value,...] for the final evaluation; repeatable.
    """
    _plugins(plugin)
    attacks, overrides = _attacks(attack, set_)
    layer = _layer(
        verb="train", data__name=data, data__augment=augment, model__name=model, method__name=method, seed=seed,
        train__epochs=epochs, train__batch_size=batch_size, train__lr=lr, train__devices=_devices(devices), train__nodes=nodes,
        train__precision=precision, evaluation__attacks=attacks or None,
    )  # fmt: skip
    _execute(layer, overrides, config=config, out=out, seeds=seeds, as_json=json_)


def _devices(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.lstrip("-").isdigit() else text


@app.command
def distill(
    *,
    teacher: str | None = None,
    student: str | None = None,
    data: str | None = None,
    method: str = "kd",
    out: Path,
    config: Path | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    augment: tuple[str, ...] = (),
    attack: tuple[str, ...] = (),
    devices: str | None = None,
    nodes: int | None = None,
    precision: str | None = None,
    seed: int | None = None,
    seeds: Seeds = "",
    set_: Set = (),
    plugin: Plugin = (),
    json_: Json = False,
) -> None:
    """Train a student that learns from a teacher.

    Parameters
    ----------
    teacher
        The run folder of the teacher (other teachers: --set teacher.name=timm:NAME --set teacher.pretrained=true).
    student
        A registered model, timm:NAME, torchvision:NAME or module.path:callable.
    data
        A registered set, parquet:DIR, hub:NAME or folder:DIR.
    method
        A registered method with a teacher (`overproof list methods`).
    out
        The run folder to be made.
    config
        TOML file to begin with, such as RUN/config.toml.
    augment
        crop, flip, cutout:8, randaugment:2:9, mixup:0.2, cutmix:1.0; repeatable.
    attack
        NAME[:key=value,...] for the final evaluation; repeatable.
    """
    _plugins(plugin)
    attacks, overrides = _attacks(attack, set_)
    layer = _layer(
        verb="distill", data__name=data, data__augment=augment, model__name=student, method__name=method, teacher__run=teacher,
        seed=seed, train__epochs=epochs, train__batch_size=batch_size, train__lr=lr, train__devices=_devices(devices),
        train__nodes=nodes, train__precision=precision, evaluation__attacks=attacks or None,
    )  # fmt: skip
    _execute(layer, overrides, config=config, out=out, seeds=seeds, as_json=json_)


@app.command
def evaluate(
    run: Path | None = None,
    *,
    attack: tuple[str, ...] = (),
    curve: str = "",
    data: str | None = None,
    split: Literal["train", "validation", "test"] = "test",
    limit: int | None = None,
    which: Literal["best", "last"] = "best",
    model: str | None = None,
    weights: Path | None = None,
    teacher: Path | None = None,
    name: str | None = None,
    seed: int = 0,
    set_: Set = (),
    plugin: Plugin = (),
    json_: Json = False,
) -> None:
    """Measure a run, or any model with weights, on clean and attacked images.

    Parameters
    ----------
    run
        A run folder; the evaluation is kept in it.
    attack
        NAME[:key=value,...]; repeatable. --set attack.eps=8/255 applies to all.
    curve
        Comma-separated radii for a robustness curve of the first attack, such as 0,2/255,4/255,8/255.
    data
        Another data set than the run's own.
    limit
        Use only the first so many test images.
    model
        Instead of a run: a model by name; with --weights FILE (safetensors or a state dict of plain tensors).
    teacher
        A run folder, for the agreement with it.
    name
        Under which the evaluation is kept; made from the attacks if absent.
    """
    _plugins(plugin)
    attacks, overrides = _attacks(attack, set_)
    from overproof.run.judging import evaluate_model, evaluate_run

    options: dict[str, Any] = {"attacks": attacks, "curve": curve, "data": data, "split": split, "limit": limit, "seed": seed}
    options |= {"teacher": teacher, "overrides": overrides}
    if run is not None:
        result = evaluate_run(run, which=which, name=name, **options)
    elif model is not None and data is not None:
        result = evaluate_model(model, weights, **options)
    else:
        raise UsageError("Name a run folder, or a model and data: overproof evaluate --model timm:NAME --weights FILE --data NAME.")
    _print(result.summary, json_, _evaluation_text(result.summary))


def _evaluation_text(summary: dict[str, Any]) -> str:
    lines = [f"{summary['samples']} images, clean accuracy {summary['clean']:.2%}"]
    for name, facts in summary["attacks"].items():
        lines.append(f"  {name:24} {facts['threat']}({facts['eps']:.5g})  robust accuracy {facts['robust']:.2%}  {facts['seconds']:.1f} s")
    if summary["worst_case"] is not None:
        lines.append(f"  {'worst case':24} robust accuracy {summary['worst_case']:.2%}")
    if summary["curve"]:
        pairs = zip(summary["curve"]["eps"], summary["curve"]["robust"], strict=True)
        lines.append("  curve: " + "  ".join(f"{eps:.4g}: {robust:.2%}" for eps, robust in pairs))
    if summary["agreement"]:
        lines.append(f"  agreement with the teacher {summary['agreement']['clean']:.2%}")
    lines.append(f"  ECE {summary['ece']:.4f}  NLL {summary['nll']:.4f}  {summary['parameters']:,} parameters")
    return "\n".join(lines + [f"  warning: {text}" for text in summary["warnings"]])


@app.command
def resume(run: Path, *, plugin: Plugin = (), json_: Json = False) -> None:
    """Continue an interrupted run to the end."""
    _plugins(plugin)
    from overproof.run.execute import resume as continue_run

    _report([continue_run(run).folder], run / "report.html", json_)


@app.command
def report(runs: tuple[Path, ...], *, output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None, json_: Json = False) -> None:
    """Write one page about one or several runs, from their folders alone."""
    from overproof.folder import RunFolder
    from overproof.report import summarise, write_report

    folders = [RunFolder(run).require().path for run in runs]
    page = write_report(folders, output)
    _print({"report": str(page), "runs": summarise(folders)}, json_, str(page))


KINDS = ("methods", "attacks", "models", "data", "guards", "probes")


@app.command(name="list")
def list_(kind: Literal["methods", "attacks", "models", "data", "guards", "probes"], *, plugin: Plugin = (), json_: Json = False) -> None:
    """Name everything of one kind, with paper and tags."""
    _plugins(plugin)
    import importlib

    rooms = {"methods": "METHODS", "attacks": "ATTACKS", "models": "MODELS", "data": "DATA"}
    entries = getattr(importlib.import_module(f"overproof.{kind}"), rooms[kind]).entries() if kind in rooms else []
    rows = [{"name": e.name, "summary": e.summary, "paper": e.paper, "url": e.url, "tags": list(e.tags)} for e in entries]
    width = max((len(row["name"]) for row in rows), default=0)
    _print(rows, json_, "\n".join(f"{row['name']:{width}}  {row['summary']}" for row in rows) or f"There are no {kind} yet.")


@app.command
def show(what: str, *, plugin: Plugin = (), json_: Json = False) -> None:
    """Tell what a run folder holds, or what options a method, attack, model or data set takes."""
    _plugins(plugin)
    from overproof.folder import RunFolder

    if RunFolder(what).exists:
        from overproof.report import summarise, text_table

        folder = RunFolder(what)
        facts = {"status": folder.status, "config": folder.config, "runs": summarise([folder.path])}
        state = f"{folder.path}: {folder.status['state']} {folder.status.get('message', '')}"
        _print(facts, json_, f"{state}\n\n{(folder.path / 'config.toml').read_text()}\n{text_table(facts['runs'])}")
        return
    entry, kind = _entry(what)
    options = [{"name": o.name, "type": o.type_name, "default": str(o.default)} for o in entry.options().values()]
    text = f"{entry.name} ({kind}): {entry.summary}\n{entry.paper} {entry.url}\n\n"
    text += "\n".join(f"  {o['name']} = {o['default']}  ({o['type']})" for o in options)
    facts = {"name": entry.name, "kind": kind, "summary": entry.summary, "paper": entry.paper, "options": options}
    _print(facts, json_, f"{text}\n\n{entry.load().__doc__ or ''}")


def _entry(name: str) -> tuple[Any, str]:
    from overproof.attacks import ATTACKS
    from overproof.data import DATA
    from overproof.errors import UnknownNameError
    from overproof.methods import METHODS
    from overproof.models import MODELS

    tables = (METHODS, ATTACKS, MODELS, DATA)
    for table in tables:
        if name in table:
            return table.get(name), table.kind
    raise UnknownNameError("run folder or name", name, [n for table in tables for n in table.names()])


@app.command
def run(recipe: Path, *, out: Path | None = None, seeds: Seeds = "", set_: Set = (), plugin: Plugin = (), json_: Json = False) -> None:
    """Run a recipe; what is finished is kept, what was interrupted goes on."""
    _plugins(plugin)
    _run_recipe(recipe, out or Path("runs") / recipe.stem, seeds, set_, json_)


def _run_recipe(path: Path, out: Path, seeds: str, overrides: Sequence[str], as_json: bool) -> None:
    from overproof.run.recipes import read_recipe, run_recipe

    recipe = read_recipe(path, overrides)
    folders = run_recipe(recipe, out, seeds=_numbers(seeds), overrides=overrides)
    flat = [folder for named in folders.values() for folder in named.values()]
    _report(flat, out / "report.html", as_json, recipe.about.title)


@app.command
def demo(*, out: Path = Path("runs/demo"), seeds: Seeds = "", json_: Json = False) -> None:
    """The main job on real handwritten digits: teachers, students, attacks, one table, one page."""
    from overproof.run.recipes import recipes_home

    _run_recipe(recipes_home() / "demo.toml", out, seeds, (), json_)


@app.command
def reproduce(
    *names: str,
    minutes: float | None = None,
    out: Path = Path("runs/reproduce"),
    results: Path = Path("results"),
    again: Annotated[bool, Parameter(negative="")] = False,
    json_: Json = False,
) -> None:
    """Measure published figures that have no row yet; resumable within the time given.

    Parameters
    ----------
    names
        Recipes; all that fit this machine if none is named.
    minutes
        Stop in time; the next call goes on.
    """
    from overproof.run.reproduce import reproduce as measure

    states = measure(names, minutes=minutes, out=out, results=results, again=again)
    _print(states, json_, "\n".join(f"{name}: {state}" for name, state in states.items()))
