"""compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from overproof.cli.options import Json, Names, Plugin, Trust, plugins, show


def compare(
    a: Path,
    b: Path,
    *,
    metric: Names = (),
    data: str | None = None,
    split: Literal["train", "validation", "test"] = "test",
    limit: int | None = None,
    which: Literal["best", "last"] = "best",
    images: int = 200,
    targets: int | None = None,
    step_size: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    plugin: Plugin = (),
    trust: Trust = False,
    json_: Json = False,
) -> None:
    """Put the models of two runs side by side: accuracy, agreement, and how alike their decision boundaries lie.

    Parameters
    ----------
    a, b
        Run folders.
    metric
        boundary: MagSim and AngSim, the similarity of distance and direction to the boundaries of other classes.
    data
        Another data set than the runs' own.
    limit
        Use only so many images, the classes in proportion.
    images
        With --metric: images on which it is measured, drawn from those that both get right.
    targets
        With --metric boundary: other classes for each image, drawn at random; all if absent.
    step_size
        With --metric boundary: "newton" (the default), or pixel units per unit of the logit gap, as in training.
    steps
        With --metric boundary: steps of a walk, at most.
    """
    plugins(plugin)
    from overproof.registry import convert
    from overproof.report.words import comparison_text
    from overproof.run.comparing import compare_runs

    given: dict[str, Any] = {"targets": targets, "steps": steps, "step_size": step_size}
    options = {key: value for key, value in given.items() if value is not None}
    if step_size not in (None, "newton"):
        options["step_size"] = convert(step_size, float, "--step-size")
    found = compare_runs(
        a,
        b,
        which=which,
        data=data,
        split=split,
        limit=limit,
        trusted=trust,
        metric=metric,
        images=images,
        seed=seed,
        **options,
    )
    show(found.summary, json_, comparison_text(found.summary))
