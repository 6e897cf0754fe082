"""The record of what a detector did with natural and with attacked images, and its figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from overproof.attacks.randomness import Streams
from overproof.evaluation.metrics import area, roc, wilson

BINS, POINTS = 30, 200


class Judge(Protocol):
    """A detector that measures all of its criteria."""

    @property
    def thresholds(self) -> dict[str, float]:
        """By criterion: what is larger is rejected."""
        ...

    @property
    def cut(self) -> float:
        """What is rejected has a larger score."""
        ...

    def __call__(self, model: nn.Module, images: Tensor, streams: Streams | None = None) -> Any:
        """An object with `score` (N,) and `parts`, tensors (N,) by criterion."""
        ...


@dataclass(frozen=True)
class Scored:
    """Images after the model and the detector have seen them; a value per image.

    Attributes:
        wrong: whether the model gets it wrong.
        score: the detector's.
        parts: scores by criterion.
        invalid: images for which the attack broke its own rules, which count as untouched.
        no_gradient: images for which the attack found no gradient, which count as untouched: no robustness, no attack.
        pictures: a few images as bytes, (k, C, H, W), "rejected" and "passed" by the thresholds of the measurement; of attacked
            ones those that are wrong.
    """

    wrong: np.ndarray
    score: np.ndarray
    parts: dict[str, np.ndarray]
    invalid: int = 0
    no_gradient: int = 0
    pictures: dict[str, np.ndarray] = field(default_factory=dict)

    def flagged(self, cut: float, thresholds: Mapping[str, float]) -> dict[str, np.ndarray]:
        """What is rejected: "union", and by each criterion alone."""
        alone = {name: self.parts[name] > limit for name, limit in thresholds.items() if name in self.parts}
        return {"union": self.score > cut, **alone}


@dataclass(frozen=True)
class Detection:
    """The result of `measure_detector`.

    Attributes:
        seen: images there were; all else is about those the model classifies rightly.
        natural: these images untouched.
        attacks: and attacked, by the attack's name.
        cut, thresholds: the detector's when it was measured.
    """

    seen: int
    natural: Scored
    attacks: dict[str, Scored]
    cut: float
    thresholds: dict[str, float]

    @property
    def strongest(self) -> str | None:
        """The attack of which most images are wrong and not rejected; None without attacks."""
        shares = {name: self.passed(name) for name in self.attacks}
        return max(shares, key=shares.__getitem__) if shares else None

    def passed(self, attack: str) -> float:
        """Share of images that are wrong and not rejected under `attack`."""
        found = self.attacks[attack]
        return float((found.wrong & (found.score <= self.cut)).mean())

    def at(self, judge: Judge) -> Detection:
        """The same measurement under other thresholds of the same detector."""
        return replace(self, cut=judge.cut, thresholds=judge.thresholds)

    def pictures(self) -> dict[str, np.ndarray]:
        """A few images as bytes, (k, C, H, W): natural ones that are rejected, and the strongest attack's, rejected and not."""
        kinds = {"natural-rejected": self.natural.pictures.get("rejected")}
        if self.strongest is not None:
            kinds |= {f"attacked-{key}": value for key, value in self.attacks[self.strongest].pictures.items()}
        return {name: value for name, value in kinds.items() if value is not None and len(value)}

    def summary(self) -> dict[str, Any]:
        """Figures by name, JSON-able: shares with 95 % intervals, and what the drawings need."""
        count = len(self.natural.score)
        rejected = int((self.natural.score > self.cut).sum())
        return {
            "images": count,
            "clean": count / self.seen,
            "clean_rejected": rejected / count,
            "clean_rejected_interval": wilson(rejected, count),
            "clean_kept": (count - rejected) / self.seen,
            "clean_rejected_by": _shares(self.natural.flagged(self.cut, self.thresholds)),
            "thresholds": self.thresholds,
            "attacks": {name: self._attack(name) for name in self.attacks},
            "strongest": self.strongest,
            "histograms": self._histograms(),
        }

    def _attack(self, name: str) -> dict[str, Any]:
        found, count = self.attacks[name], len(self.natural.score)
        flagged = {key: value[found.wrong] for key, value in found.flagged(self.cut, self.thresholds).items()}
        through = round(self.passed(name) * count)
        false, true = roc(self.natural.score, found.score[found.wrong]) if found.wrong.any() else (np.zeros(0), np.zeros(0))
        return {
            "success": float(found.wrong.mean()),
            "detected": float(flagged["union"].mean()) if found.wrong.any() else None,
            "detected_by": _shares(flagged) if found.wrong.any() else {},
            "wrong_and_not_rejected": through / count,
            "interval": wilson(through, count),
            "area": area(false, true) if found.wrong.any() else None,
            "invalid": found.invalid,
            "no_gradient": found.no_gradient,
            "roc": [_thinned(false), _thinned(true)],
        }

    def _histograms(self) -> dict[str, Any]:
        """Counts of each criterion's scores over common bins, natural and of what each attack achieved."""
        drawn = {}
        for name in self.natural.parts:
            sets = {"natural": self.natural.parts[name]}
            sets |= {attack: found.parts[name][found.wrong] for attack, found in self.attacks.items()}
            values = np.concatenate(list(sets.values()))
            values = values[np.isfinite(values)]
            usual = float(np.quantile(values, 0.98)) if len(values) else 0.0
            top = max(usual, 1.25 * self.thresholds.get(name, 0.0), 1e-6)
            edges = np.linspace(0, top, BINS + 1)  # the last bin holds all that is larger
            counts = {key: np.histogram(part[np.isfinite(part)].clip(0, top), edges)[0].tolist() for key, part in sets.items()}
            drawn[name] = {"edges": edges.tolist(), "counts": counts}
        return drawn


def _thinned(curve: np.ndarray) -> list[float]:
    kept = np.unique(np.linspace(0, max(len(curve) - 1, 0), POINTS).astype(int)) if len(curve) else slice(0)
    return list(map(float, curve[kept]))


def _shares(flagged: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(value.mean()) for name, value in flagged.items()}
