"""Where the next power iteration begins: a vector over the classes for every training image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from overproof.methods.processes import everyones


class ClassVectors(nn.Module):
    """A vector for each image by its index, zero until it is known; as many rows and columns as were needed so far.

    Vectors over the classes (K numbers) stay meaningful when the image is shifted or flipped by augmentation, which vectors of its
    pixels would not. Several processes share what they know.
    """

    by_index = True  # so an image must keep its number
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(0, 0))

    def recall(self, index: Tensor) -> Tensor | None:
        """What is known of the images `index` (N,): (N, K), or None before anything is."""
        if not self.rows.numel():
            return None
        return self.rows[index.clamp_max(len(self.rows) - 1)] * (index < len(self.rows))[:, None]

    @torch.no_grad()
    def remember(self, index: Tensor, vectors: Tensor) -> None:
        """Keep `vectors` (N, K) of the images `index` (N,); of all processes, if there are several."""
        index, vectors = everyones(index), everyones(vectors.detach())
        self._grow(int(index.max()) + 1, vectors.shape[1])
        self.rows[index] = vectors.to(self.rows)

    def _grow(self, rows: int, columns: int) -> None:
        if rows > len(self.rows) or columns > self.rows.shape[1]:
            grown = self.rows.new_zeros(max(rows, len(self.rows)), max(columns, self.rows.shape[1]))
            grown[: len(self.rows), : self.rows.shape[1]] = self.rows
            self.rows = grown

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if (saved := state.get(f"{prefix}rows")) is not None:
            self.rows = torch.empty_like(saved, device=self.rows.device)
        super()._load_from_state_dict(state, prefix, *rest)
