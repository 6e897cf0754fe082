"""Guards in a report: what the cache gained and why it says what it says, and the guarded model beside the bare one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from overproof.errors import FolderError
from overproof.folder import read_arrays, read_json
from overproof.report.charts import Chart
from overproof.report.drawing import INK, draw, line_style
from overproof.report.gallery import png
from overproof.report.maps import RIGHT, fill
from overproof.report.reading import Run
from overproof.report.values import items, number, table

HOME = "guards"


@dataclass(frozen=True)
class Neighbour:
    """A remembered image as a data URI (empty if it is not at hand), its class, and its cosine with the image."""

    image: str
    label: str
    similarity: float


@dataclass(frozen=True)
class Example:
    """A test image as a data URI, its class, what network, cache and both say, and its neighbours, the nearest first."""

    image: str
    label: str
    said: list[tuple[str, str, float]]
    neighbours: list[Neighbour]


@dataclass(frozen=True)
class Remembered:
    """What there is to tell of the cache of one run."""

    run: Run
    facts: list[tuple[str, str]]
    charts: list[Chart] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)


def remembered(run: Run) -> Remembered | None:
    """The cache of the run, or None; what cannot be read or drawn adds a warning."""
    path = run.folder.path / HOME / "cache.json"
    if not path.exists():
        return None
    try:
        found = table(read_json(path))
        told = table(found.get("description"))
        names = [str(name) for name in items(table(found.get("about")).get("classes"))]
        return Remembered(run, _facts(told), _charts(table(told.get("tuning"))), _examples(path.with_suffix(".npz"), names))
    except (FolderError, KeyError, IndexError, ValueError, TypeError) as error:
        run.warnings.append(f"{path}: the cache cannot be shown ({type(error).__name__}: {error}).")
        return None


def _facts(told: dict[str, Any]) -> list[tuple[str, str]]:
    size = number(told.get("bytes")) or 0.0
    return [
        ("layers", ", ".join(map(str, items(told.get("layers"))))),
        ("items", f"{number(told.get('items')) or 0:,.0f} from {number(told.get('images')) or 0:,.0f} images"),
        ("length of a key", f"{number(told.get('length')) or 0:,.0f}"),
        ("kept as", f"{told.get('dtype')}, {size / 2**20:,.1f} MiB"),
        ("theta", f"{number(told.get('theta')) or 0:.4g}"),
        ("lambda", f"{number(told.get('lam')) or 0:.3g}"),
    ]


def _charts(tuning: dict[str, Any]) -> list[Chart]:
    if not tuning:
        return []
    thetas, lams = [float(x) for x in tuning["thetas"]], [float(x) for x in tuning["lams"]]
    grid, alone = 100 * np.array(tuning["mixture"], float), 100 * np.array(tuning["cache"], float)
    if grid.shape != (len(thetas), len(lams)) or alone.shape != (len(thetas),):
        raise ValueError(f"a grid of shape {grid.shape} over {len(thetas)} theta and {len(lams)} lambda")
    bare = 100 * float(tuning["network"])
    note = f"{tuning['images']:,} validation images."
    drawn = [_over_lambda(thetas, lams, grid, alone, bare, float(tuning["theta"]), note)]
    return drawn + (
        [_map(thetas, lams, grid, (float(tuning["theta"]), float(tuning["lam"])), note)] if min(grid.shape) > 1 else []
    )


def _over_lambda(
    thetas: list[float], lams: list[float], grid: np.ndarray, alone: np.ndarray, bare: float, chosen: float, note: str
) -> Chart:
    middle = int(np.argmin(np.abs(np.array(thetas) - chosen)))
    rows = dict.fromkeys((middle, 0, len(thetas) - 1))

    def paint(axes: Any) -> None:
        for position, row in enumerate(rows):
            x, y = [0.0, *lams, 1.0], [bare, *grid[row], alone[row]]
            faint = {} if not position else {"linewidth": 1.0, "alpha": 0.6}
            axes.plot(x, y, label=f"theta {thetas[row]:.3g}", **line_style(position) | faint)
        axes.axhline(bare, color=INK, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.6)
        axes.set(xlabel="lambda (0: the network, 1: the cache alone)", ylabel="accuracy (%)")
        axes.legend(frameon=False, fontsize=8)

    return Chart(
        "Accuracy over the share of the cache",
        draw(paint, "Accuracy over lambda for three theta"),
        f"{note} Dashed: the network.",
    )


def _map(thetas: list[float], lams: list[float], grid: np.ndarray, chosen: tuple[float, float], note: str) -> Chart:
    low, high = float(grid.min()), float(grid.max())
    strength = 0.05 + 0.85 * (grid - low) / max(high - low, 1e-9)

    def paint(axes: Any) -> None:
        fill(axes, strength, RIGHT, (lams[0], lams[-1], thetas[0], thetas[-1]))
        axes.plot([min(chosen[1], lams[-1])], [chosen[0]], marker="+", color=INK, markersize=8)
        axes.grid(visible=False)
        axes.set(xlabel="lambda", ylabel="theta")

    text = f"{low:.2f} % (faint) to {high:.2f} % (strong); the cross marks what was chosen. {note}"
    return Chart("Accuracy over theta and lambda", draw(paint, "Accuracy over theta and lambda"), text)


def _examples(path: Path, names: Sequence[str]) -> list[Example]:
    if not path.exists():
        return []
    found = read_arrays(path)

    def word(value: Any) -> str:
        return names[int(value)] if 0 <= int(value) < len(names) else str(int(value))

    examples = []
    for row, image in enumerate(found["images"]):
        said = [(who, found[who][row]) for who in ("network", "cache") if who in found]
        words = [(who, word(shares.argmax()), float(shares.max())) for who, shares in said]
        near = zip(found["neighbour_labels"][row], found["similarity"][row], strict=True)
        pictures = [png(pixels / 255.0) for pixels in found["neighbours"][row]] if "neighbours" in found else []
        neighbours = [Neighbour(pictures[i] if pictures else "", word(y), float(s)) for i, (y, s) in enumerate(near)]
        both = [("together", word(found["predictions"][row]), float("nan"))]
        examples.append(Example(png(image / 255.0), word(found["labels"][row]), words + both, neighbours))
    return examples


def guard_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per attack of an evaluation behind guards; [] for other evaluations."""
    attacks = table(table(evaluation.get("guard")).get("attacks"))
    keys = ("wrong_and_not_rejected", "detected", "without")
    return [
        {
            "name": str(name),
            "transfer": table(facts).get("transfer") is True,
            **{key: number(table(facts).get(key)) for key in keys},
        }
        for name, facts in attacks.items()
    ]


