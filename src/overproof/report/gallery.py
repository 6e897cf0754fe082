"""Examples of attacked images: untouched, attacked, and what was added."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np

from overproof.report.reading import Run

SIDE = 160  # pixels; larger images are shown smaller


@dataclass(frozen=True)
class Picture:
    """One example; the three images are data URIs, `size` is the largest change of a pixel value in [0, 1]."""

    clean: str
    adversarial: str
    difference: str
    factor: int
    size: float
    label: str
    clean_prediction: str
    adversarial_prediction: str
    attack: str


def pictures(run: Run, most: int = 8) -> list[Picture]:
    """The first `most` examples of the run's gallery; one that cannot be shown adds a warning to `run`."""
    found = run.gallery()
    if "clean" not in found:
        return []
    try:
        return [_picture(found, i, run.evaluation["classes"]) for i in range(min(len(found["clean"]), most))]
    except (KeyError, IndexError, ValueError, TypeError) as error:
        run.warnings.append(
            f"{run.folder.path}: the gallery of {run.chosen!r} cannot be shown ({type(error).__name__}: {error})."
        )
        return []


def _picture(found: dict[str, np.ndarray], i: int, classes: list[str]) -> Picture:
    clean, adversarial = found["clean"][i] / 255.0, np.clip(found["adversarial"][i].astype(np.float64), 0.0, 1.0)
    change = adversarial - clean
    size = float(np.abs(change).max())
    factor = max(int(0.5 / size), 1) if size > 1 / 255 else 1
    words = {}
    for key in ("label", "clean_prediction", "adversarial_prediction"):
        number = int(found[key][i])
        words[key] = classes[number] if 0 <= number < len(classes) else str(number)
    attack = str(found["attack"][i]) if "attack" in found else ""
    uris = {"clean": png(clean), "adversarial": png(adversarial), "difference": png(0.5 + factor * change)}
    return Picture(**uris, **words, factor=factor, size=size, attack=attack)


def png(pixels: np.ndarray) -> str:
    """(C, H, W) in [0, 1] as a data URI; other than 1 or 3 channels are averaged to grey."""
    from PIL import Image

    if pixels.shape[0] != 3:
        pixels = pixels.mean(axis=0, keepdims=True)
    values = np.rint(np.clip(pixels, 0.0, 1.0) * 255).astype(np.uint8).transpose(1, 2, 0)
    image = Image.fromarray(values if values.shape[2] == 3 else values[:, :, 0])
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return png_uri(buffer.getvalue())


def png_uri(png: bytes) -> str:
    """A PNG file's bytes as a data URI."""
    return "data:image/png;base64," + base64.b64encode(png).decode()
