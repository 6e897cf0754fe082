"""The training loop: sums what the objective returns, and never loses finished work."""

from __future__ import annotations

import itertools
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
from overproof.training.artefacts import keep_generators
from overproof.training.averaging import STATISTICS, make_averaged, measure_statistics
from overproof.training.awp import worst_gradients
from overproof.training.checkpoints import append_metrics, restore_state, save_state
from overproof.training.meter import EpochTeller, Meter
from overproof.training.plain import Parcel, Plain
from overproof.training.ranks import compare_ranks
from overproof.training.safety import Interrupted, LossWatch, Stopper
from overproof.training.schedules import learning_rate, make_optimizer
from overproof.training.selection import Selection
from overproof.training.validation import validate, watching
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
        self.selection = Selection(config, validated=validation is not None)
        self.watched = watching(objective, config, validated=validation is not None)
        self.meter = Meter()
        self.deadline = deadline if deadline is not None else float("inf")
        self._images = 0
        self.teller = EpochTeller(config.epochs, objective.concerns)
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
            for network in objective.compiled():
                network.compile()
        self.configs = {phase: config.model_copy(update=objective.settings(phase)) for phase in objective.turns}
        bare = [make_optimizer(own, objective.groups(phase)) for phase, own in self.configs.items()]
        self.wrapped, *optimizers = self.fabric.setup(Plain(objective), *bare)
        self.optimizers = dict(zip(self.configs, optimizers, strict=True))

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
        if not restore_state(self):
            self._checkpoint()
        with self.stopper.listening(alone=self.fabric.world_size == 1), console.bar("training", self.total, self.step) as bar:
            while self.step < self.total and not self._reason:
                self._epoch(self.step // self.per_epoch, bar)
        if self.step < self.total:
            console.note(f"training ended after epoch {self.step // self.per_epoch}: {self._reason}.")
            if self.fabric.is_global_zero:
                self.folder.write_status("running", ended=self._reason)

    @property
    def _reason(self) -> str:
        """Why no further epoch should begin; "" inside an epoch and where there is no reason."""
        return "" if self.step % self.per_epoch else self.selection.reason(self.step // self.per_epoch - 1)

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
            if self.stopper.stop:
                self.watch.check()  # who is told to stop cannot wait until losses have gathered
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

    def _seed(self, *parts: int | str) -> None:
        """Randomness depends on nothing but seed, step and rank: a resumed run needs no saved generator state."""
        seed = zlib.crc32("/".join(map(str, (self.seed, *parts, self.fabric.global_rank))).encode())
        torch.default_generator.manual_seed(seed)  # torch.manual_seed costs a millisecond where there is no accelerator
        if self.fabric.device.type == "cuda":
            torch.cuda.manual_seed_all(seed)

    def _step(self, batch: Batch, epoch: int) -> None:
        self._seed(self.step)
        if self.config.channels_last:
            batch = replace(batch, images=batch.images.contiguous(memory_format=torch.channels_last))
        parcel = Parcel(batch, Progress(self.step, self.total, epoch, self.config.epochs))
        for phase in self.objective.turns:
            optimizer, rate = self.optimizers[phase], learning_rate(self.configs[phase], self.step, self.total)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            output = self._gradients(parcel, phase, optimizer)
            if self.config.clip is not None:
                # Under 16-mixed infinite gradients are normal: the scaler then skips the step.
                self.fabric.clip_gradients(self.wrapped, optimizer, max_norm=self.config.clip, error_if_nonfinite=False)
            optimizer.step()
            self.meter.add(batch, output, whole=phase == self.objective.phases[0])
        self.step += 1
        self._average()

    def _gradients(self, parcel: Parcel, phase: str, optimizer: Any) -> Output:
        def run() -> Output:
            optimizer.zero_grad()
            output = Output(**self.wrapped(parcel, phase))
            self.watch.see(self.step, output)
            self.fabric.backward(sum(output.losses.values()))
            return output

        if not self.config.awp or parcel.progress.epoch < self.config.awp_warmup:
            return run()
        return worst_gradients(run, self.objective, phase, gamma=self.config.awp)

    def _average(self) -> None:
        if self.averaged is None:
            return
        if self.config.averaging == "ema" or self.step > self.config.swa_start * self.total:
            self.averaged.update_parameters(self.objective.student)

    def _finish_epoch(self, epoch: int, speed: float) -> None:
        begun = time.perf_counter()
        if self.averaged is not None:
            self._seed("statistics", self.step)
            now = Progress(self.step - 1, self.total, epoch, self.config.epochs)
            few = itertools.islice(self.loader.batches(epoch), min(STATISTICS, -(-self.per_epoch // 4)))
            measure_statistics(self.averaged, self.objective, few, progress=now, fabric=self.fabric)
        if self.fabric.world_size > 1:
            compare_ranks(self.fabric, self.objective, self.step, kept=self.model)
        rate = learning_rate(self.config, self.step - 1, self.total)
        record: dict[str, Any] = {"epoch": epoch, "step": self.step, "lr": rate, "images_per_second": round(speed, 1)}
        record["train"] = self.meter.mean(over=self.fabric)
        self.meter.clear()
        if self.validation is not None:
            record["validation"] = validate(self.model, self.validation, fabric=self.fabric, seed=self.seed, **self.watched)
        self.watch.check_weights(self.step, self.model, record.get("validation", {}))
        self.seconds += time.perf_counter() - begun
        record["seconds"] = round(self.seconds, 3)
        self._keep(epoch, record)
        if self.fabric.is_global_zero:
            self.teller.tell(epoch, record)  # which notes down what is wrong
            self.metrics_size = append_metrics(self.folder.path, record)
        for part in ("validation", "train"):
            self.fabric.log_dict({f"{part}/{k}": v for k, v in record.get(part, {}).items()}, step=self.step)
        self._checkpoint()

    def _keep(self, epoch: int, record: dict[str, Any]) -> None:
        """Write the last weights, and the best ones; note down a collapse."""
        # Of a head that is not trained, or of no head at all, accuracy says nothing: the last weights count.
        found = record.get("validation", {}) if self.objective.answers else {}
        better, alarm = self.selection.better(epoch, found), self.selection.alarm(epoch, found)
        record |= {"alarm": alarm} if alarm else {}
        if self.fabric.is_global_zero:
            for which in ("last", "best") if better else ("last",):
                save_weights(self.model, self.folder.path, which)
            where = {"step": self.step, "epoch": epoch, "epochs": self.config.epochs}
            keep_generators(self.objective.artefacts(), self.folder.path, **where)

    def _checkpoint(self) -> None:
        self._save()
        self.fabric.barrier()

    def _save(self) -> None:
        if self.fabric.is_global_zero:
            save_state(self)
            epoch, best = self.step // self.per_epoch, self.selection.best.get("epoch")
            facts = {"step": self.step, "steps": self.total, "epoch": epoch, "epochs": self.config.epochs, "best_epoch": best}
            self.folder.write_status("running", **facts, seconds=round(self.seconds, 3))
