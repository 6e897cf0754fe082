"""What a method learned beside the student: its figures over epochs, its policy, and where it looks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from overproof.report.charts import Chart, families
from overproof.report.gallery import png, png_uri
from overproof.report.reading import Run
from overproof.report.values import items, number

ROWS = 10
EXAMPLES = 8
GRIDS = 6
Box = tuple[float, float, float, float]  # x, y, width, height in percent of the image


@dataclass(frozen=True)
class Pair:
    """Two operations that follow each other: weight of the pair, then probability and magnitude of each."""

    operations: tuple[str, ...]
    weight: float
    probabilities: tuple[float, ...]
    magnitudes: tuple[float, ...]


@dataclass(frozen=True)
class Sight:
    """An image as a data URI, with the boxes that were found on each network's map."""

    image: str
    boxes: dict[str, list[Box]]


@dataclass(frozen=True)
class Learned:
    """What there is to tell of one run."""

    run: Run
    charts: list[tuple[Chart, list[str]]]
    adapters: float | None
    policy: list[Pair] = field(default_factory=list)
    more: int = 0  # pairs that are not shown
    sights: list[Sight] = field(default_factory=list)
    samples: list[tuple[int, str]] = field(default_factory=list)  # step and picture of what a generator made then


def learned(run: Run) -> Learned | None:
    """What the run's method learned beside the student, or None."""
    charts, policy = families(run), pairs(run.method)
    adapters = number(run.method.get("adapter_parameters"))
    made = samples(run)
    if not charts and not policy and not adapters and not made:
        return None
    return Learned(run, charts, adapters, policy[:ROWS], max(len(policy) - ROWS, 0), _sights(run), made)


def pairs(method: dict[str, Any]) -> list[Pair]:
    """The rows of a policy that are whole, the heaviest first."""
    found = []
    for row in items(method.get("policy")):
        if not isinstance(row, dict) or (weight := number(row.get("weight"))) is None:
            continue
        columns = [tuple(v for v in map(number, items(row.get(k))) if v is not None) for k in ("probabilities", "magnitudes")]
        names = tuple(map(str, items(row.get("operations"))))
        if names and all(len(column) == len(names) for column in columns):
            found.append(Pair(names, weight, *columns))
    return sorted(found, key=lambda pair: -pair.weight)


def method_text(method: dict[str, Any]) -> str:
    """The same for a terminal; an empty text if there is nothing to tell."""
    lines = _reliabilities(method)
    if (adapters := number(method.get("adapter_parameters"))) is not None:
        lines.append(f"{adapters:,.0f} parameters of adapters served the training only; the student does not hold them")
    policy = pairs(method)
    if policy:
        lines.append(
            f"policy after {number(method.get('searched_steps')) or 0:,.0f} steps of search, {len(policy)} pairs of operations:"
        )
    for pair in policy[:ROWS]:
        each = zip(pair.operations, pair.probabilities, pair.magnitudes, strict=True)
        told = ", then ".join(f"{name} (probability {p:.2f}, magnitude {m:.2f})" for name, p, m in each)
        lines.append(f"  {pair.weight:6.2%}  {told}")
    if len(policy) > ROWS:
        lines.append(f"  and {len(policy) - ROWS} lighter ones")
    return "\n".join(lines)


def _reliabilities(method: dict[str, Any]) -> list[str]:
    """How reliable the teacher is, the classes first that it is least reliable about."""
    values = [number(value) for value in items(method.get("reliability"))]
    names, counts = [str(name) for name in items(method.get("names"))], [number(n) for n in items(method.get("counts"))]
    if not values or not len(values) == len(names) == len(counts):
        return []
    key = next((key for key in ("alpha", "rho") if len(items(method.get(key))) == len(values)), None)
    weights = [number(value) for value in items(method.get(key))] if key else []
    known = sorted((value, i) for i, value in enumerate(values) if value is not None)
    told = [
        f"  {names[i]}: {value:.3f} on {counts[i] or 0:.0f} images" + (f", {key} {weights[i] or 0:.3f}" if weights else "")
        for value, i in known[:ROWS]
    ]
    more = [f"  and {len(known) - ROWS} about which it is more reliable"] if len(known) > ROWS else []
    return [
        f"reliability of the teacher by {method.get('group')} ({method.get('kind')}, held-out images), the least first:",
        *told,
        *more,
    ]


def samples(run: Run) -> list[tuple[int, str]]:
    """Pictures of what a generator made after so many steps, as data URIs; at most `GRIDS`, spread over the training."""
    found = sorted((run.folder.path / "samples").glob("step-*.png"))
    kept = (
        sorted({round(i * (len(found) - 1) / (GRIDS - 1)) for i in range(GRIDS)}) if len(found) > GRIDS else range(len(found))
    )
    pictures = []
    for path in (found[i] for i in kept):
        try:
            pictures.append((int(path.stem.removeprefix("step-")), _uri(path.read_bytes())))
        except (ValueError, OSError) as error:
            run.warnings.append(f"{path} cannot be shown ({type(error).__name__}: {error}).")
    return pictures


def _uri(png: bytes) -> str:
    if not png.startswith(b"\x89PNG"):
        raise ValueError("it is no PNG")
    return png_uri(png)


def _sights(run: Run) -> list[Sight]:
    found = run.pictures()
    kinds = [name for name in found if name.endswith("_boxes")]
    if "images" not in found or not kinds:
        return []
    try:
        return [
            Sight(png(image), {kind.removesuffix("_boxes"): _percent(found[kind][i]) for kind in kinds})
            for i, image in enumerate(found["images"][:EXAMPLES])
        ]
    except (IndexError, ValueError, TypeError) as error:
        run.warnings.append(f"{run.folder.path}: method.npz cannot be shown ({type(error).__name__}: {error}).")
        return []


def _percent(boxes: np.ndarray) -> list[Box]:
    x1, y1, x2, y2 = (100 * np.clip(boxes.astype(float), 0, 1)).T
    return [tuple(map(float, box)) for box in zip(x1, y1, x2 - x1, y2 - y1, strict=True)]  # type: ignore[misc]
