"""Methods that compare what student and teacher make of the same images: logits, and features at chosen places."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.features import Tap, penultimate
from overproof.losses.divergences import cross_entropy
from overproof.methods.feature_probe import (
    ImageShape,
    Place,
    as_map,
    as_vector,
    pair_up,
    preact_layers,
    read,
    sample_images,
    stage_layers,
)
from overproof.methods.objective import Objective
from overproof.types import Batch, Output, Progress

Choice = Literal["all", "middle", "last"]


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


@dataclass(frozen=True)
class View:
    """What a method compares, place by place.

    Args:
        logits, teacher_logits: (N, K).
        features: the student's, through the method's adapters.
        teacher_features: the teacher's, or what a plug-in has refined them to.
        weights: importance of the cells (N, 1, H, W) of each teacher map, or None for 1 everywhere.
    """

    logits: Tensor
    teacher_logits: Tensor
    features: tuple[Tensor, ...] = ()
    teacher_features: tuple[Tensor, ...] = ()
    weights: tuple[Tensor | None, ...] = field(default=())


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
        return Output(self.losses(seen, batch, progress), seen.logits)

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

    def release(self) -> None:
        """Take the hooks off both networks: somebody else looks for this method."""
        for tap in self._taps or ():
            tap.close()
        self._taps = None

    def probe_images(self) -> Tensor:
        """Images that both networks take, for dry forwards."""
        assert self.teacher is not None
        if self._images is None:
            self._images = sample_images(self.student, self.teacher, self.image_shape)
        return self._images


class FeatureObjective(SharedForward):
    """A method that compares both networks place by place.

    It names its places in `__init__` with `watch_maps` or `watch_vectors`, builds adapters from `self.places` and implements
    `compare`; `project` sends the student's features through the adapters. A plug-in may change what the teacher shows, and the
    importance of its cells, between `view` and `compare`.

    Args:
        student, teacher, ce_weight, image_shape: see `SharedForward`.
    """

    refined_factor: ClassVar[float] = 1.0  # by which a plug-in that restricts the comparison to areas multiplies the terms
    mapped: ClassVar[bool] = False  # whether `project` gives maps in the teacher's shapes

    @abstractmethod
    def compare(self, view: View, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Named, weighted 0-d terms, without the cross-entropy."""

    def project(self, features: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The student's features as the method compares them with the teacher's; without adapters as they are."""
        return features

    def terms(self, seen: Seen, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """What `compare` makes of this method's places."""
        return self.compare(self.view(seen), batch, progress)

    def view(self, seen: Seen) -> View:
        """What of `seen` belongs to this method's places."""
        raw = tuple(shaped(seen.features[p.student], p, p.student) for p in self.places)
        theirs = tuple(shaped(seen.teacher_features[p.teacher], p, p.teacher) for p in self.places)
        return View(seen.logits, seen.teacher_logits, self.project(raw, theirs), theirs, (None,) * len(self.places))

    def watch_maps(
        self, student: Sequence[str] | None, teacher: Sequence[str] | None, *, choice: Choice = "all", preact: bool = False
    ) -> None:
        """Add places where maps are compared.

        Args:
            student, teacher: tap names, pairwise; None: the stages, paired by their sizes and thinned out by `choice`.
            choice: which stages.
            preact: take the teacher's stages before their activation.

        Raises:
            UsageError: an unknown layer, another number of layers on the other side, or layers that give vectors.
        """
        assert self.teacher is not None
        images = self.probe_images()
        named = student is not None and teacher is not None
        ours = read(self.student, student or stage_layers(self.student, images), images)
        theirs = read(self.teacher, teacher or (preact_layers if preact else stage_layers)(self.teacher, images), images)
        if named and len(ours) != len(theirs):
            raise UsageError(
                f"{type(self).__name__}: {len(ours)} student_layers {list(ours)} and {len(theirs)} teacher_layers "
                f"{list(theirs)} cannot be compared pair by pair; name as many of each."
            )
        pairs = list(zip(ours, theirs, strict=True)) if named else pair_up(ours, theirs)
        if not named and student is None and teacher is None:
            pairs = {"all": pairs, "middle": [pairs[(len(pairs) - 1) // 2]], "last": pairs[-1:]}[choice]
        found = {a: as_map(ours[a], a) for a, _ in pairs}, {b: as_map(theirs[b], b) for _, b in pairs}
        self._add([_place(a, b, found[0][a], found[1][b]) for a, b in pairs])

    def watch_vectors(self, student: Sequence[str] | None, teacher: Sequence[str] | None) -> None:
        """Add a place where vectors are compared: the named layers, or what the last linear layers read.

        Raises:
            UsageError: an unknown layer, or not one name on each side.
        """
        assert self.teacher is not None
        images, names = self.probe_images(), []
        for model, given, option in ((self.student, student, "student_layers"), (self.teacher, teacher, "teacher_layers")):
            chosen = list(given) if given is not None else [penultimate(model)]
            if len(chosen) != 1:
                raise UsageError(f"{type(self).__name__} compares one vector: {option}={chosen} must name one layer.")
            names += chosen
        ours, theirs = read(self.student, names[:1], images), read(self.teacher, names[1:], images)
        self._add([_place(names[0], names[1], as_vector(ours[names[0]]), as_vector(theirs[names[1]]))])

    def _add(self, places: Sequence[Place]) -> None:
        self.watch((*self.places, *places))


def _place(student: str, teacher: str, ours: Tensor, theirs: Tensor) -> Place:
    signed = bool((theirs < 0).any())
    return Place(student, teacher, tuple(ours.shape[1:]), tuple(theirs.shape[1:]), signed, theirs.dim() == 4)


def shaped(feature: Tensor, place: Place, name: str) -> Tensor:
    """The feature as the map or the vector that is compared at `place`."""
    return as_map(feature, name) if place.spatial else as_vector(feature)


def hard_labels(labels: Tensor) -> Tensor:
    """Class numbers (N,): of mixed labels (N, K) the heaviest class."""
    return labels if labels.dim() == 1 else labels.argmax(dim=1)
