"""Students that trust their teacher class by class, or subgroup by subgroup, as far as it has earned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from overproof.errors import DataError, UsageError
from overproof.losses.feature_distances import wide
from overproof.losses.group_reliability import Kind, estimate_reliability, shrunk
from overproof.methods.objective import Objective
from overproof.networks import device_of
from overproof.types import Batch

Group = Literal["class", "attribute"]
Absent = Literal["raise", "mean"]
HeldOut = Literal["validation", "train"]


class AdaObjective(Objective):
    """What AdaAlpha and AdaMargin have in common: the teacher's reliability by class, measured on images it has not learned from.

    g_c = mean_{n: y_n = c} gamma(y_n, softmax(T(x_n))),  gamma(y, p) = (K p_y - 1) / (K - 1),  over held-out images

    Args:
        student: images -> logits (N, K).
        teacher: images -> logits (N, K), frozen.
        temperature: tau > 0 of the teacher's soft labels; neither the student nor g knows it, and nothing is multiplied by tau^2.
        group: g by "class", or by "attribute": the subgroup of an image, which the data know.
        reliability: what is averaged, see `credit`.
        few, shrinkage: a group of n < few held-out images gets (n g + shrinkage g_mean) / (n + shrinkage).
        absent: a group without any is an error, "raise", or gets the "mean".
        held_out: part of the data that g is measured on.
        allow_training_images: do so even if the teacher was trained on images of that part.

    Attributes:
        measured: g (G,), shrunk; empty until `study` was called. Then every group is trusted alike.
        counts: held-out images (G,) behind it.

    Raises:
        UsageError: an option out of its range.
    """

    measured: Tensor
    counts: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        temperature: float = 1.0,
        group: Group = "class",
        reliability: Kind = "margin",
        few: int = 5,
        shrinkage: float = 5.0,
        absent: Absent = "raise",
        held_out: HeldOut = "validation",
        allow_training_images: bool = False,
    ) -> None:
        super().__init__(student, teacher)
        if not 0 < temperature < math.inf or few < 0 or not 0 <= shrinkage < math.inf:
            raise UsageError(
                f"{type(self).__name__}: needs temperature > 0, few >= 0 and shrinkage >= 0, not {temperature}, {few} and {shrinkage}."
            )
        self.temperature, self.group, self.reliability = temperature, group, reliability
        self.few, self.shrinkage, self.absent = few, shrinkage, absent
        self.held_out, self.allow_training_images = held_out, allow_training_images
        self.names: tuple[str, ...] = ()
        self._groups: Tensor | None = None  # of the training images, by their index; as long as the data, so no buffer
        self.register_buffer("measured", torch.zeros(0))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.long))

    def study(
        self,
        batches: Iterable[Batch],
        *,
        names: Sequence[str] = (),
        held_groups: Tensor | None = None,
        train_groups: Tensor | None = None,
    ) -> None:
        """Measure how reliable the teacher is, once, before training begins.

        Args:
            batches: held-out images with class numbers, on the teacher's device.
            names: of the groups.
            held_groups, train_groups: with group="attribute", the subgroup of each held-out and each training image by its index.

        Raises:
            DataError: no images, or a group without any.
        """
        assert self.teacher is not None
        count = len(names) if held_groups is not None else None
        found = estimate_reliability(self.teacher, batches, kind=self.reliability, groups=held_groups, count=count)
        size = len(found.counts)
        self.names = (*names, *map(str, range(len(names), size)))
        empty = [self.names[i] for i in range(len(names) or size) if not found.counts[i]]
        if empty and self.absent == "raise":
            more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
            what = "classes" if self.group == "class" else "subgroups"
            raise DataError(
                f"Nobody knows how reliable the teacher is about the {what} {', '.join(map(repr, empty[:5]))}{more}: there is no held-out "
                f"image of them among {int(found.counts.sum())}. Hold out more (data.validation=0.2), or let them have the mean of the others "
                'with method.absent="mean".'
            )
        place = device_of(self.student)
        self.measured = shrunk(found, few=self.few, strength=self.shrinkage).float().to(place)
        self.counts, self._groups = found.counts.to(place), train_groups

    @property
    def known(self) -> bool:
        """Whether the teacher's reliability has been measured."""
        return len(self.measured) > 0

    def soft_labels(self, batch: Batch) -> Tensor:
        """The teacher's probabilities at temperature tau (N, K)."""
        return (wide(self.teacher_logits(batch)) / self.temperature).softmax(dim=1)

    def by_image(self, values: Tensor, batch: Batch) -> Tensor:
        """Of `values` (G,) by group those (N,) of the batch's images; an image mixed of two classes gets its share of both."""
        if self.group == "class":
            return (
                values[batch.labels]
                if batch.labels.dim() == 1
                else batch.labels @ values[: batch.labels.shape[1]].to(batch.labels)
            )
        if batch.labels.dim() == 2:
            raise UsageError(
                'Mixed images belong to two subgroups at once: leave out mixup and cutmix, or say method.group="class".'
            )
        if self._groups is None:
            raise UsageError(
                'method.group="attribute": the subgroups of the training images are not known; call `study` with train_groups.'
            )
        if self._groups.device != batch.index.device:
            self._groups = self._groups.to(batch.index.device)
        return values[self._groups[batch.index]]

    def weights(self) -> dict[str, Tensor]:
        """What follows from the reliabilities, by name, (G,) each."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The reliabilities, how many images each stands on, and what follows from them."""
        if not self.known:
            return {}
        facts = {"reliability": self.measured, "counts": self.counts, **self.weights()}
        about = {"group": self.group, "kind": self.reliability, "held_out": self.held_out, "names": list(self.names)}
        return {**about, **{name: value.tolist() for name, value in facts.items()}}

    def concerns(self, means: Mapping[str, float]) -> dict[str, str]:
        """Whether anybody has measured the teacher."""
        if self.known:
            return {}
        text = "nobody has measured how reliable the teacher is, so all classes are trusted alike: call `study` with held-out images."
        return {"reliability": f"{type(self).__name__}: {text}"}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("measured", "counts"):  # how many groups there are, the state knows
            known = state_dict.get(f"{prefix}{name}")
            if known is not None and known.shape != getattr(self, name).shape:
                setattr(self, name, torch.empty_like(known, device=device_of(self.student)))
        super()._load_from_state_dict(state_dict, prefix, *rest)
