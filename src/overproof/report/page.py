"""Run folders -> report.html, one file that needs nothing but a browser."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from overproof.console import note
from overproof.folder import atomic
from overproof.report import charts, maps
from overproof.report.attacked import bounded
from overproof.report.detection import detected
from overproof.report.drawing import swatch
from overproof.report.explanation import explained
from overproof.report.gallery import pictures
from overproof.report.guards import guard_rows, remembered
from overproof.report.learned import learned
from overproof.report.payers import fallen, payers, verdict
from overproof.report.purifier import purified
from overproof.report.reading import Run, read_runs
from overproof.report.seeds import group_by_seed
from overproof.report.table import amount, binomial, columns, duration, on_fewer, percent, row, work
from overproof.report.text import notes
from overproof.report.values import number
from overproof.report.words import sample_rows

TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    folders: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    title: str | None = None,
    baseline: str | None = None,
) -> Path:
    """Write the report on one or several runs, from their folders alone.

    Args:
        folders: run folders; finished, running, failed or damaged. A folder that is none stands for the runs in it.
        output: the file to write; by default report.html in the folder, or beside the first of several.
        title: heading of the page; by default the run's name, or how many runs there are.
        baseline: with several seeds, the run or group of runs that the others are compared with, seed by seed.

    Returns:
        The path of the page.

    Raises:
        FolderError: a folder does not exist or holds no run, or the page cannot be written.
        UnknownNameError: there is no run or group called `baseline`.
    """
    import jinja2

    runs = read_runs(folders)
    first, alone = Path(folders[0]), len({Path(folder).resolve() for folder in folders}) == 1
    path = Path(output) if output else (first if alone else first.resolve().parent) / "report.html"
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "amount": amount, "duration": duration}
    environment.globals |= {
        "binomial": binomial,
        "swatch": swatch,
        "number": number,
        "work": work,
        "bounded": bounded,
        "on_fewer": on_fewer,
    }
    environment.globals |= {"guard_rows": guard_rows, "fallen": fallen, "verdict": verdict, "sample_rows": sample_rows}
    html = environment.get_template("page.html").render(_content(runs, title, baseline))
    with atomic(path) as file:
        file.write(html.encode("utf-8", "replace"))
    for text in dict.fromkeys(text for run in runs for text in run.warnings):
        note(f"note: {text}")
    return path


def _content(runs: list[Run], title: str | None, baseline: str | None) -> dict[str, Any]:
    rows = [row(run) for run in runs]
    groups = group_by_seed(rows, baseline)
    galleries = [(run, found) for run in runs if (found := pictures(run, 8 if len(runs) <= 3 else 4))]
    script = (TEMPLATES / "sort.js").read_text("utf-8").strip()
    return {
        "title": title or (runs[0].name if len(runs) == 1 else f"{len(runs)} runs"),
        "newest": max(filter(None, map(_date, runs)), default=None),
        "runs": runs,
        "rows": rows,
        "groups": groups if baseline or any(group["n"] > 1 for group in groups) else [],
        "baseline": baseline,
        "columns": columns,
        "notes": notes,
        "scatter": charts.scatter(rows),
        "training": charts.training(runs),
        "learned": [told for run in runs if (told := learned(run))],
        "robustness": charts.robustness(runs),
        "caches": [told for told in map(remembered, runs) if told],
        "purifiers": [told for run in runs for told in purified(run)],
        "detections": [seen for run in runs if (seen := detected(run))],
        "explanations": [told for told in map(explained, runs) if told],
        "classes": charts.per_class(runs),
        "payers": payers(runs),
        "confusion": [chart for run in runs if (chart := maps.confusion(run))],
        "sanity": [(run, maps.surfaces(run, 4 if len(runs) <= 3 else 2)) for run in runs if run.evaluation.get("sanity")],
        "galleries": galleries,
        "configuration": _configuration,
        "style": (TEMPLATES / "style.css").read_text("utf-8"),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def _date(run: Run) -> str | None:
    try:
        changed = (run.folder.path / "status.json").stat().st_mtime
    except OSError:
        return None
    return datetime.fromtimestamp(changed, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _configuration(run: Run) -> str:
    import tomli_w

    return tomli_w.dumps(run.config).strip()
