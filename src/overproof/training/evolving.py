"""From generation to generation, with tests in between; finished work is never lost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from overproof import console
from overproof.data.order import generator_for
from overproof.errors import NonFiniteLossError
from overproof.evolution.population import Evolution
from overproof.folder import RunFolder
from overproof.training.checkpoints import append_metrics, load_checkpoint, save_checkpoint, truncate_metrics
from overproof.training.safety import Interrupted, Stopper

Found = tuple[dict[str, float], list[str]]
SHARES = "selected/"


class Evolver:
    """Runs an evolution.

    What is random in a generation comes from the seed and its number, so that a run that was stopped goes on with the same bits.

    Args:
        evolution: the population and its discriminator.
        reals: from the number of a generation to the real images of that and of all that follow.
        look: from the number of generations to figures of the champion's samples, and what is wrong with them.
        folder: where the run is kept.
        generations: in all.
        test_every: generations between looks; there is always one at the end.
        seed: of the run.
        deadline: `time.monotonic()` at which to stop with a checkpoint.
        checkpoint_seconds: between checkpoints beside those at the looks.
    """

    def __init__(
        self,
        evolution: Evolution,
        reals: Callable[[int], Iterator[Tensor]],
        look: Callable[[int], Found],
        *,
        folder: RunFolder,
        generations: int,
        test_every: int,
        seed: int,
        deadline: float | None = None,
        checkpoint_seconds: float = 60.0,
    ) -> None:
        self.evolution, self.reals, self.look, self.folder = evolution, reals, look, folder
        self.generations, self.test_every, self.seed = generations, test_every, seed
        self.deadline = math.inf if deadline is None else deadline
        self.checkpoint_seconds = checkpoint_seconds
        self.step, self.looks, self.seconds, self.metrics_size = 0, 0, 0.0, 0
        self.sums: dict[str, Any] = {}
        self.totals: dict[str, float] = {}
        self.warnings: list[str] = []
        self.stopper = Stopper()

    def run(self) -> None:
        """To the last generation, from the last checkpoint if there is one.

        Raises:
            NonFiniteLossError: a score or loss became NaN or infinite.
            Interrupted: Ctrl-C, SIGTERM or the deadline; a checkpoint has been written.
        """
        self._restore()
        reals, saved = self.reals(self.step), time.monotonic()
        with self.stopper.listening(alone=True), console.bar("evolving", self.generations, self.step) as bar:
            while self.step < self.generations:
                fitness = self._generation(next(reals))
                bar.update(self.step, fitness=fitness)
                stop = self.stopper.stop or time.monotonic() > self.deadline
                tested = self.step % self.test_every == 0 or self.step == self.generations
                if tested:
                    self._test()
                if tested or stop or time.monotonic() - saved > self.checkpoint_seconds:
                    self._save()
                    saved = time.monotonic()
                if stop and self.step < self.generations:
                    raise Interrupted(
                        f"Stopped at generation {self.step} of {self.generations}; `overproof resume {self.folder.path}` continues."
                    )

    @property
    def selected(self) -> dict[str, float]:
        """Shares of the survivors by origin, over all generations so far."""
        return {name.removeprefix(SHARES): total / max(self.step, 1) for name, total in self.totals.items()}

    def _generation(self, real: Tensor) -> float:
        begun = time.perf_counter()
        stream = generator_for("generation", self.seed, self.step)
        seed = int(torch.randint(1 << 31, (1,), generator=stream))
        torch.default_generator.manual_seed(
            seed
        )  # for dropout; torch.manual_seed costs a millisecond where there is no accelerator
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)
        found = self.evolution.generation(real, stream)
        for name, value in found.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            if name.startswith(SHARES):
                self.totals[name] = self.totals.get(name, 0.0) + value
        self.step += 1
        self.seconds += time.perf_counter() - begun
        return float(found["fitness"])

    def _test(self) -> None:
        since = (self.step - 1) % self.test_every + 1
        means = {name: float(total) / since for name, total in self.sums.items()}
        if not math.isfinite(means["discriminator"]):
            raise NonFiniteLossError(
                f"The discriminator's loss is {means['discriminator']} before generation {self.step}. The last good state is in "
                f"{self.folder.path / 'checkpoint.pt'}. Start again with a smaller evolution.discriminator_lr, or with a gradient penalty."
            )
        figures, concerns = self.look(self.step)
        record: dict[str, Any] = {"epoch": self.looks, "step": self.step, "train": {**means, **figures}}
        record["seconds"] = round(self.seconds, 3)
        for concern in concerns:
            if concern.partition(":")[0] not in {known.partition(":")[0] for known in self.warnings}:
                console.note(f"warning: {concern}")
                self.warnings.append(concern)
        if concerns:
            record["alarm"] = " ".join(concerns)
        self.metrics_size = append_metrics(self.folder.path, record)
        told = {"fitness": means["fitness"], **figures}
        console.note(f"  generation {self.step}/{self.generations}  " + "  ".join(f"{k} {v:.3g}" for k, v in told.items()))
        self.looks, self.sums = self.looks + 1, {}

    def _save(self) -> None:
        moved = (*self.evolution.critic.parameters(), *(member.weights for member in self.evolution.population))
        if not all(bool(values.isfinite().all()) for values in moved):
            return  # the last good state stays; the next test says so
        kept = ("step", "looks", "seconds", "metrics_size", "sums", "totals", "warnings")
        state = {name: getattr(self, name) for name in kept}
        save_checkpoint(self.folder.path, {**state, "evolution": self.evolution.state()})
        facts = {"step": self.step, "steps": self.generations, "seconds": round(self.seconds, 3)}
        self.folder.write_status("running", **facts)

    def _restore(self) -> None:
        state = load_checkpoint(self.folder.path)
        if state is None:
            self._save()
            return
        self.evolution.load(state.pop("evolution"))
        for name, value in state.items():
            setattr(self, name, value)
        truncate_metrics(self.folder.path, self.metrics_size)
