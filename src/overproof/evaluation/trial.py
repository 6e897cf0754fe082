"""A few images on which attacks are compared: what each broke, and what that says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from overproof.attacks.base import predictions
from overproof.attacks.pgd import PGD
from overproof.attacks.randomness import Streams
from overproof.attacks.threats import Norm, Threat

Crafter = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Check:
    """One check: `value` images (of those tested) speak against the model, `limit` are tolerated; `text` says what it means."""

    name: str
    passed: bool
    value: int
    limit: int
    text: str


class Trial:
    """Images that a model gets right, met by one attack after another.

    Attributes:
        holds: mask (n,) of images that nothing broke so far.
        broken: mask (n,) of what each attack broke.
        facts: what else was measured, JSON-able.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, seed: int) -> None:
        self.model, self.images, self.labels, self.threat, self.seed = model, images, labels, threat, seed
        self.norm: Norm = type(threat).__name__  # type: ignore[assignment]
        self.index = torch.arange(len(images), device=images.device)
        self.holds = torch.ones(len(images), dtype=torch.bool, device=images.device)
        self.broken: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {}

    def pgd(self, steps: int = 20, **options: Any) -> PGD:
        """PGD under the threat."""
        return PGD(**{"eps": self.threat.eps, "norm": self.norm, "steps": steps, **options})

    def breaks(self, name: str, attack: Crafter, *, model: nn.Module | None = None, start: int = 0) -> int:
        """How many of the images that hold `attack` breaks; they no longer hold.

        Args:
            name: under which it is counted.
            attack: called as attacks are.
            model: the judge, if not the model on trial.
            start: attacks with the same number draw the same random start, which leaves the comparison less to chance.
        """
        holds, model = self.holds, model or self.model
        self.broken[name] = torch.zeros_like(holds)
        if bool(holds.any()):
            streams = Streams.named(self.index, self.seed, "sanity", start).rows(holds)
            found = attack(model, self.images[holds], self.labels[holds], streams)
            self.broken[name][holds] = predictions(model, found) != self.labels[holds]
            self.holds = holds & ~self.broken[name]
        return int(self.broken[name].sum())

    def judge(self, name: str, value: int, share: float | None, seen: str, *, good: str, bad: str) -> Check:
        """A check that tolerates one image and a `share` of all (none at all if None).

        Args:
            name: of the check.
            value: images that speak against the model.
            share: in [0, 1].
            seen: what these images do, as the end of "3 of 128 images ...".
            good: what it means if the check is passed.
            bad: what it means otherwise, and what to do.
        """
        count = len(self.images)
        limit = 0 if share is None else 1 + int(share * count)
        passed = value <= limit
        text = f"{value} of {count} images {seen} (tolerated: {limit}). {good if passed else bad}"
        return Check(name, passed, value, limit, text)
