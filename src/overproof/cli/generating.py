"""generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from overproof.cli.options import Json, show


def generate(
    run: Path,
    *,
    count: Annotated[int, Parameter(name=["--count", "-n"])] = 64,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    generator: str = "generator",
    seed: int = 0,
    columns: int | None = None,
    zoom: int = 1,
    json_: Json = False,
) -> None:
    """Draw samples of a run's generator, side by side in one picture.

    Parameters
    ----------
    run
        A run folder whose method has trained a generator (dfad, ...).
    count
        Number of images.
    output
        The PNG file to write.
    generator
        Its name, if the run has several.
    seed
        Of the noise: the same seed gives the same pictures.
    columns
        Images side by side; about a square if absent.
    zoom
        Enlarge each pixel so many times.
    """
    from overproof.run.generating import generate as draw

    path = draw(run, count, output, name=generator, seed=seed, columns=columns, zoom=zoom)
    show({"output": str(path), "count": count, "seed": seed}, json_, str(path))
