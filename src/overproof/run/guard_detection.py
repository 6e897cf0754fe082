"""A guarded model's detector under attack, and the search for what it overlooks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from overproof import console
from overproof.attacks.base import Attack
from overproof.attacks.pgd import PGD
from overproof.attacks.randomness import Streams
from overproof.attacks.threats import L1, L2, Linf
from overproof.data import make_loader
from overproof.evaluation.detection import measure_detector, over_steps
from overproof.guards.base import Judgement
from overproof.guards.detector import Detector
from overproof.guards.detector_attacks import NEAREST, SegmentSearch
from overproof.guards.guarded import Guarded
from overproof.networks import on_device

TRANSFER = "-transfer"
SEARCH = "segment-search"
DRAWS = 8  # of a purifier's noise, over which the way of a search is averaged
FOLLOWED = 256  # images whose scores are followed over the steps of an attack


def _search(attack: Attack, judge: Beside, *, random: bool = False) -> SegmentSearch:
    """The search under the attack's own threat, along the way to a deep image: one that stops at the boundary leads nowhere."""
    threat = attack.threat
    if not isinstance(threat, Linf | L2 | L1) or not math.isfinite(threat.eps):
        return SegmentSearch(inner=attack, detector=judge)
    ball: dict[str, Any] = {"eps": threat.eps, "norm": type(threat).__name__}
    if not random:
        return SegmentSearch(detector=judge, **ball)
    return SegmentSearch(inner={"attack": "eot", "inner": dict(NEAREST), "samples": DRAWS}, detector=judge, **ball)


class Beside:
    """A guarded model's detector, looking at what the model is shown, while somebody attacks the guarded model."""

    def __init__(self, guarded: Guarded, detector: Detector) -> None:
        # Measured to the end: a detector that stops early leaves scores out.
        self.detector = Detector(**{**detector.options(), "stop_early": False}).restore(detector.state(), detector.facts)
        self.guarded = guarded

    @property
    def thresholds(self) -> dict[str, float]:
        return self.detector.thresholds

    @property
    def cut(self) -> float:
        return self.detector.cut

    def __call__(self, model: nn.Module, images: Tensor, streams: Streams | None = None) -> Judgement:
        streams = Streams.of(streams, images)
        shown = images if self.guarded.purifier is None else self.guarded.classify(images, streams)[1]
        judged: Judgement = self.detector(self.guarded.model, shown, streams.fork(1))  # as in `Guarded`
        return judged


def detection_of(
    guarded: Guarded, data: Any, attacks: Mapping[str, Attack], *, batch_size: int, seed: int, device: torch.device
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The table "detection" of an evaluation, and pictures: every attack before the detector, and a search for each of their threats."""
    assert isinstance(guarded.detector, Detector)
    console.note("judging attacked images with the detector")
    with on_device(guarded, device):
        judge = Beside(guarded, guarded.detector)
        batches = list(make_loader(data, batch_size).batches(0))
        images, labels = torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])
        searches: dict[str, SegmentSearch] = {}
        for name, attack in attacks.items():
            search = None if name.endswith(TRANSFER) else _search(attack, judge, random=guarded.purifier is not None)
            if search is not None and search not in searches.values():  # attacks of one threat share it
                searches[f"{name}-{SEARCH}"] = search
        found = measure_detector(
            judge,
            guarded.logits_model(),
            images,
            labels,
            attacks={**attacks, **searches},
            seed=seed,
            batch_size=batch_size,
        )
        return {**found.summary(), **_over_steps(judge, guarded, images, labels, attacks, seed)}, found.pictures()


def _over_steps(
    judge: Beside, guarded: Guarded, images: Tensor, labels: Tensor, attacks: Mapping[str, Attack], seed: int
) -> dict[str, Any]:
    """The scores as the first PGD goes on, on a few images; other attacks go another way if they have fewer steps."""
    attack = next((attack for attack in attacks.values() if type(attack) is PGD), None)
    if attack is None:
        return {}
    attack = replace(attack, early_stop=False)
    few = slice(0, FOLLOWED)
    return {"over_steps": over_steps(judge, guarded.logits_model(), images[few], labels[few], attack=attack, seed=seed)}
