"""Published figures beside ours: recipes -> results/NAME.json -> RESULTS.md. No figure is typed by hand."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from overproof import console
from overproof.errors import FolderError, UnknownNameError
from overproof.folder import RunFolder, atomic, read_json, write_json
from overproof.run.comparing import similarities
from overproof.run.explaining import resemblance
from overproof.run.recipes import PROBED, Figure, Recipe, read_recipe, recipes_home, run_recipe
from overproof.run.seeds import figures, mean_and_error
from overproof.training.safety import Interrupted

HEADER = (
    "# Results",
    "",
    "Written by `overproof reproduce` from `results/*.json`. Accuracies in %, ours as mean ± standard error over seeds.",
)


def available(home: Path | None = None) -> dict[str, Path]:
    """Recipes with figures to reproduce, by name."""
    paths = sorted((home or recipes_home()).glob("*.toml"))
    return {path.stem: path for path in paths if read_recipe(path).figures}


def reproduce(
    names: Sequence[str] = (),
    *,
    minutes: float | None = None,
    out: Path = Path("runs/reproduce"),
    results: Path = Path("results"),
    home: Path | None = None,
    again: bool = False,
) -> dict[str, str]:
    """Run recipes that have no measured row yet; unfinished ones go on where they stopped.

    Args:
        names: recipes; all that fit this device ("gpu" recipes need one) if empty.
        minutes: stop in time, with everything resumable.
        out: where the runs are kept.
        results: where NAME.json is written.
        home: folder of recipes.
        again: also those that have results.

    Returns:
        By recipe: "measured", "known", "unfinished" or "needs a GPU".

    Raises:
        UnknownNameError: no such recipe.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    known = available(home)
    for name in names:
        if name not in known:
            raise UnknownNameError("recipe", name, known)
    states: dict[str, str] = {}
    for name in names or known:
        recipe = read_recipe(known[name])
        if (results / f"{name}.json").exists() and not again:
            states[name] = "known"
        elif recipe.about.scale == "gpu" and not torch.cuda.is_available() and not names:
            states[name] = "needs a GPU"
        else:
            states[name] = _measure(recipe, out / name, results, deadline)
    write_table(results, results.parent / "RESULTS.md", home)
    return states


def _measure(recipe: Recipe, out: Path, results: Path, deadline: float | None) -> str:
    begun = time.monotonic()
    if deadline is not None and begun > deadline:
        return "unfinished"
    try:
        folders = run_recipe(recipe, out, deadline=deadline)
    except Interrupted as stop:
        if deadline is None or time.monotonic() < deadline:
            raise  # a person stopped it, not the clock
        console.note(f"{recipe.name}: {stop}")
        return "unfinished"
    write_json(results / f"{recipe.name}.json", result_of(recipe, folders))
    return "measured"


def result_of(recipe: Recipe, folders: dict[int, dict[str, RunFolder]]) -> dict[str, Any]:
    """The content of results/NAME.json."""
    first = next(iter(next(iter(folders.values())).values()))
    seen = {key: value for key, value in first.environment.items() if key not in ("command", "platform")}
    runs = {f"{name}/{seed}": folder for seed, named in folders.items() for name, folder in named.items()}
    alike: dict[Any, dict[str, float]] = {}
    return {
        "name": recipe.name,
        "title": recipe.about.title,
        "paper": recipe.about.paper,
        "notes": recipe.about.notes,
        "seeds": list(folders),
        "figures": [_measured(figure, folders, alike) for figure in recipe.figures],
        "seconds": {name: folder.status.get("seconds") for name, folder in runs.items()},
        "environment": seen,
        "command": f"overproof reproduce {recipe.name}",
    }


def _measured(figure: Figure, folders: dict[int, dict[str, RunFolder]], alike: dict[Any, dict[str, float]]) -> dict[str, Any]:
    values = []
    for named in folders.values():
        value = _value(figure, figure.run, named, alike)
        values.append(value - (_value(figure, figure.minus, named, alike) if figure.minus else 0))
    return {**figure.model_dump(), **mean_and_error(values)}


def _value(figure: Figure, run: str, named: dict[str, RunFolder], alike: dict[Any, dict[str, float]]) -> float:
    """The figure of one run; comparisons of two runs are made once and kept in `alike`."""
    if not figure.against:
        return figures(named[run], figure.evaluation)[figure.metric]
    key = (named[run].path, named[figure.against].path, figure.evaluation.removeprefix("test-"))
    if figure.metric in PROBED:
        place = (*key, figure.data, figure.metric, repr(figure.options))
        if place not in alike:
            alike[place] = resemblance(*key, data=figure.data, metric=figure.metric, options=figure.options)
        return alike[place][figure.metric]
    if key not in alike:
        alike[key] = similarities(*key)
    return alike[key][figure.metric]


