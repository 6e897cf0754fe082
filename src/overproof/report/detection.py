"""What the page draws of a detector: its scores, its rates, and how they change as an attack goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from overproof.errors import FolderError
from overproof.report.charts import Chart
from overproof.report.drawing import INK, draw, line_style
from overproof.report.gallery import png
from overproof.report.reading import Run
from overproof.report.values import items, number, numbers, table

WORDS = {
    "noise": "change of the answer under noise",
    "targeted": "steps towards another class",
    "untargeted": "steps away from the class",
}
KINDS = {
    "natural-rejected": "Natural images that are rejected",
    "attacked-rejected": "Images of the strongest attack, wrong and rejected",
    "attacked-passed": "Images of the strongest attack, wrong and not rejected",
}
MOST = 6  # attacks in one drawing


@dataclass(frozen=True)
class Detected:
    """What there is to tell of the detector of one run: drawings, and a row per attack."""

    run: Run
    charts: list[Chart]
    rows: list[dict[str, Any]]
    clean_rejected: float | None
    strongest: str
    criteria: list[str]
    pictures: list[tuple[str, list[str]]]


def detected(run: Run) -> Detected | None:
    """The detector's part of the evaluation in which most images passed it, or None; a part that cannot be drawn adds a warning."""
    behind = {name: told for name, facts in run.evaluations.items() if (told := table(facts.get("detection")))}
    if not behind:
        return None
    chosen = max(behind, key=lambda name: _worst(behind[name]))
    found = behind[chosen]
    attacks = {str(name): table(facts) for name, facts in table(found.get("attacks")).items()}
    keys = ("success", "detected", "wrong_and_not_rejected", "area")
    by = {name: numbers(facts.get("detected_by")) for name, facts in attacks.items()}
    rows = [{"name": name, "by": by[name], **{key: number(facts.get(key)) for key in keys}} for name, facts in attacks.items()]
    strongest, charts = str(found.get("strongest") or ""), []
    criteria = list(dict.fromkeys(name for shares in by.values() for name in shares if name != "union"))
    try:
        limits = numbers(found.get("thresholds"))
        for name, facts in table(found.get("histograms")).items():
            charts.append(_histogram(name, facts, limits.get(name), strongest))
        charts += [chart for chart in (_roc(attacks, strongest), _over_steps(table(found.get("over_steps")))) if chart]
    except (KeyError, ValueError, TypeError, IndexError) as error:
        run.warnings.append(f"{run.folder.path}: the detector's scores cannot be drawn ({type(error).__name__}: {error}).")
    return Detected(run, charts, rows, number(found.get("clean_rejected")), strongest, criteria, _pictures(run, chosen))


def _worst(found: dict[str, Any]) -> float:
    attacks = table(found.get("attacks")).values()
    return max((number(table(facts).get("wrong_and_not_rejected")) or 0.0 for facts in attacks), default=0.0)


def _pictures(run: Run, evaluation: str) -> list[tuple[str, list[str]]]:
    """Captions, and a few images under each as data URIs."""
    try:
        kept = run.folder.arrays(evaluation, "gallery")
        return [(text, [png(pixels / 255.0) for pixels in kept[name]]) for name, text in KINDS.items() if name in kept]
    except (FolderError, ValueError, TypeError, IndexError) as error:
        run.warnings.append(f"{run.folder.path}: the rejected images cannot be shown ({type(error).__name__}: {error}).")
        return []


def _histogram(name: str, facts: dict[str, Any], limit: float | None, attack: str) -> Chart:
    edges, counts = [float(edge) for edge in facts["edges"]], facts["counts"]
    shown = {key: [float(count) for count in counts[key]] for key in ("natural", attack) if key in counts}

    def paint(axes: Any) -> None:
        for position, (key, values) in enumerate(shown.items()):
            shares = [100 * value / max(sum(values), 1) for value in values]
            color = line_style(position)["color"]
            axes.stairs(
                shares, edges, fill=position == 0, alpha=0.45 if position == 0 else 1.0, color=color, label=key, linewidth=1.6
            )
        if limit is not None and limit <= edges[-1]:
            axes.axvline(limit, color=INK, linewidth=0.9, linestyle=(0, (3, 3)))
        axes.set(xlabel=WORDS.get(name, name), ylabel="share of images (%)")
        axes.legend(frameon=False, fontsize=8)

    limited = "" if limit is None else f"Rejected above {limit:.3g} (dashed). "
    return Chart(f"Scores: {name}", draw(paint, f"Histogram of {name} of natural and attacked images"),
                 f"{limited}The last bin holds all larger scores.")  # fmt: skip


def _roc(attacks: dict[str, dict[str, Any]], strongest: str) -> Chart | None:
    curves = {name: [items(axis) for axis in items(facts.get("roc"))] for name, facts in attacks.items()}
    curves = {name: curve for name, curve in curves.items() if len(curve) == 2 and curve[0]}
    if not curves:
        return None
    first = sorted(curves, key=strongest.__ne__)[:MOST]  # the strongest one is always drawn

    def paint(axes: Any) -> None:
        for position, name in enumerate(first):
            false, true = curves[name]
            axes.plot([100 * x for x in false], [100 * y for y in true], label=name, **line_style(position))
        axes.plot([0, 100], [0, 100], color=INK, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.6)
        axes.set(xlabel="natural images rejected (%)", ylabel="detected (%)", xlim=(0, 100), ylim=(0, 102))
        axes.legend(frameon=False, fontsize=8, loc="lower right")

    more = f" {len(curves) - MOST} further attacks are not drawn." if len(curves) > MOST else ""
    note = f"Detected: share of the images that the attack made wrong. All criteria together, one rank for all.{more}"
    return Chart("Detection over false alarms", draw(paint, "Share detected over share of natural images rejected"), note)


def _over_steps(facts: dict[str, Any]) -> Chart | None:
    steps, criteria = [float(step) for step in items(facts.get("steps"))], table(facts.get("criteria"))
    if not steps or not criteria:
        return None

    def paint(axes: Any) -> None:
        for position, (name, found) in enumerate(criteria.items()):
            scale, style = max(float(found["threshold"]), 1e-9), line_style(position)
            kept = [i for i in range(len(steps)) if found["median"][i] is not None]
            x, low, middle, high = (
                [steps[i] for i in kept],
                *([float(found[key][i]) / scale for i in kept] for key in ("low", "median", "high")),
            )
            axes.plot(x, middle, label=WORDS.get(name, name), marker="o", markersize=3, **style)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)
        axes.axhline(1, color=INK, linewidth=0.8, linestyle=(0, (3, 3)), alpha=0.6)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xticks(steps, [f"{step:g}" for step in steps], fontsize=8)
        axes.set_xticks([], minor=True)
        axes.set(
            xlabel="steps of the attack (0: natural)",
            ylabel="score / threshold",
            xlim=(-0.15, 1.1 * max(steps)),
            ylim=(0, None),
        )
        axes.legend(frameon=False, fontsize=8)

    note = "Median of the images that are wrong, with quarters; above the dashed line they are rejected. Where the curves cross an attack may pass."
    return Chart("Scores as the attack goes on", draw(paint, "Scores of each criterion over the steps of an attack"), note)
