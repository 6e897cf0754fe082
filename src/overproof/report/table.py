"""One row per run, and the columns that a terminal and the page both show."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overproof.report.reading import Run, number, read_runs

Row = dict[str, Any]
NONE = "-"


def summarise(folders: Sequence[str | Path]) -> list[Row]:
    """One row per run folder: what it is, and the figures of its main evaluation (None where nothing was measured).

    Accuracies are shares in [0, 1]; `clean_se`, `robust_se` and `attacks_se` are binomial standard errors
    sqrt(p (1 - p) / n) over the n images of that evaluation. `robust` is the worst case over the attacks in `attacks`.

    Args:
        folders: run folders; each is listed once.

    Raises:
        FolderError: a folder does not exist or holds no run.
    """
    return [row(run) for run in read_runs(folders)]


def row(run: Run) -> Row:
    """The row of one run."""
    found, method = run.evaluation, run.section("method")
    samples = found.get("samples")
    attacks = {name: facts["robust"] for name, facts in found.get("attacks", {}).items()}
    clean, robust = found.get("clean"), found.get("worst_case")
    return {
        "name": run.name,
        "path": str(run.folder.path),
        "state": str(run.status.get("state", "unknown")),
        "method": str(method.get("name") or run.config.get("verb") or NONE),
        "data": str(found.get("data") or run.section("data").get("name") or NONE),
        "model": str(run.section("model").get("name") or found.get("model") or run.model.get("class") or NONE),
        "parameters": number(run.model.get("parameters")) or found.get("parameters"),
        "seed": run.config.get("seed"),
        "evaluation": run.chosen,
        "samples": samples,
        "clean": clean,
        "clean_se": binomial(clean, samples),
        "robust": robust,
        "robust_se": binomial(robust, samples),
        "attacks": attacks,
        "attacks_se": {name: binomial(share, samples) for name, share in attacks.items()},
        "agreement": number(found.get("agreement", {}).get("clean")),
        "ece": found.get("ece"),
        "seconds": number(run.status.get("seconds")),
        "se": "binomial",
        "protocol": _protocol(found),
        "config": run.config,
    }


def binomial(share: float | None, samples: float | None) -> float | None:
    """Standard error of a share over `samples` images; None if either is unknown."""
    if share is None or not samples or not 0 <= share <= 1:
        return None
    return math.sqrt(share * (1 - share) / samples)


def _protocol(found: dict[str, Any]) -> tuple[str, str] | None:
    """What must be equal for two clean, and two robust, accuracies to be comparable."""
    if not found:
        return None
    attacks = {name: [facts[key] for key in ("attack", "threat", "eps")] for name, facts in found["attacks"].items()}
    images = [found.get("data"), found.get("split"), found.get("samples")]
    return json.dumps(images, default=str), json.dumps(attacks, default=str, sort_keys=True)


def comparable(rows: Sequence[Row], part: int) -> bool:
    """Whether all measured rows used the same images (part 0), and the same attacks (part 1)."""
    measured = [row["protocol"] for row in rows if row["protocol"] and (part == 0 or row["robust"] is not None)]
    return len({protocol[: part + 1] for protocol in measured}) <= 1


@dataclass(frozen=True)
class Column:
    """A column: `value` sorts, `show` is read; `best` is +1 if more is better, -1 if less is, 0 if neither."""

    head: str
    hint: str
    value: Callable[[Row], Any]
    show: Callable[[Row], str]
    best: int = 0
    part: int = 0
    numeric: bool = True

    def winner(self, rows: Sequence[Row]) -> Any:
        """The best value among comparable rows; None if all are equal."""
        values = [v for v in map(self.value, rows) if v is not None]
        if not self.best or len(set(values)) < 2 or not comparable(rows, self.part):
            return None
        return max(values) if self.best > 0 else min(values)


def percent(share: float | None, error: float | None = None, sign: str = "") -> str:
    """A share in per cent, with its standard error."""
    if share is None:
        return NONE
    return f"{100 * share:{sign}.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def amount(value: float | None) -> str:
    """A count with k, M or G."""
    if value is None:
        return NONE
    size, unit = next(((s, u) for s, u in ((1e9, " G"), (1e6, " M"), (1e3, " k")) if value >= s), (1, ""))
    return f"{value / size:.3g}{unit}"


def duration(seconds: float | None) -> str:
    """Seconds as a person would say them."""
    if seconds is None:
        return NONE
    size, unit = next(((s, u) for s, u in ((3600, "h"), (60, "min")) if seconds >= s), (1, "s"))
    return f"{seconds / size:.1f} {unit}"


def _text(key: str, head: str, hint: str) -> Column:
    def show(row: Row) -> str:
        return NONE if row.get(key) is None else str(row[key])

    return Column(head, hint, lambda row: row.get(key), show, numeric=key in ("n", "seed"))


def _share(key: str, head: str, hint: str, part: int = 0) -> Column:
    return Column(head, hint, lambda row: row[key], lambda row: percent(row[key], row.get(f"{key}_se")), best=1, part=part)


def _attack(name: str) -> Column:
    def show(row: Row) -> str:
        return percent(row["attacks"].get(name), row["attacks_se"].get(name))

    hint = f"robust accuracy under {name} alone, in per cent"
    return Column(f"{name} %", hint, lambda row: row["attacks"].get(name), show, best=1, part=1)


def _difference(key: str) -> Column:
    def show(row: Row) -> str:
        return percent(row.get(f"{key}_difference"), row.get(f"{key}_difference_se"), "+")

    hint = f"{key} accuracy minus the baseline's, paired by seed, in points: mean ± standard error over the seeds both have"
    return Column(f"Δ {key}", hint, lambda row: row.get(f"{key}_difference"), show)


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns that have something to say about `rows` (of runs, or of groups of seeds), figures first."""
    attacks = list(dict.fromkeys(name for row in rows for name in row["attacks"]))
    agreement = "share of images on which student and teacher predict the same class, in per cent"
    found = [
        _text("name", "run", "name of the run folder"),
        _text("method", "method", "method of training"),
        _share("clean", "clean %", "accuracy on untouched images, in per cent"),
        _share("robust", "robust %", "robust accuracy, in per cent: right untouched and under every attack", part=1),
        *(_attack(name) for name in attacks if any(len(row["attacks"]) > 1 for row in rows)),
        *(_difference(key) for key in ("clean", "robust")),
        _share("agreement", "agree %", agreement),
        Column("ECE", "expected calibration error", lambda r: r["ece"], lambda r: _decimals(r["ece"]), best=-1),
        _text("model", "model", "architecture"),
        Column("size", "number of parameters", lambda r: r["parameters"], lambda r: amount(r["parameters"])),
        _text("data", "data", "data set"),
        Column("time", "time spent on training", lambda r: r["seconds"], lambda r: duration(r["seconds"])),
        _text("n", "seeds", "number of seeds") if any("n" in row for row in rows) else _text("seed", "seed", "seed of the run"),
        _text("state", "state", "as the run itself last recorded it"),
    ]
    finished = all(row["state"] == "done" for row in rows)
    return [c for c in found if any(c.value(row) is not None for row in rows) and not (finished and c.head == "state")]


