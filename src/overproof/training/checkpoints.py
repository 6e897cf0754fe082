"""Everything needed to continue a run, in one file that appears complete or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from overproof.errors import FolderError
from overproof.folder import atomic, disk_message, plain

NAME = "checkpoint.pt"


def save_checkpoint(run: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, texts, lists and dicts of them)."""
    with atomic(run / NAME) as file:
        torch.save(state, file)


def load_checkpoint(run: Path) -> dict[str, Any] | None:
    """The last state, on the CPU; None if there is none. Only plain data are unpickled.

    Raises:
        FolderError: the file is damaged, or holds anything but plain data.
    """
    path = run / NAME
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    except Exception as error:
        raise FolderError(
            f"{path} is damaged or is not a checkpoint of plain tensors ({type(error).__name__}). It was not executed. Delete it "
            "to start the run from the beginning, or restore it from a copy."
        ) from error


def append_metrics(run: Path, record: dict[str, Any]) -> int:
    """Add a line to metrics.jsonl; returns the file's size."""
    path = run / "metrics.jsonl"
    try:
        with path.open("ab") as file:
            file.write(json.dumps(plain(record), allow_nan=False).encode() + b"\n")
            return file.tell()
    except OSError as error:
        raise FolderError(disk_message(path, error)) from error


def truncate_metrics(run: Path, size: int) -> None:
    """Forget the epochs that were written after the checkpoint."""
    path = run / "metrics.jsonl"
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(size)
