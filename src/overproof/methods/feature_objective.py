"""Methods that compare what student and teacher make of the same images: logits, and features at chosen places."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from overproof.errors import UsageError
from overproof.features import penultimate
from overproof.methods.feature_probe import (
    Place,
    as_map,
    as_vector,
    pair_up,
    preact_layers,
    read,
    stage_layers,
)
from overproof.methods.shared_forward import Seen, SharedForward
from overproof.types import Batch, Progress

Choice = Literal["all", "middle", "last"]


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
