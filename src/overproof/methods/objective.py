"""The contract between a method and the training loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from overproof.attacks.pgd import PGD
from overproof.methods.memory import Memory
from overproof.models.generators import Generator
from overproof.types import Batch, Output, Progress


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

    def compiled(self) -> list[nn.Module]:
        """What train.compile compiles, in place: networks that it calls as a whole, or parts of them."""
        return [network for network in (self.student, self.teacher) if network is not None]

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
