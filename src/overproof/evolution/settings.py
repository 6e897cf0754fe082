"""Evolutions as values: what is varied, judged and kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from overproof.errors import UnknownNameError, UsageError
from overproof.losses.adversarial import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES


@dataclass(frozen=True, kw_only=True)
class CEGAN:
    """Mutations along several adversarial losses, and crossover of the best pairs by distillation.

    A generation: each of `population` parents has a child for each loss; the best pairs of these have a child that imitates, on each
    noise, the parent that the discriminator believes more; the best children live on; the discriminator learns from their images.

    Args:
        population: parents, mu, at least 1.
        crossovers: children by crossover; as many as there are pairs, at most. 0: none.
        mutations: minimax, heuristic, least-squares, least-squares-sigmoid, wgan, relativistic. A single one is a fixed loss.
        fitness: "logit"; "egan": with the discriminator's slope; "iegan": with the diversity of the images.
        fitness_weight: of slope or diversity in the score, at least 0.
        crossover_weight: of diversity in the worth of a single image, at least 0.
        margin: by how much the first parent's image must be better to be kept.
        candidates: "all" children compete, or only those by "crossover".
        keep_parents: parents compete with their children.
        selection: "greedy", or "random": the ablation that shows what the fitness is worth.
        common_noise: children by crossover are judged on the same noise as the others.
        judge_eval: the discriminator judges with its running statistics, in eval mode.
        discriminator_loss: vanilla, least-squares, wgan, relativistic.
        discriminator_steps: per generation, at least 1.
        gradient_penalty: weight of (||grad_x D|| - 1)^2, at least 0; wgan needs one.
        batch_size: images of a step, B.
        evaluation_size: images by which a child is judged, M; the discriminator's come from them, so it may become larger.
        lr: of the generators' Adam.
        discriminator_lr: of the discriminator's.
        betas: of both.

    Raises:
        UsageError: an option out of its range, or a population that is too small.

    Reference: Li, Zhang, Gong, Lü, IJCNN 2021, arXiv 2101.11186.

    Differences from the paper: defaults are those of the authors' script for 32x32 images. Each member of a larger population begins
    with weights of its own. "least-squares" is on the raw logit as in the authors' code, "least-squares-sigmoid" on the probability
    as in the first E-GAN code. Slopes add a tiny constant inside the logarithm.
    """

    population: int = 1
    crossovers: int = 1
    mutations: tuple[str, ...] = ("heuristic", "least-squares", "minimax")
    fitness: Literal["logit", "egan", "iegan"] = "logit"
    fitness_weight: float = 0.001
    crossover_weight: float = 0.001
    margin: float = 0.0
    candidates: Literal["all", "crossover"] = "all"
    keep_parents: bool = False
    selection: Literal["greedy", "random"] = "greedy"
    common_noise: bool = False
    judge_eval: bool = False
    discriminator_loss: Literal["vanilla", "least-squares", "wgan", "relativistic"] = "vanilla"
    discriminator_steps: int = 3
    gradient_penalty: float = 10.0
    batch_size: int = 32
    evaluation_size: int = 256
    lr: float = 1e-4
    discriminator_lr: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.999)

    def __post_init__(self) -> None:
        self._check_ranges()
        for name in self.mutations:
            if name not in GENERATOR_LOSSES:
                raise UnknownNameError("mutation", name, GENERATOR_LOSSES)
        if not self.mutations or len({*self.mutations}) < len(self.mutations):
            raise UsageError(f"mutations={self.mutations}: name at least one loss, and each once.")
        if self.discriminator_loss not in DISCRIMINATOR_LOSSES:
            raise UnknownNameError("discriminator_loss", self.discriminator_loss, DISCRIMINATOR_LOSSES)
        if self.discriminator_loss == "wgan" and not self.gradient_penalty:
            raise UsageError("discriminator_loss='wgan' is unbounded without gradient_penalty; give it a weight, such as 10.")
        children = self.population * len(self.mutations)
        if self.crossovers and not self.pairs:
            raise UsageError(
                f"crossovers={self.crossovers} needs two mutated children to cross, but population={self.population} and "
                f"{len(self.mutations)} mutation give {children}. Name more mutations, or say crossovers=0."
            )
        if self.candidates == "crossover" and self.crosses < self.population:
            raise UsageError(
                f"candidates='crossover' leaves {self.crosses} children (of {self.pairs} pairs) for population={self.population}: give "
                "more crossovers, or candidates='all'."
            )

    def _check_ranges(self) -> None:
        for name in ("population", "discriminator_steps", "batch_size", "evaluation_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("crossovers", "fitness_weight", "crossover_weight", "gradient_penalty"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 0.")
        if not (self.lr > 0 and self.discriminator_lr > 0 and all(0 <= beta < 1 for beta in self.betas)):
            raise UsageError(
                f"lr={self.lr} and discriminator_lr={self.discriminator_lr} must be above 0, betas={self.betas} in [0, 1)."
            )
        choices = {
            "fitness": ("logit", "egan", "iegan"), "candidates": ("all", "crossover"), "selection": ("greedy", "random"),
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UnknownNameError(name, getattr(self, name), known)

    @property
    def pairs(self) -> int:
        """Pairs of mutated children."""
        return math.comb(self.population * len(self.mutations), 2)

    @property
    def crosses(self) -> int:
        """Children by crossover in a generation."""
        return min(self.crossovers, self.pairs)

    @property
    def judged(self) -> int:
        """M: images that each child is judged by; together the survivors' are enough for the discriminator."""
        return max(math.ceil(self.batch_size * self.discriminator_steps / self.population), self.evaluation_size)

    @property
    def learned(self) -> int:
        """Real images that the discriminator learns from in a generation."""
        return self.batch_size * self.discriminator_steps

    @property
    def real(self) -> int:
        """Real images that a generation takes: the discriminator's, and M for a fitness that looks at them."""
        return self.learned + (self.judged if self.fitness == "egan" else 0)

    @property
    def origins(self) -> tuple[str, ...]:
        """Who can live on."""
        mutated = self.mutations if self.candidates == "all" else ()
        return (*mutated, *(("crossover",) if self.crosses else ()), *(("parent",) if self.keep_parents else ()))


