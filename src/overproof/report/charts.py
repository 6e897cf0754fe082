"""What the page draws: accuracy against robustness, training, robustness over radii, classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from overproof.report.drawing import INK, PALETTE, draw, line_style
from overproof.report.reading import Run
from overproof.report.table import SUSPECTED, Row, amount, binomial
from overproof.report.values import items, number, table

POINTS = 1500  # of all lines of a drawing together
TERMS = 6
BARS = 20

Line = tuple[list[float], list[float]]
SPLITS = "Bold: validation split. Faint: training images."
TEACHER = [("train", f"teacher reliability/{key}") for key in ("probability of the label", "share below 0.5")]
TRUST = "On the student's adversarial images. Bold: the teacher's mean probability of the label. Faint: share of images below one half."


@dataclass(frozen=True)
class Chart:
    """A drawing with its title and what must be said about it."""

    title: str
    svg: str
    note: str = ""


def scatter(rows: Sequence[Row]) -> Chart | None:
    """Clean against robust accuracy, area growing with the number of parameters; None unless two runs have both."""
    shown = [(i, row) for i, row in enumerate(rows) if row["robust"] is not None]
    if len(shown) < 2:
        return None
    sizes = [row["parameters"] or 0 for _, row in shown]
    largest = max(sizes) or 1

    def paint(axes: Any) -> None:
        for (position, row), size in zip(shown, sizes, strict=True):
            style, x, y = line_style(position), 100 * row["clean"], 100 * row["robust"]
            errors = {"xerr": 100 * (row["clean_se"] or 0), "yerr": 100 * (row["robust_se"] or 0)}
            axes.errorbar(x, y, **errors, color=style["color"], linewidth=0.8, alpha=0.8)
            filled = {"color": style["color"], "linewidths": 0}
            hollow = {"facecolors": "none", "edgecolors": style["color"], "linewidths": 1.4}
            look = hollow if row["suspected"] else filled
            axes.scatter([x], [y], s=24 + 260 * size / largest, alpha=0.75, **look)
        axes.set(xlabel="clean accuracy (%)", ylabel="robust accuracy (%)")
        axes.margins(0.15)

    note = "Bars: ± standard error. "
    note += f"Area grows with parameters ({amount(min(sizes))} to {amount(largest)})." if len(set(sizes)) > 1 else ""
    note += f" Hollow: {SUSPECTED}." if any(row["suspected"] for _, row in shown) else ""
    return Chart("Clean and robust accuracy", draw(paint, "Robust accuracy over clean accuracy, a dot per run"), note)


def training(runs: Sequence[Run]) -> list[Chart]:
    """Accuracies, then the loss, its named terms and whatever else was logged, over epochs."""
    names = dict.fromkeys(key for run in runs for record in run.metrics for key in table(record.get("train")))
    terms = [key for key in names if key not in ("loss", "accuracy") and "/" not in key]
    charts = [
        _epochs(runs, "Accuracy", [("validation", "clean"), ("train", "accuracy")], "accuracy (%)"),
        _epochs(runs, "Robust accuracy, validation", [("validation", "robust")], "robust accuracy (%)"),
        _epochs(runs, "Teacher reliability", TEACHER, "probability, share of images", note=TRUST),
        _epochs(runs, "Loss", [("validation", "loss"), ("train", "loss")], "loss"),
        *(_epochs(runs, f"Training: {key}", [("train", key)], key) for key in terms[:TERMS]),
    ]
    found = [chart for chart in charts if chart]
    if len(terms) > TERMS and found:
        last = found[-1]
        found[-1] = Chart(last.title, last.svg, f"{last.note} Not drawn: {', '.join(terms[TERMS:])} (see metrics.jsonl).")
    return found


def families(run: Run) -> list[tuple[Chart, list[str]]]:
    """What was logged as FAMILY/MEMBER over epochs, a drawing per family, with the members in the order of their lines.

    What `training` draws for all runs together is left out.
    """
    names = dict.fromkeys(key for record in run.metrics for key in table(record.get("train")) if "/" in key)
    names = dict.fromkeys(key for key in names if ("train", key) not in TEACHER)
    found: dict[str, list[str]] = {}
    for key in names:
        family, _, member = key.partition("/")
        found.setdefault(family, []).append(member)
    return [(_family(run, family, members), members) for family, members in found.items()]


def _family(run: Run, family: str, members: Sequence[str]) -> Chart:
    lines = [_series(run, "train", f"{family}/{member}", 1.0) for member in members]
    limit = max(POINTS // len(lines), 20)

    def paint(axes: Any) -> None:
        for position, line in enumerate(lines):
            x, y = _thinned(*line, limit)
            axes.plot(x, y, marker="o" if len(x) == 1 else "", markersize=4, **line_style(position))
        axes.set(xlabel=_time(run), ylabel=family)
        axes.xaxis.get_major_locator().set_params(integer=True)

    return Chart(family, draw(paint, f"{family} over {_time(run)}s, a line each for {', '.join(members)}"))


def _time(run: Run) -> str:
    return "generation" if run.config.get("verb") == "evolve" else "epoch"


def _series(run: Run, section: str, key: str, scale: float) -> Line:
    """Over epochs, which count from 0; of generators that evolve over generations, of which an epoch of their records is many."""
    clock, first = ("step", 0) if _time(run) == "generation" else ("epoch", 1)
    pairs = [(record.get(clock), table(record.get(section)).get(key)) for record in run.metrics]
    kept = [(x + first, scale * y) for x, y in ((number(a), number(b)) for a, b in pairs) if x is not None and y is not None]
    return [x for x, _ in kept], [y for _, y in kept]


def _epochs(
    runs: Sequence[Run], title: str, sources: Sequence[tuple[str, str]], label: str, *, note: str = SPLITS
) -> Chart | None:
    scale = 100.0 if label.endswith("(%)") else 1.0
    lines = [[_series(run, *source, scale) for source in sources] for run in runs]
    drawn = [i for i in range(len(sources)) if any(found[i][0] for found in lines)]
    if not drawn:
        return None
    limit, clock = max(POINTS // (len(runs) * len(drawn)), 20), " or ".join(dict.fromkeys(map(_time, runs)))

    def paint(axes: Any) -> None:
        for position, found in enumerate(lines):
            for i in drawn:
                x, y = _thinned(*found[i], limit)
                faint = {"linewidth": 1.0, "alpha": 0.45} if i != drawn[0] else {}
                axes.plot(x, y, marker="o" if len(x) == 1 else "", markersize=4, **line_style(position) | faint)
        axes.set(xlabel=clock, ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)

    return Chart(title, draw(paint, f"{title} over {clock}s, a line per run"), note if len(drawn) > 1 else "")


def _thinned(x: list[float], y: list[float], limit: int) -> Line:
    step = max(-(-len(x) // limit), 1)
    keep = sorted({*range(0, len(x), step), *range(max(len(x) - 1, 0), len(x))})
    return [x[i] for i in keep], [y[i] for i in keep]


def robustness(runs: Sequence[Run]) -> list[Chart]:
    """Robust accuracy over the radius, a drawing per kind of threat, with the accuracy of guessing."""
    curves = [(i, run, run.evaluation.get("curve") or {}) for i, run in enumerate(runs)]
    found = []
    for threat in dict.fromkeys(str(curve["threat"]) for _, _, curve in curves if curve.get("threat")):
        lines = [(i, run, _curve(curve)) for i, run, curve in curves if str(curve.get("threat")) == threat]
        if lines := [line for line in lines if line[2][0]]:
            attacks = dict.fromkeys(str(runs[i].evaluation["curve"].get("attack")) for i, _, _ in lines)
            found.append(_radii(threat, lines, ", ".join(attacks)))
    return found


def _curve(curve: dict[str, Any]) -> Line:
    pairs = zip(items(curve.get("eps")), items(curve.get("robust")), strict=False)
    kept = [(x, y) for x, y in ((number(a), number(b)) for a, b in pairs) if x is not None and y is not None]
    return [x for x, _ in kept], [y for _, y in kept]


def _radii(threat: str, lines: list[tuple[int, Run, Line]], attack: str) -> Chart:
    classes = sorted({len(run.evaluation["classes"]) for _, run, _ in lines} - {0})
    right = max(x[-1] for _, _, (x, _) in lines)

    def paint(axes: Any) -> None:
        for position, run, (x, y) in lines:
            style, samples = line_style(position), run.evaluation["samples"]
            axes.plot(x, [100 * v for v in y], marker="o", markersize=3, **style)
            errors = [binomial(v, samples) or 0 for v in y]
            low, high = ([100 * (v + sign * e) for v, e in zip(y, errors, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)
        for count in classes:
            axes.axhline(100 / count, color=INK, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.6)
            axes.annotate(
                f"guessing, 1 of {count}",
                (right, 100 / count),
                (0, 3),
                textcoords="offset points",
                ha="right",
                fontsize=8,
            )
        axes.set(xlabel=f"radius ε ({threat}, pixel values in [0, 1])", ylabel="robust accuracy (%)", ylim=(0, 102))

    note = f"Attack: {attack}. Band: ± binomial standard error."
    return Chart(f"Robust accuracy over the radius, {threat}", draw(paint, f"Robust accuracy over {threat} radius"), note)


def per_class(runs: Sequence[Run]) -> list[tuple[Run, Chart]]:
    """Clean and robust accuracy of each class, a drawing per run."""
    return [(run, chart) for run in runs if (chart := _classes(run))]


def _classes(run: Run) -> Chart | None:
    found = run.evaluation.get("per_class") or {}
    clean, robust = ([number(value) for value in items(found.get(key))] for key in ("clean", "robust"))
    if not clean:
        return None
    robust = robust if len(robust) == len(clean) else []
    names = run.evaluation["classes"]
    names = names if len(names) == len(clean) else [str(i) for i in range(len(clean))]
    judged = [2.0 if value is None else value for value in robust or clean]
    weakest = sorted(range(len(clean)), key=judged.__getitem__)
    shown = sorted(weakest[:BARS])

    labels = [short(names[i]) for i in shown]
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if sum(map(len, labels)) > 32 else {}

    def paint(axes: Any) -> None:
        places = list(range(len(shown)))
        width = 0.4 if robust else 0.7
        for values, color, shift in ((clean, PALETTE[5], -width / 2), (robust, PALETTE[0], width / 2)):
            if values:
                heights = [100 * (values[i] or 0) for i in shown]
                centres = [place + (shift if robust else 0) for place in places]
                axes.bar(centres, heights, width, color=color)
                for place, i in zip(centres, shown, strict=True):
                    if values[i] is None:  # no image of this class was seen, which is not an accuracy of 0
                        axes.text(place, 2, "none", fontsize=7, rotation=90, ha="center", va="bottom")
        axes.set_xticks(places, labels, **turned)
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False, axis="x")
        axes.set(ylabel="accuracy (%)", ylim=(0, 102))
        axes.set_xlabel("" if turned else "class")

    note = (
        f"{BARS} of {len(clean)} classes: those with the lowest {'robust' if robust else 'clean'} accuracy."
        if len(clean) > BARS
        else ""
    )
    return Chart(run.name, draw(paint, f"Accuracy per class of {run.name}", bottom=0.62 if turned else 0.45), note)


def short(name: str) -> str:
    """A name as a drawing has room for it."""
    text = "".join(c if c.isprintable() else "?" for c in name)
    return text if len(text) <= 14 else text[:13] + "…"
