"""What a person sees while long work runs: a bar on a terminal, plain lines elsewhere. Everything goes to standard error."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PLAIN_SECONDS = 10.0
_quiet = False


def leading() -> bool:
    """Whether this process speaks and writes for all: the first of several, or the only one."""
    return not any(int(os.environ.get(name) or 0) for name in ("LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "SLURM_PROCID"))


def set_quiet(quiet: bool) -> None:
    """Silence progress and notes (errors are raised, never printed here)."""
    global _quiet
    _quiet = quiet


@contextmanager
def quiet_unless(speaking: bool) -> Iterator[None]:
    """Silence for the `with` block unless `speaking`: of several processes only one reports."""
    before = _quiet
    set_quiet(before or not speaking)
    try:
        yield
    finally:
        set_quiet(before)


def note(message: str) -> None:
    """One line for the person."""
    if not _quiet:
        print(message, file=sys.stderr, flush=True)


class Bar:
    """Progress of one piece of work; `update` is cheap enough to call at every step."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self._started = self._said = time.monotonic()
        self._first = done
        self._rich: Any = None
        self._task: Any = None

    def update(self, done: int, images: int = 0, **facts: float) -> None:
        """`done` of `total` are finished; `images` of them per second are computed from `images` processed so far."""
        self.done = done
        if _quiet:
            return
        now = time.monotonic()
        text = self._facts(facts, images, now)
        if self._rich is not None:
            self._rich.update(self._task, completed=done, facts=text)
        elif now - self._said >= PLAIN_SECONDS:
            self._said = now
            left = (now - self._started) / max(done - self._first, 1) * (self.total - done)
            note(f"{self.title}: {done}/{self.total}  {text}  {left:.0f} s left")

    def _facts(self, facts: dict[str, float], images: int, now: float) -> str:
        parts = [f"{k} {v:.3f}" for k, v in facts.items()]
        if images:
            parts.append(f"{images / max(now - self._started, 1e-9):.0f} images/s")
        return "  ".join(parts)


@contextmanager
def bar(title: str, total: int, done: int = 0) -> Iterator[Bar]:
    """A progress bar for the `with` block."""
    progress = Bar(title, total, done)
    if _quiet or not sys.stderr.isatty():
        yield progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"))
    with RichProgress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as rich:
        progress._rich = rich
        progress._task = rich.add_task(title, total=total, completed=done, facts="")
        yield progress
