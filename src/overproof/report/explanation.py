"""What the probes found, for a terminal and for the page: nothing here needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from overproof.errors import FolderError
from overproof.folder import read_arrays, read_json
from overproof.report.charts import Chart
from overproof.report.probes import attacked_images, cam_triplets, curves, gaps, grids, planes, robustness, scores
from overproof.report.reading import Run
from overproof.report.values import items, number, table

FILE = "explanation.json"


@dataclass(frozen=True)
class Finding:
    """A line of the table: a probe's headline with its controls."""

    probe: str
    question: str
    gap: str
    controls: str
    verdict: str
    notes: list[str]


@dataclass(frozen=True)
class Told:
    """What there is to tell of one explanation."""

    run: Run
    about: str
    accuracy: list[tuple[str, str]]
    findings: list[Finding]
    skipped: list[tuple[str, str]]
    notes: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    triplets: list[list[tuple[str, str]]] = field(default_factory=list)
    attacked: list[list[tuple[str, str]]] = field(default_factory=list)


def explained(run: Run) -> Told | None:
    """The explanation kept in the run's folder, or None; what cannot be read or drawn adds a warning."""
    path = run.folder.path / FILE
    if not path.exists():
        return None
    try:
        summary = table(read_json(path))
        arrays = read_arrays(path.with_suffix(".npz")) if path.with_suffix(".npz").exists() else {}
        told = told_of(run, summary)
    except (FolderError, KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        run.warnings.append(f"{path}: the explanation cannot be shown ({type(error).__name__}: {error}).")
        return None
    try:
        return replace(told, **_drawn(table(summary.get("probes")), arrays, summary))
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        run.warnings.append(f"{path}: the probes' pictures cannot be drawn ({type(error).__name__}: {error}).")
        return told


def _drawn(probes: Mapping[str, Any], arrays: Mapping[str, np.ndarray], summary: Mapping[str, Any]) -> dict[str, Any]:
    charts = [gaps(probes), scores(table(probes.get("adversarial-transfer")))]
    charts += [curves(name, table(probes.get(name))) for name in ("colour", "crop", "shift")]
    charts += robustness(table(probes.get("corruptions")))
    charts += [*planes(arrays), *grids(arrays)]
    classes = [str(name) for name in items(summary.get("classes"))]
    kept = [chart for chart in charts if chart is not None]
    return {"charts": kept, "triplets": cam_triplets(arrays, classes), "attacked": attacked_images(arrays, classes)}


def told_of(run: Run, summary: Mapping[str, Any]) -> Told:
    """Table, accuracies and notes of a summary."""
    probes = {str(name): table(found) for name, found in table(summary.get("probes")).items()}
    accuracy = [(str(name), _percent(value)) for name, value in table(summary.get("accuracy")).items()]
    about = f"{number(summary.get('images')) or 0:,.0f} {summary.get('split', 'held-out')} images of {summary.get('data', 'the given data')}"
    skipped = [(name, str(found["skipped"])) for name, found in probes.items() if found.get("skipped")]
    findings = [_finding(name, found) for name, found in probes.items() if not found.get("skipped")]
    return Told(run, about, accuracy, findings, skipped, [str(note) for note in items(summary.get("notes"))])


def _finding(name: str, found: Mapping[str, Any]) -> Finding:
    share, chance = bool(found.get("share", True)), number(found.get("chance")) or 0.0
    rows = items(found.get("rows"))
    first = table(rows[0]) if rows else {}
    gap, controls = table(first.get("gap")), table(first.get("controls"))
    told = ", ".join(f"{key} {figure(number(table(value).get('value')), share, chance)}" for key, value in controls.items())
    about = f"{first.get('quantity', '')}"
    notes = [str(note) for note in items(found.get("notes"))]
    return Finding(
        name, f"{found.get('question', '')} ({about})", with_interval(gap, share, chance), told, verdict(found), notes
    )


def verdict(found: Mapping[str, Any]) -> str:
    """Whether the headline stands out from chance and from its controls.

    "clear": the interval leaves out chance, and every control is known and nearer to chance; "not clear" otherwise; "uncontrolled" without two
    independent students, "" where there is no gap.
    """
    rows = items(found.get("rows"))
    first = table(rows[0]) if rows else {}
    gap, chance = table(first.get("gap")), number(found.get("chance")) or 0.0
    value, low, high = (number(gap.get(key)) for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return ""
    if found.get("controlled") is not True:
        return "uncontrolled"
    controls = [number(table(control).get("value")) for control in table(first.get("controls")).values()]
    known = [abs(control - chance) for control in controls if control is not None]
    if len(known) < len(controls):
        return "not clear"
    return "clear" if not low <= chance <= high and abs(value - chance) > max(known, default=0.0) else "not clear"


def explanation_text(summary: Mapping[str, Any]) -> str:
    """An explanation for a terminal; brackets hold 95 % intervals over the images."""
    from overproof.folder import RunFolder

    told = told_of(Run(RunFolder("."), ""), summary)
    lines = [told.about, "  accuracy: " + ", ".join(f"{name} {value} %" for name, value in told.accuracy)]
    width = max((len(finding.probe) for finding in told.findings), default=0)
    span = max((len(finding.gap) for finding in told.findings), default=0)
    lines.append(f"  {'probe':{width}}  {'students less independents':{span}}")
    for finding in told.findings:
        controls = f"  controls: {finding.controls}" if finding.controls else ""
        lines.append(f"  {finding.probe:{width}}  {finding.gap:{span}}  {finding.verdict:12}{controls}".rstrip())
        lines += [f"  {'':{width}}  {note}" for note in finding.notes if note not in told.notes]
    lines += [f"  skipped {name}: {reason}" for name, reason in told.skipped]
    return "\n".join(lines + [f"  note: {note}" for note in told.notes])


def figure(value: float | None, share: bool, chance: float) -> str:
    """A gap in points with its sign, a share of wins in per cent, another quantity as it is."""
    if value is None:
        return "-"
    if not share:
        return f"{value:+.4f}"
    return f"{100 * value:.1f} %" if chance else f"{100 * value:+.1f}"


def with_interval(found: Mapping[str, Any], share: bool, chance: float) -> str:
    """The same with its 95 % interval."""
    value, low, high = (number(found.get(key)) for key in ("value", "low", "high"))
    if value is None:
        return "-"
    return f"{figure(value, share, chance)} [{figure(low, share, chance)}, {figure(high, share, chance)}]"


def _percent(value: Any) -> str:
    share = number(value)
    return "-" if share is None else f"{100 * share:.2f}"
