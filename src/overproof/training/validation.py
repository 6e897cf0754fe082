"""Accuracy on held-out images while training runs, shared between the processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from overproof import console
from overproof.attacks.base import Attack
from overproof.attacks.pgd import PGD
from overproof.attacks.randomness import Streams
from overproof.config import TrainConfig
from overproof.errors import UsageError
from overproof.evaluation.verdicts import verdict
from overproof.losses.divergences import cross_entropy
from overproof.methods.objective import Objective
from overproof.methods.robust_objective import RobustObjective
from overproof.networks import full_precision, in_mode
from overproof.types import Batch


def watching(objective: Objective, config: TrainConfig, *, validated: bool) -> dict[str, Any]:
    """What validation attacks with, and how many images: arguments of `validate`.

    `attack` is PGD under the method's own threat, or of radius `validation_eps` for any method; `one_step` the step of a method that
    takes a single one.

    Raises:
        UsageError: the best weights are to be chosen by robust accuracy, and there is nothing to attack with.
    """
    own = objective.validation_attack
    if config.validation_eps:
        own = PGD(norm=own.norm if own is not None else "Linf", eps=config.validation_eps)
    if own is None:
        if config.select == "robust":
            raise UsageError(
                'train.select="robust" needs an attack, and this method has none of its own: give a radius with '
                "train.validation_eps=8/255, say."
            )
        return {}
    robust = [part for part in objective.modules() if isinstance(part, RobustObjective)]
    step = next((part.one_step_attack for part in robust if part.steps == 1), None)
    if step is not None and not validated:
        console.note("warning: one inner step and no validation split, so nothing would notice if training collapsed.")
    return {"attack": replace(own, steps=config.validation_steps), "one_step": step, "limit": config.validation_limit}


def validate(
    model: nn.Module,
    loader: Any,
    *,
    fabric: Any,
    attack: Attack | None = None,
    one_step: Attack | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Clean accuracy, loss and, with an attack, robust accuracy.

    Each process judges every n-th batch; the sums are then added, so that nothing is counted twice.

    Args:
        model: images -> logits (N, K).
        loader: with `batches(epoch)`, the same on all processes.
        fabric: of the run.
        attack: for robust accuracy: right on the image and on what becomes of it.
        one_step: a weak attack, for the accuracy on what becomes of the images by it.
        limit: images that are attacked; all if None.
        seed: of the attack.

    Returns:
        "clean", "robust" and "one-step" in [0, 1], "loss" in nats.
    """
    sums = torch.zeros(6, device=fabric.device)  # whole numbers below 2^24 are exact in float32
    seen = 0
    with full_precision(fabric.device), in_mode(model), torch.no_grad():
        for number, batch in enumerate(loader.batches(0)):
            first, seen = seen, seen + len(batch)
            if number % fabric.world_size != fabric.global_rank:
                continue
            batch = batch.to(fabric.device)
            logits = model(batch.images)
            right = logits.argmax(dim=1) == batch.labels
            sums[0] += right.sum()
            sums[1] += cross_entropy(logits, batch.labels).sum()
            sums[2] += len(right)
            count = max(min(len(batch), (limit or seen) - first), 0)
            sums[3] += count
            if attack is not None:
                sums[4] += _holding(attack, model, batch, right[:count].nonzero().flatten(), seed)
            if one_step is not None:
                sums[5] += _holding(one_step, model, batch, torch.arange(count, device=fabric.device), seed)
    total = fabric.all_reduce(sums, reduce_op="sum").tolist()
    result = {"clean": total[0] / total[2], "loss": total[1] / total[2]}
    given = {"robust": (attack, total[4]), "one-step": (one_step, total[5])}
    return result | {name: value / total[3] for name, (asked, value) in given.items() if asked is not None}


def _holding(attack: Attack, model: nn.Module, batch: Batch, rows: Tensor, seed: int) -> Tensor | int:
    """How many of the images `rows` the model gets right under the attack."""
    if len(rows) == 0:
        return 0
    images, labels = batch.images[rows], batch.labels[rows]
    streams = Streams.named(batch.index[rows], seed, "validation")
    return (verdict(attack, model, images, labels, streams).predictions == labels).sum()
