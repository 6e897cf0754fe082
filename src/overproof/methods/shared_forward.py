"""One forward pass of each network, over which a method compares them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.features import Tap
from overproof.losses.divergences import cross_entropy
from overproof.methods.feature_probe import ImageShape, Place, sample_images
from overproof.methods.objective import Objective
from overproof.types import Batch, Output, Progress


@dataclass(frozen=True)
class Lesson:
    """One forward pass of the teacher: logits (N, K), and features by tap name."""

    logits: Tensor
    features: dict[str, Tensor]

    def rows(self, rows: slice) -> Lesson:
        """The same for some of the images."""
        return Lesson(self.logits[rows], {name: value[rows] for name, value in self.features.items()})


@dataclass(frozen=True)
class Seen:
    """One forward pass of both networks: logits (N, K), and features by tap name."""

    logits: Tensor
    features: dict[str, Tensor]
    teacher_logits: Tensor
    teacher_features: dict[str, Tensor]


class SharedForward(Objective):
    """L = ce_weight mean_n CE(y_n, S(x_n)) + what `terms` makes of one forward pass of each network.

    Args:
        student, teacher: see `Objective`.
        ce_weight: weight of the labels, at least 0.
        image_shape: (channels, height, width) of the training images, for the dry forward that finds all shapes; None takes
            the shape that the networks were built for, or the first usual one that works.

    Raises:
        UsageError: a negative weight, or no image shape that both networks take.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, *, ce_weight: float = 1.0, image_shape: ImageShape | None = None
    ) -> None:
        super().__init__(student, teacher)
        if ce_weight < 0:
            raise UsageError(f"{type(self).__name__}: ce_weight={ce_weight} must be at least 0.")
        self.ce_weight, self.image_shape = ce_weight, image_shape
        self.places: tuple[Place, ...] = ()
        self._taps: tuple[Tap, Tap] | None = None
        self._images: Tensor | None = None

    @abstractmethod
    def terms(self, seen: Seen, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Named, weighted 0-d terms, without the cross-entropy."""

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's losses."""
        seen = self.look(batch, self.teach(batch))
        return Output(self.losses(seen, batch, progress), seen.logits, self.told())

    def told(self) -> dict[str, Tensor]:
        """What there is to log about the terms that were made last."""
        return {}

    def losses(self, seen: Seen, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The cross-entropy, and the method's terms."""
        terms = self.terms(seen, batch, progress)
        return {"ce": self.ce_weight * cross_entropy(seen.logits, batch.labels).mean(), **terms} if self.ce_weight else terms

    def teach(self, batch: Batch) -> Lesson:
        """Run the teacher, without gradients."""
        if self._taps is None:
            return Lesson(self.teacher_logits(batch), {})
        with torch.no_grad():
            return Lesson(*self._taps[1](batch.images))

    def look(self, batch: Batch, lesson: Lesson) -> Seen:
        """Run the student."""
        logits, features = self._taps[0](batch.images) if self._taps else (self.student(batch.images), {})
        return Seen(logits, features, lesson.logits, lesson.features)

    @property
    def answers(self) -> bool:
        """Whether there are labels to answer, or the answers are what is compared: where there are no places."""
        return self.ce_weight > 0 or not self.places

    @property
    def adapter_parameters(self) -> int:
        """Trainable numbers beside the student's; they are thrown away after training."""
        networks = (self.student, self.teacher)
        shared = {id(parameter) for net in networks if net is not None for parameter in net.parameters()}
        return sum(parameter.numel() for parameter in self.parameters() if id(parameter) not in shared)

    def describe(self) -> dict[str, Any]:
        """The size of what is thrown away after training."""
        return {"adapter_parameters": self.adapter_parameters}

    def watch(self, places: Sequence[Place], *, teacher_extra: Sequence[str] = ()) -> None:
        """Tap exactly these places, and further layers of the teacher; a layer that several share is read once."""
        assert self.teacher is not None
        self.release()
        self.places = tuple(places)
        ours, theirs = dict.fromkeys(p.student for p in places), dict.fromkeys([*(p.teacher for p in places), *teacher_extra])
        if ours or theirs:
            self._taps = Tap(self.student, ours), Tap(self.teacher, theirs)

    def join(self) -> None:
        """Become part of another method, which looks for this one."""
        self.release()

    def release(self) -> None:
        """Take the hooks off both networks."""
        for tap in self._taps or ():
            tap.close()
        self._taps = None

    def probe_images(self) -> Tensor:
        """Images that both networks take, for dry forwards."""
        assert self.teacher is not None
        if self._images is None:
            self._images = sample_images(self.student, self.teacher, self.image_shape)
        return self._images
