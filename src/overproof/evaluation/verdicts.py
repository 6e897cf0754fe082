"""What an attack really achieved: range, budget and prediction are checked again, by us."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from overproof.attacks.base import Attack, logits_of, predictions
from overproof.networks import full_precision, in_mode

SLACK = 1e-5  # rounding of eps-sized differences of float32 pixels


@dataclass(frozen=True)
class Verdict:
    """Per attacked image: the images that count, the model's prediction on them, distance, and whether the attack broke its
    own rules (then the untouched image counts)."""

    images: Tensor
    predictions: Tensor
    sizes: Tensor
    invalid: Tensor


def verdict(
    attack: Attack, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None
) -> Verdict:
    """Attack `images` in fp32 and judge the result.

    Args:
        attack: any value that fulfils the contract of `attacks.Attack`.
        model: images -> logits (N, K).
        images: (N, C, H, W) in [0, 1].
        labels: true classes (N,). A targeted attack gets another class, drawn uniformly.
        generator: randomness of the attack and of the targets.

    Returns:
        A `Verdict`; images that left [0, 1] or the ball, changed shape or hold NaN are replaced by the originals.
    """
    with full_precision(images.device):
        wanted = _targets(model, images, labels, generator) if attack.targeted else labels
        found = attack(model, images, wanted, generator).detach()
        if found.shape != images.shape:
            found = torch.full_like(images, float("nan"))
        found = found.to(images.dtype)
        sizes = attack.threat.size(found - images)
        low, high = found.flatten(1).amin(dim=1), found.flatten(1).amax(dim=1)
        valid = (low >= 0) & (high <= 1) & (sizes <= attack.threat.eps * (1 + SLACK) + SLACK)
        found = torch.where(valid.view(-1, *[1] * (images.dim() - 1)), found, images)
        return Verdict(found, predictions(model, found), torch.where(valid, sizes, torch.zeros_like(sizes)), ~valid)


def _targets(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None) -> Tensor:
    with in_mode(model), torch.no_grad():
        classes = logits_of(model, images[:1]).shape[1]
    place = generator.device if generator else labels.device
    shift = torch.randint(1, classes, labels.shape, generator=generator, device=place)
    targets: Tensor = (labels + shift.to(labels.device)) % classes
    return targets


def seeded(device: torch.device, *parts: float | str) -> torch.Generator:
    """A generator that depends on nothing but `parts`."""
    seed = zlib.crc32("/".join(map(str, parts)).encode())
    return torch.Generator(device).manual_seed(seed)
