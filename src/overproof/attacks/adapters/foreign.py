"""Attacks of other libraries as values with our contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from overproof.attacks.adapters.guard import Shell, lent
from overproof.attacks.adapters.library import Call
from overproof.attacks.base import BudgetAttack, MinimumNormAttack, Nearest, logits_of, predictions, won
from overproof.attacks.randomness import Streams
from overproof.attacks.threats import per_image
from overproof.errors import OverproofError
from overproof.networks import in_mode


@dataclass(frozen=True, kw_only=True)
class ForeignAttack(BudgetAttack):
    """An attack with a radius from another library; `foreign_attack` builds and checks it.

    Only images that still hold are handed over. The library sees the model in eval mode with frozen parameters, and its global
    random generators are seeded from ours; model and generators are afterwards as before. What comes back is cut to [0, 1] and
    pulled onto the ball where it lies outside, the evaluator judges what is left; an image with NaN counts as not found.
    The library draws for the batch as a whole, so here a batch is not the same as its images one by one.

    Args:
        eps, norm, targeted: see `BudgetAttack`.
        name: LIBRARY:NAME.
        options: of the library's constructor.

    Raises:
        OverproofError: the library failed, or returned another shape.

    Reference: the library's.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        result = images.detach().clone()
        rows, found = _ask(self, model, images.detach(), labels, generator)
        result[rows] = self.threat.project(found, result[rows])
        return result


@dataclass(frozen=True, kw_only=True)
class ForeignMinimumNorm(MinimumNormAttack):
    """An attack of another library that looks for the smallest change; `foreign_attack` builds and checks it.

    As `ForeignAttack`; what does not fool the model, or lies outside `eps`, is replaced by the image itself.

    Args:
        eps, norm, targeted: see `MinimumNormAttack`.
        name: LIBRARY:NAME.
        options: of the library's constructor.

    Raises:
        OverproofError: the library failed, or returned another shape.

    Reference: the library's.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Nearest adversarial images found."""
        nearest = Nearest(images, self.threat)
        rows, found = _ask(self, model, images.detach(), labels, generator)
        nearest.offer(found, won(predictions(model, found), labels[rows], self.targeted), rows)
        return nearest.within(self.eps)


def _ask(
    attack: ForeignAttack | ForeignMinimumNorm,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Numbers (M,) of the images that hold, and the library's answer (M, C, H, W) for them, inside [0, 1]."""
    from overproof.attacks.adapters import library_of

    prefix, _, name = attack.name.partition(":")
    streams = Streams.of(generator, images)
    with in_mode(model), torch.no_grad():
        logits = logits_of(model, images)
    rows = (~won(logits.argmax(dim=1), labels, attack.targeted)).nonzero().flatten()
    if len(rows) == 0:
        return rows, images[rows]
    library, seed = library_of(prefix), streams.rows(rows).initial_seed()
    builder = library.builder(name)
    with lent(model, seed, images.device):
        origin = images[rows].clone()
        call = Call(
            model=Shell(model, images), images=origin.clone(), labels=labels[rows].clone(), classes=logits.shape[1],
            eps=attack.eps, norm=attack.norm, targeted=attack.targeted, options=attack.options, seed=seed,
        )  # fmt: skip
        try:
            found = library.run(builder, call)
        except OverproofError:
            raise
        except Exception as error:
            raise OverproofError(f"{attack.name} failed inside the library with {type(error).__name__}: {error}") from error
    return rows, _settled(attack.name, found, origin)


def _settled(name: str, found: Tensor, origin: Tensor) -> Tensor:
    if found.shape != origin.shape:
        raise OverproofError(f"{name} returned shape {tuple(found.shape)} for images of shape {tuple(origin.shape)}.")
    found = found.detach().to(origin.device, origin.dtype)
    lost = per_image(found.flatten(1).isnan().any(dim=1), origin)
    return torch.where(lost, origin, found).clamp(0, 1)
