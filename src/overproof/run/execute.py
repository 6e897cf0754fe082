"""From a resolved configuration to a finished run folder: the Python API and the command line both come through here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overproof import console
from overproof.attacks.base import Attack
from overproof.config import RunConfig
from overproof.data import DeviceLoader, Splits, build_augment, make_loader
from overproof.errors import OverproofError, UsageError
from overproof.evaluation.evaluator import evaluate
from overproof.evaluation.records import Evaluation
from overproof.folder import RunFolder, write_json, write_toml
from overproof.methods import METHODS
from overproof.methods.objective import Objective
from overproof.models.weights import fill, load_model, read_state
from overproof.run.environment import claim, environment
from overproof.run.prepare import USER, Parts, UserData, borrowed, checked, prepare
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
        FolderError: `out` holds another run, or cannot be written.
        Interrupted: stopped from outside or by the deadline; resumable.
    """
    folder, parts = RunFolder(out), parts or Parts()
    leader = not any(int(os.environ.get(name, 0)) for name in ("LOCAL_RANK", "GROUP_RANK", "NODE_RANK"))
    config = checked(config)
    if leader:
        claim(folder, config, resume)
    if folder.exists and folder.status["state"] == "done":
        return finished(folder, parts)
    with console.quiet_unless(leader), borrowed(parts.teacher), _recorded(folder, leader):
        fabric = _launch(config, folder)
        objective, splits = prepare(config, parts)
        if fabric.is_global_zero:
            write_toml(folder.path / "config.toml", config.table())
            write_json(folder.path / "environment.json", environment(fabric.device))
            folder.write_status("running", message="")
        fabric.barrier()
        _train(config, objective, splits, folder=folder, fabric=fabric, deadline=deadline)
        if fabric.is_global_zero:
            _judge(config, objective, splits, folder, parts.attacks)
            folder.write_status("done", message="")
        fabric.barrier()
    return finished(folder, Parts(student=objective.student))


def finished(folder: RunFolder, parts: Parts) -> Run:
    """The handle of a run whose folder is complete."""
    return Run(folder, load_model(folder.path, "best", parts.student), folder.evaluations)


def resume(out: str | Path, *, deadline: float | None = None) -> Run:
    """Continue the run in `out` to its end.

    Raises:
        FolderError: no run there.
        UsageError: it was made from objects of a program, which has to be called again with resume=True.
    """
    folder = RunFolder(out).require()
    config = RunConfig.model_validate(folder.config)
    if USER in (config.data.name, config.model.name, config.teacher.name if config.teacher else None):
        raise UsageError(
            f"{folder.path} was made from Python objects (data {config.data.name}, model {config.model.name}). Call the same "
            "overproof.train or overproof.distill again with resume=True."
        )
    return execute(config, out, resume=True, deadline=deadline)


def _launch(config: RunConfig, folder: RunFolder) -> Any:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    train = config.train
    strategy: Any = train.strategy
    if strategy == "auto" and (train.nodes > 1 or train.devices not in (1, "1")):
        phases = getattr(METHODS.get(config.method.name).load(), "phases", ("train",))
        # A phase leaves the other phases' parameters without gradients; with one phase that would be a mistake worth an error.
        strategy = DDPStrategy(find_unused_parameters=len(phases) > 1)
    fabric = Fabric(
        accelerator=train.accelerator,
        devices=train.devices,
        num_nodes=train.nodes,
        strategy=strategy,
        precision="32-true" if train.precision == "32" else train.precision,
        loggers=_loggers(train.loggers, folder),
    )
    fabric.launch()
    return fabric


def _loggers(names: Sequence[str], folder: RunFolder) -> list[Any]:
    return [_logger(name, folder) for name in names]


def _logger(name: str, folder: RunFolder) -> Any:
    place = str(folder.path)
    try:
        if name == "csv":
            from lightning.fabric.loggers import CSVLogger

            return CSVLogger(place, name="csv")
        if name == "tensorboard":
            from lightning.fabric.loggers import TensorBoardLogger

            return TensorBoardLogger(place, name="tensorboard")
        if name == "wandb":
            from lightning.pytorch.loggers import WandbLogger

            return WandbLogger(save_dir=place, name=folder.name, project="overproof")
        from lightning.pytorch.loggers import MLFlowLogger

        return MLFlowLogger(save_dir=str(folder.path / "mlflow"), run_name=folder.name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"The logger {name!r} is not installed ({error}). Install it: pip install 'overproof[{name}]'."
        ) from None


