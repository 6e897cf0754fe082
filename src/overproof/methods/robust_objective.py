"""A method that attacks its own student: threat, inner maximiser, and the copy that the attacks see."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from overproof.attacks.ascent import Loss, Start, ascend
from overproof.attacks.pgd import PGD
from overproof.attacks.threats import Norm, Threat, make_ball
from overproof.errors import UsageError
from overproof.folding import Follower
from overproof.losses.divergences import cross_entropy
from overproof.methods.objective import Objective
from overproof.networks import in_mode
from overproof.types import Batch, Progress

AttackMode = Literal["eval", "train"]


class RobustObjective(Objective):
    """A method that attacks its own student while training.

    Args:
        student, teacher: see `Objective`.
        norm: "Linf", "L2" or "L1".
        eps: radius, pixel units.
        step_size: length of an inner step, pixel units; None: eps / 4, and 1.25 eps if there is only one step.
        steps: inner steps.
        attack_mode: mode of the student's BatchNorm and dropout while it is attacked.

    Attributes:
        eps_warmup: epochs over which radius and step grow linearly to their full sizes, at least 0. A method need not know.
    """

    start: ClassVar[Start] = "uniform"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        norm: Norm = "Linf",
        eps: float = 8 / 255,
        step_size: float | None = None,
        steps: int = 10,
        attack_mode: AttackMode = "eval",
    ) -> None:
        super().__init__(student, teacher)
        self.threat: Threat = make_ball(norm, eps)
        if step_size is None:
            step_size = (1.25 if steps == 1 else 0.25) * eps or 2 / 255  # a ball of radius 0 takes any step
        if steps < 1 or step_size <= 0 or attack_mode not in ("eval", "train"):
            raise UsageError(
                f"The inner attack needs steps >= 1, step_size > 0 and attack_mode eval or train, not {steps}, {step_size} and {attack_mode!r}."
            )
        self.step_size, self.steps, self.attack_mode = step_size, steps, attack_mode
        self.norm: Norm = norm
        self.eps_warmup, self._share = 0.0, 1.0
        self._folded = Follower()
        self._victim: tuple[nn.Module, ...] = ()  # in a tuple it is no part of the objective
        self.register_forward_pre_hook(_grow, with_kwargs=True)

    def share(self, progress: Progress) -> float:
        """Share of the full radius at this step, min(1, (step + 1) / steps of the warm-up)."""
        warmup = self.eps_warmup * progress.total / progress.epochs
        return min(1.0, (progress.step + 1) / warmup) if warmup else 1.0

    def against_labels(self, batch: Batch) -> Tensor:
        """Images on which the student's cross-entropy is largest."""

        def loss(x: Tensor, rows: Tensor) -> Tensor:
            return cross_entropy(self.victim(x), batch.labels[rows])

        return self.perturb(loss, batch.images)

    def perturb(self, loss: Loss, images: Tensor) -> Tensor:
        """Images that maximise `loss(x, rows)` under the method's threat; `loss` asks `self.victim`, the student in `attack_mode`."""
        return self._once("attack", images, lambda: self._attack(loss, images))

    def _attack(self, loss: Loss, images: Tensor) -> Tensor:
        threat = self.threat if self._share == 1 else make_ball(self.norm, self._share * self.threat.eps)
        # fp16 gradients of confident predictions underflow to zero, and such images would never move; bf16 has the range.
        half = torch.is_autocast_enabled(images.device.type) and torch.get_autocast_dtype(images.device.type) == torch.float16
        with (
            in_mode(self.student, self.attack_mode),
            torch.autocast(images.device.type, enabled=False) if half else nullcontext(),
        ):
            self._victim = (self._folded.now(self.student, images),) if self.attack_mode == "eval" else ()
            try:
                return ascend(loss, images, threat, steps=self.steps, step_size=self._share * self.step_size, start=self.start)
            finally:
                self._victim = ()  # the weights move on

    @property
    def victim(self) -> nn.Module:
        """The student as its attacks see it: in eval mode its cheaper copy, which answers alike up to rounding (see `folding`)."""
        return self._victim[0] if self._victim else self.student

    @property
    def validation_attack(self) -> PGD | None:
        """PGD-10 under the method's own threat."""
        return PGD(norm=self.norm, eps=self.threat.eps, steps=10)

    @property
    def one_step_attack(self) -> PGD | None:
        """One step as the method takes it, where it takes no more; what PGD finds beside it tells whether that is enough."""
        if self.steps > 1:
            return None
        start = self.start == "uniform"
        return PGD(norm=self.norm, eps=self.threat.eps, steps=1, step_size=self.step_size, random_start=start, early_stop=False)


def _grow(objective: RobustObjective, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Each forward begins by looking where training stands, so that no method has to hand it on to `perturb`."""
    progress = next((value for value in (*arguments, *named.values()) if isinstance(value, Progress)), None)
    objective._share = 1.0 if progress is None else objective.share(progress)
