"""Recipes: several runs that belong together, in one TOML file, repeated and resumed run by run.

[recipe]            title, paper, scale ("cpu" or "gpu"), seeds
[defaults.SECTION]  what all runs share
[runs.NAME]         a run; teacher.run = "@OTHER" refers to the run OTHER of the same recipe, and so do standard_teacher.run, judge.run
                    and model.run (a network to begin with, under a new last layer)
[[figures]]         name, run, metric, and the published value with its source, if there is one
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from overproof import console
from overproof.config import RunConfig, merge, parse_override, resolve
from overproof.errors import UnknownNameError, UsageError
from overproof.evaluation.comparison import check_options
from overproof.folder import RunFolder, read_toml
from overproof.run.explaining import check_resemblance
from overproof.run.in_a_row import REFERENCES, Row
from overproof.run.launch import refuse_in_a_row
from overproof.run.prepare import Parts, refuse_code
from overproof.run.seeds import WITHIN, radius_of

ALIKE = ("agreement", "mag-sim", "ang-sim", "kept", "fell", "paid")  # metrics of figures that compare two runs
WALKED = ("mag-sim", "ang-sim", "kept")  # of these, those of boundaries
PROBED = ("accuracy", "consensus", "fooled", "planes")  # likewise, by probes, on other data too


class About(BaseModel):
    """[recipe]"""

    model_config = ConfigDict(extra="forbid", frozen=True)
    title: str = ""
    paper: str = ""
    scale: str = Field("cpu", pattern="^(cpu|gpu)$")
    seeds: list[int] = [0]
    notes: str = ""
    baseline: str = Field("", description="the run whose figures the others are compared with, seed by seed")


class Figure(BaseModel):
    """[[figures]]: one number of the paper, and where ours stands in the runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    run: str
    metric: str
    evaluation: str = "test-best"
    minus: str = Field("", description="a run whose figure is subtracted, seed by seed")
    against: str = Field(
        "", description="a run with which the run is compared: agreement, mag-sim, ang-sim, kept, fell, paid, or by probes"
    )
    data: str = Field("", description="of figures by probes: another set than the run's own, or a change of it such as color")
    options: dict[str, Any] = Field(default_factory=dict, description="of the comparison or probe, such as targets or eps")
    percent: bool = Field(True, description="a share, told in per cent; else as it is (trace, lambda_max, ...)")
    published: float | None = None
    source: str = ""


@dataclass(frozen=True)
class Recipe:
    """A parsed recipe."""

    name: str
    about: About
    runs: dict[str, dict[str, Any]]
    defaults: dict[str, Any] = field(default_factory=dict)
    figures: tuple[Figure, ...] = ()

    def config(self, run: str, out: Path, seed: int, overrides: Iterable[str] = ()) -> RunConfig:
        """The resolved configuration of one run, its "@" references pointing into `out`; a seed of its own is added to `seed`."""
        table = merge(self.defaults, self.runs[run])
        table = merge(table, {"seed": seed + table.get("seed", 0)})
        for place, other in references(table).items():
            table = merge(table, {place: {"run": str(out / other)}})
        return resolve(table, overrides=overrides)