def _decimals(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}"


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader must know to read the columns rightly."""
    said = []
    kinds = {row["se"] for row in rows if row["clean"] is not None}
    if "seeds" in kinds:
        said.append(
            "±: standard error of the mean over seeds" + (" (one seed: binomial, over images)." if len(kinds) > 1 else ".")
        )
    elif kinds:
        said.append("±: binomial standard error over the images of one evaluation; it does not cover the choice of seed.")
    said += [
        f"Δ: difference from {base}, paired by seed."
        for base in dict.fromkeys(filter(None, (row.get("baseline") for row in rows)))
    ]
    sets = list(dict.fromkeys(tuple(row["attacks"]) for row in rows if row["robust"] is not None))
    said += [f"Robust accuracy (worst case over: {', '.join(names)})." for names in sets]
    calm = [row["name"] for row in rows if row["clean"] is not None and not row["attacks"]]
    if calm:
        said.append(f"Never attacked, so nothing is known about the robustness of: {', '.join(calm)}.")
    if not comparable(rows, 0):
        said.append("The runs were measured on different images: their figures are not comparable, and none is marked as best.")
    elif not comparable(rows, 1):
        said.append(
            "The runs were attacked differently: their robust accuracies are not comparable, and none is marked as best."
        )
    missing = [row["name"] for row in rows if row["clean"] is None]
    if missing:
        said.append(f"No evaluation was made of: {', '.join(missing)}.")
    return said


def text_table(rows: Sequence[Row]) -> str:
    """The rows of `summarise` or `group_by_seed` as aligned plain text, with notes on how to read them."""
    if not rows:
        return "No runs."
    chosen = columns(rows)
    lines = [[column.head for column in chosen], *([column.show(row) for column in chosen] for row in rows)]
    clean = [["".join(c if c.isprintable() else "?" for c in cell) for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in clean) for i in range(len(chosen))]

    def aligned(line: Sequence[str]) -> str:
        cells = zip(line, widths, chosen, strict=True)
        return "  ".join(c.rjust(width) if column.numeric else c.ljust(width) for c, width, column in cells).rstrip()

    head, *body = [aligned(line) for line in clean]
    return "\n".join([head, "-" * max(map(len, (head, *body))), *body, "", *notes(rows)])
