"""Purifiers in a report: the knob as a curve and a table, and images on their way through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from overproof.errors import FolderError
from overproof.report.charts import Chart
from overproof.report.drawing import draw, line_style
from overproof.report.gallery import png
from overproof.report.reading import Run
from overproof.report.values import items, number, table

MOST = 8  # images shown


@dataclass(frozen=True)
class Shown:
    """One image as data URIs: untouched, attacked, with noise, rebuilt; and what is said of it."""

    clean: str
    attacked: str
    noisy: str
    purified: str
    label: str
    bare: str
    guarded: str


@dataclass(frozen=True)
class Purified:
    """What an evaluation tells of a purifier: which, a drawing, a row per level, the attacks, and images."""

    run: Run
    name: str
    about: str
    charts: list[Chart]
    rows: list[dict[str, Any]]
    attacks: list[str]
    examples: list[Shown]


def purified(run: Run) -> list[Purified]:
    """What each evaluation behind a purifier has to show: a curve, pictures, or both."""
    found = []
    for name, summary in run.evaluations.items():
        if "purifier" not in items(table(summary.get("guard")).get("guards")):
            continue
        rows, examples = level_rows(summary), []
        try:
            examples = _examples(run.folder.arrays(name, "gallery"), summary["classes"])
        except (FolderError, KeyError, IndexError, ValueError, TypeError) as error:
            run.warnings.append(
                f"{run.folder.path}: the images behind the purifier cannot be shown ({type(error).__name__}: {error})."
            )
        attacks = list(rows[0]["robust"]) if rows else []
        if rows or examples:
            charts = [_chart(rows, attacks)] if rows else []
            found.append(Purified(run, name, _about(summary), charts, rows, attacks, examples))
    return found


def _about(summary: Mapping[str, Any]) -> str:
    """Which purifier it was, in words."""
    facts = table(table(table(summary.get("protocol")).get("guards")).get("purifier"))
    kind = (
        "small, of convolutions" if "teacher_stats" in facts else "masked autoencoder" if facts.get("kind") == "mask" else "nim"
    )
    told = {
        "statistics of": facts.get("stats"),
        "sigma": facts.get("sigma"),
        "draws": facts.get("draws"),
        "parameters": facts.get("parameters"),
    }
    return (
        ", ".join([f"purifier: {kind}", *(f"{name} {value}" for name, value in told.items() if value is not None)])
        if facts
        else ""
    )


def level_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per level of an evaluation's curve: "sigma" (a number, or None for off), "clean", "robust" by attack, "noisy", "purified"."""
    found = table(summary.get("purifier"))
    robust = {str(name): items(values) for name, values in table(found.get("attacks")).items()}
    rows = []
    for place, level in enumerate(items(found.get("sigma"))):
        value = {key: number(_at(items(found.get(key)), place)) for key in ("clean", "noisy", "purified")}
        rows.append(
            {"sigma": number(level), **value, "robust": {name: number(_at(row, place)) for name, row in robust.items()}}
        )
    return rows


def _at(values: list[Any], place: int) -> Any:
    return values[place] if place < len(values) else None


def curve_text(summary: Mapping[str, Any]) -> str:
    """The curve for a terminal, beginning with a new line; "" without one."""
    rows = level_rows(summary)
    if not rows:
        return ""
    names = list(rows[0]["robust"])
    widths = [max(len(name), 8) for name in names]
    heads = "  ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    lines = [f"  {'sigma':>6}  {'clean':>8}  {heads}  error: noisy, purified"]
    for row in rows:
        shares = "  ".join(f"{_share(row['robust'][name]):>{width}}" for name, width in zip(names, widths, strict=True))
        errors = "" if row["noisy"] is None or row["purified"] is None else f"  {row['noisy']:.4f}, {row['purified']:.4f}"
        lines.append(f"  {_word(row['sigma']):>6}  {_share(row['clean']):>8}  {shares}{errors}")
    return "\n" + "\n".join(lines)


def _word(sigma: float | None) -> str:
    return "off" if sigma is None else f"{sigma:g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _chart(rows: list[dict[str, Any]], attacks: list[str]) -> Chart:
    levels = [row["sigma"] for row in rows if row["sigma"] is not None]
    left = min(levels, default=0.0) - 0.15 * (max(levels, default=1.0) - min(levels, default=0.0) or 1.0)
    places = [left if row["sigma"] is None else row["sigma"] for row in rows]
    order = sorted(range(len(rows)), key=places.__getitem__)
    lines = {"clean": [row["clean"] for row in rows]} | {name: [row["robust"][name] for row in rows] for name in attacks}

    def paint(axes: Any) -> None:
        for position, (name, values) in enumerate(lines.items()):
            kept = [(places[i], 100 * values[i]) for i in order if values[i] is not None]
            if kept:
                axes.plot(*zip(*kept, strict=True), marker="o", markersize=3, label=name, **line_style(position))
        axes.set_xticks([places[i] for i in order], [_word(rows[i]["sigma"]) for i in order])
        axes.set(xlabel="level of the purifier's noise, sigma", ylabel="accuracy (%)", ylim=(0, 102))
        axes.legend(frameon=False, fontsize=8)

    note = "Attacks go through the purifier at each level; those called -transfer were made on the bare model."
    return Chart(
        "Accuracy over the knob", draw(paint, "Clean and robust accuracy over the level of the purifier's noise"), note
    )


def _examples(gallery: dict[str, np.ndarray], classes: list[str]) -> list[Shown]:
    if "noisy" not in gallery:
        return []

    def word(name: str, row: int) -> str:
        value = int(gallery[name][row])
        return classes[value] if 0 <= value < len(classes) else str(value)

    def picture(name: str, row: int, scale: float) -> str:
        return png(gallery[name][row].astype(np.float64) / scale)

    return [
        Shown(
            picture("clean", row, 255), picture("adversarial", row, 1), picture("noisy", row, 255), picture("purified", row, 255),
            word("label", row), word("bare_prediction", row), word("purified_prediction", row),
        )
        for row in range(min(len(gallery["noisy"]), MOST))
    ]  # fmt: skip
