"""groups."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from overproof.cli.options import Json, Plugin, Trust, plugins, show


def groups(
    runs: tuple[Path, ...],
    *,
    alone: Annotated[tuple[Path, ...], Parameter(negative="")] = (),
    by: Literal["class", "attribute"] = "class",
    worst: int = 5,
    evaluation: str | None = None,
    reliability: bool = True,
    plugin: Plugin = (),
    trust: Trust = False,
    json_: Json = False,
) -> None:
    """Tell who paid for a distillation: accuracy by class or subgroup, beside the teacher's and that of the student alone.

    Parameters
    ----------
    runs
        Run folders, at least one of a distilled student; runs that differ in the seed alone are taken together.
    alone
        Run of the student trained alone; repeatable. If absent: one among the runs, or in their folder, with the same network and seed.
    by
        class, or attribute: the subgroups that the data were told (data.attribute, data.attribute_file).
    worst
        How many of the weakest groups are averaged.
    evaluation
        Whose rows are compared, such as test-last; test-best where there is one.
    reliability
        Tell how reliable the teacher is about each group: as the method measured it, or measured now on held-out images.
    """
    plugins(plugin)
    from overproof.report.group_text import groups_text
    from overproof.run.grouping import group_report

    found = group_report(runs, alone=alone, by=by, worst=worst, evaluation=evaluation, reliability=reliability, trusted=trust)
    show(found.summary, json_, groups_text(found))
