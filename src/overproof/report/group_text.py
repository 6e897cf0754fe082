"""Figures by group for a terminal."""

from __future__ import annotations

from overproof.evaluation.groups import Figures, GroupReport
from overproof.report.payers import fallen, verdict
from overproof.report.table import NONE

ROWS = 60


def groups_text(report: GroupReport) -> str:
    """A line for each model, a sentence for each student, and a line for each group, those that paid most first."""
    lines = [f"{sum(report.count)} images, {len(report.names)} groups by {report.by}; shares in %", ""]
    head = ["", "role", "seeds", "mean", "worst", f"worst {report.k}", "copied", "own", "paid"]
    lines += _aligned([head, *(_overall(figures, report) for figures in report.models)])
    for figures in report.models:
        if figures.changes:
            lines += ["", f"{figures.name} against {figures.alone}: {verdict(figures)}", *_inheritance(figures)]
    lines += ["", *_aligned(_by_group(report))]
    if report.reliability:
        lines += ["", f"reliability: {report.source}"]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def _overall(figures: Figures, report: GroupReport) -> list[str]:
    paid = str(sum(change.paid for change in figures.changes)) if figures.changes else NONE
    parts = [_mean(values, report.count) for values in (figures.copied, figures.own)]
    shares = [_share(value) for value in (figures.average, figures.worst, figures.worst_k)]
    return [figures.name, figures.role, str(len(figures.seeds)), *shares, *parts, paid]


def _mean(values: list[float | None] | None, count: list[int]) -> str:
    """Mean over the images."""
    if values is None:
        return NONE
    return _share(sum((value or 0) * n for value, n in zip(values, count, strict=True)) / max(sum(count), 1))


def _inheritance(figures: Figures) -> list[str]:
    lines = []
    for change in fallen(figures)[:5]:
        line = f"  {change.name}: {100 * change.difference:+.1f} points [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
        if figures.copied is not None and figures.own is not None:
            line += f"; errors copied from the teacher {_share(figures.copied[change.group])}, own {_share(figures.own[change.group])}"
        lines.append(line)
    if figures.spearman is not None:
        lines.append(f"  rank correlation of the teacher's reliability with the change: {figures.spearman:.2f}")
    return lines


def _by_group(report: GroupReport) -> list[list[str]]:
    worst = dict.fromkeys(range(len(report.names)), 0.0)
    for figures in report.models:
        for change in figures.changes:
            worst[change.group] = min(worst[change.group], change.difference)
    order = sorted(worst, key=worst.__getitem__)
    head = [report.by, *(["train"] if report.train else []), "test", *(["g"] if report.reliability else [])]
    rows = [[*head, *(figures.name for figures in report.models)]]
    for g in order[:ROWS]:
        row = [report.names[g], *([_entry(report.train, g, "d")] if report.train else []), str(report.count[g])]
        row += [_entry(report.reliability, g, ".2f")] if report.reliability else []
        rows.append([*row, *(_share(figures.recall[g]) for figures in report.models)])
    return rows if len(order) <= ROWS else [*rows, [f"and {len(order) - ROWS} more (--json)", *[""] * (len(rows[0]) - 1)]]


def _entry(values: list[int] | list[float] | None, group: int, form: str) -> str:
    return format(values[group], form) if values is not None and group < len(values) else NONE


def _share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    clean = [["".join(c if c.isprintable() else "?" for c in cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in clean) for i in range(len(clean[0]))]
    return [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in clean
    ]
