"""One row per run, and the columns that a terminal and the page both show."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overproof.report.attacked import Attacked, attacked, bounded
from overproof.report.reading import Run, read_runs
from overproof.report.values import number

Row = dict[str, Any]
NONE = "-"
SUSPECTED = "masked gradients suspected"


def summarise(folders: Sequence[str | Path]) -> list[Row]:
    """One row per run folder: what it is, and the figures of the evaluation that stands for it (None where nothing was measured).

    Accuracies are shares in [0, 1]; `clean_se`, `robust_se` and `attacks_se` are binomial standard errors sqrt(p (1 - p) / n) over n
    images. Attacks are those of all evaluations of the same images and weights; `attacks_samples` and `robust_samples` say on how many
    images. `robust` is the worst case over the attacks in `worst`; `suspected` says that the sanity panel suspects masked gradients,
    and `sizes` has the median change that an attack without radius needs. `apart` says in what the evaluation is not one of the run's
    own test images and best weights, `outdated` and `damaged` name evaluations that were not used, `warnings` tell of files.

    Args:
        folders: run folders, or folders that hold some; each run is listed once.

    Raises:
        FolderError: a folder does not exist or holds no run.
    """
    return [row(run) for run in read_runs(folders)]


def row(run: Run) -> Row:
    """The row of one run."""
    found, method = run.evaluation, run.section("method")
    samples, clean, seen = found.get("samples"), found.get("clean"), attacked(run)
    attacks = {name: seen.attacks[name]["robust"] for name in bounded(seen.attacks)}
    return {
        "name": run.name,
        "path": str(run.folder.path),
        "state": str(run.status.get("state", "unknown")),
        "method": str(method.get("name") or run.section("evolution").get("name") or run.config.get("verb") or NONE),
        "data": str(found.get("data") or run.section("data").get("name") or NONE),
        "model": str(run.section("model").get("name") or found.get("model") or run.model.get("class") or NONE),
        "parameters": number(run.model.get("parameters")) or found.get("parameters"),
        "seed": run.config.get("seed"),
        "evaluation": run.chosen,
        "samples": samples,
        "clean": clean,
        "clean_se": binomial(clean, samples),
        "robust": seen.robust,
        "robust_se": binomial(seen.robust, seen.samples),
        "robust_samples": seen.samples,
        "worst": seen.worst,
        "attacks": attacks,
        "attacks_se": {name: binomial(share, seen.images[name]) for name, share in attacks.items()},
        "attacks_samples": seen.images,
        "sizes": {name: facts["sizes"].get("median") for name, facts in seen.attacks.items() if name not in attacks},
        "suspected": seen.suspected,
        "agreement": number(found.get("agreement", {}).get("clean")),
        "ece": found.get("ece"),
        "seconds": number(run.status.get("seconds")),
        "se": "binomial",
        "protocol": _protocol(found, seen),
        "apart": list(run.measured(run.chosen).values()) if run.chosen else [],
        "outdated": run.outdated,
        "damaged": run.damaged,
        "warnings": run.warnings,
        "config": run.config,
    }


def binomial(share: float | None, samples: float | None) -> float | None:
    """Standard error of a share over `samples` images; None if either is unknown."""
    if share is None or not samples or not 0 <= share <= 1:
        return None
    return math.sqrt(share * (1 - share) / samples)


def _protocol(found: dict[str, Any], seen: Attacked) -> tuple[str, str] | None:
    """What must be equal for two clean, and two robust, accuracies to be comparable."""
    if not found:
        return None
    attacks = {
        name: [*(facts[key] for key in ("attack", "threat", "eps")), seen.images[name]] for name, facts in seen.attacks.items()
    }
    images = [found.get("data"), found.get("split"), found.get("samples")]
    return json.dumps(images, default=str), json.dumps(attacks, default=str, sort_keys=True)


def comparable(rows: Sequence[Row], part: int) -> bool:
    """Whether all measured rows used the same images (part 0), and the same attacks (part 1)."""
    measured = [row["protocol"] for row in rows if row["protocol"] and (part == 0 or row["robust"] is not None or row["sizes"])]
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
        """The best value among comparable rows that can be believed; None if all are equal."""
        values = [self.value(row) for row in rows if self.value(row) is not None and not self.doubted(row)]
        if not self.best or len(set(values)) < 2 or not comparable(rows, self.part):
            return None
        return max(values) if self.best > 0 else min(values)

    def doubted(self, row: Row) -> bool:
        """Whether the figure is one of robustness, of a model whose gradients seem masked."""
        return self.part == 1 and bool(row.get("suspected"))


def percent(share: float | None, error: float | None = None, sign: str = "") -> str:
    """A share in per cent, with its standard error."""
    if share is None:
        return NONE
    return f"{100 * share:{sign}.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def on_fewer(row: Row, images: float | None) -> str:
    """A mark for a figure that rests on fewer images than the others of its row."""
    return f" ({images:g} images)" if images is not None and row.get("samples") not in (None, images) else ""


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


def work(passes: dict[str, float]) -> str:
    """Forward and backward passes per image, where they were counted."""
    found = [passes.get(f"{key}_per_image") for key in ("forward", "backward")]
    return " + ".join(amount(value) for value in found) if any(found) else NONE


def _text(key: str, head: str, hint: str) -> Column:
    def show(row: Row) -> str:
        return NONE if row.get(key) is None else str(row[key])

    return Column(head, hint, lambda row: row.get(key), show, numeric=key in ("n", "seed"))


def _share(key: str, head: str, hint: str, part: int = 0) -> Column:
    def show(row: Row) -> str:
        text = percent(row[key], row.get(f"{key}_se")) + on_fewer(row, row.get(f"{key}_samples"))
        return f"{text}, {SUSPECTED}" if part and row.get("suspected") and row[key] is not None else text

    return Column(head, hint, lambda row: row[key], show, best=1, part=part)


def _attack(name: str) -> Column:
    def show(row: Row) -> str:
        text = percent(row["attacks"].get(name), row["attacks_se"].get(name)) + on_fewer(row, row["attacks_samples"].get(name))
        return f"{text} (?)" if row.get("suspected") and name in row["attacks"] else text

    hint = f"robust accuracy under {name} alone, in per cent"
    return Column(f"{name} %", hint, lambda row: row["attacks"].get(name), show, best=1, part=1)


def _size(name: str) -> Column:
    def value(row: Row) -> Any:
        return row["sizes"].get(name)

    def show(row: Row) -> str:
        return _decimals(value(row)) + on_fewer(row, row["attacks_samples"].get(name))

    hint = f"median size of the change that {name} needs to fool the model"
    return Column(f"{name} size", hint, value, show, best=1, part=1)


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
        *(_size(name) for name in dict.fromkeys(name for row in rows for name in row["sizes"])),
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