def _train(
    config: RunConfig,
    objective: Objective,
    splits: Splits | UserData,
    *,
    folder: RunFolder,
    fabric: Any,
    deadline: float | None,
) -> None:
    train = config.train
    shared = {"device": fabric.device, "num_workers": train.workers, "classes": len(splits.classes) or None}
    loader = make_loader(
        splits.train,
        train.batch_size,
        shuffle=True,
        seed=config.seed,
        augment=build_augment(config.data.augment, classes=len(splits.classes)),
        drop_last=not hasattr(splits.train, "__len__") or len(splits.train) >= train.batch_size * fabric.world_size,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        **shared,
    )
    if not hasattr(loader, "__len__"):
        raise UsageError(
            "The training data have no length, so the schedule cannot be planned. Give a DataLoader over a sized data set."
        )
    validation = (
        make_loader(splits.validation, config.evaluation.batch_size, **shared) if splits.validation is not None else None
    )
    trainer = Trainer(
        objective, loader, validation, config=train, folder=folder, fabric=fabric, seed=config.seed, deadline=deadline
    )
    if train.cache_teacher:
        _remember_teacher(objective, splits, fabric.device)
    trainer.run()


def _remember_teacher(objective: Objective, splits: Splits | UserData, device: torch.device) -> None:
    loader = make_loader(splits.train, 512, device=device)
    if objective.teacher is None or not isinstance(loader, DeviceLoader):
        raise UsageError("train.cache_teacher=true needs a teacher, and data that fit into memory.")
    objective.teacher.to(device)
    with torch.no_grad():
        parts = [(batch.index, objective.teacher(batch.images)) for batch in loader.batches(0)]
    index, logits = torch.cat([i for i, _ in parts]), torch.cat([z for _, z in parts])
    table = torch.full((int(index.max()) + 1, logits.shape[1]), float("nan"), device=device)
    table[index] = logits
    objective.remember_teacher(table)


def _judge(
    config: RunConfig,
    objective: Objective,
    splits: Splits | UserData,
    folder: RunFolder,
    attacks: Mapping[str, Attack] | None,
) -> None:
    """Evaluate the best and the last weights on the test set, once if they are the same."""
    if splits.test is None:
        return
    wanted = list(config.evaluation.weights)
    same = folder.status.get("best_epoch") == config.train.epochs - 1
    done: Evaluation | None = None
    for which in wanted:
        if done is None or not same:
            fill(objective.student, read_state(folder.path / "weights" / f"{which}.safetensors"), folder.path)
            done = evaluate(
                objective.student,
                splits.test,
                attacks=attacks or config.evaluation.attacks,
                curve=config.evaluation.curve,
                teacher=objective.teacher,
                batch_size=config.evaluation.batch_size,
                seed=config.seed,
                classes=splits.classes,
            )
        facts: dict[str, Any] = {"weights": which, "data": config.data.name, "split": "test", "model": config.model.name}
        if done.summary["agreement"] and config.teacher is not None:
            facts["agreement"] = {**done.summary["agreement"], "teacher": config.teacher.run or config.teacher.name}
        Evaluation({**done.summary, **facts}, done.samples, done.gallery).save(folder.path, f"test-{which}")


@contextlib.contextmanager
def _recorded(folder: RunFolder, leader: bool) -> Iterator[None]:
    """The run's state tells what happened, whatever happens; a folder in which nothing began is left as it was found."""
    try:
        yield
    except BaseException as error:
        if leader and folder.exists:
            state = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
            with contextlib.suppress(OverproofError, OSError):  # the disk may be what failed
                folder.write_status(state, message=f"{type(error).__name__}: {error}"[:2000])
        elif leader:
            with contextlib.suppress(OSError):  # empty, or not ours to remove
                folder.path.rmdir()
        raise
