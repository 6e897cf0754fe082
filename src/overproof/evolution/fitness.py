"""What a child is worth: to the discriminator, by its slope, and by how different its images are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof.evolution.individual import Individual, coupled
from overproof.networks import in_mode

if TYPE_CHECKING:
    from overproof.evolution.settings import CEGAN

TINY = 1e-30
SHUFFLES = 5


def logits_of(critic: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """Logits (N,) of each batch: each alone where its images depend on each other, else in one go."""
    if len(batches) == 1 or coupled(critic):
        return [critic(batch) for batch in batches]
    logits: Tensor = critic(torch.cat(list(batches)))
    return list(torch.split(logits, [len(batch) for batch in batches]))


class Fitness(ABC):
    """Scores individuals of one generation; the discriminator does not change meanwhile.

    Args:
        settings: of the evolution.
        critic: the discriminator, images -> logits (N,).
        real: M real images, for a fitness that needs them.
        stream: draws what is random about it.
    """

    def __init__(self, settings: CEGAN, critic: nn.Module, real: Tensor, stream: torch.Generator) -> None:
        self.settings, self.critic, self.real, self.stream = settings, critic, real, stream

    def __call__(self, individuals: Sequence[Individual]) -> list[Individual]:
        """The individuals, whose images are known, with score and values."""
        if not individuals:
            return []
        images = [individual.images for individual in individuals if individual.images is not None]
        with in_mode(self.critic, "eval") if self.settings.judge_eval else nullcontext():
            found = self.judge(images)
        scores = torch.stack([score for score, _ in found]).tolist()
        pairs = zip(individuals, scores, found, strict=True)
        return [replace(individual, score=score, values=values) for individual, score, (_, values) in pairs]

    @abstractmethod
    def judge(self, images: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """For each child's images (M, ...) its score and the worth of each image (M,)."""


class Logit(Fitness):
    """F = mean_i D(x_i), q_i = D(x_i): what the discriminator believes, on raw logits."""

    @torch.no_grad()
    def judge(self, images: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """See `Fitness.judge`."""
        return [(logits.mean(), logits) for logits in logits_of(self.critic, images)]


class Slope(Fitness):
    """E-GAN's fitness: belief, and how little the discriminator would have to change.

    F = mean_i p_i - lambda log || grad_{theta_D} [ mean_i softplus(-D(r_i)) + mean_i softplus(D(x_i)) ] ||_2
    q_i = p_i = sigmoid(D(x_i))

    The gradient of the real half is the same for all children, and is computed once a generation.
    """

    def __init__(self, settings: CEGAN, critic: nn.Module, real: Tensor, stream: torch.Generator) -> None:
        super().__init__(settings, critic, real, stream)
        self._of_real: Sequence[Tensor] | None = None

    def judge(self, images: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """See `Fitness.judge`."""
        if self._of_real is None:
            self._of_real = self._gradient(F.softplus(-self.critic(self.real)))
        return [self._judged(part, self._of_real) for part in images]

    def _judged(self, images: Tensor, of_real: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        logits = self.critic(images)
        of_fake = self._gradient(F.softplus(logits))
        size = torch.stack([(a + b).square().sum() for a, b in zip(of_real, of_fake, strict=True)]).sum().sqrt()
        values = logits.detach().sigmoid()
        return values.mean() - self.settings.fitness_weight * (size + TINY).log(), values

    def _gradient(self, losses: Tensor) -> Sequence[Tensor]:
        return torch.autograd.grad(losses.mean(), list(self.critic.parameters()))


class Diversity(Fitness):
    """IE-GAN's fitness: belief, and how much an image differs from others of the same generator.

    F = mean_i (D(x_i) + lambda_f e_i),  q_i = D(x_i) + lambda_c e_i,  e_i = mean_r mean_pixels |x_i - x_{perm_r(i)}|

    over five random permutations, the same for all children of one evaluation.
    """

    @torch.no_grad()
    def judge(self, images: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """See `Fitness.judge`."""
        count = len(images[0])
        orders = [torch.randperm(count, generator=self.stream).to(images[0].device) for _ in range(SHUFFLES)]
        found = []
        for part, logits in zip(images, logits_of(self.critic, images), strict=True):
            apart = torch.stack([(part - part[order]).abs().flatten(1).mean(dim=1) for order in orders]).mean(dim=0)
            score = (logits + self.settings.fitness_weight * apart).mean()
            found.append((score, logits + self.settings.crossover_weight * apart))
        return found


FITNESS: dict[str, type[Fitness]] = {"logit": Logit, "egan": Slope, "iegan": Diversity}
