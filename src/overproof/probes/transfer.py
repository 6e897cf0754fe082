"""What fools it?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from overproof.attacks.base import predictions
from overproof.attacks.bim import BIM
from overproof.probes.base import Probe, Result, Row, SkipProbe
from overproof.probes.intervals import Number
from overproof.probes.lab import Lab

SEARCHES, CALIBRATED = 7, 256
SMALLEST, LARGEST = 0.25 / 255, 0.5
SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class AdversarialTransfer(Probe):
    """Do images made against the teacher alone fool the student more often than an independent student?

    score = share with argmax S(x_adv) != argmax S(x) among the images with argmax T(x_adv) != argmax T(x)

    x_adv comes from iterated FGSM on the teacher's cross-entropy with the label, in steps of eps / 4. The foreign attack is the
    control: images made on networks that have nothing to do with the teacher must fool both kinds of students alike.

    Args:
        eps: radius in pixel units, 0 to 1; None: the smallest of a search at which the teacher is fooled on a share `target`.
        target: that share, between 0 and 1.
        steps: of the attack, at least 1.
        images: at most so many, at least 1.
        seed, resamples: see `Probe`.

    Reference: Ojha, Li, Sundara Rajan, Liang, Lee, NeurIPS 2023, arXiv 2205.16004.

    Differences from the paper: it does not tell its radius; here one is looked for at which the teacher is fooled about as often as
    the paper's were (0.85). Without a foreign network each independent student in turn is attacked for the control, and judged are the
    others.
    """

    name: ClassVar[str] = "adversarial-transfer"
    question: ClassVar[str] = "What fools it?"

    eps: float | None = None
    target: float = 0.85
    steps: int = 5
    images: int = 5000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.eps is None or 0 <= self.eps <= 1, f"eps={self.eps} must lie in [0, 1]")
        self.require(0 < self.target < 1, f"target={self.target} must lie between 0 and 1")
        self.require(self.steps >= 1 and self.images >= 1, f"steps={self.steps} and images={self.images} must be at least 1")

    def measure(self, lab: Lab) -> Result:
        """Shares of the images fooling the teacher that fool each model too."""
        rows, eps = lab.some(self.images, self.seed), self._radius(lab)
        columns = self.columns(lab, lab.teacher, eps)
        fooled = columns.pop(lab.teacher).double()
        if not bool(fooled.any()):
            raise SkipProbe(f"No image fools the teacher at eps={eps:.4g}, so there is nothing to pass on; give a larger eps.")
        row = self.row(lab, "fooled by images that fool the teacher", columns)
        rate = self.table({"teacher": fooled}).mean("teacher")
        notes: tuple[str, ...] = ()
        if self.eps is None and rate.value < self.target - 0.1:
            notes = (f"The teacher is fooled on {rate.value:.0%} only, with the largest radius that was tried, {eps:.3g}.",)
        foreign = self._foreign(lab, eps)
        controls = row.controls if foreign is None else {**row.controls, "foreign attack": foreign}
        scores = {lab.teacher: rate, **row.scores}
        facts = {"eps": eps, "steps": self.steps, "images": len(rows), "teacher_fooled": rate.value}
        pictures = self._pictures(lab, eps, fooled)
        return self.found(Row(row.quantity, "", scores, row.gap, controls), notes=notes, facts=facts, pictures=pictures)

    def columns(self, lab: Lab, source: str, eps: float) -> dict[str, Tensor]:
        """Whether images made on `source` fool each judged model, NaN where they do not fool `source`; and for that whether they do."""
        rows, attacked = lab.some(self.images, self.seed), self._attacked(lab, source, eps)
        key = ("adversarial", *lab.about(source), eps, self.steps, len(rows), self.seed)
        changed = {
            name: lab.predictions(name, *key, of=attacked) != lab.clean(name)[rows]
            for name in dict.fromkeys((source, *lab.judged))
        }
        fooled = changed.pop(source)
        found = {name: change.double().where(fooled, torch.nan) for name, change in changed.items()}
        return {**found, source: fooled}

    def _foreign(self, lab: Lab, eps: float) -> Number | None:
        """The gap under images made on others than the teacher, averaged over these."""
        columns, plus, minus = dict[str, Tensor](), list[str](), list[str]()
        for source in lab.roles["foreign"] or lab.independents:
            others = [name for name in lab.independents if name != source]
            if not others:
                return None
            found = self.columns(lab, source, eps)
            if not bool(found[source].any()):
                continue
            columns |= {f"{name} by {source}": found[name] for name in (*lab.students, *others)}
            plus += [f"{name} by {source}" for name in lab.students]
            minus += [f"{name} by {source}" for name in others]
        return self.table(columns).difference(plus, minus=minus) if columns else None

    def _attacked(self, lab: Lab, source: str, eps: float) -> Tensor:
        rows = lab.some(self.images, self.seed)
        parts = lab.about(source, "attacked", eps, self.steps, len(rows), self.seed)
        return lab.store.tensor(parts, lambda: self._made(lab, source, rows, eps), lasting=lab.lasting(source))

    def _made(self, lab: Lab, source: str, rows: Tensor, eps: float) -> Tensor:
        attack, found = BIM(eps=eps, steps=self.steps, step_size=eps / 4, early_stop=False), []
        with lab.running(source) as (model, device):
            for part in torch.split(rows, lab.batch_size):
                streams = lab.streams("attack", self.seed, part)  # draws nothing, and leaves the global generator alone
                found.append(attack(model, lab.images[part].to(device), lab.labels[part].to(device), streams).cpu())
        return torch.cat(found)

    def _radius(self, lab: Lab) -> float:
        if self.eps is not None:
            return self.eps
        rows = lab.some(min(CALIBRATED, self.images), self.seed)
        parts = lab.about(lab.teacher, "radius", self.target, self.steps, len(rows), self.seed)
        return float(lab.store.tensor(parts, lambda: torch.tensor(self._searched(lab, rows), dtype=torch.double), lasting=True))

    def _searched(self, lab: Lab, rows: Tensor) -> float:
        """Halve the logarithm's interval: the fooling rate grows with the radius, up to accidents that do not matter here."""
        low, high = math.log(SMALLEST), math.log(LARGEST)
        clean = lab.clean(lab.teacher)[rows]
        for _ in range(SEARCHES):
            middle = (low + high) / 2
            attacked = self._made(lab, lab.teacher, rows, math.exp(middle))
            with lab.running(lab.teacher) as (model, device):
                rate = float((predictions(model, attacked.to(device)).cpu() != clean).double().mean())
            low, high = (low, middle) if rate >= self.target else (middle, high)
        return math.exp(high)

    def _pictures(self, lab: Lab, eps: float, fooled: Tensor) -> dict[str, np.ndarray]:
        """A few images that fool the teacher, untouched and attacked."""
        rows, attacked = lab.some(self.images, self.seed), self._attacked(lab, lab.teacher, eps)
        chosen = fooled.nonzero().flatten()[:SHOWN]
        return {
            "clean": lab.images[rows[chosen]].float().numpy(),
            "attacked": attacked[chosen].float().numpy(),
            "labels": lab.labels[rows[chosen]].numpy(),
        }
