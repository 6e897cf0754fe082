"""Devices, processes and loggers, through Lightning Fabric."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from overproof import console
from overproof.config import RunConfig, TrainConfig
from overproof.errors import UsageError
from overproof.folder import RunFolder
from overproof.methods import METHODS

_spawned = False


@contextmanager
def launched(config: RunConfig, folder: RunFolder) -> Iterator[Any]:
    """A `Fabric` whose processes run; its loggers are closed after the block.

    Raises:
        UsageError: a second run over several devices in one process without torchrun, or a logger that is not installed.
    """
    global _spawned
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    train = config.train
    devices, nodes = _devices(train.devices, train.nodes)
    strategy: Any = train.strategy
    if strategy == "ddp" or nodes > 1 or devices not in (1, "1"):
        method = METHODS.get(config.method.name).load()
        # A phase leaves the other phases' parameters without gradients; elsewhere that would be a mistake worth an error.
        partial = len(getattr(method, "phases", ("train",))) > 1 or getattr(method, "partial", False)
        partial = partial or config.method.options.get("ce_weight") == 0  # the last layer may be left out
        strategy = DDPStrategy(find_unused_parameters=partial)
        _only_once()
    loggers = [_logger(name, folder) for name in train.loggers]
    precision: Any = "32-true" if train.precision == "32" else train.precision
    places = {"accelerator": train.accelerator, "devices": devices, "num_nodes": nodes}
    try:
        fabric = Fabric(strategy=strategy, precision=precision, loggers=loggers, **places)
    except (ValueError, TypeError, RuntimeError) as error:
        named = ", ".join(f"train.{k}={v!r}" for k, v in places.items())
        raise UsageError(f"This machine cannot serve {named}, train.precision={train.precision}: {error}") from error
    fabric.launch()
    _spawned = _spawned or fabric.world_size > 1
    outcome = "failed"
    try:
        yield fabric
        outcome = "success"
    finally:
        for logger in loggers:
            logger.finalize(outcome)
            if type(logger).__name__ == "WandbLogger":
                logger.experiment.finish()


@contextmanager
def processes(devices: int | str | None = None, accelerator: str = "auto") -> Iterator[None]:
    """The processes that torchrun started, or else as many as `devices` says, joined for an evaluation; only the first speaks.

    Raises:
        UsageError: this machine has not so many devices.
    """
    global _spawned
    places = dict(zip(("devices", "num_nodes"), _devices(1 if devices is None else devices, 1), strict=True))
    if places in ({"devices": 1, "num_nodes": 1}, {"devices": "1", "num_nodes": 1}):
        yield
        return
    from lightning.fabric import Fabric

    _only_once()
    try:
        fabric = Fabric(strategy="ddp", accelerator=accelerator, **places)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"This machine cannot serve --devices {devices}: {error}") from error
    fabric.launch()
    _spawned = _spawned or fabric.world_size > 1
    with console.quiet_unless(console.leading()):
        yield


def _devices(devices: int | str, nodes: int) -> tuple[int | str, int]:
    """Under torchrun its processes count; devices=1 would make each of them work alone."""
    world, local = (int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        if devices not in (1, "auto", local):
            raise UsageError(f"devices={devices}, but torchrun started {local} processes here; leave --devices out.")
        return local, world // local
    return devices, nodes


def refuse_in_a_row(runs: Iterable[tuple[RunConfig, RunFolder]]) -> None:
    """Refuse, before any work is done, several runs that would each have to start processes of their own.

    Raises:
        UsageError: more than one unfinished run over several devices without torchrun.
    """
    left = [config.train for config, folder in runs if folder.status.get("state") != "done"]
    if len(left) > 1 and any(train.nodes > 1 or _count(train) != 1 for train in left):
        _need_torchrun()


def _count(train: TrainConfig) -> int | str:
    """How many devices are asked for, as far as that is a number."""
    if train.devices == "auto" and train.accelerator in ("auto", "cuda", "gpu"):
        return max(torch.cuda.device_count(), 1)
    return 1 if train.devices in (1, "1", "auto") else train.devices


def _only_once() -> None:
    if _spawned:
        _need_torchrun()


def _need_torchrun() -> None:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise UsageError(
            "Several runs over several devices in one go need torchrun: torchrun --nproc-per-node N -m overproof ... (without "
            "--devices)."
        )


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
