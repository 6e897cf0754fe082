"""The memory of contrastive distillation: a vector of every training image by both networks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.methods.processes import everyones

UNKNOWN = -1


class Bank(nn.Module):
    """Vectors of all training images, student and teacher side, with the classes seen so far.

    Rows begin uniform in +-1 / sqrt(d / 3), as in the authors' code.

    Args:
        dim: length d of a row; 0: nothing is kept of the student.
        rows: training images M; None: the bank grows to the largest index it meets.
        momentum: share of the old row that `remember` keeps, in [0, 1).
        teacher_dim: length of the teacher's rows, if it is another.
    """

    by_index = True  # so an image must keep its number
    student: Tensor
    teacher: Tensor
    labels: Tensor
    log_z: Tensor
    begun: Tensor

    def __init__(self, dim: int, rows: int | None, *, momentum: float, teacher_dim: int | None = None) -> None:
        super().__init__()
        self.fixed, self.momentum = rows is not None, momentum
        self.dims = {"student": dim, "teacher": dim if teacher_dim is None else teacher_dim}
        for name, length in self.dims.items():
            self.register_buffer(name, _fresh(rows or 0, length))
        self.register_buffer("labels", torch.full((rows or 0,), UNKNOWN))
        self.register_buffer("log_z", torch.zeros(2))
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))
        self._order: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, index: Tensor, labels: Tensor) -> None:
        """Take in the classes of this batch; of all processes, if there are several.

        Raises:
            UsageError: an index beyond the bank.
        """
        index, labels = everyones(index), everyones(labels)
        largest = int(index.max()) + 1
        if largest > len(self) and self.fixed:
            raise UsageError(
                f"The image with index {largest - 1} has no row in the bank of {len(self)}: give samples={largest} or more, and "
                "data whose index counts from 0."
            )
        if largest > len(self):
            extra = largest - len(self)
            generator = torch.Generator().manual_seed(len(self))  # processes draw differently, but share their banks
            for name, length in self.dims.items():
                rows: Tensor = getattr(self, name)
                setattr(self, name, torch.cat([rows, _fresh(extra, length, generator).to(rows)]))
            self.labels = torch.cat([self.labels, self.labels.new_full((extra,), UNKNOWN)])
            self._order = None
        if not torch.equal(self.labels[index], labels):
            self.labels[index] = labels
            self._order = None

    @torch.no_grad()
    def remember(self, index: Tensor, student: Tensor, teacher: Tensor | None = None) -> None:
        """row <- unit(momentum row + (1 - momentum) new) for the images `index` (N,); of all processes, if there are several."""
        everyone = everyones(index)
        for name, new in (("student", student), ("teacher", teacher)):
            if new is None:
                continue
            rows: Tensor = getattr(self, name)
            mixed = self.momentum * rows[everyone] + (1 - self.momentum) * everyones(new.detach()).to(rows)
            # Not in place: the graph of the present step still needs the rows as they were.
            setattr(self, name, rows.index_copy(0, everyone, F.normalize(mixed, dim=1)))

    @torch.no_grad()
    def store(self, index: Tensor, teacher: Tensor) -> None:
        """row <- new, as it is, on the teacher's side; of all processes, if there are several."""
        self.teacher = self.teacher.index_copy(0, everyones(index), everyones(teacher.detach()).to(self.teacher))

    @torch.no_grad()
    def set_scale(self, log_z: Tensor) -> None:
        """Keep log Z (2,) of both sides from now on; of several processes their mean."""
        self.log_z = everyones(log_z[None]).mean(dim=0).to(self.log_z)
        self.begun = torch.ones_like(self.begun)

    def draw_others(self, labels: Tensor, count: int) -> Tensor:
        """Rows of other classes, uniformly with replacement, (N, count); of any class while no other is known.

        Rows that no image has filled hold noise and are left out: there may be many, of images that are not trained on.
        """
        order, starts, sizes = self._sorted(labels)
        sizes = sizes * (sizes < len(order))
        rest = len(order) - sizes
        drawn = (torch.rand(len(labels), count, device=labels.device, dtype=torch.float64) * rest[:, None]).long()
        drawn = drawn + (drawn >= starts[:, None]) * sizes[:, None]  # jump over the class's own block
        return order[drawn]

    def draw_same(self, labels: Tensor) -> Tensor:
        """A row of the same class for each label, (N,)."""
        order, starts, sizes = self._sorted(labels)
        drawn = (torch.rand(len(labels), device=labels.device, dtype=torch.float64) * sizes).long()
        return order[starts + drawn]

    def others(self, index: Tensor, labels: Tensor, *, same_class: bool = False) -> Tensor:
        """Which rows are of other classes, or with `same_class` of other images, (N, M); classes not seen yet are none."""
        rows = torch.arange(len(self), device=labels.device)
        other = rows != index[:, None] if same_class else self.labels != labels[:, None]
        return other & (self.labels != UNKNOWN)

    def _sorted(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Known rows in the order of their classes, and where the block of each label begins and how long it is."""
        if self._order is None:
            known = (self.labels != UNKNOWN).nonzero().flatten()
            order = known[self.labels[known].argsort(stable=True)]
            self._order = order, self.labels[order].contiguous()
        order, classes = self._order
        starts = torch.searchsorted(classes, labels.contiguous())
        return order, starts, torch.searchsorted(classes, labels.contiguous(), right=True) - starts

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state.get(f"{prefix}labels")
        if saved is not None and len(saved) != len(self):
            if self.fixed:
                raise UsageError(
                    f"The checkpoint's bank holds {len(saved)} images, the training set {len(self)}. Resume with the data the "
                    "run began with, or begin anew."
                )
            for name in (*self.dims, "labels"):
                setattr(self, name, torch.empty_like(state[prefix + name], device=getattr(self, name).device))
        self._order = None
        super()._load_from_state_dict(state, prefix, *rest)


def draw(allowed: Tensor, count: int) -> Tensor:
    """Rows (N, count) drawn uniformly with replacement from the `allowed` ones (N, M); from all, where none is allowed."""
    chances = allowed.float()
    return torch.multinomial(chances.masked_fill(~allowed.any(dim=1, keepdim=True), 1), count, replacement=True)


def log_mean(positive: Tensor, negatives: Tensor, keep: Tensor | None = None) -> Tensor:
    """Logarithm of the mean of e^u over all positives u (N,) and those negatives (N, m) that count."""
    every = torch.cat([positive, negatives.flatten() if keep is None else negatives[keep]])
    return every.logsumexp(dim=0) - math.log(len(every))


def _fresh(rows: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
    bound = 1 / math.sqrt(max(dim, 1) / 3)
    return torch.empty(rows, dim).uniform_(-bound, bound, generator=generator)
