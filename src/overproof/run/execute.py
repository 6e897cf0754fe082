"""From a resolved configuration to a finished run folder: the Python API and the command line both come through here."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overproof import console
from overproof.config import RunConfig, resolve
from overproof.data import DeviceLoader, NoImages, Splits, build_augment, make_loader, make_mixed
from overproof.errors import FolderError, OverproofError, UsageError
from overproof.folder import RunFolder, disk_message, write_json, write_toml
from overproof.methods.objective import Objective
from overproof.models.weights import load_model
from overproof.networks import borrowed
from overproof.run.data_facts import check_same_data, keep_data_facts
from overproof.run.environment import claim, environment
from overproof.run.judging import judge_run
from overproof.run.launch import launched
from overproof.run.learned import keep_learned
from overproof.run.prepare import USER, Parts, UserData, checked, prepare, refuse_code
from overproof.run.studying import study_teacher
from overproof.run.teachers import look_at_teacher
from overproof.training.loop import Trainer
from overproof.training.safety import Interrupted


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, the model with the best weights, and its evaluations by name."""

    folder: RunFolder
    model: nn.Module
    evaluations: dict[str, Any]

    @property
    def path(self) -> Path:
        """The folder's path."""
        return self.folder.path


def execute(
    config: RunConfig, out: str | Path, *, parts: Parts | None = None, resume: bool = False, deadline: float | None = None
) -> Run:
    """Train, keep, evaluate.

    Args:
        config: resolved configuration.
        out: run folder to be made, or with `resume` to be continued.
        parts: objects used instead of building by name.
        resume: continue an unfinished run; a finished one is returned as it is.
        deadline: `time.monotonic()` at which to stop with a checkpoint.

    Raises:
        UsageError: the configuration cannot be served.
        FolderError: `out` holds another run, is in use, or cannot be written.
        Interrupted: stopped from outside or by the deadline; resumable.
    """
    if config.verb == "evolve":
        from overproof.run.evolving import execute_evolution  # it needs what is here

        trusted = parts is not None and parts.trusted
        return execute_evolution(config, out, resume=resume, deadline=deadline, trusted=trusted)
    folder, parts, leader = RunFolder(out), parts or Parts(), console.leading()
    config = checked(config, own_attacks=parts.attacks)
    made = claim(folder, config, resume) if leader else []
    if folder.exists and folder.status.get("state") == "done":
        if parts.data is not None:
            check_same_data(parts.data, folder)
        return _finished(folder, parts.student, parts.trusted)
    with (
        holding(folder, made, leader=leader),
        borrowed(parts.teacher),
        borrowed(parts.standard_teacher),
        launched(config, folder) as fabric,
    ):
        objective, data = prepare(config, parts)
        study_teacher(config, objective, data, fabric.device)
        trainer = _trainer(config, objective, data, folder=folder, fabric=fabric, deadline=deadline)
        if leader:
            write_toml(folder.path / "config.toml", config.table())
            write_json(folder.path / "environment.json", environment(fabric.device))
            keep_data_facts(data, folder)
            folder.write_status("running", message="")
            look_at_teacher(config, objective, trainer.validation, data, folder=folder)
        trainer.run()
        if leader:
            keep_learned(objective, data, folder)
        judge_run(config, objective, data, folder=folder, attacks=parts.attacks)
        if leader:
            folder.write_status("done", message="")
    return _finished(folder, objective.student, parts.trusted)


def _finished(folder: RunFolder, student: nn.Module | None, trusted: bool) -> Run:
    return Run(folder, load_model(folder.path, "best", student, trusted=trusted), folder.evaluations)


def resume(out: str | Path, *, overrides: Sequence[str] = (), deadline: float | None = None, trusted: bool = False) -> Run:
    """Continue the run in `out` to its end.

    Args:
        out: a run folder.
        overrides: "section.key=value"; only what changes no result (train.workers, evaluation.batch_size, ...).
        deadline: `time.monotonic()` at which to stop again.
        trusted: allow a folder that names a package.module:callable to import and run it.

    Raises:
        FolderError: no run there.
        UsageError: it was made from objects of a program, which has to be called again with resume=True.
    """
    folder = RunFolder(out).require()
    config = refuse_code(resolve(folder.config, overrides=overrides), str(folder.path), trusted)
    teachers = (config.teacher, config.standard_teacher, config.judge)
    if USER in (config.data.name, config.data.extra, config.model.name, *(t.name for t in teachers if t is not None)):
        raise UsageError(
            f"{folder.path} was made from Python objects (data {config.data.name}, model {config.model.name}). Call the same "
            "overproof.train or overproof.distill again with resume=True."
        )
    return execute(config, out, parts=Parts(trusted=trusted), resume=True, deadline=deadline)


