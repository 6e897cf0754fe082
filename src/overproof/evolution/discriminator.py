"""The discriminator's steps against the survivors' images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from overproof.evolution.fitness import logits_of
from overproof.evolution.individual import per_sample
from overproof.losses.adversarial import DISCRIMINATOR_LOSSES, gradient_penalty


def train_discriminator(
    critic: nn.Module,
    optimizer: torch.optim.Optimizer,
    real: Tensor,
    fake: Tensor,
    *,
    loss: str,
    penalty: float,
    batch_size: int,
    stream: torch.Generator,
) -> Tensor:
    """One step on each batch; the mean loss without the penalty (0-d).

    L_D = mean_i l(D(x_i), D(r_i)) + lambda mean_i (||grad_x D(u_i x_i + (1 - u_i) r_i)||_2 - 1)^2,  u_i uniform on [0, 1]

    Args:
        critic: images -> logits (N,), in train mode; real and generated images are batches of their own.
        optimizer: over its parameters.
        real, fake: (n B, ...) each.
        loss: a name in `DISCRIMINATOR_LOSSES`.
        penalty: lambda.
        batch_size: B.
        stream: draws u.
    """
    losses = []
    for r, x in zip(torch.split(real, batch_size), torch.split(fake, batch_size), strict=True):
        optimizer.zero_grad()
        of_real, of_fake = logits_of(critic, [r, x])
        value = DISCRIMINATOR_LOSSES[loss](of_fake, of_real).mean()
        total = value
        if penalty:
            u = torch.rand(len(r), generator=stream, dtype=r.dtype).to(r.device)
            total = value + penalty * gradient_penalty(critic, torch.lerp(r, x, per_sample(u, r))).mean()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(value.detach())
    return torch.stack(losses).mean()
