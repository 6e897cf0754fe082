"""Auto-PGD."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from overproof.attacks.apgd_climb import Found, Look, climb
from overproof.attacks.apgd_steps import make_pace
from overproof.attacks.ascent import differentiable, input_gradient
from overproof.attacks.base import BudgetAttack, logits_of, won
from overproof.attacks.objectives import AttackLoss, attack_value, check_loss
from overproof.attacks.randomness import Streams, normal, uniform
from overproof.attacks.threats import make_threat, per_image, project_l1
from overproof.errors import UsageError
from overproof.networks import in_mode


@dataclass(frozen=True, kw_only=True)
class APGD(BudgetAttack):
    """Gradient ascent whose step size and momentum need no tuning: the strong part of AutoAttack.

    z = project(x + step * direction(grad L)), x+ = project(x + alpha (z - x) + (1 - alpha) (x - x-)), with step = 2 eps at
    first, halved per image (and the image put back to its best point) at checkpoints that show too little progress. L1
    uses sparse steps of adaptive length and number of entries, the projection on ball and box together, and three phases
    with 3, 2 and 1 times eps (0.3, 0.3 and 0.4 of the steps).

    Args:
        eps, norm, targeted: see `BudgetAttack`.
        loss: L; "ce", "margin", "dlr" as in `PGD`, or "dlr-targeted": the targeted difference of logits ratio towards one
            wrong class after another (any misclassification counts). With `targeted`, both "dlr" lead from the class
            predicted on the untouched image to the label.
        steps: gradient steps per start, at least 1.
        restarts: random starts (per target), later ones only for images that still hold, at least 1.
        alpha: weight of the new step against the last one's, in (0, 1].
        rho: share of a window's steps that must raise the loss, in (0, 1).
        targets: of "dlr-targeted": how many classes, those with the largest logits on the untouched image; at least 1.
        screen: of "dlr-targeted": (steps, number of targets) per round, instead of `steps` and `targets`. Every image tries
            the given number of classes, chosen by the logits in the first round, and afterwards by the highest loss reached
            in the round before; each round starts afresh. ((10, 9), (30, 3), (100, 1)) stops after 280 steps per image
            instead of 900. Empty: the paper's full schedule.
        early_stop: a misclassified image (a target: reached) leaves at once; off, all steps are made, and the point of
            highest loss is returned among those that are misclassified, or among all where there is none.

    Raises:
        UsageError: an option out of range, an unknown loss, or `screen` where there are no targets to choose from.

    Reference: Croce and Hein, ICML 2020, arXiv 2003.01690; L1: Croce and Hein, ICML 2021, arXiv 2103.01208.

    Differences from the paper: `early_stop` for each image at each step, `screen`. The number of entries that an L1 step
    moves is rounded down, not up: otherwise it never falls below two. With two classes (for targets: three)
    the ratio of "dlr" is constant and its numerator, the margin, takes its place.
    """

    logits_only: ClassVar[bool] = True

    loss: Literal["ce", "margin", "dlr", "dlr-targeted"] = "ce"
    steps: int = 100
    restarts: int = 1
    alpha: float = 0.75
    rho: float = 0.75
    targets: int = 9
    screen: tuple[tuple[int, int], ...] = ()
    early_stop: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self, self.loss, ("ce", "margin", "dlr", "dlr-targeted"))
        if min(self.steps, self.restarts, self.targets) < 1:
            raise UsageError(
                f"APGD(steps={self.steps}, restarts={self.restarts}, targets={self.targets}): all must be at least 1."
            )
        if not (0 < self.alpha <= 1 and 0 < self.rho < 1):
            raise UsageError(f"APGD(alpha={self.alpha}, rho={self.rho}): alpha must lie in (0, 1], rho in (0, 1).")
        if self.screen and not self._many:
            raise UsageError('APGD(screen=...) chooses among targets: it needs loss="dlr-targeted" and targeted=False.')
        counts = [count for _, count in self.screen]
        if any(steps < 1 or count < 1 for steps, count in self.screen) or counts != sorted(counts, reverse=True):
            raise UsageError(f"APGD(screen={self.screen}): give (steps, targets) per round, at least 1, targets not growing.")

    @property
    def _many(self) -> bool:
        return self.loss == "dlr-targeted" and not self.targeted

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        streams = Streams.of(generator, images)
        with in_mode(model), torch.inference_mode(False), torch.no_grad():
            images, labels = images.clone(), labels.clone()
            logits = logits_of(model, images)
            found = Found.nothing(images, logits[:, 0])
            found.won = won(logits.argmax(dim=1), labels, self.targeted)
            leave, goals = (labels, self._wrong(logits, labels)) if self._many else (logits.argmax(dim=1), labels[:, None])
            for number, (steps, count) in enumerate(self.screen or ((self.steps, self.targets),)):
                goals = goals[:, :count]
                scores = self._round(model, images, leave, goals, found, streams.fork(number), steps)
                goals = goals.gather(1, scores.argsort(dim=1, descending=True))
        return found.images

    @staticmethod
    def _wrong(logits: Tensor, labels: Tensor) -> Tensor:
        """All wrong classes (N, K - 1), the largest logit first."""
        return logits.scatter(1, labels[:, None], -math.inf).argsort(dim=1, descending=True)[:, :-1]

    def _round(
        self, model: nn.Module, images: Tensor, leave: Tensor, goals: Tensor, found: Found, streams: Streams, steps: int
    ) -> Tensor:
        """Every column of `goals` (N, T) from every start, for images that hold; the highest values reached (N, T)."""
        scores = torch.full(goals.shape, -math.inf, dtype=found.values.dtype, device=goals.device)
        for number in range(goals.shape[1] * self.restarts):
            column = number // self.restarts
            rows = torch.arange(len(images), device=images.device)
            rows = rows[~found.won] if self.early_stop else rows
            if len(rows) == 0:
                break
            look = self._look(model, leave[rows], goals[rows, column])
            result = self._run(look, images[rows], streams.fork(number).rows(rows), steps)
            found.take(rows, result.images, result.values, result.won)
            scores[rows, column] = scores[rows, column].maximum(result.values)
        return scores

    def _look(self, model: nn.Module, leave: Tensor, goals: Tensor) -> Look:
        """Value, success and gradient; `goals` are the true classes unless a class is to be reached."""
        loss: AttackLoss = "dlr" if self.loss == "dlr-targeted" else self.loss

        def look(x: Tensor, rows: Tensor, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
            with differentiable(x) as leaf, torch.set_grad_enabled(wanted):
                logits = logits_of(model, leaf)
                values = attack_value(loss, logits, goals[rows], leave[rows] if self.targeted or self._many else None)
                gradient = input_gradient(values, leaf).nan_to_num_(nan=0.0) if wanted else torch.zeros_like(x)
            predicted = logits.detach().argmax(dim=1)
            success = predicted != leave[rows] if self._many else won(predicted, goals[rows], self.targeted)
            return values.detach(), success, gradient

        return look

    def _run(self, look: Look, images: Tensor, streams: Streams, steps: int) -> Found:
        x = self._start(images, streams)
        for eps, count in self._phases(steps):
            x = project_l1(x, images, eps) if self.norm == "L1" else x
            pace = partial(make_pace, make_threat(self.norm, eps), images, x, steps=count, alpha=self.alpha, rho=self.rho)
            # Success in a larger ball decides nothing.
            result = climb(look if eps == self.eps else _undecided(look), x, pace, count, stop=self.early_stop)
            x = result.images
        return result

    def _start(self, images: Tensor, streams: Streams) -> Tensor:
        """A random direction, as long as the ball is wide; for L1 as it is, to be projected."""
        if self.norm == "L1":
            return images + normal(images, streams)
        change = uniform(images, streams, -1, 1) if self.norm == "Linf" else normal(images, streams)
        length = self.threat.size(change).clamp(min=1e-12)
        return (images + change * per_image(self.eps / length, images)).clamp_(0, 1)

    def _phases(self, steps: int) -> list[tuple[float, int]]:
        if self.norm != "L1":
            return [(self.eps, steps)]
        early = 3 * steps // 10
        return [(factor * self.eps, count) for factor, count in ((3, early), (2, early), (1, steps - 2 * early)) if count]


def _undecided(look: Look) -> Look:
    def blind(x: Tensor, rows: Tensor, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
        values, success, gradient = look(x, rows, wanted)
        return values, torch.zeros_like(success), gradient

    return blind