def write_table(results: Path, path: Path, home: Path | None = None) -> None:
    """RESULTS.md from the files in `results`; recipes without a row are named as not measured."""
    lines = list(HEADER)
    for name, recipe_path in available(home).items():
        about = read_recipe(recipe_path).about
        lines += ["", f"## {name}", "", about.title + (f" ({about.paper})" if about.paper else "")]
        lines += [""] + (
            _rows(read_json(results / f"{name}.json")) if (results / f"{name}.json").exists() else ["Not measured yet."]
        )
    lines += _benchmarks(results)
    if path.exists() and not path.read_text("utf-8").startswith("\n".join(HEADER)):
        raise FolderError(f"{path} is somebody else's file; run `overproof reproduce` where RESULTS.md may be written.")
    with atomic(path) as file:
        file.write(("\n".join(lines) + "\n").encode())
    _embed(results, path.with_name("README.md"))


def _benchmarks(results: Path) -> list[str]:
    """What `python benchmarks/NAME.py --save` left: ratios, and the rows of each comparison where there are several."""
    lines: list[str] = []
    for path in sorted(results.glob("bench-*.json")):
        found = read_json(path)
        seen = found["environment"]
        lines += [
            "",
            f"## benchmark {found['name']}",
            "",
            found["about"],
            "",
            "| case | ratio | spread |",
            "|---|---|---|",
        ]
        spread = {key: f"± {value:.3f}" for key, value in found.get("spread", {}).items()}
        lines += [f"| {key} | {ratio:.3f} | {spread.get(key, '')} |" for key, ratio in found["ratios"].items()]
        for name, comparison in found.get("table", {}).items():
            lines += [
                "",
                f"{name}:",
                "",
                "| who | robust % | seconds | forward / image | backward / image |",
                "|---|---|---|---|---|",
            ]
            lines += [
                f"| {who} | {100 * row['robust']:.2f} | {row['seconds']:.2f} | {row['forward']:.1f} | {row['backward']:.1f} |"
                for who, row in comparison["rows"].items()
            ]
        if memory := found.get("memory_mib"):
            lines += ["", "Peak memory in MiB: " + ", ".join(f"{key} {value:.0f}" for key, value in memory.items()) + "."]
        outcome = "equal" if found["equal"] else "NOT equal"
        lines += [
            "",
            f"Outcome {outcome}; {seen.get('device')}, torch {seen.get('torch')}, commit {seen.get('commit')}, {seen.get('date', '')[:10]}.",
        ]
    return lines


def _embed(results: Path, readme: Path) -> None:
    """Refresh the tables between `<!-- results:NAME -->` and `<!-- end -->`, if the file has such places."""
    if not readme.exists():
        return
    text = readme.read_text("utf-8")

    def table(match: re.Match[str]) -> str:
        known = results / f"{match[1]}.json"
        rows = "\n".join(_rows(read_json(known))) if known.exists() else "Not measured yet."
        return f"<!-- results:{match[1]} -->\n{rows}\n<!-- end -->"

    fresh = re.sub(r"<!-- results:([\w-]+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)
    if fresh != text:
        with atomic(readme) as file:
            file.write(fresh.encode())


def _rows(result: dict[str, Any]) -> list[str]:
    seen = result["environment"]
    compared = any(figure["published"] is not None for figure in result["figures"])
    rows = ["| figure | ours | published | source |", "|---|---|---|---|"] if compared else ["| figure | ours |", "|---|---|"]
    for figure in result["figures"]:
        factor = 100 if figure.get("percent", True) else 1
        error = "" if figure["standard_error"] is None else f" ± {factor * figure['standard_error']:.2f}"
        published = "" if figure["published"] is None else f"{factor * figure['published']:.2f}"
        row = f"| {figure['name']} | {factor * figure['mean']:.2f}{error} |"
        rows.append(row + (f" {published} | {figure['source']} |" if compared else ""))
    seconds = sum(value or 0 for value in result["seconds"].values())
    facts = f"{len(result['seeds'])} seed(s), {seen.get('device')}, torch {seen.get('torch')}, commit {seen.get('commit')}, "
    facts += f"{seen.get('date', '')[:10]}, {seconds:.0f} s of training: `{result['command']}`."
    notes = [result["notes"], ""] if result["notes"] else []
    return [*rows, "", *notes, facts]
