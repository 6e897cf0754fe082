"""What the commands share: option types, parsing, printing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from overproof import console
from overproof.errors import UsageError
from overproof.folder import plain

Set = Annotated[
    tuple[str, ...], Parameter(name="--set", negative="", help="section.key=value of the configuration; repeatable.")
]
Plugin = Annotated[
    tuple[Path, ...], Parameter(negative="", help="Python file that registers more methods, attacks, models or data.")
]
Names = Annotated[tuple[str, ...], Parameter(negative="")]
Json = Annotated[bool, Parameter(name="--json", negative="", help="The result as one JSON object on standard output.")]
Trust = Annotated[
    bool, Parameter(negative="", help="Allow files that are read to name package.module:callable, and run that code.")
]
Seeds = Annotated[str, Parameter(help="Comma-separated seeds: one run each, mean ± standard error.")]


def plugins(paths: Sequence[Path]) -> None:
    from overproof.registry import load_plugin

    for path in paths:
        load_plugin(path)


def show(value: Any, as_json: bool, text: str) -> None:
    if console.leading():
        print(json.dumps(plain(value)) if as_json else text)


def numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UsageError(f"--seeds {text!r}: write whole numbers separated by commas, for example 0,1,2.") from None


def attacks_of(specs: Sequence[str], overrides: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """`--attack NAME[:key=value,...]`, NAME also as LIBRARY:NAME, with `--set attack.key=value` for all of them; returns the other overrides too."""
    from overproof.attacks.spelling import spelled
    from overproof.config import parse_override

    common: dict[str, Any] = {}
    for text in overrides:
        if text.startswith("attack."):
            common |= parse_override(text)["attack"]
    named: dict[str, dict[str, Any]] = {}
    for spec in specs:
        named[spec] = {**common, **spelled(spec)}
    if common and not named:
        raise UsageError("--set attack.… needs an --attack to belong to, for example --attack pgd.")
    return named, [text for text in overrides if not text.startswith("attack.")]


def layer(**given: Any) -> dict[str, Any]:
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


@contextmanager
def shown(output: Path, as_json: bool, **options: str) -> Iterator[list[Any]]:
    """A list for the folders of several runs, which are shown at the end; if some diverged, the others are."""
    from overproof.run.in_a_row import DivergedError

    folders: list[Any] = []
    try:
        yield folders
    except DivergedError as error:
        if error.done:
            show_runs(error.done, output, as_json, **options)
        raise
    show_runs(folders, output, as_json, **options)


def show_runs(folders: Sequence[Any], output: Path, as_json: bool, *, title: str = "Overproof", baseline: str = "") -> None:
    """Write the report and print the table: over seeds if there are several, with paired differences to `baseline`."""
    from overproof.report import group_by_seed, summarise, text_table, write_report

    if not console.leading():
        return
    paths = [folder.path for folder in folders]
    rows = summarise(paths)
    several = len({row["seed"] for row in rows}) > 1
    page = write_report(paths, output, title=title, baseline=(baseline or None) if several else None)
    groups = group_by_seed(rows, baseline or None) if several else []
    result = {"runs": rows, "report": str(page)} | ({"over_seeds": groups} if several else {})
    show(result, as_json, f"{text_table(groups if several else rows)}\n\nreport: {page}")


def devices_of(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.lstrip("-").isdigit() else text
