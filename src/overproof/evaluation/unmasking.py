"""Other views of a model, in which masked gradients show: through a blur, and with its logits at another scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from overproof.attacks.ascent import ascend
from overproof.attacks.base import logits_of
from overproof.attacks.randomness import Streams, normal
from overproof.attacks.threats import Threat
from overproof.losses.margins import margin
from overproof.networks import in_mode


@dataclass(frozen=True, kw_only=True)
class Smoothed:
    """Ascent of the margin seen through a blur: its gradient is estimated from answers alone.

    g = 1/(2 S sigma) sum_s (m(x + sigma u_s) - m(x - sigma u_s)) u_s with Gaussian u_s, then x <- project(x + eps/4 steepest(g)).
    A staircase of zero gradient becomes the slope that it approximates. Costs steps * (2 * samples + 1) forward passes.

    Args:
        threat: the ball.
        steps: steps of the ascent.
        samples: pairs of answers per step.
        sigma: width of the blur in pixel units.

    Reference: Ilyas et al., ICML 2018, arXiv 1804.08598 (antithetic search gradients).
    """

    threat: Threat
    steps: int = 8
    samples: int = 12
    sigma: float = 0.06

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        streams = Streams.of(generator, images)

        def loss(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                slope = torch.zeros_like(x)
                for _ in range(self.samples):
                    streams.draws += 1  # every pair is a draw of its own, whichever images are left
                    u = normal(x, streams.rows(rows), self.sigma)
                    slope += (
                        margin(logits_of(model, x + u), labels[rows]) - margin(logits_of(model, x - u), labels[rows])
                    ).view(-1, 1, 1, 1) * u
                done = logits_of(model, x).argmax(dim=1) != labels[rows]
            return (x * slope).flatten(1).sum(dim=1), done  # linear in x: its gradient is the estimate

        with in_mode(model):
            return ascend(loss, images, self.threat, steps=self.steps, step_size=self.threat.eps / 4, generator=streams)


class Scaled(nn.Module):
    """A model whose logits are multiplied by `factor`: the same classes, another cross-entropy."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, K)."""
        return self.factor * logits_of(self.model, images)
