"""Stopping well: on request with a checkpoint, and at once when a loss is no number any more."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from overproof import console
from overproof.errors import NonFiniteLossError, OverproofError
from overproof.types import Output

CHECK_EVERY = 20  # steps between looks at the loss on an accelerator, where looking waits for the device


class Interrupted(OverproofError):
    """Training was stopped from outside; the run can be resumed."""


class LossWatch:
    """Notices the first loss that is not finite, and names it.

    Args:
        run: the run folder, for the message.
        fabric: on the CPU every step is checked, elsewhere every `CHECK_EVERY`; several processes stop together.
    """

    def __init__(self, run: Path, fabric: Any) -> None:
        self.run, self.fabric = run, fabric
        self.every = 1 if fabric.device.type == "cpu" else CHECK_EVERY
        self._recent: list[tuple[int, dict[str, Tensor]]] = []

    @property
    def settled(self) -> bool:
        """Whether every loss so far has been looked at."""
        return not self._recent

    def see(self, step: int, output: Output) -> None:
        """Remember a step's losses and check them when it is time."""
        self._recent.append((step, {name: value.detach() for name, value in output.losses.items()}))
        if len(self._recent) >= self.every:
            self.check()

    def check(self) -> None:
        """Check what was not checked yet.

        Raises:
            NonFiniteLossError: names step, terms and remedies.
        """
        recent, self._recent = self._recent, []
        if not recent:
            return
        bad = (~torch.stack([v for _, terms in recent for v in terms.values()]).isfinite()).any().float()
        if self.fabric.world_size > 1:
            bad = self.fabric.all_reduce(bad, reduce_op="sum")
        if not bool(bad):
            return
        here = ((s, t) for s, t in recent if not all(bool(v.isfinite()) for v in t.values()))
        step, terms = next(here, (recent[-1][0], {}))
        values = ", ".join(f"{name} = {float(value):g}" for name, value in terms.items()) or "in another process"
        raise self._error(f"The loss is not finite at step {step}: {values}.")

    def check_weights(self, step: int, model: nn.Module, validation: dict[str, float]) -> None:
        """Refuse to keep weights that are no numbers, or that give none on held-out images.

        Raises:
            NonFiniteLossError: names step and remedies.
        """
        finite = all(bool(p.isfinite().all()) for p in model.parameters()) and math.isfinite(validation.get("loss", 0.0))
        if not finite:
            raise self._error(f"The weights after step {step} are useless: they, or the loss they give, are not finite.")

    def _error(self, what: str) -> NonFiniteLossError:
        return NonFiniteLossError(
            f"{what} The last good state is in {self.run / 'checkpoint.pt'}. Start again "
            "with a smaller train.lr, train.warmup=1, train.clip=1.0 or train.precision=32."
        )


class Stopper:
    """Ctrl-C and SIGTERM let the step end and a checkpoint be written; a second one stops at once."""

    def __init__(self) -> None:
        self.stop = False

    @contextlib.contextmanager
    def listening(self, alone: bool) -> Iterator[None]:
        """Take the signals over for the block; not beside other processes, which would not stop at the same step."""
        if not alone or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True
        console.note("stopping after this step (again to stop at once)")
