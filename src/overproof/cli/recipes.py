"""run, demo, reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from overproof.cli.options import Json, Plugin, Seeds, Set, Trust, numbers, plugins, show, shown
from overproof.errors import NonFiniteLossError


def run(
    recipe: Path,
    *,
    out: Path | None = None,
    seeds: Seeds = "",
    set_: Set = (),
    plugin: Plugin = (),
    trust: Trust = False,
    json_: Json = False,
) -> None:
    """Run a recipe; what is finished is kept, what was interrupted goes on."""
    plugins(plugin)
    _run_recipe(recipe, out or Path("runs") / recipe.stem, seeds=seeds, overrides=set_, trust=trust, as_json=json_)


def _run_recipe(
    path: Path, out: Path, *, seeds: str, as_json: bool, overrides: Sequence[str] = (), trust: bool = False
) -> None:
    from overproof.run.recipes import read_recipe, run_recipe

    recipe = read_recipe(path, overrides)
    with shown(out / "report.html", as_json, title=recipe.about.title, baseline=recipe.about.baseline) as done:
        folders = run_recipe(recipe, out, seeds=numbers(seeds), overrides=overrides, trusted=trust)
        done += [folder for named in folders.values() for folder in named.values()]


def demo(*, out: Path = Path("runs/demo"), seeds: Seeds = "0", json_: Json = False) -> None:
    """The main job on real handwritten digits: teachers, students, attacks, one table, one page."""
    from overproof.run.recipes import recipes_home

    _run_recipe(recipes_home() / "demo.toml", out, seeds=seeds, as_json=json_)


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
    show(states, json_, "\n".join(f"{name}: {state}" for name, state in states.items()))
    if lost := [name for name, state in states.items() if state == "diverged"]:
        raise NonFiniteLossError(f"Training diverged in {', '.join(lost)}; what was not touched by it is kept.")
