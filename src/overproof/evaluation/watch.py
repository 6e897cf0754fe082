"""Flat or saturated? What a model that was trained to have a small Fisher information has to show beside its robust figures.

The information also vanishes where the softmax is saturated, and then attacks on the cross-entropy are blind, not beaten. So it is told
with its median and with the largest probability, and attacks on the margin stand beside those on the cross-entropy.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from overproof.attacks.base import Attack
from overproof.attacks.pgd import PGD
from overproof.attacks.threats import L1, L2, Linf
from overproof.attacks.transfer import Transfer
from overproof.errors import NoGradientError, UsageError
from overproof.evaluation.findings import Findings
from overproof.losses.fisher import spectrum
from overproof.losses.fisher_eigen import MANY

MEASURES = ("trace", "lambda_max")
TWIN = "-margin"
MISLED, ELSEWHERE, FLAT = 0.05, 0.02, 0.1  # shares beyond which a difference is worth a warning


def with_margin(attacks: Mapping[str, Attack]) -> dict[str, Attack]:
    """The attacks, each whose loss is the cross-entropy followed by the same on the margin.

    Under a ball where no loss can be chosen (FGSM and its kind) PGD-20 on the margin is added.
    """
    found: dict[str, Attack] = {}
    for name, attack in attacks.items():
        found[name] = attack
        if getattr(attack, "loss", None) == "ce" and is_dataclass(attack) and f"{name}{TWIN}" not in attacks:
            found[f"{name}{TWIN}"] = replace(attack, loss="margin")
    blind = [attack.threat for attack in attacks.values() if getattr(attack, "loss", None) is None]
    balls = [threat for threat in blind if isinstance(threat, Linf | L2 | L1) and 0 < threat.eps < np.inf]
    climbed = [a.threat for a in found.values() if getattr(a, "loss", None) == "margin"]
    for ball in balls:
        if ball not in climbed:
            climbed.append(ball)
            names = (f"pgd{TWIN}{'' if number < 2 else f'-{number}'}" for number in itertools.count(1))
            free = next(name for name in names if name not in found)
            found[free] = PGD(norm=type(ball).__name__, eps=ball.eps, steps=20, loss="margin")  # type: ignore[arg-type]
    return found


def flatness(model: nn.Module, images: Tensor, classes: int) -> dict[str, Tensor]:
    """Trace and largest eigenvalue of the Fisher information at each image, by column; {} where they cannot be had.

    Args:
        model: images -> logits (N, K), in eval mode.
        images: (N, C, H, W) in [0, 1].
        classes: K; beyond 200 so many backward passes are not worth it.
    """
    if classes > MANY:
        return {}
    try:
        values = spectrum(model, images)
    except (NoGradientError, UsageError):
        return {}
    return {"fisher/trace": values.sum(dim=1), "fisher/lambda_max": values[:, 0]}


def watched(
    found: Findings, attacks: Mapping[str, Attack], holds: Mapping[str, np.ndarray], classes: int
) -> tuple[dict[str, Any] | None, list[str]]:
    """What was found, as written to JSON, and what a reader has to be warned of; None where nobody asked.

    Args:
        found: a row per sample.
        attacks: by name.
        holds: by attack, which images are right untouched and attacked.
        classes: K.
    """
    if "fisher/trace" not in found.kinds:
        return None, []
    robust = {name: float(mask.mean()) for name, mask in holds.items()}
    pairs = {name: (share, robust[f"{name}{TWIN}"]) for name, share in robust.items() if f"{name}{TWIN}" in robust}
    crafted = {name for name, attack in attacks.items() if isinstance(attack, Transfer)}
    facts: dict[str, Any] = {
        "samples": int(np.isfinite(found["fisher/trace"]).sum()),
        **{name: _middle(found[f"fisher/{name}"]) for name in MEASURES},
        "max_probability": _middle(found["confidence"]),
        "pairs": {name: {"ce": ce, "margin": margin} for name, (ce, margin) in pairs.items()},
        "transfer": {
            name: {"robust": robust[name], "own": _strongest(name, attacks, robust, crafted)} for name in sorted(crafted)
        },
    }
    return facts, _worries(facts, classes, found.count)


def _strongest(transfer: str, attacks: Mapping[str, Attack], robust: Mapping[str, float], crafted: set[str]) -> float | None:
    """What the strongest attack on the model itself leaves, under the same threat."""
    own = [robust[name] for name in attacks if name not in crafted and attacks[name].threat == attacks[transfer].threat]
    return min(own, default=None)


def _middle(values: np.ndarray) -> dict[str, float] | None:
    kept = values[np.isfinite(values)].astype(float)
    return {"mean": float(kept.mean()), "median": float(np.median(kept))} if len(kept) else None


def _worries(facts: dict[str, Any], classes: int, count: int) -> list[str]:
    texts, chance = [], 1 / classes
    if 0 < facts["samples"] < count:
        texts.append(
            f"{count - facts['samples']} of {count} images have no finite Fisher information: the gradient breaks down there, which is no "
            "flatness. The figures are those of the others."
        )
    if facts["trace"] is None:
        texts.append(
            f"The Fisher information was not measured: no gradient reaches the images, or the batch is normalised as a whole, or {classes} "
            f"classes are too many (over {MANY}). overproof.fisher.trace with an estimator may serve."
        )
    sure = facts["max_probability"]["mean"]
    if sure - chance <= FLAT * (1 - chance):
        texts.append(
            f"The model answers all images almost alike (mean largest probability {sure:.2f}, chance {chance:.2f}). That its answer does "
            "not move is no robustness; if a penalty did this, lower its weight (method.mu)."
        )
    for name, pair in facts["pairs"].items():
        if pair["ce"] - pair["margin"] > MISLED:
            texts.append(
                f"{name} leaves {pair['ce']:.1%} with cross-entropy but {pair['margin']:.1%} with the margin: the softmax is saturated and "
                "hides the gradient. Believe the smaller figure, or a stronger attack (autoattack)."
            )
    for name, both in facts["transfer"].items():
        if both["own"] is not None and both["own"] - both["robust"] > ELSEWHERE:
            texts.append(
                f"{name} leaves {both['robust']:.1%}, less than any attack on the model itself ({both['own']:.1%}): its own gradients "
                "mislead, and no figure here bounds its robustness."
            )
    return texts
