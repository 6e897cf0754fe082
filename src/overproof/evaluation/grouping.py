"""From rows of evaluations to figures by group. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from overproof.errors import DataError, UsageError
from overproof.evaluation.groups import Change, Figures, GroupReport, Model, Record, Shares
from overproof.evaluation.intervals import paired


def group_figures(
    models: Sequence[Model],
    names: Sequence[str],
    *,
    by: str = "class",
    worst: int = 5,
    train: Sequence[int] | None = None,
    reliability: Sequence[float] | None = None,
    source: str = "",
    notes: Sequence[str] = (),
) -> GroupReport:
    """Compare models group by group.

    Args:
        models: all judged on the same images.
        names: of the G groups.
        by: what the groups are.
        worst: how many of the groups with the least accuracy are averaged; all of them if there are fewer.
        train, reliability: by group, for the table and the correlation; not used unless there is one for each. `source` says how the latter
            was measured.
        notes: what else a reader must know.

    Raises:
        DataError: the models were judged on different images, or there are none.
        UsageError: worst below 1.
    """
    if worst < 1:
        raise UsageError(f"The mean of the worst {worst} groups was asked for; give at least 1.")
    first = _same_images(models)
    size = max(len(names), int(first.group.max()) + 1)
    names = [*names, *map(str, range(len(names), size))]
    train = list(train) if train is not None and len(train) >= size else None
    reliability = list(reliability) if reliability is not None and len(reliability) >= size else None
    count = np.bincount(first.group, minlength=size)
    known = {model.name: model for model in models if model.role == "alone"}
    figures = [_figures(model, known.get(model.alone), names, worst, reliability) for model in models]
    return GroupReport(
        by=by,
        names=names,
        k=min(worst, int((count > 0).sum())),
        count=count.tolist(),
        models=figures,
        train=train,
        reliability=reliability,
        source=source if reliability is not None else "",
        notes=list(notes),
    )


def _same_images(models: Sequence[Model]) -> Record:
    found = [(model.name, record) for model in models for record in model.records.values()]
    if not found:
        raise DataError("There is nothing to compare: no model has been evaluated.")
    (name, first), *others = found
    for other, record in others:
        pairs = ((first.index, record.index), (first.label, record.label), (first.group, record.group))
        if not all(np.array_equal(a, b) for a, b in pairs):
            raise DataError(
                f"{name} and {other} were not evaluated on the same images, so no class can be compared. Evaluate both on the same data: "
                "overproof evaluate RUN."
            )
    return first


def _figures(
    model: Model, alone: Model | None, names: Sequence[str], worst: int, reliability: Sequence[float] | None
) -> Figures:
    size, records = len(names), list(model.records.values())
    recalls = np.stack([shares(record.group, record.right, size) for record in records])
    ordered = np.sort(recalls, axis=1)  # groups without images, NaN, come last
    seen = int(np.isfinite(ordered[0]).sum())
    changes = _changes(model.records, alone.records, names) if alone is not None else []
    return Figures(
        name=model.name,
        role=model.role,
        seeds=sorted(model.records),
        recall=_plain(recalls.mean(axis=0)),
        average=float(np.nanmean(recalls)),
        worst=float(ordered[:, 0].mean()),
        worst_k=float(ordered[:, : min(worst, seen)].mean()),
        alone=model.alone,
        changes=changes,
        spearman=_correlation(changes, reliability),
        **_inherited(records, size),
    )


def _inherited(records: Sequence[Record], size: int) -> dict[str, Any]:
    """Mean margin by group; errors by group, those that are the teacher's and the others; what a group lost on its teacher."""
    found: dict[str, Any] = {}
    margins = [shares(record.group, record.margin, size) for record in records if record.margin is not None]
    if len(margins) == len(records):
        found["margin"] = _plain(np.mean(margins, axis=0))
    taught = [(record, record.teacher) for record in records if record.teacher is not None]
    if len(taught) < len(records):
        return found
    copied, own, gap = [], [], []
    for record, theirs in taught:
        wrong = ~record.right
        same = record.prediction == theirs
        copied.append(shares(record.group, wrong & same, size))
        own.append(shares(record.group, wrong & ~same, size))
        gap.append(shares(record.group, wrong.astype(float) - (theirs != record.label), size))
    parts = {"copied": copied, "own": own, "amplification": gap}
    return found | {name: _plain(np.mean(part, axis=0)) for name, part in parts.items()}


def _changes(mine: Mapping[int, Record], alone: Mapping[int, Record], names: Sequence[str]) -> list[Change]:
    """Paired seed by seed and image by image."""
    pairs = [(mine[seed], alone[seed]) for seed in mine if seed in alone]
    if not pairs:
        return []
    gaps, found = np.stack([a.right.astype(int) - b.right for a, b in pairs]), []
    for group, name in enumerate(names):
        members = gaps[:, pairs[0][0].group == group]
        if members.size:
            low, high = paired(members)
            found.append(Change(group, name, members.shape[1], float(members.mean()), low, high))
    return found


def _correlation(changes: Sequence[Change], reliability: Sequence[float] | None) -> float | None:
    if reliability is None:
        return None
    return spearman([reliability[change.group] for change in changes], [change.difference for change in changes])


def shares(groups: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Mean of `values` (N,) in each of `size` groups; NaN for a group without images."""
    count = np.bincount(groups, minlength=size)
    total = np.bincount(groups, weights=values.astype(float), minlength=size)
    found: np.ndarray = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
    return found


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation, equal values sharing their mean rank; None for fewer than three pairs, or if one side is constant."""
    if len(a) < 3:
        return None
    first, second = (_ranks(np.asarray(values, dtype=float)) for values in (a, b))
    if first.std() == 0 or second.std() == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return ranks


def _plain(values: np.ndarray) -> Shares:
    return [float(value) if np.isfinite(value) else None for value in values]
