"""Running means that stay on the device until somebody looks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from overproof import console
from overproof.types import Batch, Output

TELL_SECONDS = 3.0  # between lines about epochs: short ones need not all be told


class EpochTeller:
    """A line now and then about finished epochs, and always about the last; concerns at once, but each only once.

    Args:
        epochs: in all.
        concerns: from an epoch's means to sentences by name, see `Objective.concerns`.
    """

    def __init__(self, epochs: int, concerns: Callable[[Mapping[str, float]], dict[str, str]] = lambda means: {}) -> None:
        self.epochs, self.concerns, self._told = epochs, concerns, time.monotonic()
        self.known: set[str] = set()  # concerns that were told

    def tell(self, epoch: int, record: dict[str, Any]) -> None:
        """Say what `record` found, unless the last line was just now, and what is wrong with it; that is kept in it as "concerns"."""
        if "alarm" in record:
            console.note(f"warning: {record['alarm']}")
        found = self.concerns(record["train"])
        for name in sorted(found.keys() - self.known):
            console.note(f"warning: {found[name]}")
        self.known |= found.keys()
        if found:
            record["concerns"] = found
        if epoch + 1 < self.epochs and time.monotonic() - self._told < TELL_SECONDS:
            return
        self._told = time.monotonic()
        held_out = {f"validation {k}": v for k, v in record.get("validation", {}).items() if k != "loss"}
        facts = {**{k: record["train"][k] for k in ("loss", "accuracy")}, **held_out}
        console.note(f"  epoch {epoch + 1}/{self.epochs}  " + "  ".join(f"{k} {v:.3f}" for k, v in facts.items()))


class Meter:
    """Means over the samples seen since the last `clear`."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    @torch.no_grad()
    def add(self, batch: Batch, output: Output, *, whole: bool = True) -> None:
        """Take in one step: loss terms and logged quantities; unless it is not the `whole` of a step, their sum and accuracy too."""
        values = {name: value.detach() for name, value in output.losses.items()}
        if whole:
            labels = batch.labels if output.labels is None else output.labels
            labels = labels if labels.dim() == 1 else labels.argmax(dim=1)
            values["loss"] = torch.stack(list(values.values())).sum()
            values["accuracy"] = (output.logits.argmax(dim=1) == labels).float().mean()
        for name, value in {**values, **(output.logs or {})}.items():
            self.sums[name] = self.sums.get(name, 0) + len(batch) * value.float()
            self.counts[name] = self.counts.get(name, 0) + len(batch)

    def mean(self, *names: str, over: Any = None) -> dict[str, float]:
        """Means by name, all of them if none is named; over all processes of the Fabric `over`, else of this one."""
        chosen = [name for name in names or self.sums if name in self.sums]
        if over is None or over.world_size == 1 or not chosen:
            return {name: float(self.sums[name]) / self.counts[name] for name in chosen}
        pairs = torch.stack([self.sums[n] / self.counts[n] for n in chosen])  # equal batches: the mean of means is the mean
        return dict(zip(chosen, over.all_reduce(pairs, reduce_op="mean").tolist(), strict=True))

    def clear(self) -> None:
        """Begin anew."""
        self.sums, self.counts = {}, {}

    def state(self) -> dict[str, dict[str, Tensor] | dict[str, int]]:
        """For a checkpoint."""
        return {"sums": self.sums, "counts": self.counts}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Inverse of `state`."""
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.counts = dict(state["counts"])
