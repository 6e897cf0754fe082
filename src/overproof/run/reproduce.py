"""Published figures beside ours: recipes -> results/NAME.json -> RESULTS.md. No figure is typed by hand."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from overproof import console
from overproof.errors import UnknownNameError
from overproof.folder import RunFolder, write_json
from overproof.run.comparing import similarities
from overproof.run.explaining import resemblance
from overproof.run.grouping import losers
from overproof.run.recipes import PROBED, Figure, Recipe, read_recipe, recipes_home, run_recipe
from overproof.run.results import write_results
from overproof.run.seeds import figure_of, mean_and_error
from overproof.training.safety import Interrupted


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
    write_results(available(home).values(), results, results.parent / "RESULTS.md")
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
    alike: dict[Any, dict[str, Any]] = {}
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


def _measured(figure: Figure, folders: dict[int, dict[str, RunFolder]], alike: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    values = []
    for named in folders.values():
        value = _value(figure, figure.run, named, alike)
        values.append(value - (_value(figure, figure.minus, named, alike) if figure.minus else 0))
    return {**figure.model_dump(), **mean_and_error(values)}


def _value(figure: Figure, run: str, named: dict[str, RunFolder], alike: dict[Any, dict[str, Any]]) -> float:
    """The figure of one run; comparisons of two runs are made once and kept in `alike`."""
    if not figure.against:
        return figure_of(named[run], figure.metric, figure.evaluation)
    if figure.metric in ("fell", "paid"):
        return losers(named[run], named[figure.against], figure.evaluation)[figure.metric]
    key = (named[run].path, named[figure.against].path, figure.evaluation.removeprefix("test-"))
    if figure.metric in PROBED:
        place = (*key, figure.data, figure.metric, repr(figure.options))
        if place not in alike:
            alike[place] = resemblance(*key, data=figure.data, metric=figure.metric, options=figure.options)
        return float(alike[place][figure.metric])
    if key not in alike:
        alike[key] = similarities(*key, kept=alike.setdefault("data", {}))
    return float(alike[key][figure.metric])