def read_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe. A plain run configuration is a recipe with one run.

    Raises:
        FolderError: absent or not TOML.
        UsageError: an unknown key, run or reference.
    """
    path = Path(path)
    table = read_toml(path)
    if "runs" not in table:
        alone = {key: value for key, value in table.items() if key != "seed"}
        return Recipe(path.stem, About(title=path.stem, seeds=[table.get("seed", 0)]), {path.stem: alone})
    for key in table:
        if key not in ("recipe", "defaults", "runs", "figures"):
            raise UnknownNameError(f"key of the recipe {path}:", key, ("recipe", "defaults", "runs", "figures"))
    try:
        about = About.model_validate(table.get("recipe", {}))
        found = tuple(Figure.model_validate(figure) for figure in table.get("figures", []))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(f"Recipe {path}, {place} = {first['input']!r}: {first['msg'].lower()}.") from None
    recipe = Recipe(path.stem, about, table["runs"], table.get("defaults", {}), found)
    for name in recipe.runs:
        _check_references(recipe, name, path)
        recipe.config(name, Path(), 0, overrides)
    for figure in found:
        for run in filter(None, (figure.run, figure.minus, figure.against)):
            if run not in recipe.runs:
                raise UnknownNameError(f"run in figure {figure.name!r} of {path}:", run, recipe.runs)
        if figure.against and figure.metric not in (*ALIKE, *PROBED):
            raise UnknownNameError(
                f"metric of figure {figure.name!r}, which compares two runs, of {path}:", figure.metric, (*ALIKE, *PROBED)
            )
        if WITHIN in figure.metric:
            radius_of(figure.metric.partition(WITHIN)[2], f"{path}, figure {figure.name!r}, metric {figure.metric!r}")
        for key, useful in (("data", PROBED), ("options", (*PROBED, *WALKED))):
            if getattr(figure, key) and not (figure.against and figure.metric in useful):
                raise UsageError(
                    f"{path}, figure {figure.name!r}: `{key}` needs `against`, and a metric among {', '.join(useful)}."
                )
        if figure.metric in WALKED:
            check_options(("boundary",), {name: value for name, value in figure.options.items() if name != "images"})
        elif figure.options or figure.data:
            check_resemblance(figure.metric, figure.options, recipe.config(figure.run, Path(), 0, overrides), figure.data)
    return recipe


def _check_references(recipe: Recipe, name: str, path: Path) -> None:
    before = list(recipe.runs)[: list(recipe.runs).index(name)]
    for place, other in references(merge(recipe.defaults, recipe.runs[name])).items():
        if other not in before:
            role = place.replace("_", " ")
            raise UnknownNameError(f"{role} of run {name!r} in {path} (it must come before):", other, before)


def references(table: Mapping[str, Any]) -> dict[str, str]:
    """The runs of the same recipe that a run learns from or begins with, by section: `run = "@OTHER"` without its sign."""
    found = {place: table.get(place, {}).get("run", "") for place in REFERENCES}
    return {place: run[1:] for place, run in found.items() if run.startswith("@")}


def run_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    seeds: Iterable[int] = (),
    overrides: Iterable[str] = (),
    deadline: float | None = None,
    trusted: bool = False,
) -> dict[int, dict[str, RunFolder]]:
    """All runs of a recipe, in order; finished ones are kept and unfinished ones resumed.

    Returns:
        Run folders by seed and name. With one seed they lie in `out/NAME`, else in `out/seed-N/NAME`.

    Raises:
        UsageError: several runs over several devices without torchrun.
        DivergedError: training diverged in some of them; the others are done.
    """
    seeds, overrides = tuple(seeds) or tuple(recipe.about.seeds), tuple(overrides)
    for text in overrides:
        parse_override(text)
    for name in recipe.runs:
        refuse_code(recipe.config(name, Path(out), 0, overrides), f"The recipe {recipe.name}", trusted)
    places = {seed: Path(out) / f"seed-{seed}" if len(seeds) > 1 else Path(out) for seed in seeds}
    planned = [
        (seed, name, RunFolder(place / name), recipe.config(name, place, seed, overrides))
        for seed, place in places.items()
        for name in recipe.runs
    ]
    refuse_in_a_row((config, folder) for _, _, folder, config in planned)
    folders: dict[int, dict[str, RunFolder]] = {}
    row = Row()
    for seed, name, folder, config in planned:
        folders.setdefault(seed, {})[name] = folder
        if not (folder.exists and folder.status.get("state") == "done"):
            console.note(f"{'resuming' if folder.exists else 'running'} {name}, seed {seed} -> {folder.path}")
        row.execute(config, folder, parts=Parts(trusted=trusted), deadline=deadline)
    row.finish()
    return folders


def recipes_home() -> Path:
    """The folder of the recipes that come with Overproof: inside the installed package, or in the source tree."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent.parent / "recipes"
