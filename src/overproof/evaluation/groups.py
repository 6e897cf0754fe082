"""Averages hide who pays: accuracy by class or subgroup, beside the teacher's and that of the student trained alone.

Everything is computed from the rows that evaluations keep; nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from overproof.errors import DataError

By = Literal["class", "attribute"]
Shares = list[float | None]  # by group; None for a group without images


@dataclass(frozen=True)
class Record:
    """What a model said about each of N images, in the order of their numbers.

    Attributes:
        index, label, prediction: number, class and predicted class.
        group: number of the group, 0 to G-1.
        margin: (K p_y - 1) / (K - 1), p_y the probability of the class; None if it was not kept.
        teacher: what the teacher predicted, if the evaluation knew it.
    """

    index: np.ndarray
    label: np.ndarray
    prediction: np.ndarray
    group: np.ndarray
    margin: np.ndarray | None = None
    teacher: np.ndarray | None = None

    @classmethod
    def of(cls, samples: Mapping[str, np.ndarray], *, classes: int, by: By = "class") -> Record:
        """From the rows of an evaluation.

        Args:
            samples: arrays by name, as `Evaluation.samples` has them.
            classes: K, at least 2.
            by: "class", or "attribute": the subgroup that the data knew.

        Raises:
            DataError: rows or subgroups are missing.
        """
        missing = {"index", "label", "prediction"} - samples.keys()
        if missing:
            raise DataError(f"The evaluation has no rows for {', '.join(sorted(missing))}. Evaluate the run again.")
        if by == "attribute" and "group" not in samples:
            raise DataError(
                "The evaluation does not know the subgroups of its images. Name them with data.attribute=... and evaluate again."
            )
        order = np.argsort(samples["index"], kind="stable")
        rows = {name: samples[name][order] for name in ("index", "label", "prediction")}
        margin = (classes * np.exp(-samples["nll"][order].astype(float)) - 1) / (classes - 1) if "nll" in samples else None
        theirs = samples["teacher_prediction"][order] if "teacher_prediction" in samples else None
        known = theirs is not None and bool((theirs >= 0).all())
        group = samples["group"][order] if by == "attribute" else rows["label"]
        return cls(**rows, group=group, margin=margin, teacher=theirs if known else None)

    @property
    def right(self) -> np.ndarray:
        """Whether the model is right (N,)."""
        found: np.ndarray = self.prediction == self.label
        return found


@dataclass(frozen=True)
class Model:
    """A model, or the same one trained with several seeds.

    Attributes:
        name: what it is called.
        role: "teacher", "alone" (trained on the labels only) or "student".
        records: what it said, by seed.
        alone: name of the model trained alone that a student is compared with; "" if there is none.
    """

    name: str
    role: str
    records: Mapping[int, Record]
    alone: str = ""


@dataclass(frozen=True)
class Change:
    """Accuracy of a student on one group minus that of the student trained alone, with its 95 % interval; both saw the same images."""

    group: int
    name: str
    count: int
    difference: float
    low: float
    high: float

    @property
    def paid(self) -> bool:
        """Whether the group has lost more than chance explains."""
        return self.high < 0


@dataclass(frozen=True)
class Figures:
    """What is known of one model; shares are means over its seeds.

    Attributes:
        recall: accuracy by group.
        average, worst, worst_k: mean over the groups, the least, and the mean of the k least (each found seed by seed).
        margin: mean of (K p_y - 1) / (K - 1) by group.
        amplification: error by group minus the teacher's; copied, own: errors by group that are the teacher's wrong class, and others.
        changes: against the student trained alone, groups in order.
        spearman: rank correlation of these with the teacher's reliability.
    """

    name: str
    role: str
    seeds: list[int]
    recall: Shares
    average: float
    worst: float
    worst_k: float
    margin: Shares | None = None
    amplification: Shares | None = None
    copied: Shares | None = None
    own: Shares | None = None
    alone: str = ""
    changes: list[Change] = field(default_factory=list)
    spearman: float | None = None


@dataclass(frozen=True)
class GroupReport:
    """Accuracy by class or subgroup.

    Attributes:
        by: "class", or the name of the attribute.
        names: of the groups.
        k: the k of worst_k.
        count: test images of each group; train: training images, if known.
        reliability: how reliable the teacher is about each group, if known, and how that was measured.
        models: teachers, students alone, students.
        notes: what a reader must know.
    """

    by: str
    names: list[str]
    k: int
    count: list[int]
    models: list[Figures]
    train: list[int] | None = None
    reliability: list[float] | None = None
    source: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def summary(self) -> dict[str, Any]:
        """Everything in plain values, as written to JSON; with the names of those who paid."""
        table = asdict(self)
        for model, figures in zip(table["models"], self.models, strict=True):
            model["paid"] = [change.name for change in figures.changes if change.paid]
            model["fell"] = [change.name for change in figures.changes if change.difference < 0]
        return table
