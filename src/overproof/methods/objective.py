"""The contract between a method and the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from overproof.attacks.ascent import Loss, Start, ascend
from overproof.attacks.pgd import PGD
from overproof.attacks.threats import Norm, Threat, make_ball
from overproof.errors import UsageError
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

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self._known_teacher_logits: Tensor | None = None
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

    def trained_state(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold: student and adapters, not the teacher."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("teacher.")}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `trained_state`."""
        frozen = {k: v for k, v in self.state_dict().items() if k.startswith("teacher.")}
        self.load_state_dict({**frozen, **state})

    @property
    def validation_attack(self) -> PGD | None:
        """The attack under which a robust method is watched during training; None for the others."""
        return None

    def teacher_logits(self, batch: Batch) -> Tensor:
        """The teacher's logits on the batch's own images, without gradients; looked up if they are known already."""
        assert self.teacher is not None
        if self._known_teacher_logits is not None:
            return self._known_teacher_logits[batch.index]
        with torch.no_grad():
            logits: Tensor = self.teacher(batch.images)
        return logits

    def remember_teacher(self, logits: Tensor | None) -> None:
        """Use `logits[index]` (M, K) instead of running the teacher: exact as long as images are not augmented."""
        self._known_teacher_logits = logits


class RobustObjective(Objective):
    """A method that attacks its own student while training.

    Args:
        student, teacher: see `Objective`.
        norm: "Linf", "L2" or "L1".
        eps: radius, pixel units.
        step_size: length of an inner step, pixel units.
        steps: inner steps.
        attack_mode: mode of the student's BatchNorm and dropout while it is attacked.
    """

    start: ClassVar[Start] = "uniform"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        norm: Norm = "Linf",
        eps: float = 8 / 255,
        step_size: float = 2 / 255,
        steps: int = 10,
        attack_mode: AttackMode = "eval",
    ) -> None:
        super().__init__(student, teacher)
        self.threat: Threat = make_ball(norm, eps)
        if steps < 1 or step_size <= 0 or attack_mode not in ("eval", "train"):
            raise UsageError(
                f"The inner attack needs steps >= 1, step_size > 0 and attack_mode eval or train, not {steps}, {step_size} and {attack_mode!r}."
            )
        self.step_size, self.steps, self.attack_mode = step_size, steps, attack_mode
        self.norm: Norm = norm

    def perturb(self, loss: Loss, images: Tensor) -> Tensor:
        """Images that maximise `loss(x, rows)` under the method's threat, student in `attack_mode`."""
        # fp16 gradients of confident predictions underflow to zero, and such images would never move; bf16 has the range.
        half = torch.is_autocast_enabled(images.device.type) and torch.get_autocast_dtype(images.device.type) == torch.float16
        with (
            in_mode(self.student, self.attack_mode),
            torch.autocast(images.device.type, enabled=False) if half else nullcontext(),
        ):
            return ascend(loss, images, self.threat, steps=self.steps, step_size=self.step_size, start=self.start)

    @property
    def validation_attack(self) -> PGD | None:
        """PGD-10 under the method's own threat."""
        return PGD(norm=self.norm, eps=self.threat.eps, steps=10)
