"""A row per sample: what the evaluator sees, and what it concludes."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from overproof.attacks.base import Attack, logits_of
from overproof.errors import DataError
from overproof.evaluation.curves import with_radius
from overproof.evaluation.metrics import calibration_error, latency, multiply_adds, per_class
from overproof.evaluation.records import Evaluation
from overproof.evaluation.verdicts import seeded, verdict
from overproof.models import parameters_of
from overproof.networks import full_precision, in_mode
from overproof.types import Batch

GALLERY = 8


class Judge:
    """Collects a row per sample, batch by batch."""

    def __init__(
        self, model: nn.Module, attacks: dict[str, Attack], curve: tuple[float, ...], teacher: nn.Module | None, seed: int
    ) -> None:
        self.model, self.attacks, self.curve, self.teacher, self.seed = model, attacks, curve, teacher, seed
        self.rows: dict[str, list[Tensor]] = {}
        self.logits: list[Tensor] = []
        self.pictures: list[dict[str, Any]] = []
        self.seconds = dict.fromkeys(attacks, 0.0)
        self.invalid = dict.fromkeys(attacks, 0)
        self.seen = self.classes = 0
        self.image: Tensor | None = None
        self._hits: dict[str, int] = {}

    def see(self, batch: Batch, number: int) -> None:
        """Judge one batch."""
        images, labels = batch.images.float(), batch.labels
        with full_precision(images.device):
            with torch.no_grad():
                logits = logits_of(self.model, images).float()
            if int(labels.max()) >= logits.shape[1]:
                raise DataError(
                    f"Label {int(labels.max())} does not exist for a model with {logits.shape[1]} classes (0 to "
                    f"{logits.shape[1] - 1}). Evaluate on the data the model was made for, or rebuild it with more classes."
                )
            self._clean(batch, logits)
            for name, attack in self.attacks.items():
                self._attack(name, attack, batch, logits.argmax(dim=1), number)
            self._sweep(images, labels, logits.argmax(dim=1), number)
        self.seen += len(labels)
        self.classes = logits.shape[1]
        self.image = images[:1]

    def so_far(self) -> dict[str, float]:
        """Running accuracies for the progress bar."""
        return {name: hits / self.seen for name, hits in self._hits.items()}

    def _put(self, **columns: Tensor) -> None:
        for name, values in columns.items():
            self.rows.setdefault(name, []).append(values.cpu())

    def _count(self, name: str, hits: Tensor) -> None:
        self._hits[name] = self._hits.get(name, 0) + int(hits.sum())

    def _clean(self, batch: Batch, logits: Tensor) -> None:
        confidence, predicted = logits.softmax(dim=1).max(dim=1)
        self._put(index=batch.index, label=batch.labels, prediction=predicted, confidence=confidence)
        self._count("clean", predicted == batch.labels)
        self.logits.append(logits.cpu())
        if self.teacher is not None:
            with in_mode(self.teacher), torch.no_grad():
                self._put(teacher_prediction=logits_of(self.teacher, batch.images.float()).argmax(dim=1))

    def _attack(self, name: str, attack: Attack, batch: Batch, predicted: Tensor, number: int) -> None:
        begin = time.perf_counter()
        images, labels = batch.images.float(), batch.labels
        right = predicted == labels
        outcome, sizes = predicted.clone(), torch.zeros(len(labels), device=images.device)
        if bool(right.any()):
            generator = seeded(images.device, self.seed, name, number)
            result = verdict(attack, self.model, images[right], labels[right], generator)
            outcome[right], sizes[right] = result.predictions, result.sizes
            self.invalid[name] += int(result.invalid.sum())
            self._picture(name, images[right], labels[right], result.images, result.predictions)
        robust = right & (outcome == labels)
        self._put(**{f"{name}/prediction": outcome, f"{name}/size": sizes, f"{name}/robust": robust})
        self._count(name, robust)
        self.seconds[name] += time.perf_counter() - begin

    def _picture(self, name: str, clean: Tensor, labels: Tensor, adversarial: Tensor, predicted: Tensor) -> None:
        if name != next(iter(self.attacks)) or len(self.pictures) >= GALLERY:
            return
        broken = (predicted != labels).nonzero().flatten().tolist()
        for row in (broken or list(range(len(labels))))[: GALLERY - len(self.pictures)]:
            facts = {"label": labels[row], "clean_prediction": labels[row], "adversarial_prediction": predicted[row]}
            pixels = {"clean": (clean[row] * 255).round().byte(), "adversarial": adversarial[row]}
            self.pictures.append({k: v.cpu().numpy() for k, v in {**facts, **pixels}.items()} | {"attack": name})

    def _sweep(self, images: Tensor, labels: Tensor, predicted: Tensor, number: int) -> None:
        if not self.curve:
            return
        name, attack = next(iter(self.attacks.items()))
        holds = predicted == labels
        for eps in self.curve:
            if eps > 0 and bool(holds.any()):
                generator = seeded(images.device, self.seed, name, eps, number)
                result = verdict(with_radius(attack, eps), self.model, images[holds], labels[holds], generator)
                holds = holds.clone()
                holds[holds.nonzero().flatten()[result.predictions != labels[holds]]] = False
            self._put(**{f"curve/{eps:.6g}": holds})

    def conclude(self, classes: tuple[str, ...], seconds: float) -> Evaluation:
        """Summary over all batches."""
        rows = {name: torch.cat(parts).numpy() for name, parts in self.rows.items()}
        logits, labels = torch.cat(self.logits), torch.from_numpy(rows["label"])
        right = rows["prediction"] == rows["label"]
        robust = np.logical_and.reduce([rows[f"{n}/robust"] for n in self.attacks]) if self.attacks else None
        assert self.image is not None
        summary = {
            **self._accuracies(rows, right, robust, len(classes)),
            "classes": list(classes),
            "ece": calibration_error(logits, labels),
            "nll": float(nn.functional.cross_entropy(logits, labels)),
            "parameters": parameters_of(self.model),
            "macs": multiply_adds(self.model, self.image),
            "latency_ms": latency(self.model, self.image),
            "device": str(self.image.device),
            "seed": self.seed,
            "seconds": seconds,
            "warnings": self._warnings(logits),
        }
        return Evaluation(summary, {k: v for k, v in rows.items() if not k.startswith("curve/")}, self._gallery())

    def _accuracies(
        self, rows: dict[str, np.ndarray], right: np.ndarray, robust: np.ndarray | None, classes: int
    ) -> dict[str, Any]:
        return {
            "samples": self.seen,
            "clean": float(right.mean()),
            "attacks": {name: self._facts(name, rows, right) for name in self.attacks},
            "worst_case": None if robust is None else float(robust.mean()),
            "curve": self._curve(rows),
            "agreement": {"clean": float((rows["prediction"] == rows["teacher_prediction"]).mean())} if self.teacher else None,
            "per_class": {
                "count": np.bincount(rows["label"], minlength=classes).tolist(),
                "clean": per_class(rows["label"], right, classes),
                "robust": None if robust is None else per_class(rows["label"], robust, classes),
            },
        }

    def _facts(self, name: str, rows: dict[str, np.ndarray], right: np.ndarray) -> dict[str, Any]:
        attack, robust, broken = self.attacks[name], rows[f"{name}/robust"], right & ~rows[f"{name}/robust"]
        sizes = rows[f"{name}/size"][broken]
        return {
            "attack": repr(attack),
            "threat": type(attack.threat).__name__,
            "eps": attack.threat.eps,
            "robust": float(robust.mean()),
            "success_rate": float(broken.sum() / max(right.sum(), 1)),
            "success_denominator": int(right.sum()),
            "mean_size": float(sizes.mean()) if len(sizes) else None,
            "invalid": self.invalid[name],
            "seconds": self.seconds[name],
        }

    def _curve(self, rows: dict[str, np.ndarray]) -> dict[str, Any] | None:
        if not self.curve:
            return None
        name, attack = next(iter(self.attacks.items()))
        robust = [float(rows[f"curve/{eps:.6g}"].mean()) for eps in self.curve]
        return {"attack": name, "threat": type(attack.threat).__name__, "eps": list(self.curve), "robust": robust}

    def _gallery(self) -> dict[str, np.ndarray]:
        if not self.pictures:
            return {}
        return {key: np.stack([np.asarray(picture[key]) for picture in self.pictures]) for key in self.pictures[0]}

    def _warnings(self, logits: Tensor) -> list[str]:
        found = [
            f"{name}: {count} of its images left [0, 1] or the allowed distance; the untouched images were counted instead."
            for name, count in self.invalid.items()
            if count
        ]
        if bool((logits >= 0).all()) and torch.allclose(logits.sum(dim=1), torch.ones(len(logits)), atol=1e-4):
            found.append(
                "The model's outputs are non-negative and sum to 1: it seems to end in a softmax. Attacks and distillation "
                "need logits; remove the softmax, or robust accuracy will look better than it is."
            )
        return found