def _trainer(
    config: RunConfig, objective: Objective, data: Splits | UserData, *, folder: RunFolder, fabric: Any, deadline: float | None
) -> Trainer:
    train, size = config.train, config.train.batch_size * fabric.world_size
    shared = {"device": fabric.device, "num_workers": train.workers, "classes": len(data.classes) or None}
    how: dict[str, Any] = {
        **shared,
        "seed": config.seed,
        "augment": build_augment(config.data.augment, classes=len(data.classes)),
        "rank": fabric.global_rank,
        "world_size": fabric.world_size,
    }
    loader: Any
    if isinstance(data.train, NoImages):
        loader = data.train.to(fabric.device)
    elif data.extra is not None:
        loader = make_mixed(data.train, data.extra, train.batch_size, share=config.data.extra_share, **how)
    else:
        whole = not hasattr(data.train, "__len__") or len(data.train) >= size
        loader = make_loader(data.train, train.batch_size, shuffle=True, drop_last=whole, **how)
    if not hasattr(loader, "__len__"):
        raise UsageError(
            "The training data have no length, so the schedule cannot be planned. Give a DataLoader over a sized set."
        )
    held_out = data.validation
    if held_out is not None:
        # Shuffled once and for all: the attacked part comes first, and a folder's images are sorted by class.
        held_out = make_loader(held_out, config.evaluation.batch_size, shuffle=True, **shared)
    if train.cache_teacher:
        _remember_teacher(objective, data, fabric)
    return Trainer(objective, loader, held_out, config=train, folder=folder, fabric=fabric, seed=config.seed, deadline=deadline)


def _remember_teacher(objective: Objective, data: Splits | UserData, fabric: Any) -> None:
    loader = make_loader(data.train, 512, device=fabric.device)
    if objective.teacher is None or not isinstance(loader, DeviceLoader):
        raise UsageError("train.cache_teacher=true needs a teacher, and data that fit into memory.")
    objective.teacher.to(fabric.device)
    with torch.no_grad(), fabric.autocast():
        parts = [(batch.index, objective.teacher(batch.images).float()) for batch in loader.batches(0)]
    index, logits = torch.cat([i for i, _ in parts]), torch.cat([z for _, z in parts])
    table = torch.full((int(index.max()) + 1, logits.shape[1]), float("nan"), device=fabric.device)
    table[index] = logits
    objective.remember_teacher(table)


@contextlib.contextmanager
def holding(folder: RunFolder, made: list[Path], *, leader: bool = True) -> Iterator[None]:
    """The folder is ours inside the block, its state tells what happened, and the caller's random numbers go on afterwards.

    Args:
        folder: claimed.
        made: folders that `claim` made, which go again if nothing begins.
        leader: whether this process speaks and writes.
    """
    with console.quiet_unless(leader), _locked(folder, leader), _recorded(folder, leader, made), _own_randomness():
        yield


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """The caller's random numbers go on afterwards as if nothing had been drawn."""
    # Only a device already in use has a stream worth keeping; looking at the others would wake them.
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        yield


@contextlib.contextmanager
def _locked(folder: RunFolder, leader: bool) -> Iterator[None]:
    """One writer per folder; the lock falls with the process, however that ends."""
    if not leader:
        yield
        return
    path = folder.path / ".lock"
    try:
        file = path.open("w")
    except OSError as error:
        raise FolderError(disk_message(path, error)) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderError(
                f"Another process is working in {folder.path} (after a kill: perhaps its loader processes, for a few seconds). Wait "
                "for it, or stop it first."
            ) from None
        except OSError as error:  # some network file systems know no locks
            console.note(f"note: {folder.path} cannot be locked ({error.strerror}); do not run it twice at once.")
        yield


@contextlib.contextmanager
def _recorded(folder: RunFolder, leader: bool, made: list[Path]) -> Iterator[None]:
    """The run's state tells what happened, whatever happens; a folder in which nothing began is left as it was found."""
    try:
        yield
    except BaseException as error:
        if leader and folder.exists:
            state = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
            what = str(error) or (
                "stopped at once, without a checkpoint of its own" if state == "interrupted" else "nothing more is known"
            )
            with contextlib.suppress(OverproofError, OSError):  # the disk may be what failed
                folder.write_status(state, message=f"{type(error).__name__}: {what}"[:2000])
        elif leader:
            with contextlib.suppress(OSError):  # nothing began here: leave no trace
                (folder.path / ".lock").unlink(missing_ok=True)
                for place in made:
                    place.rmdir()
        raise
