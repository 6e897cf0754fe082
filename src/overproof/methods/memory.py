"""What two forwards over one batch share."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor


class Memory:
    """What a forward made of images without leaving a graph, for a second forward over the same batch."""

    def __init__(self) -> None:
        self._made: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._left: dict[str, deque[tuple[Tensor, Tensor]]] = {}

    def rewind(self) -> None:
        """From now on tell what is known, in the order in which it was made."""
        self._left = {kind: deque(entries) for kind, entries in self._made.items()}

    def recall(self, kind: str, images: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What was made of these images, if that is what comes next; else `make()`, which is remembered."""
        left = self._left.get(kind)
        if left and torch.equal(left[0][0], images):
            return left.popleft()[1]
        found = make()
        self._made.setdefault(kind, []).append((images, found))
        return found
