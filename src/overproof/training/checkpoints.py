"""Everything needed to continue a run, in one file that appears complete or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import torch

from overproof.errors import FolderError, UsageError
from overproof.folder import atomic, disk_message, plain

if TYPE_CHECKING:
    from overproof.training.loop import Trainer

NAME = "checkpoint.pt"


def save_state(trainer: Trainer) -> None:
    """Write where `trainer` stands."""
    state = {
        "step": trainer.step,
        "per_epoch": trainer.per_epoch,
        "processes": trainer.fabric.world_size,
        "seconds": trainer.seconds,
        "best": trainer.selection.best,
        "peak": trainer.selection.peak,
        "metrics_size": trainer.metrics_size,
        "meter": trainer.meter.state(),
        "objective": trainer.objective.trained_state(),
        "optimizers": {phase: optimizer.state_dict() for phase, optimizer in trainer.optimizers.items()},
        "averaged": trainer.averaged.state_dict() if trainer.averaged is not None else None,
        "scaler": trainer.fabric.strategy.precision.state_dict(),
    }
    save_checkpoint(trainer.folder.path, state)


def restore_state(trainer: Trainer) -> bool:
    """Put `trainer` where the last checkpoint left off; False if there is none."""
    state = load_checkpoint(trainer.folder.path)
    trainer.fabric.barrier()  # nobody may write the first checkpoint before everybody has looked for one
    if state is None:
        return False
    made = state.get("per_epoch", trainer.per_epoch)
    if made != trainer.per_epoch:
        raise UsageError(
            f"{trainer.folder.path / NAME} was made with {made} steps an epoch by {state['processes']} process(es), and now there are "
            f"{trainer.per_epoch} by {trainer.fabric.world_size}: epochs and learning rates would be others. Continue with as many "
            "processes, the same data and the same batch size."
        )
    trainer.step, trainer.seconds, trainer.metrics_size = state["step"], state["seconds"], state["metrics_size"]
    trainer.selection.best, trainer.selection.peak = state["best"], state.get("peak", {})
    trainer.meter.load(state["meter"], trainer.fabric.device)
    trainer.objective.load_trained_state(state["objective"])
    for phase, optimizer in trainer.optimizers.items():
        try:
            optimizer.load_state_dict(state["optimizers"][phase])
        except (ValueError, KeyError) as error:
            raise FolderError(
                f"{trainer.folder.path / NAME} holds an optimiser of other parameters ({error}): the method was another one when it was made. "
                "Start the run again in a fresh --out."
            ) from error
    if trainer.averaged is not None:
        trainer.averaged.load_state_dict(state["averaged"])
    trainer.fabric.strategy.precision.load_state_dict(state["scaler"])
    if trainer.fabric.is_global_zero:
        truncate_metrics(trainer.folder.path, trainer.metrics_size)
        trainer.teller.known = {name for record in trainer.folder.metrics for name in record.get("concerns", ())}
    return True


def save_checkpoint(run: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, texts, lists and dicts of them)."""
    with atomic(run / NAME) as file:
        watched = _Watched(file)
        try:
            torch.save(state, cast("IO[bytes]", watched))
        except RuntimeError:
            if watched.error is not None:
                raise watched.error from None
            raise


class _Watched:
    """A file that remembers why the disk refused: `torch.save` tells of it in words of its own."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


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
