"""Methods as parts of another one: they share its forward passes, whatever they are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.methods import METHODS
from overproof.methods.feature_objective import FeatureObjective, View
from overproof.methods.feature_probe import ImageShape
from overproof.methods.objective import Objective
from overproof.methods.robust_objective import RobustObjective
from overproof.methods.shared_forward import SharedForward
from overproof.types import Batch, Output, Progress

CE = "ce"


class Echo(nn.Module):
    """A network that answers from memory when it is shown the very batch it has just seen; else it runs.

    Args:
        network: images -> logits.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._known: tuple[Tensor, Tensor, bool] | None = None

    def remember(self, images: Tensor, logits: Tensor) -> None:
        """Answer `images`, this tensor and no copy, with `logits`, as long as the network is in the mode that it is in now."""
        self._known = images, logits, self.network.training

    def __getstate__(self) -> dict[str, Any]:
        """Copies remember nothing: logits that carry a graph cannot be copied."""
        return {**self.__dict__, "_known": None}

    def forget(self) -> None:
        """Run the network for everything again."""
        self._known = None

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        if self._known is not None and images is self._known[0] and self.network.training == self._known[2]:
            return self._known[1]
        logits: Tensor = self.network(images)
        return logits


class Whole(FeatureObjective):
    """Any objective as a part: its forward runs over logits that are known already. Its own cross-entropy is dropped.

    Args:
        student, teacher: the networks.
        name: of the method.
        options: of the method.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, *, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(student, teacher)
        self.echoes = nn.ModuleList([Echo(student), Echo(teacher)])
        wanted = len(METHODS.get(name).positional())
        if wanted > len(self.echoes):
            raise UsageError(f"The method {name!r} learns from two teachers and cannot be part of another one.")
        self.inner: Objective = METHODS.create(name, *self.echoes[:wanted], **options)
        self._logs: dict[str, Tensor] = {}
        if self.inner.phases != ("train",):
            raise UsageError(f"The method {name!r} trains in the phases {self.inner.phases} and cannot be part of another one.")
        if type(self.inner).groups is not Objective.groups:
            raise UsageError(
                f"The method {name!r} gives its parameters optimiser options of their own and cannot be part of another one."
            )
        self.called = name

    def compare(self, view: View, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The method's own terms."""
        for echo, logits in zip(self.echoes, (view.logits, view.teacher_logits), strict=True):
            echo.remember(batch.images, logits)  # type: ignore[operator]
        try:
            output: Output = self.inner(batch, progress)
        finally:
            for echo in self.echoes:
                echo.forget()  # type: ignore[operator]
        self._logs = dict(output.logs or {})
        terms = {name: value for name, value in output.losses.items() if name != CE}
        if not terms:
            raise UsageError(
                f"The method {self.called!r} adds nothing but the cross-entropy with the labels, which is counted once: leave it out."
            )
        return terms

    def told(self) -> dict[str, Tensor]:
        """What the method logs."""
        return self._logs


def make_part(
    name: str,
    student: nn.Module,
    teacher: nn.Module,
    *,
    options: Mapping[str, Any],
    image_shape: ImageShape | None = None,
    samples: int | None = None,
) -> FeatureObjective:
    """The method `name` as a part; what it does not say itself about images and their number is filled in.

    Raises:
        UsageError: an unknown method or option, or a method that itself consists of parts.
    """
    entry = METHODS.get(name)
    builder = entry.load()
    known = {"image_shape": image_shape, "samples": samples}
    offered = {key: value for key, value in known.items() if value is not None and key in entry.options()}
    options = {**offered, **options}
    if inspect.isclass(builder) and issubclass(builder, Compound):
        raise UsageError(f"The method {name!r} consists of other methods itself and cannot be part of one.")
    if not (inspect.isclass(builder) and issubclass(builder, FeatureObjective)):
        return Whole(student, teacher, name=name, options=options)
    part: FeatureObjective = METHODS.create(name, student, teacher, **options)
    part.join()
    return part


class Compound(SharedForward):
    """A method that consists of others, which share its networks; checkpoints hold the student once and the teacher never."""

    parts: nn.ModuleList

    def told(self) -> dict[str, Tensor]:
        """The logs of all parts; of two of the same name the first."""
        return {name: value for part in reversed(self.parts) for name, value in part.told().items()}  # type: ignore[operator]

    def describe(self) -> dict[str, Any]:
        """What all parts have learned beside the student."""
        inner = [part.inner for part in self.parts if isinstance(part, Whole)]
        return {**super().describe(), **{key: value for part in inner for key, value in part.describe().items()}}

    def concerns(self, means: Mapping[str, float]) -> dict[str, str]:
        """Those of all parts."""
        return {name: text for part in self._inner() for name, text in part.concerns(means).items()}

    @property
    def answers(self) -> bool:
        """Whether there are labels to answer, or a part that compares answers."""
        return self.ce_weight > 0 or any(not part.places for part in self.parts)

    @property
    def validation_attack(self) -> Any:
        """The first attack under which a part is watched."""
        return next((part.validation_attack for part in self._inner() if isinstance(part, RobustObjective)), None)

    def _inner(self) -> list[Any]:
        """The methods, without what makes parts of them."""
        return [getattr(part, "inner", part) for part in self.parts]

    def trained_state(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold: the student, and what the parts own beside the two networks."""
        copies = self._copies()
        return {name: value for name, value in self.state_dict().items() if name not in copies}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `trained_state`.

        Raises:
            UsageError: the state belongs to other parts.
        """
        missing, unexpected = self.load_state_dict(state, strict=False)
        wrong = sorted({*missing} - self._copies()) + sorted(unexpected)
        if wrong:
            raise UsageError(
                f"This state is not of the same methods: {', '.join(wrong[:3])} and {max(0, len(wrong) - 3)} more."
            )

    def _copies(self) -> set[str]:
        """Names of the two networks' tensors, but for the student's own."""
        networks = (self.student, self.teacher)
        shared = {id(tensor) for net in networks if net is not None for tensor in (*net.parameters(), *net.buffers())}
        own = self.state_dict(keep_vars=True)
        return {name for name, value in own.items() if id(value) in shared and not name.startswith("student.")}
