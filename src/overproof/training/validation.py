"""Accuracy on held-out images while training runs, shared between the processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from overproof.attacks.base import Attack
from overproof.attacks.randomness import Streams
from overproof.evaluation.verdicts import verdict
from overproof.losses.divergences import cross_entropy
from overproof.networks import full_precision, in_mode


def validate(
    model: nn.Module, loader: Any, *, fabric: Any, attack: Attack | None = None, limit: int | None = None, seed: int = 0
) -> dict[str, float]:
    """Clean accuracy, loss and, with an attack, robust accuracy.

    Each process judges every n-th batch; the sums are then added, so that nothing is counted twice.

    Args:
        model: images -> logits (N, K).
        loader: with `batches(epoch)`, the same on all processes.
        fabric: of the run.
        attack: for robust accuracy.
        limit: images that are attacked; all if None.
        seed: of the attack.

    Returns:
        "clean" and "robust" in [0, 1], "loss" in nats.
    """
    sums = torch.zeros(5, device=fabric.device)  # whole numbers below 2^24 are exact in float32
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
            if attack is not None and count:
                chosen = right[:count].nonzero().flatten()
                images, labels = batch.images[chosen], batch.labels[chosen]
                sums[4] += count
                if len(chosen):
                    streams = Streams.named(batch.index[chosen], seed, "validation")
                    sums[3] += (verdict(attack, model, images, labels, streams).predictions == labels).sum()
    total = fabric.all_reduce(sums, reduce_op="sum").tolist()
    result = {"clean": total[0] / total[2], "loss": total[1] / total[2]}
    return result | ({"robust": total[3] / total[4]} if attack is not None else {})
