"""What the generator of a run makes: pictures to look at, and labelled images to train on."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from overproof import console
from overproof.attacks.base import logits_of
from overproof.data import ImageSet
from overproof.data.splits import Parts
from overproof.errors import FolderError, UsageError
from overproof.folder import RunFolder
from overproof.models.sampling import load_generator, sample, write_grid
from overproof.models.weights import load_model

BATCH, CUT = 256, 0.01  # CUT: share of pixels outside of [0, 1] from which on it is said


def generate(
    run: str | Path,
    count: int,
    output: str | Path,
    *,
    name: str = "generator",
    seed: int = 0,
    columns: int | None = None,
    zoom: int = 1,
) -> Path:
    """Write a picture of what the generator of a run makes.

    Args:
        run: a run folder whose method has trained a generator.
        count: number of images, at least 1.
        output: the PNG file to write.
        name: of the generator, if there are several.
        seed: of the noise.
        columns: images side by side; None: about a square.
        zoom: by how much each pixel is enlarged, a whole number.

    Raises:
        FolderError: no such run, no generator in it, or a file that cannot be written.
        UsageError: counts below 1, or another kind of file.
    """
    output = Path(output)
    if output.suffix.lower() != ".png":
        raise UsageError(f"-o {output}: the picture is written as PNG; give a name that ends in .png.")
    if zoom < 1 or (columns is not None and columns < 1):
        raise UsageError(f"A picture needs zoom and columns of at least 1, not {zoom} and {columns}.")
    generator = load_generator(RunFolder(run).require().path, name).to(_device())
    write_grid(sample(generator, count, seed=seed), output, columns=columns, zoom=zoom)
    return output


def generated(
    run: str,
    *,
    count: int = 10_000,
    seed: int = 0,
    generator: str = "generator",
    labels: str | None = None,
    which: str = "best",
) -> Parts:
    """A data source, generator:RUN: images of the run's generator with the classes that a network sees in them.

    They are kept as 8-bit pixels: what a generator makes outside of [0, 1] is cut off, and the classes are those of the images so kept.

    Args:
        run: a run folder whose method has trained a generator.
        count: number of images.
        seed: of the noise.
        generator: its name, if there are several.
        labels: a run folder whose network says the classes, such as the teacher's; None: the run's own network.
        which: weights of that network, "best" or "last".

    Raises:
        FolderError: no such run, no generator in it, or no network that could name classes.
        UsageError: fewer than one image, or a network for images of another shape.
    """
    folder = RunFolder(run).require()
    device = _device()
    images = sample(load_generator(folder.path, generator).to(device), count, seed=seed, clamp=False)
    pixels: Tensor = (images.clamp(0, 1) * 255).round().to(torch.uint8)
    cut = float(((images < -0.5 / 255) | (images > 1 + 0.5 / 255)).float().mean())
    if cut > CUT:
        console.note(
            f"generator:{run}: {cut:.0%} of the pixels lie outside of [0, 1] and are cut off, so that these are not quite the images that "
            "its student learned from. A generator with method.head=sigmoid makes none such."
        )
    judge = RunFolder(labels or run).require().path
    try:
        model = load_model(judge, which).to(device)
    except FolderError as error:
        raise FolderError(
            f"Nobody says what classes the images of {run} show; give labels=RUN of a classifier. ({error})"
        ) from error
    built = (getattr(model, "spec", None) or {}).get("image_size")
    if built is not None and built != pixels.shape[-1]:
        raise UsageError(_unfit(judge, run, pixels, f"it was built for {built} pixels"))
    try:
        with torch.no_grad():
            logits = torch.cat([logits_of(model, part.to(device).float() / 255).cpu() for part in torch.split(pixels, BATCH)])
    except RuntimeError as error:
        raise UsageError(_unfit(judge, run, pixels, str(error))) from error
    return {"train": ImageSet(pixels, logits.argmax(dim=1), classes=logits.shape[1], name=f"generator:{run}")}


def _unfit(judge: Path, run: str, pixels: Tensor, why: str) -> str:
    shape = tuple(pixels.shape[1:])
    return f"The network of {judge} cannot name the classes of {run}'s images of shape {shape}: {why}. Give labels=RUN of a classifier of such."


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
