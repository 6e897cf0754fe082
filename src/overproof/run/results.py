"""RESULTS.md, and the tables in README.md, from results/*.json."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from overproof.errors import FolderError
from overproof.folder import atomic, read_json
from overproof.run.recipes import read_recipe

HEADER = (
    "# Results",
    "",
    "Written by `overproof reproduce` from `results/*.json`. Accuracies in %, ours as mean ± standard error over seeds.",
)
Cells = dict[tuple[str, str], str]


def write_results(recipes: Iterable[Path], results: Path, path: Path) -> None:
    """Write the tables of all recipes and benchmarks; recipes without a row are named as not measured.

    Args:
        recipes: files with figures.
        results: the folder of NAME.json, table-NAME.json and bench-NAME.json.
        path: RESULTS.md; README.md beside it is brought up to date, too.

    Raises:
        FolderError: `path` was written by somebody else.
    """
    lines = list(HEADER)
    for recipe in recipes:
        about, known = read_recipe(recipe).about, results / f"{recipe.stem}.json"
        lines += ["", f"## {recipe.stem}", "", about.title + (f" ({about.paper})" if about.paper else ""), ""]
        lines += _recipe(read_json(known)) if known.exists() else ["Not measured yet."]
    lines += _tables(results) + _benchmarks(results)
    if path.exists() and not path.read_text("utf-8").startswith("\n".join(HEADER)):
        raise FolderError(f"{path} is somebody else's file; run `overproof reproduce` where RESULTS.md may be written.")
    with atomic(path) as file:
        file.write(("\n".join(lines) + "\n").encode())
    _embed(results, path.with_name("README.md"))


def _recipe(result: dict[str, Any]) -> list[str]:
    """The measured figures of one recipe, with what they were measured on."""
    seen = result["environment"]
    seconds = sum(value or 0 for value in result["seconds"].values())
    facts = f"{len(result['seeds'])} seed(s), {seen.get('device')}, torch {seen.get('torch')}, commit {seen.get('commit')}, "
    facts += f"{seen.get('date', '')[:10]}, {seconds:.0f} s of training: `{result['command']}`."
    notes = [result["notes"], ""] if result["notes"] else []
    return [*_figures(result["figures"]), "", *notes, facts]


def _figures(figures: list[dict[str, Any]]) -> list[str]:
    """Figures beside the published ones, or by subject and metric as far as their names ("SUBJECT, METRIC") say both."""
    if any(figure["published"] is not None for figure in figures):
        rows = ["| figure | ours | published | source |", "|---|---|---|---|"]
        for figure in figures:
            published = "" if figure["published"] is None else _told(figure, figure["published"])
            rows.append(f"| {figure['name']} | {_value(figure)} | {published} | {figure['source']} |")
        return rows
    grid, others = _grid(figures)
    plain = (
        ["| figure | ours |", "|---|---|", *(f"| {figure['name']} | {_value(figure)} |" for figure in others)] if others else []
    )
    return [*grid, *([""] if grid and plain else []), *plain]


def _grid(figures: list[dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """A table of subjects and metrics, and the figures that have no place in it: all of them if it would be half empty."""
    cells: Cells = {}
    others = []
    for figure in figures:
        subject, between, metric = figure["name"].partition(": ")
        if not between:
            subject, between, metric = figure["name"].rpartition(", ")
        if between and (subject, metric) not in cells:
            cells[subject, metric] = _value(figure)
        else:
            others.append(figure)
    subjects, metrics = (list(dict.fromkeys(key[part] for key in cells)) for part in (0, 1))
    if min(len(subjects), len(metrics)) < 2 or 2 * len(cells) < len(subjects) * len(metrics):
        return [], figures
    if len(metrics) > len(subjects):
        cells, subjects, metrics = {(b, a): value for (a, b), value in cells.items()}, metrics, subjects
    rows = [f"| {subject} | {' | '.join(cells.get((subject, metric), '') for metric in metrics)} |" for subject in subjects]
    return [f"| | {' | '.join(metrics)} |", "|---" * (len(metrics) + 1) + "|", *rows], others


def _factor(figure: dict[str, Any]) -> int:
    return 100 if figure.get("percent", True) else 1


def _value(figure: dict[str, Any]) -> str:
    error = "" if figure["standard_error"] is None else f" ± {_told(figure, figure['standard_error'])}"
    return f"{_told(figure, figure['mean'])}{error}"


def _told(figure: dict[str, Any], value: float) -> str:
    """`value` in the figure's unit with two places, and more where the figure itself is small."""
    size = abs(_factor(figure) * figure["mean"])
    places = 2 if size >= 0.1 or size == 0 else min(1 - math.floor(math.log10(size)), 6)
    return f"{_factor(figure) * value:.{places}f}"


def _tables(results: Path) -> list[str]:
    """What scripts left that turn a knob or try many attacks on a finished run: shares in %, other numbers as they are told."""
    lines: list[str] = []
    for path in sorted(results.glob("table-*.json")):
        found = read_json(path)
        seen = found["environment"]
        lines += ["", f"## {path.stem.removeprefix('table-')}", "", found["about"]]
        for told in found["tables"]:
            lines += ["", f"{told['title']}:", "", f"| {' | '.join(told['columns'])} |", "|---" * len(told["columns"]) + "|"]
            lines += [f"| {' | '.join(map(_cell, row))} |" for row in told["rows"]]
        lines += [
            "",
            f"{seen.get('device')}, torch {seen.get('torch')}, commit {seen.get('commit')}, {seen.get('date', '')[:10]}.",
        ]
    return lines


def _cell(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{100 * value:.1f}"


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
                f"| {who} | {100 * row['robust']:.2f} | {'' if row['seconds'] is None else format(row['seconds'], '.2f')} | "
                f"{row['forward']:.1f} | {row['backward']:.1f} |"
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
        rows = "\n".join(_recipe(read_json(known))) if known.exists() else "Not measured yet."
        return f"<!-- results:{match[1]} -->\n{rows}\n<!-- end -->"

    fresh = re.sub(r"<!-- results:([\w-]+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)
    if fresh != text:
        with atomic(readme) as file:
            file.write(fresh.encode())