def guard_text(summary: Mapping[str, Any]) -> str:
    """An evaluation behind guards, for a terminal."""
    found = table(summary.get("guard"))
    clean, bare, rejected = (number(found.get(key)) for key in ("clean", "clean_without", "clean_rejected"))
    rows = guard_rows(summary)
    width = max((len(row["name"]) for row in rows), default=0) + 2
    lines = [
        f"{summary['samples']} images behind {', '.join(map(str, items(found.get('guards'))))}",
        f"  clean accuracy {_share(clean)} (without guards {_share(bare)}), {_share(rejected)} of the right ones rejected",
        f"  {'wrong and not rejected':{max(width, 24)}} {'guarded':>8}  {'bare':>8}  detected",
    ]
    for row in rows:
        own = " (made without the guards)" if row["transfer"] else ""
        shares = f"{_share(row['wrong_and_not_rejected']):>8}  {_share(row['without']):>8}  {_share(row['detected'])}"
        lines.append(f"  {row['name']:{max(width, 24)}} {shares}{own}")
    if known := number(found.get("remembered")):
        lines.append(f"  note: {known:.0f} of the images are in the cache, which knows their labels")
    if found.get("caution"):
        lines.append(f"  warning: {found['caution']}")
    strongest = found.get("strongest")
    lines.append(f"  strongest: {strongest}" if strongest else "  no attack was made, so nothing is known about robustness")
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def description_text(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What was fitted, for a terminal."""
    lines = []
    for name, facts in found.items():
        told = _facts(dict(facts)) if name == "cache" else _plain(facts)
        lines.append(f"{name}: " + ", ".join(f"{key} {value}" for key, value in told))
        for group in (value for value in facts.values() if name != "cache" and isinstance(value, Mapping)):
            lines += [f"  {key}: " + ", ".join(f"{a} {b}" for a, b in _plain(table(inner))) for key, inner in group.items()]
        tuning = table(facts.get("tuning"))
        if tuning:
            best = max(max(row) for row in tuning["mixture"])
            figures = f"network {tuning['network']:.2%}, best mixture {best:.2%}, cache alone {max(tuning['cache']):.2%}"
            lines.append(f"  on {tuning['images']:,} validation images: {figures}")
    return "\n".join(lines)


def _plain(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of what is a single value."""
    simple = {key.replace("_", " "): value for key, value in facts.items() if isinstance(value, str | int | float)}
    return [(key, f"{value:.4g}" if isinstance(value, float) else str(value)) for key, value in simple.items()]


def predictions_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of classified files for a terminal."""
    width = max(len(str(row["file"])) for row in rows)
    label = max((len(str(row["label"])) for row in rows if row["label"]), default=0)
    lines = []
    for row in rows:
        if row["problem"] is not None:
            lines.append(f"{row['file']:{width}}  skipped: {row['problem']}")
            continue
        judged = "" if row["verdict"] is None else f"  {row['score']:8.4g}  {row['verdict']}"
        lines.append(f"{row['file']:{width}}  {row['label']:{label}}  {row['probability']:7.2%}{judged}")
    return "\n".join(lines)