@dataclass(frozen=True, kw_only=True)
class EGAN(CEGAN):
    """Mutations alone, judged with the discriminator's slope.

    Args:
        all: see `CEGAN`.

    Reference: Wang, Xu, Yao, Tao, IEEE TEVC 2019, arXiv 1803.00657.

    Differences from the paper: the weight 0.01 belongs to the logarithm of the norm; on the logarithm of its square, as in the first
    code, it would be half of that. Rates and gradient penalty are those of CE-GAN (theirs: 2e-4 and none), so that the fitness alone
    differs.
    """

    crossovers: int = 0
    fitness: Literal["logit", "egan", "iegan"] = "egan"
    fitness_weight: float = 0.01


@dataclass(frozen=True, kw_only=True)
class IEGAN(CEGAN):
    """Crossover, and a fitness that rewards images that differ from each other.

    Args:
        all: see `CEGAN`.

    Reference: arXiv 2109.11078.

    Differences from the paper: children imitate images behind the tanh, not before it.
    """

    fitness: Literal["logit", "egan", "iegan"] = "iegan"
    fitness_weight: float = 0.05
    lr: float = 2e-4
    discriminator_lr: float = 2e-4


@dataclass(frozen=True, kw_only=True)
class GAN(CEGAN):
    """One generator and one loss, nothing judged that is not learned from: a plain GAN.

    Args:
        all: see `CEGAN`. With mutations=("wgan",), discriminator_loss="wgan" and discriminator_steps=5: WGAN-GP.

    Reference: Goodfellow et al., NeurIPS 2014, arXiv 1406.2661.
    """

    crossovers: int = 0
    mutations: tuple[str, ...] = ("heuristic",)
    evaluation_size: int = 1
