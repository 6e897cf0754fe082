"""What an attack really achieved: range, budget and prediction are checked again, by us."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from overproof.attacks.base import Attack, logits_of, predictions
from overproof.attacks.randomness import Streams, other_classes
from overproof.attacks.threats import per_image
from overproof.evaluation.counting import Passes
from overproof.networks import full_precision, in_mode

SLACK = 1e-5  # rounding of eps-sized differences of float32 pixels


@dataclass(frozen=True)
class Verdict:
    """Per attacked image: the images that count, the model's prediction on them, distance, and whether the attack broke its
    own rules (then the untouched image counts); for a targeted attack the classes that were to be reached."""

    images: Tensor
    predictions: Tensor
    sizes: Tensor
    invalid: Tensor
    targets: Tensor | None = None


def verdict(
    attack: Attack,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator | None = None,
    *,
    through: nn.Module | None = None,
    passes: Passes | None = None,
) -> Verdict:
    """Attack `images` in fp32 and judge the result.

    Args:
        attack: any value that fulfils the contract of `attacks.Attack`.
        model: images -> logits (N, K).
        images: (N, C, H, W) in [0, 1].
        labels: true classes (N,). A targeted attack gets another class, drawn uniformly.
        generator: randomness of the attack and of the targets.
        through: the same function as `model`, cheaper to attack; the verdict is always the model's.
        passes: counts what the attack asks of the model.

    Returns:
        A `Verdict`; images that left [0, 1] or the ball, changed shape or hold NaN are replaced by the originals.
    """
    attacked = model if through is None else through
    with full_precision(images.device):
        streams = Streams.of(generator, images)
        targets = _targets(model, images, labels, streams) if attack.targeted else None
        with nullcontext() if passes is None else passes.of(attacked):
            found = attack(attacked, images, labels if targets is None else targets, streams).detach()
        if found.shape != images.shape:
            found = torch.full_like(images, float("nan"))
        found = found.to(images.dtype)
        sizes = attack.threat.size(found - images)
        low, high = found.flatten(1).amin(dim=1), found.flatten(1).amax(dim=1)
        valid = (low >= 0) & (high <= 1) & (sizes <= attack.threat.eps * (1 + SLACK) + SLACK)
        found = torch.where(per_image(valid, images), found, images)
        sizes = torch.where(valid, sizes, torch.zeros_like(sizes))
        return Verdict(found, predictions(model, found), sizes, ~valid, targets)


def _targets(model: nn.Module, images: Tensor, labels: Tensor, streams: Streams) -> Tensor:
    with in_mode(model), torch.no_grad():
        classes = logits_of(model, images[:1]).shape[1]
    return other_classes(labels, classes, streams)
