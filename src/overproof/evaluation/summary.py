"""From a row per sample to figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from overproof.evaluation.findings import Findings
from overproof.evaluation.inputs import SOFTMAX, TWICE, normalised_twice
from overproof.evaluation.metrics import (
    Estimate,
    calibration_error,
    latency,
    multiply_adds,
    per_class,
    quantile,
    surviving,
    wilson,
)
from overproof.evaluation.plan import CURVE, Plan
from overproof.evaluation.records import Evaluation
from overproof.evaluation.watch import watched
from overproof.models import parameters_of

WIDE = 50  # classes beyond which a matrix over them goes into the samples file
RADII = 21
WORK = ("forward", "backward")


def conclude(model: nn.Module, found: Findings, plan: Plan, classes: tuple[str, ...], image: Tensor) -> Evaluation:
    """The evaluation that follows from what was found.

    Args:
        model: for its cost.
        found: a row per sample.
        plan: what was asked.
        classes: their names.
        image: one image (1, C, H, W), for the cost of a forward pass.
    """
    figures = _Figures(found, plan, len(classes))
    twice = normalised_twice(model, image)
    flat, worries = watched(found, plan.attacks, figures.holds, len(classes))
    summary = {
        **figures.accuracies(),
        "passes": figures.passes(),
        "classes": list(classes),
        "fisher": flat,
        "ece": calibration_error(found["confidence"], figures.right),
        "nll": None if np.isnan(found["_nll"]).any() else float(found["_nll"].mean(dtype=np.float64)),
        "parameters": parameters_of(model),
        "macs": multiply_adds(model, image),
        "latency_ms": latency(model, image),
        "device": str(image.device),
        "seed": plan.seed,
        "seconds": found.facts["seconds"],
        "warnings": figures.warnings() + worries + ([TWICE.format(name=twice)] if twice else []),
    }
    return Evaluation(summary, figures.samples(), found.gallery)


def running(found: Findings, plan: Plan, seen: int) -> dict[str, Estimate]:
    """Accuracies while the first `seen` images are under way, by attack."""
    clean = (seen, int((found["prediction"][:seen] != found["label"][:seen]).sum()))
    members = {name: found.counts[name].values() for name in plan.attacks if name in found.counts}
    stages = {name: [(int(c["attacked"]), int(c["broken"])) for c in counts] for name, counts in members.items()}
    return {"clean": surviving([clean])} | {name: surviving([clean, *met]) for name, met in stages.items()}


class _Figures:
    def __init__(self, found: Findings, plan: Plan, classes: int) -> None:
        self.found, self.plan, self.classes = found, plan, classes
        self.right = found["prediction"] == found["label"]
        self.holds = {name: self.right & (found[f"_by/{name}"] < 0) for name in plan.attacks}
        self.arrays: dict[str, np.ndarray] = {}  # too wide for the summary

    def accuracies(self) -> dict[str, Any]:
        found, bounded = self.found, self.plan.bounded
        # An attack without a radius breaks nearly everything: it has a distribution of sizes, and no part in a worst case.
        robust = np.logical_and.reduce([self.holds[name] for name in bounded]) if bounded else None
        theirs = found["teacher_prediction"] if "teacher_prediction" in found.kinds else None
        agrees = None if theirs is None or (theirs < 0).all() else found["prediction"] == theirs
        return {
            "samples": found.count,
            "clean": float(self.right.mean()),
            "clean_interval": wilson(int(self.right.sum()), found.count),
            "attacks": {name: self.facts(name) for name in self.plan.attacks},
            "worst_case": None if robust is None else float(robust.mean()),
            "worst_case_interval": None if robust is None else wilson(int(robust.sum()), found.count),
            "curve": self.curve(),
            "agreement": None if agrees is None else {"clean": float(agrees.mean())},
            "per_class": {
                "count": np.bincount(found["label"], minlength=self.classes).tolist(),
                "clean": per_class(found["label"], self.right, self.classes),
                "robust": None if robust is None else per_class(found["label"], robust, self.classes),
            },
        }

    def facts(self, name: str) -> dict[str, Any]:
        attack, found, holds = self.plan.attacks[name], self.found, self.holds[name]
        broken, attacked = self.right & ~holds, int(self.right.sum())
        changed = found[f"{name}/prediction"] != found["prediction"]
        sizes, eps = found[f"{name}/size"], attack.threat.eps
        return {
            "attack": repr(attack),
            "threat": type(attack.threat).__name__,
            "eps": None if math.isinf(eps) else eps,
            "robust": float(holds.mean()),
            "interval": wilson(int(holds.sum()), found.count),
            "success_rate": float(broken.sum() / max(attacked, 1)),
            "success_denominator": attacked,
            "fooling_ratio": float(changed.mean()),
            "fooling_denominator": found.count,
            "mean_size": float(sizes[broken].mean()) if broken.any() else None,
            "sizes": self._sizes(name) if self.plan.unbounded(name) else None,
            "invalid": int(found.total(name, "invalid")),
            "no_gradient": found.total(name, "no_gradient") > 0,
            "seconds": found.total(name, "seconds"),
            "passes": self._work(name, attacked),
            **self._members(name),
            **self._matrices(name, attacked=self.right, broken=broken),
        }

    def _sizes(self, name: str) -> dict[str, Any]:
        sizes = self.found[f"{name}/size"][self.right].astype(float)
        if not len(sizes):
            return {**dict.fromkeys(("median", "q10", "q25", "q75", "q90", "mean")), "found": 0}
        shares = {"median": 0.5, "q10": 0.1, "q25": 0.25, "q75": 0.75, "q90": 0.9}
        values = {key: quantile(sizes, share) for key, share in shares.items()} | {"mean": float(sizes.mean())}
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        return {**finite, "found": int(np.isfinite(sizes).sum())}

    def _members(self, name: str) -> dict[str, Any]:
        stages = self.plan.lanes[name]
        if len(stages) == 1 and not stages[0].member:
            return {}
        by, counts = self.found[f"_by/{name}"], self.found.counts.get(name, {})
        kept = ("attacked", *WORK, "seconds")
        return {
            "members": {
                stage.member: {
                    "broken": int((by == stage.number).sum()),
                    **{key: counts.get(stage.member, {}).get(key, 0) for key in kept},
                    "no_gradient": counts.get(stage.member, {}).get("no_gradient", 0) > 0,
                }
                for stage in stages
            }
        }

    def _matrices(self, name: str, *, attacked: np.ndarray, broken: np.ndarray) -> dict[str, Any]:
        """Which class became which; wanted and reached, if the attack had targets."""
        labels, became = self.found["label"], self.found[f"{name}/prediction"]
        if f"{name}/target" in self.found.kinds:
            targets = self.found[f"{name}/target"]
            tried = attacked & (targets >= 0)
            reached = tried & (became == targets)
            matrices = {"attempts": self._matrix(labels[tried], targets[tried])}
            matrices |= {"successes": self._matrix(labels[reached], targets[reached])}
            return self._placed(name, "targeted", matrices)
        return self._placed(name, "confusion", {"": self._matrix(labels[broken], became[broken])})

    def _matrix(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        width = max(self.classes, int(self.found.facts["classes"]))
        known = columns >= 0
        return np.bincount(rows[known] * width + columns[known], minlength=width * width).reshape(width, width)

    def _placed(self, name: str, kind: str, matrices: Mapping[str, np.ndarray]) -> dict[str, Any]:
        if len(next(iter(matrices.values()))) > WIDE:
            self.arrays |= {f"{name}/{kind}" + (f"/{part}" if part else ""): m for part, m in matrices.items()}
            return {}
        listed = {part: matrix.tolist() for part, matrix in matrices.items()}
        return {kind: listed.get("", listed)}

    def _work(self, lane: str, images: int) -> dict[str, float]:
        counts = {key: int(self.found.total(lane, key)) for key in WORK}
        return counts | {f"{key}_per_image": value / max(images, 1) for key, value in counts.items()}

    def passes(self) -> dict[str, float]:
        """Forward and backward passes of all attacks and of the curve together, and per image that was right untouched."""
        totals = {key: int(sum(self.found.total(lane, key) for lane in self.plan.lanes)) for key in WORK}
        return totals | {f"{key}_per_image": value / max(int(self.right.sum()), 1) for key, value in totals.items()}

    def curve(self) -> dict[str, Any] | None:
        """Robust accuracy over the radius; of a minimum-norm attack it follows from the sizes."""
        name = self.plan.of_curve
        if name is None:
            return None
        if self.plan.unbounded(name):
            sizes = self.found[f"{name}/size"].astype(float)
            radii = self.plan.curve or self._radii(sizes[self.right & np.isfinite(sizes)])
            robust = [float((self.right & ~((sizes <= eps) & ~self.holds[name])).mean()) for eps in radii]
        else:
            radii, robust = self.plan.curve, [self._robust_at(eps) for eps in self.plan.curve]
        threat = type(self.plan.attacks[name].threat).__name__
        return {"attack": name, "threat": threat, "eps": list(radii), "robust": robust}

    def _radii(self, sizes: np.ndarray) -> tuple[float, ...]:
        """From 0 to the size within which 95 % of the images that were broken lie."""
        return tuple(np.linspace(0, quantile(sizes, 0.95), RADII).tolist()) if len(sizes) else (0.0,)

    def _robust_at(self, eps: float) -> float:
        if CURVE not in self.plan.lanes:
            return float(self.right.mean())
        by, radii = self.found[f"_by/{CURVE}"], np.array([stage.eps for stage in self.plan.lanes[CURVE]])
        return float((self.right & ((by < 0) | (radii[by] > eps))).mean())

    def samples(self) -> dict[str, np.ndarray]:
        """The record as it is kept."""
        kept = {name: self.found[name].copy() for name in self.found.kinds if not name.startswith("_")}
        kept["nll"] = self.found["_nll"].copy()
        for name in self.plan.attacks:
            kept[f"{name}/robust"] = self.holds[name]
            if "" not in {stage.member for stage in self.plan.lanes[name]}:
                kept[f"{name}/by"] = self.found[f"_by/{name}"].copy()
        return kept | self.arrays

    def warnings(self) -> list[str]:
        """What the reader has to know, in plain words."""
        texts = [SOFTMAX] if self.found.facts["softmax"] else []
        if mute := int((self.found["prediction"] < 0).sum()):
            texts.append(
                f"The model answers {mute} of {self.found.count} untouched images with NaN. They count as wrong: look for a division by zero, a "
                "logarithm of zero, or numbers too large for its precision."
            )
        for name in self.plan.attacks:
            lanes = (name, CURVE) if CURVE in self.plan.lanes and name == self.plan.of_curve else (name,)
            invalid = int(sum(self.found.total(lane, "invalid") for lane in lanes))
            if invalid:
                texts.append(
                    f"{name}: {invalid} of its images left [0, 1] or the allowed distance; the untouched images were counted instead."
                )
            blind = {member for lane in lanes for member, c in self.found.counts.get(lane, {}).items() if c.get("no_gradient")}
            if blind:
                who = f"{name} ({', '.join(sorted(blind - {''}))})" if blind - {""} else name
                texts.append(
                    f"{who}: no gradient reaches the images through this model, so the attack could do nothing and its images were "
                    "counted as unbroken. This figure says nothing about robustness: use an attack without gradients (square), "
                    "or put a BPDA wrapper around the part that rounds or detaches."
                )
        return texts
