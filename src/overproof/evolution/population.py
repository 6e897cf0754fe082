"""The population, its discriminator, and one generation of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from overproof.errors import NonFiniteLossError, UsageError
from overproof.evolution.crossover import couples, cross
from overproof.evolution.discriminator import train_discriminator
from overproof.evolution.fitness import FITNESS, Fitness
from overproof.evolution.individual import Adam, Individual, Species, coupled
from overproof.evolution.mutation import mutate
from overproof.evolution.selection import select, shares
from overproof.evolution.settings import CEGAN
from overproof.losses.adversarial import GENERATOR_LOSSES

Draw = Callable[[int, torch.Generator], Tensor]


class Evolution:
    """Generators that compete and the discriminator they compete before.

    Args:
        settings: what is varied, judged and kept.
        networks: one network for each member of the population, all of one structure: noise (N, d) -> images (N, ...). The first lends
            its structure to all; `champion` gives it the weights of the best.
        critic: the discriminator, images -> raw logits (N,); in train mode from now on.
        draw: noise (N, d) on the networks' device from a CPU generator.

    Attributes:
        population: the survivors, the champion first.

    Raises:
        UsageError: networks that do not fit together or to the batch size.
    """

    def __init__(self, settings: CEGAN, networks: Sequence[nn.Module], critic: nn.Module, *, draw: Draw) -> None:
        self.settings, self.critic, self.draw = settings, critic.train(), draw
        if len(networks) != settings.population:
            raise UsageError(f"population={settings.population}, but {len(networks)} generator networks were given.")
        self.species = Species(networks[0], Adam(settings.lr, settings.betas))
        self.population = [self.species.individual(network) for network in networks]
        self.optimizer = torch.optim.Adam(critic.parameters(), settings.discriminator_lr, settings.betas)
        if min(settings.batch_size, settings.judged) == 1 and (self.species.coupled or coupled(critic)):
            raise UsageError(
                f"Steps of batch_size={settings.batch_size} images, judged by {settings.judged}, and a network that normalises over its "
                "batch: a single image has no statistics. Take at least 2 of each (batch_size, evaluation_size)."
            )
        self._probe()

    @torch.no_grad()
    def _probe(self) -> None:
        # In eval mode: nothing that is remembered of batches may change.
        noise = self.draw(2, torch.Generator())
        training = self.critic.training
        images, _ = self.species.run(self.species.leaves(self.population[0]), self.population[0].buffers, noise)
        try:
            shape = tuple(self.critic.eval()(images).shape)
        except (RuntimeError, ValueError) as error:
            raise UsageError(
                f"The discriminator cannot take the generator's images {tuple(images.shape[1:])}: {error}"
            ) from error
        finally:
            self.critic.train(training)
        if shape != (2,):
            raise UsageError(f"The discriminator gives {shape} for two images; it must give one logit for each, (2,).")

    def generation(self, real: Tensor, stream: torch.Generator) -> dict[str, Any]:
        """Vary, judge, select, and let the discriminator learn.

        Args:
            real: `settings.real` real images, in the generators' range of numbers.
            stream: CPU generator; all that is random comes from it.

        Returns:
            "fitness" of the champion, "discriminator" loss (0-d tensor), and "selected/ORIGIN", the shares of the survivors.

        Raises:
            UsageError: another number of real images.
            NonFiniteLossError: no candidate has a finite score.
        """
        settings = self.settings
        if len(real) != settings.real:
            raise UsageError(
                f"A generation takes {settings.real} real images, not {len(real)}: give as many (`settings.real`)."
            )
        learned, compared = real[: settings.learned], real[settings.learned :]
        fitness = FITNESS[settings.fitness](settings, self.critic, compared, stream)
        pool = self.breed(learned, fitness, stream)
        self.population = select(pool, settings.population, at_random=settings.selection == "random", stream=stream)
        champion = self.population[0]
        if not math.isfinite(champion.score):
            raise NonFiniteLossError(
                f"The discriminator's judgement of the best generator ({champion.origin}) is {champion.score}: training has diverged. "
                "Use a smaller evolution.lr or evolution.discriminator_lr."
            )
        loss = self._learn(learned, stream)
        self.population = [survivor.settled() for survivor in self.population]
        selected = {f"selected/{name}": share for name, share in shares(self.population, settings.origins).items()}
        return {"fitness": champion.score, "discriminator": loss, **selected}

    def breed(self, real: Tensor, fitness: Fitness, stream: torch.Generator) -> list[Individual]:
        """The evaluated candidates of a generation: mutated children, then children by crossover, then parents.

        Args:
            real: of the discriminator's next steps.
            fitness: of this generation.
            stream: draws all noise.
        """
        settings = self.settings
        noise = self.draw(settings.judged, stream)
        fresh = noise if settings.common_noise or not settings.crosses else self.draw(settings.judged, stream)
        against = self._real_logits(real)
        mutated = []
        for parent in self.population:
            small = self.draw(settings.batch_size, stream)
            mutated += mutate(self.species, parent, small, critic=self.critic, losses=settings.mutations, real=against)
        mutated = fitness(self.species.all_images(mutated, noise))
        crossed = [
            cross(self.species, first, second, noise, margin=settings.margin)
            for first, second in couples(mutated, settings.crosses)
        ]
        crossed = fitness(self.species.all_images(crossed, fresh))
        pool = crossed if settings.candidates == "crossover" else mutated + crossed
        if settings.keep_parents:
            parents = [replace(parent, origin="parent") for parent in self.population]
            pool = pool + fitness(self.species.all_images(parents, noise))
        return pool

    @torch.no_grad()
    def _real_logits(self, real: Tensor) -> Tensor | None:
        """What relative losses compare with."""
        if not any(GENERATOR_LOSSES[name].relative for name in self.settings.mutations):
            return None
        logits: Tensor = self.critic(real[: self.settings.batch_size])
        return logits

    def _learn(self, real: Tensor, stream: torch.Generator) -> Tensor:
        settings = self.settings
        images = torch.cat([survivor.images for survivor in self.population if survivor.images is not None])
        order = torch.randperm(len(images), generator=stream)[: settings.learned].to(images.device)
        return train_discriminator(
            self.critic, self.optimizer, real, images[order], loss=settings.discriminator_loss,
            penalty=settings.gradient_penalty, batch_size=settings.batch_size, stream=stream,
        )  # fmt: skip

    def champion(self) -> nn.Module:
        """The first network, with the weights of the best survivor; in train mode."""
        self.species.fill(self.population[0])
        return self.species.network

    def state(self) -> dict[str, Any]:
        """For a checkpoint: tensors, numbers and dicts of them."""
        members = [
            {"weights": m.weights, "moments": list(m.moments), "steps": m.steps, "buffers": m.buffers} for m in self.population
        ]
        return {"population": members, "critic": self.critic.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        device = self.population[0].weights.device
        self.population = [
            Individual(
                member["weights"].to(device),
                (member["moments"][0].to(device), member["moments"][1].to(device)),
                member["steps"],
                {name: buffer.to(device) for name, buffer in member["buffers"].items()},
            )
            for member in state["population"]
        ]
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
