"""What the page draws as coloured fields: which class became which, and the loss around a few images."""

from __future__ import annotations

from typing import Any

import numpy as np

from overproof.report.charts import Chart
from overproof.report.drawing import INK, PALETTE, draw
from overproof.report.reading import Run

CLASSES = 20
COUNTED = 12  # classes up to which the numbers fit into the fields
RIGHT, WRONG = PALETTE[0], PALETTE[1]


def confusion(run: Run) -> Chart | None:
    """Which class became which under the first attack; None if it was not recorded or nothing was broken."""
    known: dict[str, dict[str, Any]] = run.evaluation.get("attacks", {})
    name, facts = next(iter(known.items()), ("", dict[str, Any]()))
    counts = np.array(facts.get("confusion") or [[0.0]])
    if counts.max() <= 0:
        return None
    involved = counts.sum(axis=0) + counts.sum(axis=1)
    shown = np.sort(np.argsort(-involved, kind="stable")[:CLASSES])
    names = run.evaluation["classes"]
    labels = [_short(names[i] if i < len(names) else str(i)) for i in shown]
    fields = counts[np.ix_(shown, shown)]

    def paint(axes: Any) -> None:
        fill(axes, fields / fields.max() * 0.9, RIGHT, (-0.5, len(shown) - 0.5, len(shown) - 0.5, -0.5))
        if len(shown) <= COUNTED:
            for row, column in zip(*np.nonzero(fields), strict=True):
                axes.text(column, row, f"{fields[row, column]:g}", ha="center", va="center", fontsize=7)
        places = list(range(len(shown)))
        axes.set_xticks(places, labels, rotation=90 if max(map(len, labels)) > 2 else 0, fontsize=8)
        axes.set_yticks(places, labels, fontsize=8)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.set(xlabel="predicted under attack", ylabel="true class")

    note = f"{name}: {counts.sum():g} images {'driven to the class that was wanted' if facts['targeted'] else 'broken'}."
    note += f" The {CLASSES} of {len(counts)} classes that occur most." if len(counts) > CLASSES else ""
    # The y axis takes more room than the numbers of other drawings.
    svg = draw(paint, f"Which class became which under {name}, {run.name}", bottom=0.35 + 0.075 * max(map(len, labels)))
    return Chart(run.name, svg, note)


def surfaces(run: Run, most: int = 4) -> list[Chart]:
    """The loss around a few images, with the outline of the attacker's ball; one that cannot be drawn adds a warning."""
    found = run.gallery()
    if "surface" not in found:
        return []
    try:
        names = run.evaluation["classes"]
        labels = [int(label) for label in found["surface_label"][:most]]
        words = [names[label] if 0 <= label < len(names) else str(label) for label in labels]
        radius = found["surface_radius"].astype(float)
        fields = zip(found["surface"].astype(float), found["surface_size"].astype(float), words, strict=False)
        return [_surface(margins, sizes, radius, word) for margins, sizes, word in fields]
    except (KeyError, IndexError, ValueError, TypeError) as error:
        run.warnings.append(
            f"{run.folder.path}: the loss surface of {run.chosen!r} cannot be drawn ({type(error).__name__}: {error})."
        )
        return []


def _surface(margins: np.ndarray, sizes: np.ndarray, radius: np.ndarray, label: str) -> Chart:
    if not margins.shape == sizes.shape == (len(radius), len(radius)) or len(radius) < 2 or not radius[-1] > 0:
        raise ValueError(f"a surface of shape {margins.shape} over {len(radius)} radii")
    margins = np.nan_to_num(margins, posinf=0.0, neginf=0.0)
    eps = radius[-1] / 2
    strength = 0.1 + 0.8 * np.abs(margins) / max(float(np.abs(margins).max()), 1e-12)

    def paint(axes: Any) -> None:
        for color, side in ((RIGHT, margins < 0), (WRONG, margins >= 0)):
            fill(axes, np.where(side, strength, 0.0), color, (-2, 2, -2, 2))
        axes.contour(radius / eps, radius / eps, sizes, levels=[eps], colors=[INK], linewidths=1.2)
        axes.plot([0], [0], marker="+", color=INK, markersize=7)
        axes.grid(visible=False)
        axes.set(xlabel="along the gradient (ε)", ylabel="random direction (ε)")

    low, high = float(margins.min()), float(margins.max())
    return Chart(
        f"around an image of {_short(label)}",
        draw(paint, f"Margin around an image of {label}"),
        f"margin {low:.3g} to {high:.3g}",
    )


def fill(axes: Any, opacity: np.ndarray, color: str, extent: tuple[float, float, float, float]) -> None:
    """A colour whose opacity says how much: it suits light and dark pages."""
    from matplotlib.colors import to_rgb

    pixels = np.empty((*opacity.shape, 4))
    pixels[..., :3], pixels[..., 3] = to_rgb(color), opacity
    lower = extent[2] < extent[3]
    axes.imshow(pixels, extent=extent, origin="lower" if lower else "upper", interpolation="none", aspect="auto")


def _short(name: str) -> str:
    text = "".join(c if c.isprintable() else "?" for c in name)
    return text if len(text) <= 10 else text[:9] + "…"
