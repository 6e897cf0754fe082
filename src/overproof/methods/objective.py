"""The contract between a method and the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from overproof.attacks.ascent import Loss, Start, ascend
from overproof.attacks.pgd import PGD
from overproof.attacks.threats import Norm, Threat, make_ball
from overproof.errors import UsageError
from overproof.folding import Follower
from overproof.losses.divergences import cross_entropy
from overproof.methods.memory import Memory
from overproof.models.generators import Generator
from overproof.networks import in_mode
from overproof.types import Batch, Output, Progress

AttackMode = Literal["eval", "train"]


class Objective(nn.Module, ABC):
    """A method: student, frozen teacher, adapters, and one forward that does all trainable work of a step.

    Args:
        student: classifier to be trained, images in [0, 1] -> logits (N, K).
        teacher: frozen classifier of the same classes, or None. It never trains: always in eval mode, no gradients.
    """

    phases: ClassVar[tuple[str, ...]] = ("train",)
    partial: ClassVar[bool] = False  # whether a step may leave some of its parameters without gradient
    needs_same_classes: bool = True  # whether it compares what both networks answer
    same_classes: bool = True  # whether student and teacher have as many, which is found out when a run begins

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self._known_teacher_logits: Tensor | None = None
        self._memory: Memory | None = None
        if teacher is not None:
            teacher.requires_grad_(False).eval()

    @abstractmethod
    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """Weighted loss terms of one step, and the student's logits."""

    def train(self, mode: bool = True) -> Objective:
        """Training mode for everything but the teacher."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def trainable(self, phase: str = "train") -> Iterator[nn.Parameter]:
        """Parameters that the optimiser of `phase` updates."""
        return (p for p in self.parameters() if p.requires_grad)

    def groups(self, phase: str = "train") -> list[dict[str, Any]]:
        """The same for the optimiser: tables with "params", options of their own, and "lr_scale", a factor of the learning rate."""
        return [{"params": list(self.trainable(phase))}]

    @property
    def turns(self) -> tuple[str, ...]:
        """The phases that make up one step, in order; a phase may have several turns. `loss` and `accuracy` are those of the first phase."""
        return self.phases

    def settings(self, phase: str) -> dict[str, Any]:
        """What of [train] is otherwise for the optimiser of `phase`, such as {"optimizer": "adam", "lr": 1e-3}."""
        return {}

    def artefacts(self) -> dict[str, Generator]:
        """Generators that it trains beside the student, by name: kept in the run, with pictures of what they make."""
        return {}

    def trained_state(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold: student and adapters, not the teacher."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("teacher.")}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `trained_state`."""
        frozen = {k: v for k, v in self.state_dict().items() if k.startswith("teacher.")}
        self.load_state_dict({**frozen, **state})

    @property
    def answers(self) -> bool:
        """Whether the student's answers are trained, and not its features alone: then its accuracy says nothing."""
        return True

    def describe(self) -> dict[str, Any]:
        """What it has learned beside the student, in plain values: kept in the run, and told by `overproof show`."""
        return {}

    def illustrate(self, batch: Batch) -> dict[str, Tensor]:
        """What of that can be looked at on these images, by name; called in eval mode and without gradients."""
        return {}

    def concerns(self, means: Mapping[str, float]) -> dict[str, str]:
        """What a person should know about an epoch with these `means` of losses and logs: sentences by name, each told once a run."""
        return {}

    @property
    def validation_attack(self) -> PGD | None:
        """The attack under which a robust method is watched during training; None for the others."""
        return None

    def teacher_logits(self, batch: Batch) -> Tensor:
        """The teacher's logits on the batch's own images, without gradients; looked up if they are known already."""
        assert self.teacher is not None
        if self._known_teacher_logits is not None:
            return self._known_teacher_logits[batch.index]
        return self._once("teacher", batch.images, lambda: self._ask_teacher(batch.images))

    def _ask_teacher(self, images: Tensor) -> Tensor:
        assert self.teacher is not None
        with torch.no_grad():
            logits: Tensor = self.teacher(images)
        return logits

    def remember_teacher(self, logits: Tensor | None) -> None:
        """Use `logits[index]` (M, K) instead of running the teacher: exact as long as images are not augmented."""
        self._known_teacher_logits = logits

    def _once(self, kind: str, images: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """`make()`; in the second of two forwards over a batch (see `remembering`) what the first one made."""
        return make() if self._memory is None else self._memory.recall(kind, images, make)


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
        step_size: float | None = 2 / 255,
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


@contextmanager
def remembering(objective: Objective) -> Iterator[Callable[[], None]]:
    """For two forwards over one batch: once what this yields was called, attacks and teacher's logits are those made before."""
    memories = []
    parts = [part for part in objective.modules() if isinstance(part, Objective)]
    for part in parts:
        part._memory = Memory()
        memories.append(part._memory)

    def again() -> None:
        for memory in memories:
            memory.rewind()

    try:
        yield again
    finally:
        for part in parts:
            part._memory = None
