"""Generators that a run keeps beside its student: their weights, and pictures of what they make as training goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from overproof.models.generators import Generator
from overproof.models.sampling import keep_samples, save_generator

PICTURES = 12  # of a whole run, the early ones closer together


def keep_generators(generators: Mapping[str, Generator], run: Path, *, step: int, epoch: int, epochs: int) -> None:
    """Write the weights of each, and now and then a picture.

    Args:
        generators: by name.
        run: the run folder.
        step: steps done, which names the picture.
        epoch: the zero-based epoch that has just ended, of `epochs`.
    """
    for name, generator in generators.items():
        save_generator(generator, run, name)
        if pictured(epoch, epochs):
            keep_samples(generator, run, step)


def pictured(epoch: int, epochs: int) -> bool:
    """Whether the end of the zero-based `epoch` is worth a picture; the last always is."""
    return epoch + 1 in {max(1, round(epochs * (i / PICTURES) ** 2)) for i in range(1, PICTURES + 1)}
