"""A row per sample: images pass the attacks, and every verdict is written down."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from overproof.attacks.base import classes_of, logits_of
from overproof.attacks.randomness import Streams
from overproof.errors import DataError, NoGradientError
from overproof.evaluation.counting import Passes
from overproof.evaluation.findings import GALLERY, Findings
from overproof.evaluation.inputs import seems_softmax
from overproof.evaluation.partial import Partial
from overproof.evaluation.pipeline import Chunk, Lane
from overproof.evaluation.plan import CURVE, Plan, Stage, columns_of
from overproof.evaluation.verdicts import Verdict, verdict
from overproof.evaluation.watch import flatness
from overproof.folding import folded
from overproof.networks import full_precision, in_mode
from overproof.types import Batch


class Changed(Exception):
    """The images are not those that the unfinished evaluation began with."""


class Judge:
    """Takes batches in the order of the data, and fills a record.

    What the record knows already is not computed again: its verdicts are replayed, so that every batch of every stage is
    composed as it would have been without the interruption.

    Args:
        model: images in [0, 1] -> logits, in eval mode.
        plan: the attacks.
        partial: where the record is kept meanwhile.
        teacher: for agreement.
        batch_size: images per batch of a stage.
        keep: how many images that are right untouched are kept for further checks.

    Attributes:
        found: the record.
        kept: these images with their labels, by row of the data.
        image: the first image (1, C, H, W), None before there was any.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        partial: Partial,
        *,
        teacher: nn.Module | None = None,
        batch_size: int = 256,
        keep: int = 0,
    ) -> None:
        self.model, self.plan, self.partial = model, plan, partial
        self.teacher, self.batch_size, self.keep = teacher, batch_size, keep
        self.columns = columns_of(plan, teacher is not None)
        self._quick: nn.Module | None = None
        self.begin(Findings(self.columns))

    def begin(self, found: Findings) -> None:
        """Start at the first image, with a record that is empty or comes from an earlier call."""
        self.found, self.known, self.seen = found, found.count, 0
        self.lanes = {name: Lane(stages, self.batch_size, self._stage) for name, stages in self.plan.lanes.items()}
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.image: Tensor | None = None
        self._started = time.perf_counter() - found.facts["seconds"]

    def see(self, rows: Tensor, batch: Batch) -> None:
        """Judge one batch, whose images are numbers `rows` of the data; they wait until an attack has a full batch.

        Raises:
            Changed: an image is not the one that was recorded before.
            DataError: a label that the model does not know.
        """
        images, labels = batch.images.float(), batch.labels
        self.image = images[:1] if self.image is None else self.image
        places = np.arange(self.seen, self.seen + len(rows))
        pixels = images.flatten(1).double().sum(dim=1).cpu().numpy()
        with full_precision(images.device):
            if places[-1] < self.known:
                self._compare(places, batch, pixels)
            else:
                self._clean(places, rows, batch, pixels)
            self.seen += len(rows)
            right = torch.from_numpy(self.found["prediction"][places] == self.found["label"][places])
            self._keep(rows[right], images[right.to(images.device)], labels[right.to(images.device)])
            chunk = Chunk(images, labels, batch.index, torch.from_numpy(places).to(images.device))
            for lane in self.lanes.values():
                lane.feed(chunk.take(right.to(images.device)))
        self._due()

    def finish(self, after: Callable[[], None]) -> None:
        """Let the attacks have what is left; `after` is called behind each.

        Raises:
            Changed: there were more images before.
        """
        if self.seen < self.known:
            raise Changed

        def stage_done() -> None:
            self.write()
            after()

        for lane in self.lanes.values():
            lane.flush(stage_done)
        self.write()

    def _due(self) -> None:
        if self.partial.due:
            self.write()

    def write(self) -> None:
        """Keep what is known by now."""
        self.found.facts["seconds"] = time.perf_counter() - self._started
        self.partial.write(self.found)

    @property
    def pending(self) -> int:
        """Images that wait for an attack."""
        return max((lane.waiting for lane in self.lanes.values()), default=0)

    def _compare(self, places: np.ndarray, batch: Batch, pixels: np.ndarray) -> None:
        found = self.found
        same = (found["index"][places] == batch.index.cpu().numpy()) & (found["label"][places] == batch.labels.cpu().numpy())
        if not (same & np.isclose(found["_pixels"][places], pixels, rtol=1e-9, atol=1e-6)).all():
            raise Changed

    def _clean(self, places: np.ndarray, rows: Tensor, batch: Batch, pixels: np.ndarray) -> None:
        images, labels, found = batch.images.float(), batch.labels, self.found
        self._dice(batch.index, "clean")
        with torch.no_grad():
            logits = logits_of(self.model, images).float()
        if int(labels.max()) >= logits.shape[1]:
            raise DataError(
                f"Label {int(labels.max())} does not exist for a model with {logits.shape[1]} classes (0 to "
                f"{logits.shape[1] - 1}). Evaluate on the data the model was made for, or rebuild it with more classes."
            )
        predicted, confidence = classes_of(logits), logits.softmax(dim=1).amax(dim=1).nan_to_num(0)
        columns = {"index": batch.index, "label": labels, "prediction": predicted, "confidence": confidence, "_row": rows}
        columns |= {"_nll": cross_entropy(logits, labels, reduction="none")}
        columns |= {f"{name}/prediction": predicted for name in self.plan.attacks}
        columns |= flatness(self._copy(images), images, logits.shape[1]) if self.plan.fisher else {}
        if self.teacher is not None:
            with in_mode(self.teacher), torch.no_grad():
                theirs = logits_of(self.teacher, images)
            comparable = theirs.shape[1] == logits.shape[1]  # of other classes no two answers agree
            columns["teacher_prediction"] = theirs.argmax(dim=1) if comparable else torch.full_like(predicted, -1)
        arrays = {name: values.cpu().numpy() for name, values in columns.items()} | {"_pixels": pixels}
        found.extend(int(places[-1]) + 1 - found.count)
        for name, values in arrays.items():
            found[name][places] = values
        found.facts["classes"] = logits.shape[1]
        found.facts["softmax"] = float(bool(found.facts["softmax"]) and seems_softmax(logits))
        self.partial.changed()

    def _keep(self, rows: Tensor, images: Tensor, labels: Tensor) -> None:
        room = max(self.keep - len(self.kept), 0)
        for row, image, label in zip(rows[:room].tolist(), images, labels, strict=False):
            self.kept[row] = (image.clone(), label)

    def _stage(self, stage: Stage, chunk: Chunk) -> Tensor:
        """Let one member of an attack work; the mask of images that its successor gets."""
        places = chunk.rows.cpu().numpy()
        todo = self.found[f"_passed/{stage.lane}"][places] <= stage.number
        if todo.any():
            self._attack(stage, chunk if todo.all() else chunk.take(torch.from_numpy(todo).to(chunk.rows.device)))
            self._due()
        by = self.found[f"_by/{stage.lane}"][places]
        # A member that looks for the smallest change may find a smaller one where another has been successful.
        on = (by < 0) | (by > stage.number) | self.plan.unbounded(stage.lane)
        return torch.from_numpy(on).to(chunk.rows.device)

    def _attack(self, stage: Stage, chunk: Chunk) -> None:
        begin, passes = time.perf_counter(), Passes()
        through = self._through(stage, chunk.images)  # first: it asks the model, once per call of the evaluator
        streams = self._dice(chunk.index, *stage.key)
        result = None
        try:
            result = verdict(stage.attack, self.model, chunk.images, chunk.labels, streams, through=through, passes=passes)
            broken = (result.predictions != chunk.labels).cpu().numpy()
        except NoGradientError:
            broken = np.zeros(len(chunk), bool)
        amounts = {"attacked": len(chunk), "broken": int(broken.sum()), "no_gradient": int(result is None)}
        amounts |= {"invalid": 0 if result is None else int(result.invalid.sum())}
        amounts |= {"forward": passes.forward, "backward": passes.backward}
        self._record(stage, chunk, result, broken)
        self.found.tally(stage.lane, stage.member, seconds=time.perf_counter() - begin, **amounts)
        self.partial.changed()

    def _dice(self, index: Tensor, *purpose: str) -> Streams:
        """The randomness of images for a purpose; a model that rolls dice itself rolls the same for the same batch, not for the same image."""
        return Streams.named(index, self.plan.seed, *purpose).seed_global()

    def _through(self, stage: Stage, images: Tensor) -> nn.Module:
        """The model, or for attacks that need nothing but logits its cheaper copy."""
        return self._copy(images) if getattr(stage.attack, "logits_only", False) else self.model

    def _copy(self, images: Tensor) -> nn.Module:
        self._quick = folded(self.model, images) if self._quick is None else self._quick
        return self._quick

    def _record(self, stage: Stage, chunk: Chunk, result: Verdict | None, broken: np.ndarray) -> None:
        lane, places = stage.lane, chunk.rows.cpu().numpy()
        by, found = self.found[f"_by/{lane}"], self.found
        if result is not None and lane != CURVE:
            predictions, sizes = result.predictions.cpu().numpy(), result.sizes.cpu().numpy().astype(np.float32)
            kept = np.ones_like(broken)
            if self.plan.unbounded(lane):
                known = np.where(by[places] >= 0, found[f"{lane}/size"][places], math.inf)
                kept = broken = broken & (sizes < known)
                found[f"{lane}/size"][places] = known
            found[f"{lane}/prediction"][places[kept]] = predictions[kept]
            found[f"{lane}/size"][places[kept]] = sizes[kept]
            if result.targets is not None:
                found[f"{lane}/target"][places] = result.targets.cpu().numpy()
            if lane == next(iter(self.plan.attacks)):
                self._pictures(stage, chunk, result, broken)
        elif self.plan.unbounded(lane):
            found[f"{lane}/size"][places[by[places] < 0]] = math.inf
        by[places[broken]] = stage.number
        found[f"_passed/{lane}"][places] = stage.number + 1

    def _pictures(self, stage: Stage, chunk: Chunk, result: Verdict, broken: np.ndarray) -> None:
        last = stage.number + 1 == len(self.plan.lanes[stage.lane])
        still = ~broken & (self.found[f"_by/{stage.lane}"][chunk.rows.cpu().numpy()] < 0) & last
        for success, candidates in ((True, broken), (False, still)):
            for place in np.flatnonzero(candidates)[:GALLERY].tolist():
                shown = {
                    "clean": (chunk.images[place] * 255).round().byte(),
                    "adversarial": result.images[place],
                    "label": chunk.labels[place],
                    "clean_prediction": chunk.labels[place],
                    "adversarial_prediction": result.predictions[place],
                }
                facts = {name: value.cpu().numpy() for name, value in shown.items()}
                self.found.picture(int(chunk.rows[place]), **facts, broken=success, attack=stage.lane)
