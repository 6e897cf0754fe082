"""Published figures beside ours: recipes -> results/NAME.json -> RESULTS.md. No figure is typed by hand."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from overproof import console
from overproof.config import RunConfig
from overproof.data import Splits
from overproof.errors import UnknownNameError
from overproof.folder import RunFolder, read_json, write_json
from overproof.run.comparing import similarities
from overproof.run.explaining import resemblance
from overproof.run.grouping import losers
from overproof.run.in_a_row import DivergedError
from overproof.run.prepare import data_of
from overproof.run.recipes import PROBED, Figure, Recipe, read_recipe, recipes_home, run_recipe
from overproof.run.results import write_results
from overproof.run.seeds import figure_of, mean_and_error
from overproof.training.safety import Interrupted

ASKED = "asked.json"  # beside the runs of a recipe: what pairs of them were asked


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
        By recipe: "measured", "known", "unfinished", "diverged" or "needs a GPU".

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
        found = result_of(recipe, folders, kept=out / ASKED, deadline=deadline)
    except Interrupted as stop:
        if deadline is None or time.monotonic() < deadline:
            raise  # a person stopped it, not the clock
        console.note(f"{recipe.name}: {stop}")
        return "unfinished"
    except DivergedError as error:
        console.note(f"{recipe.name}: {error}")
        return "diverged"
    write_json(results / f"{recipe.name}.json", found)
    return "measured"


def result_of(
    recipe: Recipe, folders: dict[int, dict[str, RunFolder]], *, kept: Path | None = None, deadline: float | None = None
) -> dict[str, Any]:
    """The content of results/NAME.json.

    Args:
        recipe: with figures.
        folders: its finished runs by seed and name.
        kept: a file that keeps what pairs of runs were asked, so that the next call goes on there.
        deadline: `time.monotonic()` at which to stop.

    Raises:
        Interrupted: by the deadline.
    """
    first = next(iter(next(iter(folders.values())).values()))
    seen = {key: value for key, value in first.environment.items() if key not in ("command", "platform")}
    runs = {f"{name}/{seed}": folder for seed, named in folders.items() for name, folder in named.items()}
    asked = Asked(kept, deadline)
    with console.bar("measuring", len(recipe.figures)) as bar:
        figures = []
        for number, figure in enumerate(recipe.figures):
            figures.append(_measured(figure, folders, asked))
            bar.update(number + 1)
    return {
        "name": recipe.name,
        "title": recipe.about.title,
        "paper": recipe.about.paper,
        "notes": recipe.about.notes,
        "seeds": list(folders),
        "figures": figures,
        "seconds": {name: folder.status.get("seconds") for name, folder in runs.items()},
        "environment": seen,
        "command": f"overproof reproduce {recipe.name}",
    }


def _measured(figure: Figure, folders: dict[int, dict[str, RunFolder]], asked: Asked) -> dict[str, Any]:
    values = []
    for named in folders.values():
        value = asked.value(figure, figure.run, named)
        values.append(value - (asked.value(figure, figure.minus, named) if figure.minus else 0))
    return {**figure.model_dump(), **mean_and_error(values)}


class Asked:
    """What figures ask about runs and about pairs of runs: data are read once, and pairs are compared once.

    Args:
        kept: see `result_of`; answers about runs that have other weights by now are left alone.
        deadline: see `result_of`.
    """

    def __init__(self, kept: Path | None = None, deadline: float | None = None) -> None:
        self.kept, self.deadline = kept, deadline
        self._data: dict[str, Splits] = {}
        self._alike: dict[str, dict[str, float]] = read_json(kept) if kept is not None and kept.exists() else {}

    def value(self, figure: Figure, run: str, named: dict[str, RunFolder]) -> float:
        """The figure of one run, and of the one it is held against, if any."""
        if not figure.against:
            return figure_of(named[run], figure.metric, figure.evaluation)
        other = named[figure.against]
        if figure.metric in ("fell", "paid"):
            return losers(named[run], other, figure.evaluation)[figure.metric]
        pair = (named[run].path, other.path, figure.evaluation.removeprefix("test-"))
        data, metric, options = figure.data, figure.metric, figure.options
        if metric not in PROBED:
            found = self._once((*pair, repr(options)), lambda: similarities(*pair, options=options, read=self._read))
            return found[metric]
        place = (*pair, data, metric, repr(options))
        found = self._once(place, lambda: resemblance(*pair, data=data, metric=metric, options=options, read=self._read))
        return found[metric]

    def _once(self, place: tuple[Any, ...], make: Callable[[], dict[str, float]]) -> dict[str, float]:
        run, other, which = place[:3]
        weights = [(path / "weights" / f"{which}.safetensors").stat().st_mtime_ns for path in (run, other)]
        key = json.dumps([str(part) for part in (*place, *weights)])
        if key not in self._alike:
            if self.deadline is not None and time.monotonic() > self.deadline:
                raise Interrupted("Stopped between two figures.")
            self._alike[key] = make()
            if self.kept is not None:
                write_json(self.kept, self._alike)
        return self._alike[key]

    def _read(self, config: RunConfig) -> Splits:
        key = json.dumps(config.table()["data"])
        if key not in self._data:
            self._data[key] = data_of(config)
        return self._data[key]
