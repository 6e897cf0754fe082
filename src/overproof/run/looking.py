"""Looking at what a generator makes while it evolves: figures, pictures, and what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from overproof.data.toys import Toy
from overproof.evaluation import generative
from overproof.evolution.population import Evolution
from overproof.folder import write_json
from overproof.models.generators import Generator
from overproof.models.sampling import keep_samples, sample, save_generator, write_grid
from overproof.networks import in_mode

CALM = 0.25  # share of the generations in which nothing is said yet
ALIKE = 0.2  # of the differences between real images: samples that differ less than that are all alike
HALF = 0.5  # of the modes or classes
COMPARED = 512  # samples of the discrepancy
REACH, SIDE, ZOOM = 2.0, 96, 3  # of pictures of points: what is seen of the plane, in how many pixels, each how large
LAST = 500_000  # seed of the last samples; those on the way begin at 0


@dataclass
class Looker:
    """Figures of the champion's samples, from a run's point of view.

    Args:
        evolution: whose champion is looked at.
        generator: the network of the evolution with its noise and range, which is kept in the run.
        run: the run folder.
        real: real images (N, C, H, W) in [0, 1] or points (N, 2).
        count: samples that are looked at.
        generations: of the run in all.
        toy: the law of the points, if they are points.
        judge: a classifier of such images, or None.
        inception: whether the Fréchet distance and the score are those of Inception.
        compared: what the real ones are, in words.
    """

    evolution: Evolution
    generator: Generator
    run: Path
    real: Tensor
    count: int
    generations: int
    toy: Toy | None = None
    judge: nn.Module | None = None
    inception: bool = False
    compared: str = "test images"

    def __call__(self, generation: int) -> tuple[dict[str, float], list[str]]:
        """Figures, and sentences about what is wrong; picture and generator are kept."""
        samples = self._samples(generation)
        figures, _ = self._figures(samples)
        save_generator(self.generator, self.run)
        if self.toy is None:
            keep_samples(self.generator, self.run, generation)
        else:
            pictures = torch.stack([_picture(self.real), _picture(samples)])
            write_grid(pictures, self.run / "samples" / f"step-{generation:08d}.png", zoom=ZOOM)
        return figures, self.concerns(figures) if generation > CALM * self.generations else []

    def finish(self, selected: dict[str, float], warnings: list[str]) -> dict[str, Any]:
        """The summary of a finished run on samples of their own: all figures, shares of the survivors; written to samples.json."""
        samples = self._samples(LAST)
        figures, shares = self._figures(samples)
        if self.toy is None and (self.judge is not None or self.inception):
            by, suffix = (None, "") if self.inception else (self.judge, " by judge")
            figures[f"fid{suffix}"] = generative.frechet(self.real, samples, by)
            figures[f"is{suffix}"] = generative.inception_score(samples, by)
        summary: dict[str, Any] = {"samples": len(samples), "compared with": self.compared}
        summary |= {"figures": figures, "selected": selected, "warnings": warnings}
        if shares is not None:
            summary["histogram"] = shares.tolist()
        write_json(self.run / "samples.json", summary)
        return summary

    def _samples(self, seed: int) -> Tensor:
        self.evolution.champion()
        if self.toy is None:
            return sample(self.generator, self.count, seed=seed)
        stream = torch.Generator().manual_seed(seed)
        with in_mode(self.generator), torch.no_grad():
            points: Tensor = self.generator(self.generator.draw(self.count, stream)).cpu()
        return points

    def _figures(self, samples: Tensor) -> tuple[dict[str, float], Tensor | None]:
        apart = generative.spread(samples) / max(generative.spread(self.real), 1e-12)
        found = {"spread": apart, "mmd2": generative.mmd2(samples[:COMPARED], self.real[:COMPARED])}
        if self.toy is not None and self.toy.centres is not None:
            found |= generative.modes(samples, self.toy.centres, self.toy.sigma)
        if self.judge is None:
            return found, None
        shares = generative.histogram(self.judge, samples)
        found |= {"classes": float(generative.covered(shares)), "entropy": generative.entropy(shares)}
        return found, shares

    def concerns(self, figures: dict[str, float]) -> list[str]:
        """Mode collapse, with the quantity that says so."""
        found = []
        if figures["spread"] < ALIKE:
            found.append(
                f"mode collapse: samples differ from each other by {figures['spread']:.0%} of what real ones do. Try another mutation "
                "list, evolution.fitness='iegan', a gradient penalty or a smaller evolution.lr."
            )
        if self.toy is not None and self.toy.centres is not None and figures["modes"] < HALF * len(self.toy.centres):
            found.append(f"lost modes: samples reach {figures['modes']:.0f} of {len(self.toy.centres)} modes.")
        if self.judge is not None:
            known = int(self.judge_classes)
            if figures["classes"] < HALF * known:
                found.append(
                    f"lost classes: the judge sees {figures['classes']:.0f} of {known} classes in the samples (entropy "
                    f"{figures['entropy']:.2f} nats)."
                )
        return found

    @property
    def judge_classes(self) -> int:
        """How many classes the judge knows."""
        assert self.judge is not None
        return len(generative.histogram(self.judge, self.real[:2]))


def _picture(points: Tensor) -> Tensor:
    """Points (N, 2) as black dots on white (1, H, W); what lies beyond the picture is drawn at its border."""
    places = ((points / (2 * REACH) + 0.5) * SIDE).long().clamp(0, SIDE - 1)
    picture = torch.ones(1, SIDE, SIDE)
    picture[0, SIDE - 1 - places[:, 1], places[:, 0]] = 0.0
    return picture
