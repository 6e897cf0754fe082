"""Running means that stay on the device until somebody looks."""

from __future__ import annotations

import torch
from torch import Tensor

from overproof.types import Batch, Output


class Meter:
    """Means over the samples seen since the last `clear`."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    @torch.no_grad()
    def add(self, batch: Batch, output: Output) -> None:
        """Take in one step: loss terms, their sum, logged quantities and accuracy."""
        labels = batch.labels if batch.labels.dim() == 1 else batch.labels.argmax(dim=1)
        values = {name: value.detach() for name, value in output.losses.items()}
        values["loss"] = torch.stack(list(values.values())).sum()
        values["accuracy"] = (output.logits.argmax(dim=1) == labels).float().mean()
        for name, value in {**values, **(output.logs or {})}.items():
            self.sums[name] = self.sums.get(name, 0) + len(batch) * value.float()
            self.counts[name] = self.counts.get(name, 0) + len(batch)

    def mean(self, *names: str) -> dict[str, float]:
        """Means by name; all of them if none is named."""
        return {name: float(self.sums[name]) / self.counts[name] for name in names or self.sums if name in self.sums}

    def clear(self) -> None:
        """Begin anew."""
        self.sums, self.counts = {}, {}

    def state(self) -> dict[str, dict[str, Tensor] | dict[str, int]]:
        """For a checkpoint."""
        return {"sums": self.sums, "counts": self.counts}
