"""explain."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from overproof.cli.options import Json, Names, Plugin, Set, Trust, plugins, show
from overproof.errors import UsageError


def explain(
    teacher: Path,
    students: tuple[Path, ...],
    *,
    independent: Names = (),
    control: Names = (),
    foreign: Names = (),
    plain_teacher: Path | None = None,
    probes: str = "all",
    data: str | None = None,
    split: Literal["train", "validation", "test"] = "test",
    limit: int | None = None,
    domain: Names = (),
    cues: Path | None = None,
    groups: Path | None = None,
    deprived: str | None = None,
    which: Literal["best", "last"] = "best",
    keep: bool = True,
    out: Path | None = None,
    seed: int = 0,
    set_: Set = (),
    plugin: Plugin = (),
    trust: Trust = False,
    json_: Json = False,
) -> None:
    """Tell in which respects students have become like their teacher.

    Parameters
    ----------
    teacher
        A run folder.
    students
        Run folders of students distilled from it; the explanation is kept in the first.
    independent
        A run like the students, without any teacher; repeatable. Two seeds at least, or nothing is controlled.
    control
        A run that must not resemble the teacher: of another teacher, or of soft labels without one; repeatable.
    foreign
        A run that has nothing to do with the teacher, for the foreign attack; repeatable. Independent students if absent.
    plain_teacher
        A run of the teacher's kind without the property in question, shown beside.
    probes
        Comma-separated names from `overproof list probes`, or all. Options: --set colour.images=500.
    data
        Another data set than the first student's own.
    limit
        Use only so many images, the classes in proportion.
    domain
        Surroundings that the students never saw: a change of the data such as color, textured:cifar10 or noise:3, or a data set; repeatable.
        The usual changes if absent; "none" for none.
    cues
        Folder of images called SHAPE-TEXTURE, for the shape bias.
    groups
        CSV file with the columns index and group, for the group bias; the classes if absent.
    deprived
        The group that the teacher never saw.
    keep
        Keep what concerns the teacher in its folder, for the next students.
    out
        Folder for explanation.json and explanation.npz, instead of the first student's.
    """
    plugins(plugin)
    from overproof.report import write_report
    from overproof.report.explanation import explanation_text
    from overproof.run.explaining import Subject, explain_runs

    wanted = [name.strip() for name in probes.split(",") if name.strip()]
    subject = Subject(data=data, split=split, limit=limit, domains=domain or None, cues=cues, groups=groups, deprived=deprived)
    others: dict[str, Any] = {
        "independent": independent,
        "control": control,
        "foreign": foreign,
        "plain": [plain_teacher] if plain_teacher else [],
    }
    found = explain_runs(
        teacher,
        students,
        others=others,
        subject=subject,
        which=which,
        keep=keep,
        trusted=trust,
        probes="all" if wanted == ["all"] else wanted,
        options=_options(set_),
        seed=seed,
    )
    path = found.save(out or students[0])
    lines = [explanation_text(found.summary), f"kept: {path}"]
    if out is None:
        lines.append(f"report: {write_report([students[0]])}")
    show(found.summary, json_, "\n".join(lines))


def _options(overrides: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    from overproof.config import merge, parse_override

    table: dict[str, Any] = {}
    for text in overrides:
        table = merge(table, parse_override(text))
    for name, value in table.items():
        if not isinstance(value, dict):
            raise UsageError(
                f"--set {name}={value}: write PROBE.option=value, for example --set adversarial-transfer.eps=8/255."
            )
    return table
