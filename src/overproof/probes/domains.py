"""What does it say where it was never taught?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from overproof.data.corruptions import SEVERITIES, STRENGTHS, corrupted
from overproof.data.order import generator_for
from overproof.probes.base import Probe, Result, Row, SkipProbe
from overproof.probes.lab import Lab, Pictures
from overproof.probes.store import fingerprint

Columns = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Domains(Probe):
    """Do student and teacher say the same, right or wrong, in surroundings that the student never saw?

    consensus(S) = share of images with argmax S(x) = argmax T(x)

    Rows: consensus over all unseen domains together, then accuracy there (what a teacher that knows them hands on), then both for each
    domain and for the seen one. Domains come with the data (`Material.domains`).

    Args:
        seed, resamples: see `Probe`.

    Reference: Ojha, Li, Sundara Rajan, Liang, Lee, NeurIPS 2023, arXiv 2205.16004.

    Differences from the paper: intervals.
    """

    name: ClassVar[str] = "domains"
    question: ClassVar[str] = "What does it say where it was never taught?"

    def measure(self, lab: Lab) -> Result:
        """Consensus and accuracy in every domain."""
        if not lab.material.domains:
            raise SkipProbe("No unseen domains are given; name some, such as --domain color or domains={'sketch': data}.")
        same, right = (
            {"seen": agreeing(lab, "clean", of=lab.images)},
            {"seen": correct(lab, "clean", of=lab.images, labels=lab.labels)},
        )
        for domain, (images, labels) in lab.material.domains.items():
            key = ("domain", fingerprint(images, labels))
            same[domain] = agreeing(lab, *key, of=images)
            right[domain] = correct(lab, *key, of=images, labels=labels)
        return self.found(*consensus_rows(self, lab, same, right))


@dataclass(frozen=True, kw_only=True)
class Corruptions(Probe):
    """Do student and teacher fail alike on spoilt images?

    consensus(S) = share of images with argmax S(x) = argmax T(x)

    Args:
        kinds: of corruption: "noise", "blur", "contrast", "jpeg".
        severities: 1 (mild) to 5.
        images: at most so many, at least 1.
        seed, resamples: see `Probe`.

    Reference: Hendrycks and Dietterich, ICLR 2019, arXiv 1903.12261 (the corruptions).
    """

    name: ClassVar[str] = "corruptions"
    question: ClassVar[str] = "What does it say of spoilt images?"

    kinds: tuple[str, ...] = tuple(STRENGTHS)
    severities: tuple[int, ...] = SEVERITIES
    images: int = 5000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.images >= 1, f"images={self.images} must be at least 1")
        self.require(
            bool(self.kinds) and set(self.kinds) <= set(STRENGTHS), f"kinds={self.kinds} are not among {', '.join(STRENGTHS)}"
        )
        self.require(
            bool(self.severities) and set(self.severities) <= set(SEVERITIES), f"severities={self.severities} must be 1 to 5"
        )

    def measure(self, lab: Lab) -> Result:
        """Consensus and accuracy under every corruption."""
        rows = lab.some(self.images, self.seed)
        same: dict[str, Columns] = {}
        right: dict[str, Columns] = {}
        for kind in self.kinds:
            for severity in self.severities:
                key = ("corrupted", kind, severity, len(rows), self.seed)
                made = _corrupted(lab.images[rows], kind, severity, self.seed)
                same[f"{kind} {severity}"] = agreeing(lab, *key, of=made)
                right[f"{kind} {severity}"] = correct(lab, *key, of=made, labels=lab.labels[rows])
        return self.found(*consensus_rows(self, lab, same, right))


def _corrupted(images: Tensor, kind: str, severity: int, seed: int) -> Callable[[], Pictures]:
    return cache(lambda: corrupted(images, kind, severity, generator_for("corruption", kind, severity, seed)))


def agreeing(lab: Lab, *key: object, of: Pictures | Callable[[], Pictures]) -> Columns:
    """Whether each judged model says what the teacher says."""
    taught = lab.predictions(lab.teacher, *key, of=of)
    return {name: lab.predictions(name, *key, of=of) == taught for name in lab.judged}


def correct(lab: Lab, *key: object, of: Pictures | Callable[[], Pictures], labels: Tensor) -> Columns:
    """Whether each model is right, the teacher among them."""
    return {name: lab.predictions(name, *key, of=of) == labels for name in lab.watched}


def consensus_rows(probe: Probe, lab: Lab, same: Mapping[str, Columns], right: Mapping[str, Columns]) -> list[Row]:
    """Rows of both quantities over all conditions but the seen domain, then of each condition."""
    rows = []
    for quantity, found in (("same answer as the teacher", same), ("accuracy", right)):
        unseen = [columns for condition, columns in found.items() if condition != "seen"]
        rows.append(probe.row(lab, quantity, {name: _together([columns[name] for columns in unseen]) for name in unseen[0]}))
    for condition in same:
        rows.append(probe.row(lab, "same answer as the teacher", same[condition], condition=condition))
        rows.append(probe.row(lab, "accuracy", right[condition], condition=condition))
    return rows


def _together(columns: list[Tensor]) -> Tensor:
    """A column of what several conditions gave; the same images under each are drawn, or not, as one."""
    if len({len(column) for column in columns}) == 1:
        return torch.stack([column.double() for column in columns]).mean(dim=0)
    return torch.cat(columns)
