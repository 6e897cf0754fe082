"""Who paid for a distillation: classes whose accuracy fell under that of the student trained alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from overproof.errors import OverproofError
from overproof.evaluation.grouping import group_figures
from overproof.evaluation.groups import By, Change, Figures, GroupReport, Model
from overproof.report.alone import Match, alone_for, group_names, is_distilled, record_of, teacher_of
from overproof.report.charts import Chart, short
from overproof.report.drawing import INK, PALETTE, draw
from overproof.report.reading import Run
from overproof.report.seeds import group_by_seed
from overproof.report.table import row
from overproof.report.values import items, number, table

BARS = 30
CHANCE = 0.025  # of a group whose accuracy did not change: that its interval lies below 0
REMEDY = (
    "No student trained alone was found, so nobody knows who paid. Train one with the same network, data, schedule and seed, but without a "
    "teacher (overproof train --method ce, or pgd-at for a robust student), beside this run or in the same report."
)


@dataclass(frozen=True)
class Payers:
    """What there is to tell of one distilled student, of all its seeds together; `problem` says why there is nothing."""

    name: str
    problem: str = ""
    reports: list[GroupReport] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def payers(runs: Sequence[Run]) -> list[Payers]:
    """One entry for each distilled student among `runs`, seeds taken together; none for runs that were not evaluated."""
    students = {run.name: run for run in runs if is_distilled(run) and run.evaluations}
    groups = group_by_seed([row(run) for run in students.values()])
    return [_payers(str(group["name"]), [students[name] for name in group["runs"]], runs) for group in groups]


def _payers(name: str, members: Sequence[Run], runs: Sequence[Run]) -> Payers:
    matches = [(run, match) for run in members if (match := alone_for(run, runs))]
    if not matches:
        return Payers(name, REMEDY)
    notes = caveats(matches)
    if len(matches) < len(members):
        notes.append(f"Only {len(matches)} of {len(members)} seeds have a student trained alone.")
    try:
        reports = [_report(name, matches, by) for by in _groupings(matches)]
    except (OverproofError, ValueError, IndexError, TypeError) as error:  # files may be damaged in any way
        return Payers(name, f"Nobody knows who paid: {error}")
    return Payers(name, "", reports, [_chart(report) for report in reports], notes)


def _groupings(matches: Sequence[tuple[Run, Match]]) -> list[By]:
    """By class; by subgroup too, if all evaluations know them."""
    runs = [part for run, match in matches for part in (run, match.run)]
    return ["class", "attribute"] if all(run.evaluation.get("attribute") for run in runs) else ["class"]


def _report(name: str, matches: Sequence[tuple[Run, Match]], by: By) -> GroupReport:
    first = matches[0][0]
    mine = {seed_of(run): record_of(run, by=by) for run, _ in matches}
    theirs = {seed_of(run): record_of(match.run, by=by) for run, match in matches}
    alone = "student alone"
    models = [Model(alone, "alone", theirs), Model(name, "student", mine, alone)]
    about = reliability_of([run for run, _ in matches], by)
    return group_figures(models, group_names(first, by=by), by=grouping_name(first, by), train=train_counts(first, by), **about)


def seed_of(run: Run) -> int:
    """The seed of a run; 0 if it does not say."""
    return int(number(run.config.get("seed")) or 0)


def grouping_name(run: Run, by: By) -> str:
    """What the groups are: "class", or the name of the attribute."""
    return "class" if by == "class" else str(table(run.evaluation.get("attribute")).get("name") or "attribute")


def train_counts(run: Run, by: By) -> list[int] | None:
    """Training images of each group, if the run knows."""
    try:
        known = table(run.folder.data)
    except (OverproofError, ValueError, TypeError):
        return None
    counts = table((known if by == "class" else table(known.get("attribute"))).get("counts"))
    return [int(count) for entry in items(counts.get("train")) if (count := number(entry)) is not None] or None


def reliability_of(runs: Sequence[Run], by: By) -> dict[str, Any]:
    """How reliable the teacher is about each group, where a method has measured it: the mean over the runs, and how it was measured.

    Of runs with different teachers nothing is told: no one vector is that of all.
    """
    if len({teacher_of(run) for run in runs}) > 1:
        return {}
    size = len(group_names(runs[0], by=by))
    told = [run.method for run in runs if run.method.get("group") == by]
    found = [(method, [number(g) for g in items(method.get("reliability"))][:size]) for method in told]
    whole = [(_how(method), values) for method, values in found if values and len(values) == size and None not in values]
    alike = [values for how, values in whole if how == whole[0][0]]  # a margin and a share of right answers have no mean
    if not alike:
        return {}
    means = [sum(g for g in values if g is not None) / len(values) for values in zip(*alike, strict=True)]
    return {"reliability": means, "source": whole[0][0]}


def _how(method: dict[str, Any]) -> str:
    return f"{method.get('kind')} on images of the {method.get('held_out')} part, as the method measured it before training"


def caveats(matches: Sequence[tuple[Run, Match]]) -> list[str]:
    """Where a student and the one trained alone differ by more than the teacher."""
    keys = list(dict.fromkeys(key for _, match in matches for key in match.differs))
    who = ", ".join(dict.fromkeys(str(match.run.folder.path) for _, match in matches))
    notes = [f"Trained alone: {who}."]
    if keys:
        notes.append(f"It differs by more than the teacher, so the teacher alone cannot be blamed: {', '.join(keys)}.")
    return notes


def fallen(figures: Figures) -> list[Change]:
    """The groups that lost accuracy, those that lost most first."""
    return sorted((change for change in figures.changes if change.difference < 0), key=lambda change: change.difference)


def verdict(figures: Figures) -> str:
    """One sentence on who paid."""
    groups, lost = len(figures.changes), fallen(figures)
    paid = [change for change in lost if change.paid]
    if not lost:
        return f"None of {groups} groups lost accuracy."
    chance = f"{CHANCE * groups:.1f} would by chance, had nothing changed"
    names = f": {', '.join(change.name for change in paid[:8])}{', ...' if len(paid) > 8 else ''}" if paid else ""
    return f"{len(lost)} of {groups} groups lost accuracy, {len(paid)} of them by more than their interval ({chance}){names}."


def _chart(report: GroupReport) -> Chart:
    """Each group's change with its interval, the losers on the left."""
    changes = sorted(report.models[-1].changes, key=lambda change: change.difference)
    half = BARS // 2
    shown = changes if len(changes) <= BARS else changes[:half] + changes[-half:]
    places = list(range(len(shown)))
    labels = [short(change.name) for change in shown]
    crowded = sum(map(len, labels)) > 32

    def paint(axes: Any) -> None:
        for place, change in zip(places, shown, strict=True):
            color = PALETTE[1] if change.paid else PALETTE[5] if change.difference >= 0 else PALETTE[6]
            axes.bar([place], [100 * change.difference], 0.7, color=color)
            axes.plot([place, place], [100 * change.low, 100 * change.high], color=INK, linewidth=0.9, alpha=0.7)
        axes.axhline(0, color=INK, linewidth=0.8)
        turned = {"rotation": 90, "fontsize": 7} if crowded else {}
        axes.set_xticks(places, labels, **turned)
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False, axis="x")
        axes.set(ylabel="change of accuracy (points)")

    note = "Student minus student alone, 95 % intervals, paired. Orange: lost more than chance explains."
    more = f" The {half} largest losses and gains of {len(changes)}." if len(changes) > BARS else ""
    svg = draw(paint, f"Change of accuracy by {report.by}", bottom=0.9 if crowded else 0.45)
    return Chart(f"Change of accuracy by {report.by}", svg, note + more)
