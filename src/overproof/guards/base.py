"""The contract of a guard: a test-time part that is fitted on data and leaves the classifier's weights alone."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from overproof.attacks.randomness import Streams
from overproof.errors import FolderError, UsageError
from overproof.networks import digest

Place = Literal["purifier", "cache", "detector"]


@dataclass(frozen=True)
class Judgement:
    """What a detector says about N images.

    Args:
        score: (N,), the larger the more suspicious.
        rejected: (N,) bool.
        parts: further tensors (N, ...) by name, such as the scores of single criteria.
    """

    score: Tensor
    rejected: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """How a cache classifies N images.

    Args:
        logits: (N, K) log-probabilities.
        parts: further tensors (N, ...) by name.
    """

    logits: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class Guard(nn.Module, ABC):
    """A part that stands in front of, or beside, any classifier.

    Its options are the keyword-only arguments of the constructor, kept under their own names. What `fit` finds is kept in
    buffers and in `facts`, so that every guard is saved as tensors and JSON and restored without running anything. The
    classifier is handed to every call and left as it is: weights, modes, gradients.

    Attributes:
        place: where it belongs in `Guarded`.
        facts: JSON-able findings of `fit`; empty before.
    """

    place: ClassVar[Place]

    def __init__(self) -> None:
        super().__init__()
        self.facts: dict[str, Any] = {}

    @abstractmethod
    def fit(self, model: nn.Module, images: Tensor, labels: Tensor) -> Self:
        """Learn from labelled images, floats in [0, 1] or uint8, and forget what was learned before; returns the guard.

        A guard may take further keyword arguments with defaults.
        """

    def tune(self, model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """Choose options on a validation part, never on test images; returns what was tried. By default nothing is tuned."""
        return {}

    @abstractmethod
    def forward(self, model: nn.Module, images: Tensor, streams: Streams | None = None) -> Any:
        """A purifier returns images, a cache an `Answer`, a detector a `Judgement`.

        Differentiable wherever it can be; a batch gives what its images give one by one. Random numbers come from `streams`,
        one stream per image; None draws new streams.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What was fitted, in numbers a reader of a report understands; JSON-able."""

    @property
    def fitted(self) -> bool:
        """Whether `fit` has been called, or a fitted state restored."""
        return bool(self.facts)

    def options(self) -> dict[str, Any]:
        """The constructor's keyword-only arguments, as they are now."""
        parameters = inspect.signature(type(self)).parameters.values()
        return {p.name: getattr(self, p.name) for p in parameters if p.kind is p.KEYWORD_ONLY}

    def state(self) -> dict[str, Tensor]:
        """The tensors to be saved."""
        return {name: value.detach() for name, value in self.state_dict().items()}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        """Take over what `state` and `facts` were; buffers may have any length.

        Raises:
            FolderError: tensors are missing, or others are there.
        """
        own = self.state_dict().keys()
        if own != tensors.keys():
            gap = ", ".join(sorted(own ^ tensors.keys()))
            raise FolderError(
                f"The tensors are not those of a {type(self).__name__} (too many or missing: {gap}). Fit it again."
            )
        for name, value in tensors.items():
            owner, _, leaf = name.rpartition(".")
            part = self.get_submodule(owner)
            if leaf in part._buffers:
                part._buffers[leaf] = value
            else:
                getattr(part, leaf).data = value
        self.facts = dict(facts)
        return self

    def remember(self, model: nn.Module) -> None:
        """Note in `facts` which classifier this guard was fitted for."""
        self.facts["model"] = digest(model)

    def check(self, model: nn.Module) -> None:
        """Assert that this guard was fitted, and for `model`: its very weights and type.

        Raises:
            UsageError: it was not.
        """
        self.require_fitted()
        if self.facts.get("model") != digest(model):
            raise UsageError(
                f"This {self.place} was fitted for another model than this {type(model).__name__} (other weights, structure or "
                f"precision). Fit it again: {self.place}.fit(model, images, labels); and convert only after guarding: "
                "Guarded(model, ...).half()."
            )

    def require_fitted(self) -> None:
        """Raise `UsageError` unless the guard is fitted."""
        if not self.fitted:
            raise UsageError(f"This {self.place} is not fitted yet: {self.place}.fit(model, images, labels) comes first.")
