"""Generators on disk, and pictures of what they make."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overproof.errors import FolderError, OverproofError, UsageError
from overproof.folder import atomic, read_json, write_json
from overproof.models.generators import Generator, make_generator
from overproof.models.weights import fill, read_state
from overproof.networks import in_mode

SHOWN, CHUNK = 64, 256


def sample(generator: Generator, count: int, *, seed: int = 0, clamp: bool = True) -> Tensor:
    """`count` images (N, C, H, W), float32 in [0, 1], on the CPU: eval mode, pixels clamped, and the same noise for the same seed.

    With `clamp=False` pixels stay as the generator makes them, which may lie outside of [0, 1].

    The noise is drawn on the CPU, image by image: the first images of a larger count are those of a smaller one.

    Raises:
        UsageError: fewer than one image, or a generator whose samples are no images.
    """
    if count < 1:
        raise UsageError(f"{count} samples were asked for: give at least 1.")
    if len(generator.shape) != 3:
        raise UsageError(
            f"This generator makes points of shape {generator.shape}, no images: the report of its run draws them."
        )
    stream = torch.Generator().manual_seed(seed)
    with in_mode(generator), torch.no_grad():
        # Always whole chunks of noise: fewer numbers would be drawn in another way.
        parts = [generator(generator.draw(CHUNK, stream)[: count - i]) for i in range(0, count, CHUNK)]
        images = torch.cat([part.float().cpu() for part in parts])
        return images.clamp_(0, 1) if clamp else images


def grid(images: Tensor, columns: int | None = None) -> Tensor:
    """Images (N, C, H, W) side by side in one picture (C, H', W'), a white line apart; `columns` None: about a square."""
    count, channels, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    picture = images.new_ones(channels, rows * (height + 1) + 1, columns * (width + 1) + 1)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        picture[:, top : top + height, left : left + width] = image
    return picture


def write_grid(images: Tensor, path: Path, *, columns: int | None = None, zoom: int = 1) -> None:
    """Write `grid(images)` as a PNG, each pixel `zoom` times as large.

    Raises:
        FolderError: the file cannot be written.
    """
    from PIL import Image

    pixels = (grid(images, columns) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels.mean(axis=2).astype("uint8"))
    if zoom > 1:
        picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    with atomic(path) as file:
        file.write(buffer.getvalue())


def keep_samples(generator: Generator, run: Path, step: int, *, count: int = SHOWN) -> None:
    """Write `run/samples/step-NNNNNNNN.png`: what a generator makes of the same noise each time."""
    write_grid(sample(generator, count), run / "samples" / f"step-{step:08d}.png")


def save_generator(generator: Generator, run: Path, name: str = "generator") -> None:
    """Write `run/weights/<name>.safetensors`, and `run/<name>.json`, which says how to build it again."""
    from safetensors.torch import save

    if generator.spec is None:
        raise UsageError("This generator was not made by name (make_generator), so that nobody could build it again.")
    state = {key: value.detach().cpu().contiguous().clone() for key, value in generator.state_dict().items()}
    with atomic(run / "weights" / f"{name}.safetensors") as file:
        file.write(save(state))
    write_json(run / f"{name}.json", generator.spec)


def load_generator(run: str | Path, name: str = "generator") -> Generator:
    """The generator of a run folder, in eval mode on the CPU. Nothing that is read is executed.

    Raises:
        FolderError: the run has none, or its files are damaged.
    """
    run = Path(run)
    path = run / "weights" / f"{name}.safetensors"
    if not path.exists():
        raise FolderError(
            f"{run} holds no generator ({path} does not exist): name a run of a method that trains one, such as dfad."
        )
    generator = rebuild_generator(read_json(run / f"{name}.json"))
    fill(generator, read_state(path), path)
    return generator.eval()


def rebuild_generator(spec: Any) -> Generator:
    """The generator that a `Generator.spec` describes, untrained.

    Raises:
        OverproofError: the description is not complete.
    """
    try:
        known = {key: spec[key] for key in ("name", "latent", "law", "shift", "scale")}
        return make_generator(**known, shape=tuple(map(int, spec["shape"])), **spec["options"])
    except (KeyError, TypeError, ValueError) as error:
        raise OverproofError(f"This description of a generator is not complete ({error!r}): {spec}.") from error
