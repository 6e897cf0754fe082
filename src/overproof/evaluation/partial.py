"""An evaluation that can be stopped: what is known so far lies in one file, and the next call goes on from there."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from overproof import console
from overproof.data import ImageSet
from overproof.errors import FolderError
from overproof.evaluation.findings import Column, Findings
from overproof.evaluation.plan import Plan
from overproof.evaluation.sharing import Group
from overproof.folder import read_arrays, write_arrays
from overproof.networks import anonymous, digest

EVERY = 20.0  # seconds between two writings
_FINGERPRINT = "_fingerprint"


class Partial:
    """The file of an unfinished evaluation, one per process.

    Args:
        path: where it lies; None keeps nothing.
        fingerprint: of all that the result depends on. A file with another one is replaced.
        group: the processes.
    """

    def __init__(self, path: str | Path | None, fingerprint: str, group: Group) -> None:
        name = "" if path is None else Path(path).name + (f".{group.rank}-of-{group.size}" if group.size > 1 else "")
        self.path = None if path is None else Path(path).with_name(name)
        self.fingerprint = np.frombuffer(fingerprint.encode(), np.uint8)
        self._written = time.monotonic()
        self._fresh = False

    def load(self, columns: Mapping[str, Column]) -> Findings:
        """What is known of this very evaluation, perhaps nothing."""
        if self.path is None or not self.path.exists():
            return Findings(columns)
        try:
            arrays = read_arrays(self.path)
            if arrays[_FINGERPRINT].tobytes() == self.fingerprint.tobytes():
                found = Findings.unpack(columns, arrays)
                console.note(f"going on with the evaluation of which {found.count} images were begun ({self.path})")
                return found
            console.note(f"note: {self.path} belongs to another evaluation (model, data, attacks or seed); starting anew.")
        except (FolderError, KeyError, ValueError) as error:
            console.note(f"note: {self.path} cannot be read ({error}); starting anew.")
        return Findings(columns)

    def changed(self) -> None:
        """Something new is known."""
        self._fresh = True

    @property
    def due(self) -> bool:
        """Whether something new is known and the last writing is long ago."""
        return self._fresh and time.monotonic() - self._written > EVERY

    def write(self, found: Findings) -> None:
        """Write what is new."""
        if self.path is not None and self._fresh:
            write_arrays(self.path, found.pack() | {_FINGERPRINT: self.fingerprint})
            self._fresh = False
        self._written = time.monotonic()

    @contextlib.contextmanager
    def kept(self, write: Callable[[], None]) -> Iterator[None]:
        """Whatever ends the block, `write` is called; SIGTERM ends it like Ctrl-C."""
        ours = (
            self.path is not None
            and threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        )
        if ours:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            yield
        finally:
            if ours:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            write()


def discard(path: Path) -> None:
    """Remove the files of an evaluation that is done, those of all processes."""
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink(missing_ok=True)


def fingerprint(model: nn.Module, data: Any, plan: Plan, teacher: nn.Module | None, group: Group) -> str:
    """What identifies an evaluation: weights, data, attacks, seed, curve. (Each image is compared again as it comes.)"""
    known = (data.index.cpu(), data.labels.cpu()) if isinstance(data, ImageSet) else ()
    asked = (plan.seed, plan.curve, plan.fisher)
    parts: list[Any] = [repr(group), *asked, type(data).__name__, len(data) if hasattr(data, "__len__") else -1]
    parts += [hashlib.blake2b(column.numpy().tobytes()).hexdigest() for column in known]
    parts += [digest(module) for module in (model, teacher) if module is not None]
    for name, attack in plan.attacks.items():
        inside = [digest(value) for value in vars(attack).values() if isinstance(value, nn.Module)]
        parts += [name, anonymous(attack), *inside]
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
