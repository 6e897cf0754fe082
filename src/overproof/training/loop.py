"""The training loop: sums what the objective returns, and never loses finished work."""

from __future__ import annotations

import time
import zlib
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from overproof import console
from overproof.config import TrainConfig
from overproof.errors import OverproofError
from overproof.folder import RunFolder
from overproof.methods.objective import Objective
from overproof.models.weights import save_weights
from overproof.training.averaging import make_averaged
from overproof.training.checkpoints import append_metrics, load_checkpoint, save_checkpoint, truncate_metrics
from overproof.training.meter import EpochTeller, Meter
from overproof.training.plain import Plain
from overproof.training.ranks import compare_ranks
from overproof.training.safety import Interrupted, LossWatch, Stopper
from overproof.training.schedules import learning_rate, make_optimizer
from overproof.training.validation import validate
from overproof.types import Batch, Output, Progress


class Trainer:
    """Trains an objective.

    Args:
        objective: the method with its student and teacher.
        loader: training batches; `batches(epoch, start)` and `len`.
        validation: the same for the validation split, or None.
        config: how to optimise.
        folder: where the run is kept.
        fabric: a launched `lightning.fabric.Fabric`.
        seed: decides, with step and rank, all randomness of a step.
        deadline: `time.monotonic()` at which to stop with a checkpoint.
    """

    def __init__(
        self,
        objective: Objective,
        loader: Any,
        validation: Any,
        *,
        config: TrainConfig,
        folder: RunFolder,
        fabric: Any,
        seed: int,
        deadline: float | None = None,
    ) -> None:
        self.objective, self.loader, self.validation = objective, loader, validation
        self.config, self.folder, self.fabric, self.seed = config, folder, fabric, seed
        self.per_epoch = len(loader)
        self.total = config.epochs * self.per_epoch
        self.step, self.seconds, self.metrics_size = 0, 0.0, 0
        self.best: dict[str, Any] = {}
        self.meter = Meter()
        self.deadline = deadline if deadline is not None else float("inf")
        self._images = 0
        self.teller = EpochTeller(config.epochs)
        self.stopper = Stopper()
        self.watch = LossWatch(folder.path, fabric)
        self._set_up()

    def _set_up(self) -> None:
        config, objective = self.config, self.objective
        if config.channels_last:
            objective.to(memory_format=torch.channels_last)
        objective.to(self.fabric.device)
        self.averaged = make_averaged(objective.student, config)
        if config.compile:
            for network in (objective.student, objective.teacher):
                if network is not None:
                    network.compile()
        bare = [make_optimizer(config, objective.trainable(phase)) for phase in objective.phases]
        self.wrapped, *optimizers = self.fabric.setup(Plain(objective), *bare)
        self.optimizers = dict(zip(objective.phases, optimizers, strict=True))

    @property
    def model(self) -> nn.Module:
        """What is validated and kept: the averaged weights once there are any, else the student."""
        if self.averaged is not None and int(self.averaged.n_averaged) > 0:
            return self.averaged.module
        return self.objective.student

    def run(self) -> None:
        """Train to the end, from the last checkpoint if there is one.

        Raises:
            NonFiniteLossError: a loss became NaN or infinite.
            Interrupted: Ctrl-C or SIGTERM; a checkpoint has been written.
        """
        self._restore()
        with self.stopper.listening(alone=self.fabric.world_size == 1), console.bar("training", self.total, self.step) as bar:
            while self.step < self.total:
                self._epoch(self.step // self.per_epoch, bar)

    def _epoch(self, epoch: int, bar: console.Bar) -> None:
        begun, before, images = time.perf_counter(), self.seconds, 0
        saved = begun
        self.wrapped.train()
        for batch in self.loader.batches(epoch, self.step - epoch * self.per_epoch):
            self._step(batch.to(self.fabric.device), epoch)
            now = time.perf_counter()
            self.seconds = before + now - begun
            images += len(batch) * self.fabric.world_size
            # Only here has the watch looked at every loss, and only here do all processes talk about stopping.
            calm = self.watch.settled
            if calm:
                bar.update(self.step, images=self._images + images, **self.meter.mean("loss", "accuracy"))
            if not calm or self.step % self.per_epoch == 0:
                continue  # a full epoch is validated and kept before anything else happens
            stop = self._must_stop()
            if stop or now - saved > self.config.checkpoint_seconds:
                self._save()
                saved = now
            self._leave_if(stop)
        self._images += images
        if self.step < (epoch + 1) * self.per_epoch:
            raise OverproofError(f"The loader promised {self.per_epoch} batches and gave fewer in epoch {epoch}.")
        self.watch.check()
        self._finish_epoch(epoch, images / max(time.perf_counter() - begun, 1e-9))
        self._leave_if(self._must_stop())

    def _must_stop(self) -> bool:
        """Whether to stop, the same answer in every process."""
        late = time.monotonic() > self.deadline
        if self.fabric.world_size > 1:
            return bool(self.fabric.broadcast(late)) if self.deadline < float("inf") else False
        return self.stopper.stop or late

    def _leave_if(self, stop: bool) -> None:
        if stop and self.step < self.total:
            raise Interrupted(f"Stopped at step {self.step} of {self.total}; `overproof resume {self.folder.path}` continues.")

    def _step(self, batch: Batch, epoch: int) -> None:
        # Randomness depends on nothing but seed, step and rank: a resumed run needs no saved generator state.
        seed = zlib.crc32(f"{self.seed}/{self.step}/{self.fabric.global_rank}".encode())
        torch.default_generator.manual_seed(seed)  # torch.manual_seed costs a millisecond where there is no accelerator
        if self.fabric.device.type == "cuda":
            torch.cuda.manual_seed_all(seed)
        if self.config.channels_last:
            batch = replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))
        progress = Progress(self.step, self.total, epoch)
        rate = learning_rate(self.config, self.step, self.total)
        for phase, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            output = Output(**self.wrapped(vars(batch), vars(progress), phase))
            self.watch.see(self.step, output)
            self.fabric.backward(sum(output.losses.values()))
            if self.config.clip is not None:
                # Under 16-mixed infinite gradients are normal: the scaler then skips the step.
                self.fabric.clip_gradients(self.wrapped, optimizer, max_norm=self.config.clip, error_if_nonfinite=False)
            optimizer.step()
            self.meter.add(batch, output)
        self.step += 1
        self._average()

    def _average(self) -> None:
        if self.averaged is None:
            return
        if self.config.averaging == "ema" or self.step > self.config.swa_start * self.total:
            self.averaged.update_parameters(self.objective.student)

    def _finish_epoch(self, epoch: int, speed: float) -> None:
        if self.fabric.world_size > 1:
            compare_ranks(self.fabric, self.objective, self.step)
        begun = time.perf_counter()
        rate = learning_rate(self.config, self.step - 1, self.total)
        record: dict[str, Any] = {"epoch": epoch, "step": self.step, "lr": rate, "images_per_second": round(speed, 1)}
        record["train"] = self.meter.mean(over=self.fabric)
        self.meter.clear()
        if self.validation is not None:
            record["validation"] = self._validate()
        self.watch.check_weights(self.step, self.model, record.get("validation", {}))
        self.seconds += time.perf_counter() - begun
        record["seconds"] = round(self.seconds, 3)
        self._keep(epoch, record)
        if self.fabric.is_global_zero:
            self.metrics_size = append_metrics(self.folder.path, record)
            self.teller.tell(epoch, record)
        self.fabric.log_dict({f"validation/{k}": v for k, v in record.get("validation", {}).items()}, step=self.step)
        self.fabric.log_dict({f"train/{k}": v for k, v in record["train"].items()}, step=self.step)
        self._checkpoint()

    def _validate(self) -> dict[str, float]:
        attack = self.objective.validation_attack
        if attack is not None:
            attack = replace(attack, steps=self.config.validation_steps)
        limit = self.config.validation_limit
        return validate(self.model, self.validation, fabric=self.fabric, attack=attack, limit=limit, seed=self.seed)

    def _keep(self, epoch: int, record: dict[str, Any]) -> None:
        """Write the last weights, and the best ones: by robust accuracy if it is watched, else by clean accuracy."""
        found = record.get("validation", {})
        measure = "robust" if "robust" in found else "clean"
        better = not found or not self.best or found[measure] > self.best["value"]
        if better:
            self.best = {"epoch": epoch, "measure": measure, "value": found.get(measure, 0.0)}
        if self.fabric.is_global_zero:
            for which in ("last", "best") if better else ("last",):
                save_weights(self.model, self.folder.path, which)

    def _checkpoint(self) -> None:
        self._save()
        self.fabric.barrier()

    def _save(self) -> None:
        if self.fabric.is_global_zero:
            state = {
                "step": self.step,
                "seconds": self.seconds,
                "best": self.best,
                "metrics_size": self.metrics_size,
                "meter": self.meter.state(),
                "objective": self.objective.trained_state(),
                "optimizers": {phase: optimizer.state_dict() for phase, optimizer in self.optimizers.items()},
                "averaged": self.averaged.state_dict() if self.averaged is not None else None,
                "scaler": self.fabric.strategy.precision.state_dict(),
            }
            save_checkpoint(self.folder.path, state)
            epoch = self.step // self.per_epoch
            best = self.best.get("epoch")
            facts = {"step": self.step, "steps": self.total, "epoch": epoch, "epochs": self.config.epochs, "best_epoch": best}
            self.folder.write_status("running", **facts, seconds=round(self.seconds, 3))

    def _restore(self) -> None:
        state = load_checkpoint(self.folder.path)
        self.fabric.barrier()  # nobody may write the first checkpoint before everybody has looked for one
        if state is None:
            self._checkpoint()
            return
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
        self.metrics_size = state["metrics_size"]
        self.meter.load(state["meter"], self.fabric.device)
        self.objective.load_trained_state(state["objective"])
        for phase, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][phase])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        self.fabric.strategy.precision.load_state_dict(state["scaler"])
        if self.fabric.is_global_zero:
            truncate_metrics(self.folder.path, self.metrics_size)
