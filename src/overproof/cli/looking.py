"""evaluate, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from overproof.cli.options import Json, Names, Plugin, Set, Trust, attacks_of, devices_of, plugins, show
from overproof.errors import UsageError


def evaluate(
    run: Path | None = None,
    *,
    attack: Names = (),
    eps: str | None = None,
    norm: Literal["Linf", "L2", "L1", "L0"] | None = None,
    curve: str = "",
    data: str | None = None,
    split: Literal["train", "validation", "test"] = "test",
    limit: int | None = None,
    which: Literal["best", "last"] = "best",
    model: str | None = None,
    weights: Path | None = None,
    mean: str = "",
    std: str = "",
    teacher: Path | None = None,
    transfer_from: Path | None = None,
    sanity: int = 128,
    fisher: bool | None = None,
    guarded: bool = False,
    sigma: str = "",
    devices: str | None = None,
    name: str | None = None,
    seed: int = 0,
    set_: Set = (),
    plugin: Plugin = (),
    trust: Trust = False,
    json_: Json = False,
) -> None:
    """Measure a run, or any model with weights, on clean and attacked images.

    Parameters
    ----------
    run
        A run folder; the evaluation is kept in it.
    attack
        NAME[:key=value,...]; repeatable. --set attack.steps=40 applies to all.
    eps
        Radius for all attacks that have one, such as 8/255.
    norm
        Norm for all attacks that have a choice.
    curve
        Comma-separated radii for a robustness curve of the first attack, such as 0,2/255,4/255,8/255.
    data
        Another data set than the run's own.
    limit
        Use only so many images, the classes in proportion.
    model
        Instead of a run: a registered name, timm:NAME, torchvision:NAME or package.module:callable; with --weights FILE
        (safetensors or a state dict of plain tensors).
    mean, std
        With --model: the normalisation of its images, a number or one per channel, such as 0.49,0.48,0.45.
    teacher
        A run folder, for the agreement with it.
    transfer_from
        A run folder: the first attack is also crafted on that model and tried on this one.
    sanity
        Images on which the sanity panel looks for masked gradients; 0 for none.
    fisher
        Measure trace and largest eigenvalue of the Fisher information at each image, and repeat attacks on the cross-entropy with
        the margin; by default for runs that were trained with a penalty on it.
    guarded
        Put the run behind its guards: attacks go through them, and once more are made on the bare model.
    sigma
        With --guarded and a purifier: comma-separated levels of its noise, such as off,0,35,70,140, at which everything is measured too.
    devices
        Processes that share the work, one per device (without torchrun).
    name
        Under which the evaluation is kept; made from the attacks if absent.
    """
    plugins(plugin)
    attacks, overrides = attacks_of(attack, set_)
    attacks = _under(attacks, eps, norm)
    overrides += [
        f"model.{key}=" + (f"[{text}]" if "," in text else text) for key, text in (("mean", mean), ("std", std)) if text
    ]
    options: dict[str, Any] = {"attacks": attacks, "curve": curve, "data": data, "split": split, "limit": limit, "seed": seed}
    options |= {"teacher": teacher, "overrides": overrides, "sanity": sanity, "fisher": fisher, "transfer_from": transfer_from}
    if run is not None and (mean or std):
        raise UsageError("--mean and --std belong to --model; a run brings its own normalisation.")
    if run is not None and (model is not None or weights is not None):
        raise UsageError("Name either a run folder or --model with --weights, not both.")
    if run is None and (name is not None or which != "best"):
        raise UsageError("--name and --which belong to a run folder.")
    if sigma and not guarded:
        raise UsageError("--sigma is the knob of a purifier: say --guarded too.")
    if run is None and (model is None or data is None):
        raise UsageError(
            "Name a run folder, or a model and data: overproof evaluate --model timm:NAME --weights FILE --data NAME."
        )
    from overproof.report.guards import guard_text
    from overproof.report.purifier import curve_text
    from overproof.report.words import evaluation_text
    from overproof.run.judging import evaluate_model, evaluate_run
    from overproof.run.launch import processes

    kept = ""
    with processes(devices_of(devices)):
        if guarded:
            others = bool(curve or teacher or transfer_from or fisher or devices or which != "best")
            result = _behind_guards(run, {**options, "sigma": sigma}, name, trust, others=others)
        elif run is not None:
            result = evaluate_run(run, which=which, name=name, trusted=trust, **options)
        else:
            result = evaluate_model(str(model), weights, **options)
    if run is not None:
        kept = f"\n  kept: {run / 'evaluations' / result.summary['name']}.json"
    text = evaluation_text(result.summary) + (f"\n{guard_text(result.summary)}{curve_text(result.summary)}" if guarded else "")
    show(result.summary, json_, text + kept)


def _behind_guards(run: Path | None, options: dict[str, Any], name: str | None, trust: bool, *, others: bool) -> Any:
    if run is None or others:
        raise UsageError(
            "--guarded needs a run folder with guards, and knows neither --which, --curve, --teacher, --transfer-from, --fisher nor --devices: "
            "guards belong to the weights that they were fitted for, and every attack is made through the guards and on the bare model anyway."
        )
    from overproof.run.guard_evaluation import evaluate_guarded_run
    from overproof.run.purifying import levels_of

    known, levels = ("attacks", "data", "split", "limit", "seed", "overrides", "sanity"), levels_of(options["sigma"])
    return evaluate_guarded_run(run, name=name, trusted=trust, sigma=levels, **{key: options[key] for key in known})


def _under(attacks: dict[str, dict[str, Any]], eps: str | None, norm: str | None) -> dict[str, dict[str, Any]]:
    """The attacks with a common radius and norm, where they have such options and were not given their own."""
    from overproof.attacks import ATTACKS
    from overproof.registry import convert

    common = {} if eps is None else {"eps": convert(eps, float, "--eps")}
    common |= {} if norm is None else {"norm": norm}
    if common and not attacks:
        raise UsageError("--eps and --norm need an --attack to belong to, for example --attack pgd.")
    known = {name: ATTACKS.get(options["attack"]).options() for name, options in attacks.items()} if common else {}
    return {
        name: {**{key: value for key, value in common.items() if key in known[name]}, **options}
        for name, options in attacks.items()
    }


def report(
    runs: tuple[Path, ...],
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    baseline: str | None = None,
    json_: Json = False,
) -> None:
    """Write one page about one or several runs, from their folders alone.

    Parameters
    ----------
    runs
        Run folders, or folders that hold some.
    baseline
        A run, or a group of runs that differ in the seed: the others are compared with it, seed by seed.
    """
    from overproof.report import summarise, write_report

    page = write_report(runs, output, baseline=baseline)
    show({"report": str(page), "runs": summarise(runs)}, json_, str(page))
