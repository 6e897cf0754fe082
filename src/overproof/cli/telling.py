"""list, show."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any, Literal

from overproof.cli.options import Json, Plugin, plugins, show
from overproof.errors import UsageError


def list_entries(
    kind: Literal["methods", "attacks", "models", "data", "guards", "probes", "evolutions"],
    *,
    plugin: Plugin = (),
    json_: Json = False,
) -> None:
    """Name everything of one kind, with paper and tags."""
    plugins(plugin)
    import importlib

    rooms = {"methods": "METHODS", "attacks": "ATTACKS", "models": "MODELS", "data": "DATA", "guards": "GUARDS"}
    rooms |= {"evolution": "EVOLUTIONS", "probes": "PROBES"}
    room = kind.removesuffix("s") if kind == "evolutions" else kind
    entries = getattr(importlib.import_module(f"overproof.{room}"), rooms[room]).entries() if room in rooms else []
    rows = [{"name": e.name, "summary": e.summary, "paper": e.paper, "url": e.url, "tags": list(e.tags)} for e in entries]
    width = max((len(row["name"]) for row in rows), default=0)
    show(rows, json_, "\n".join(f"{row['name']:{width}}  {row['summary']}" for row in rows) or f"There are no {kind} yet.")


def show_one(what: str, *, plugin: Plugin = (), json_: Json = False) -> None:
    """Tell what a run folder holds, or what options a method, attack, model or data set takes."""
    plugins(plugin)
    from overproof.folder import RunFolder

    if RunFolder(what).exists:
        _show_run(what, json_)
        return
    entry, kind = _entry(what)
    options = [{"name": o.name, "type": o.type_name, "default": str(o.default)} for o in entry.options().values()]
    text = f"{entry.name} ({kind}): {entry.summary}\n{entry.paper} {entry.url}\n\n"
    text += "\n".join(f"  {o['name']} = {o['default']}  ({o['type']})" for o in options)
    facts = {"name": entry.name, "kind": kind, "summary": entry.summary, "paper": entry.paper, "options": options}
    show(facts, json_, f"{text}\n\n{inspect.getdoc(entry.load()) or ''}")


def _show_run(place: str, as_json: bool) -> None:
    """What a run folder holds; what of it cannot be read is told on standard error."""
    from overproof import console
    from overproof.report import summarise, text_table
    from overproof.report.learned import method_text
    from overproof.report.reading import read_runs
    from overproof.report.words import samples_text

    (run,), rows = read_runs([place]), summarise([place])
    for text in dict.fromkeys(run.warnings):
        console.note(f"note: {text}")
    state = f"{run.folder.path}: {rows[0]['state']} {run.status.get('message', '')}"
    config = run.folder.path / "config.toml"
    parts = [
        state,
        config.read_text("utf-8") if run.config else "",
        text_table(rows),
        method_text(run.method),
        samples_text(run.samples),
    ]
    facts = {"status": run.status, "config": run.config, "method": run.method, "runs": rows, "samples": run.samples}
    show(facts, as_json, "\n".join(f"{part}\n" for part in parts if part).rstrip())


def _entry(name: str) -> tuple[Any, str]:
    from overproof.attacks import ATTACKS
    from overproof.data import DATA
    from overproof.errors import UnknownNameError
    from overproof.evolution import EVOLUTIONS
    from overproof.folder import RunFolder
    from overproof.guards import GUARDS
    from overproof.methods import METHODS
    from overproof.models import MODELS
    from overproof.probes import PROBES
    from overproof.report.reading import runs_in

    tables = (METHODS, ATTACKS, MODELS, DATA, GUARDS, EVOLUTIONS, PROBES)
    for table in tables:
        if name in table:
            return table.get(name), table.kind
    if Path(name).exists() or {"/", os.sep} & set(name):
        inside = next((parent for parent in Path(name).parents if RunFolder(parent).exists), None)
        remedy = f"It lies in one: overproof show {inside}." if inside else "Give the folder named by --out."
        remedy = f"It holds some: overproof report {name}." if not inside and runs_in(Path(name)) else remedy
        raise UsageError(f"{name} is not a run folder (no config.toml in it). {remedy}")
    raise UnknownNameError("run folder or name", name, [n for table in tables for n in table.names()])
