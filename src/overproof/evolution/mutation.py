"""Mutation: one step of a generator along each of several adversarial losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from overproof.evolution.individual import Individual, Species, coupled, per_sample, row
from overproof.losses.adversarial import GENERATOR_LOSSES


def mutate(
    species: Species,
    parent: Individual,
    noise: Tensor,
    *,
    critic: nn.Module,
    losses: Sequence[str],
    real: Tensor | None = None,
) -> list[Individual]:
    """A child for each loss, one optimiser step from the parent, all on the same noise.

    theta_k = Adam(theta, (1/B) sum_i l_k'(d_i) grad_theta D(G_theta(z_i))),  d_i = D(G_theta(z_i))

    All children begin at the same weights, so there is one forward pass through both networks, however many losses there are: they
    differ in the slopes l_k'(d_i) alone, which are known in closed form. Where the critic's images do not depend on each other, one
    backward pass through it serves all losses, too.

    Args:
        species: the network and the optimiser.
        parent: whose weights and moments the children begin with.
        noise: (B, d).
        critic: the discriminator, images -> logits (B,); its weights stay as they are.
        losses: names in `GENERATOR_LOSSES`, the children's origins.
        real: logits (B,) of real images, for losses that are relative to them.
    """
    leaves = species.leaves(parent)
    images, buffers = species.run(leaves, parent.buffers, noise)
    seen = images.detach().requires_grad_()
    logits = critic(seen)
    fake = logits.detach()
    against = fake if real is None else real
    slopes = [GENERATOR_LOSSES[name].slope(fake, against) / len(fake) for name in losses]
    pulls = _pulls(seen, logits, slopes, critic)
    if species.dense:  # small matrices: all at once, they cost more to call than to multiply
        parts = torch.autograd.grad(images, leaves, torch.stack(pulls), is_grads_batched=True)
        gradients = torch.cat([part.flatten(1) for part in parts], dim=1)
    else:
        gradients = torch.stack([row(torch.autograd.grad(images, leaves, pull, retain_graph=True)) for pull in pulls])
    return species.children(parent, gradients, losses, buffers)


def _pulls(seen: Tensor, logits: Tensor, slopes: Sequence[Tensor], critic: nn.Module) -> list[Tensor]:
    """Gradients of each loss with respect to the images."""
    if coupled(critic):
        return [torch.autograd.grad(logits, seen, slope, retain_graph=True)[0] for slope in slopes]
    (each,) = torch.autograd.grad(logits.sum(), seen)
    return [each * per_sample(slope, each) for slope in slopes]
