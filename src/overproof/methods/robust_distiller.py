"""What robust methods with a robust teacher share: the attack on the student, the teacher's answers, and how good they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.folding import Follower
from overproof.losses.reliability import log_probability, teacher_case
from overproof.methods.robust_objective import RobustObjective
from overproof.types import Batch

PROBABILITY = "teacher reliability/probability of the label"  # FAMILY/MEMBER: the report draws a family together
BELOW = "teacher reliability/share below 0.5"
ALPHA = "teacher reliability/mean alpha"
CASES = ("teacher cases/right under attack", "teacher cases/right on clean only", "teacher cases/wrong")


class TwoTeachers(nn.Module):
    """A robust teacher, and beside it one that was trained without attacks. Called, it is the robust one.

    Args:
        robust, standard: images -> logits (N, K).
    """

    def __init__(self, robust: nn.Module, standard: nn.Module) -> None:
        super().__init__()
        self.robust, self.standard = robust, standard

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        logits: Tensor = self.robust(images)
        return logits


class RobustDistiller(RobustObjective):
    """A method that attacks its own student and asks a robust teacher about it.

    Args:
        student: images -> logits (N, K).
        teacher: adversarially trained, images -> logits (N, K), frozen.
        watch: log how good the teacher is on the student's adversarial images, even if the loss does not ask: then it is one
            more forward pass of the teacher.
        **attack: options of `RobustObjective`.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, *, watch: bool = True, **attack: Any) -> None:
        super().__init__(student, teacher, **attack)
        self.watch = watch
        self._teacher_copy = Follower(frozen=True)

    def ask(self, batch: Batch, images: Tensor, also: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The teacher's logits (N, K) on `images`, and on `also` if given: one pass, but for logits that are known already."""
        asked = [images] if also is None else [images, also]
        if self._known_teacher_logits is None:
            answers = self._answer(torch.cat(asked)).chunk(len(asked))
        else:
            answers = tuple(self.teacher_logits(batch) if x is batch.images else self._answer(x) for x in asked)
        return answers[0], None if also is None else answers[1]

    def _answer(self, images: Tensor) -> Tensor:
        return self._once("teacher", images, lambda: self._ask_teacher(images))

    def teacher_copy(self, images: Tensor) -> nn.Module:
        """The teacher for attacks that go through it: its cheaper copy, which answers alike up to rounding (see `folding`)."""
        assert self.teacher is not None
        return self._teacher_copy.now(self.teacher, images)

    def ask_standard(self, images: Tensor) -> Tensor:
        """The logits (N, K) of the teacher that was trained without attacks."""
        teachers = self.teacher
        assert isinstance(teachers, TwoTeachers)

        def answer() -> Tensor:
            with torch.no_grad():
                logits: Tensor = teachers.standard(images)
            return logits

        return self._once("standard teacher", images, answer)

    def reliability(self, labels: Tensor, attacked: Tensor | None, clean: Tensor | None) -> dict[str, Tensor] | None:
        """How good the teacher is, as means over the batch.

        Args:
            labels: (N,) or (N, K).
            attacked: its logits (N, K) on the student's adversarial images; None: it was not asked.
            clean: its logits on the untouched images, or None.

        Returns:
            Probability of the label, share of images where that is below one half, and the shares of the three cases.
        """
        if attacked is None:
            return None
        with torch.no_grad():
            probability = log_probability(attacked, labels).exp()
            logs = {PROBABILITY: probability.mean(), BELOW: (probability < 0.5).float().mean()}
            if clean is not None:
                case = teacher_case(clean, attacked, labels)
                logs |= {name: (case == number).float().mean() for number, name in enumerate(CASES)}
        return logs


def check_shares(method: object, teacher_weight: float, standard_weight: float) -> None:
    """Refuse weights of two teachers that leave less than nothing for the labels.

    Raises:
        UsageError: a negative weight, or more than 1 together.
    """
    if min(teacher_weight, standard_weight) < 0 or not teacher_weight + standard_weight <= 1 + 1e-9:
        raise UsageError(
            f"{type(method).__name__}: teacher_weight={teacher_weight} and standard_weight={standard_weight} must be at least 0 and "
            "together at most 1; what is left is the weight of the labels."
        )
