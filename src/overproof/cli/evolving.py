"""evolve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from overproof.cli.options import Json, Names, Plugin, Seeds, Set, Trust, layer, numbers, plugins, show


def evolve(
    *,
    data: str | None = None,
    name: str | None = None,
    out: Path,
    config: Path | None = None,
    generations: int | None = None,
    mutation: Names = (),
    judge: Path | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    augment: Names = (),
    seed: int | None = None,
    seeds: Seeds = "",
    set_: Set = (),
    plugin: Plugin = (),
    trust: Trust = False,
    json_: Json = False,
) -> None:
    """Let a population of generators learn to make images like those of a set, without labels.

    Parameters
    ----------
    data
        A registered set, parquet:DIR, hub:NAME or folder:DIR; or points of the plane: 8-gaussians, 25-gaussians, swiss-roll.
    name
        cegan, egan, iegan, gan (`overproof list evolutions`); cegan if nothing else is said.
    out
        The run folder to be made. `overproof resume` continues it, `overproof generate` makes images with it.
    config
        TOML file to begin with, such as RUN/config.toml. With another name only length, networks and looks are taken from its
        [evolution].
    mutation
        Losses of the generators: minimax, heuristic, least-squares, wgan, relativistic, ...; repeatable. One alone is a fixed loss.
    judge
        The run folder of a classifier of such images: which classes do the samples show?
    lr
        Of generators and discriminator (other options: --set evolution.fitness=iegan).
    augment
        crop, flip, ...; repeatable.
    """
    plugins(plugin)
    from overproof import console
    from overproof.config import read_config, resolve
    from overproof.run.execute import execute
    from overproof.run.prepare import Parts, refuse_code
    from overproof.run.seeds import execute_seeds

    table = layer(
        verb="evolve", seed=seed, data__name=data, data__augment=augment, judge__run=None if judge is None else str(judge),
        evolution__name=name, evolution__generations=generations, evolution__mutations=mutation,
        evolution__batch_size=batch_size, evolution__lr=lr, evolution__discriminator_lr=lr,
    )  # fmt: skip
    weakest: dict[str, Any] = {"evolution": {}}
    if config:
        weakest = refuse_code(resolve(read_config(config)), str(config), trust).table()
    resolved = resolve(weakest, table, overrides=set_)
    known, chosen_name = weakest.get("evolution") or {}, (resolved.evolution or {}).get("name")
    if known.get("name", chosen_name) != chosen_name:
        resolved = resolve({**weakest, "evolution": _course_alone(known)}, table, overrides=set_)
        console.note(f"{config} is of {known['name']!r}: its options are not those of {chosen_name!r}, and are left out.")
    chosen = numbers(seeds)
    if len(chosen) > 1:
        folders = execute_seeds(resolved, out, chosen, trusted=trust)
    else:
        if chosen:
            resolved = resolve(resolved.table(), {"seed": chosen[0]})
        folders = [execute(resolved, out, parts=Parts(trusted=trust)).folder]
    from overproof.report import write_report
    from overproof.report.words import samples_text

    page = write_report([folder.path for folder in folders], out / "report.html")
    found = [{"path": str(folder.path), **folder.samples} for folder in folders]
    told = [f"{row['path']}: {row['samples']} samples\n{samples_text(row)}" for row in found]
    show({"runs": found, "report": str(page)}, json_, "\n".join([*told, f"report: {page}"]))


def _course_alone(evolution: dict[str, Any]) -> dict[str, Any]:
    """Length, networks and looks: a run's file holds every option written out, and those of another evolution would be its copy."""
    from overproof.registry import Entry
    from overproof.run.course import Course

    known = Entry("course", Course).options()
    return {key: value for key, value in evolution.items() if key in known}
