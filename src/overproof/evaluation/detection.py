"""What a detector is worth: how many natural images it rejects, and what passes it, attack by attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from overproof.attacks.base import Attack, predictions
from overproof.attacks.randomness import Streams
from overproof.errors import DataError, NoGradientError, UsageError
from overproof.evaluation.detected import Detection, Judge, Scored
from overproof.evaluation.metrics import quantile
from overproof.evaluation.verdicts import verdict
from overproof.folding import folded
from overproof.networks import device_of, full_precision

STEPS = (1, 2, 3, 5, 10, 20, 50, 100)
SHOWN = 8  # images that are kept of each kind
LEVELS = {"low": 0.25, "median": 0.5, "high": 0.75}


def measure_detector(
    judge: Judge,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    attacks: Mapping[str, Attack],
    seed: int = 0,
    batch_size: int = 256,
) -> Detection:
    """Attack the images that the model gets right, check what came of it, and let the detector judge, with fresh randomness.

    Args:
        judge: a fitted detector that measures all of its criteria (not `stop_early`).
        model: images -> logits (N, K); one that rolls dice itself is made repeatable.
        images: (N, C, H, W) in [0, 1], none of them used in fitting.
        labels: true classes (N,).
        attacks: by name.
        seed: of attacks and judgements.
        batch_size: images at once.

    Raises:
        DataError: the model gets no image right.
        UsageError: the detector was fitted for another model.
    """
    if isinstance(judge, nn.Module) and callable(check := getattr(judge, "check", None)):
        check(model)
    with _own_dice(model), full_precision(device_of(model)):
        field = _Field(judge, model, images, labels, seed, batch_size)
        found = {name: field.scored(name, attack) for name, attack in attacks.items()}
        return Detection(len(images), field.scored("natural", None), found, judge.cut, judge.thresholds)


def over_steps(
    judge: Judge, model: nn.Module, images: Tensor, labels: Tensor, *, attack: Any, steps: Sequence[int] = STEPS, seed: int = 0
) -> dict[str, Any]:
    """How the scores change as an attack goes on: an image cannot be firm and near another class at once.

    Args:
        judge, model, images, labels, seed: see `measure_detector`.
        attack: a frozen attack with an option `steps`, whose way does not depend on how far it goes.
        steps: at which to look.

    Returns:
        JSON-able: "steps", 0 being the natural images, and by criterion the "threshold" and the "median", "low" and "high" quarter
        at each, of the images that are wrong there (None without any).

    Raises:
        UsageError: the attack has no option `steps`.
    """
    if not hasattr(attack, "steps"):
        raise UsageError(f"{type(attack).__name__} has no option `steps` to be followed.")
    with _own_dice(model), full_precision(device_of(model)):
        field = _Field(judge, model, images, labels, seed)
        ways = [field.scored("over steps", replace(attack, steps=count)) for count in steps]
        sets = [field.scored("natural", None).parts, *({k: v[way.wrong] for k, v in way.parts.items()} for way in ways)]
    criteria: dict[str, dict[str, Any]] = {name: {"threshold": limit} for name, limit in judge.thresholds.items()}
    for name, facts in criteria.items():
        for key, share in LEVELS.items():
            facts[key] = [quantile(part[name], share) if len(part[name]) else None for part in sets]
    return {"steps": [0, *steps], "criteria": criteria}


@dataclass(frozen=True)
class _Field:
    """A detector, a model, and images of which those count that the model gets right."""

    judge: Judge
    model: nn.Module
    images: Tensor
    labels: Tensor
    seed: int
    batch_size: int = 256

    @cached_property
    def rows(self) -> tuple[Tensor, ...]:
        """Numbers of the images that the model gets right, by batches."""
        everything = torch.split(torch.arange(len(self.images)), self.batch_size) if len(self.images) else ()
        right = [torch.arange(0)]
        for rows in everything:
            x, y = self._batch(rows)
            Streams.named(rows.to(y.device), self.seed, "clean").seed_global()
            right.append(rows[(predictions(self.model, x) == y).cpu()])
        found = torch.cat(right)
        if not len(found):
            raise DataError(f"The model gets none of these {len(self.images)} images right: there is nothing to detect.")
        return torch.split(found, self.batch_size)

    @cached_property
    def quick(self) -> nn.Module:
        """What attacks are shown that need nothing but logits."""
        return folded(self.model, self._batch(self.rows[0][:8])[0])

    def _batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        device = device_of(self.model)
        return self.images[rows].to(device), self.labels[rows].to(device)

    def scored(self, name: str, attack: Attack | None) -> Scored:
        """Attack the images, check what came of it, and let the detector judge; `name` decides the random numbers."""
        wrong, scores, criteria, failed = [], [], [], {"invalid": 0, "no_gradient": 0}
        shown: dict[str, list[np.ndarray]] = {"rejected": [], "passed": []}
        for rows in self.rows:
            x, y = self._batch(rows)
            guess, index = y, rows.to(y.device)
            if attack is not None:
                dice = Streams.named(index, self.seed, "attack", name).seed_global()
                through = self.quick if getattr(attack, "logits_only", False) else None
                try:
                    result = verdict(attack, self.model, x, y, dice, through=through)
                    x, guess = result.images, result.predictions
                    failed["invalid"] += int(result.invalid.sum())
                except NoGradientError:
                    failed["no_gradient"] += len(y)
            with torch.no_grad():
                judgement = self.judge(self.model, x, Streams.named(index, self.seed, "judge", name).seed_global())
            counted = guess != y if attack is not None else torch.ones_like(y, dtype=torch.bool)
            for key, mask in (("rejected", judgement.score > self.judge.cut), ("passed", judgement.score <= self.judge.cut)):
                few = x[mask & counted][:SHOWN]
                shown[key].append((few * 255).round().byte().cpu().numpy())
            wrong.append((guess != y).cpu().numpy())
            scores.append(judgement.score.float().cpu().numpy())
            criteria.append({key: value.float().cpu().numpy() for key, value in judgement.parts.items()})
        joined = {key: np.concatenate([part[key] for part in criteria]) for key in criteria[0]}
        pictures = {key: np.concatenate(parts)[:SHOWN] for key, parts in shown.items()}
        return Scored(np.concatenate(wrong), np.concatenate(scores), joined, pictures=pictures, **failed)


def _own_dice(model: nn.Module) -> AbstractContextManager[None]:
    """The caller's global generators are as they were afterwards."""
    device = device_of(model)
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
