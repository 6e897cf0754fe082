"""Drawings of what probes found: gaps, bars and curves with intervals, decision planes, grids of layers, where networks look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from overproof.report.charts import Chart
from overproof.report.drawing import INK, PALETTE, draw, line_style
from overproof.report.gallery import png
from overproof.report.maps import RIGHT, fill
from overproof.report.values import items, number, table

HEAT = (0.835, 0.369, 0.0)
COVER = 0.7  # how far the strongest cell of a map covers the image
MOST = 2


def gaps(probes: Mapping[str, Any]) -> Chart | None:
    """Headlines of all probes whose figures are shares, in points beyond chance, with their controls."""
    rows = []
    for name, found in probes.items():
        first = table(next(iter(items(table(found).get("rows"))), None))
        chance, gap = number(table(found).get("chance")) or 0.0, table(first.get("gap"))
        ends = [number(gap.get(key)) for key in ("value", "low", "high")]
        if table(found).get("share", True) and None not in ends:
            controls = [number(table(control).get("value")) for control in table(first.get("controls")).values()]
            points = [100 * (value - chance) for value in ends if value is not None]
            rows.append((str(name), points, [100 * (value - chance) for value in controls if value is not None]))
    if not rows:
        return None

    def paint(axes: Any) -> None:
        for place, (_, (value, low, high), controls) in enumerate(reversed(rows)):
            axes.barh(place, value, 0.55, color=PALETTE[0], alpha=0.8)
            axes.plot([low, high], [place, place], color=INK, linewidth=1.2)
            axes.scatter(
                controls, [place] * len(controls), s=22, facecolors="none", edgecolors=PALETTE[1], linewidths=1.3, zorder=3
            )
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(rows)), [name for name, _, _ in reversed(rows)], fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set(xlabel="students less independent students (points)")
        axes.set_position((0.34, 0.16, 0.63, 0.8))

    note = "Bars: beyond chance; lines: 95 % over images; rings: controls, which ought to be near zero."
    return Chart("What was passed on", draw(paint, "Gap of every probe with interval and controls"), note)


def scores(found: Mapping[str, Any]) -> Chart | None:
    """The share of images that fool each model, with intervals."""
    rows = items(found.get("rows"))
    known = table(table(rows[0]).get("scores")) if rows else {}
    bars = [(str(name), [number(table(value).get(key)) for key in ("value", "low", "high")]) for name, value in known.items()]
    whole = [(name, [100 * end for end in ends if end is not None]) for name, ends in bars if None not in ends]
    if not whole:
        return None

    def paint(axes: Any) -> None:
        for place, (name, (value, low, high)) in enumerate(whole):
            axes.bar(place, value, 0.6, color=PALETTE[_role(name)], alpha=0.85)
            axes.plot([place, place], [low, high], color=INK, linewidth=1.2)
        axes.set_xticks(range(len(whole)), [_short(name) for name, _ in whole], rotation=30, ha="right", fontsize=8)
        axes.grid(visible=False, axis="x")
        axes.set(ylabel="fooled (%)", ylim=(0, 102))

    note = "Teacher: of all images. Others: of the images that fool the teacher. Lines: 95 % over images."
    return Chart(
        "Fooled by images made against the teacher", draw(paint, "Share of images fooling each model", bottom=0.75), note
    )


def curves(name: str, found: Mapping[str, Any]) -> Chart | None:
    """Agreement of two views over their strength, a line for each model."""
    rows = [table(row) for row in items(found.get("rows"))]
    at = [(float(row["condition"]), table(row.get("scores"))) for row in rows if row.get("condition")]
    title = f"Same answer to both views: {name}"
    return _lines(at, title, ("strength of " + name, "same answer (%)")) if len(at) > 1 else None


def robustness(found: Mapping[str, Any]) -> list[Chart]:
    """Accuracy over the severity of each kind of corruption, a line for each model."""
    kinds: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for row in map(table, items(found.get("rows"))):
        if row.get("quantity") == "accuracy" and row.get("condition"):
            kind, _, severity = str(row["condition"]).rpartition(" ")
            kinds.setdefault(kind, []).append((float(severity), table(row.get("scores"))))
    return [
        _lines(
            sorted(at, key=lambda one: one[0]), f"Accuracy on spoilt images: {kind}", (f"severity of {kind}", "accuracy (%)")
        )
        for kind, at in kinds.items()
        if len(at) > 1
    ]


def _lines(at: Sequence[tuple[float, Mapping[str, Any]]], title: str, words: tuple[str, str]) -> Chart:
    across, up = words
    models = list(at[0][1])

    def paint(axes: Any) -> None:
        for position, model in enumerate(models):
            x = [place for place, _ in at]
            low, middle, high = ([100 * float(table(known[model])[key]) for _, known in at] for key in ("low", "value", "high"))
            style = line_style(position)
            axes.plot(x, middle, marker="o", markersize=3, label=_short(model), **style)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)
        axes.set(xlabel=across, ylabel=up)
        axes.legend(frameon=False, fontsize=7)

    return Chart(title, draw(paint, f"{up} over {across}"), "Band: 95 % over images.")


def planes(arrays: Mapping[str, np.ndarray]) -> list[Chart]:
    """The class on every point of the first planes, a drawing for each network, with the three images as marks."""
    prefix = "decision-planes/plane/"
    names = [name.removeprefix(prefix) for name in arrays if name.startswith(prefix)]
    if not names:
        return []
    places, axes = arrays["decision-planes/places"].astype(float), arrays["decision-planes/axes"].astype(float)
    return [
        _plane(arrays[f"{prefix}{name}"][i], places[i], axes[i], f"plane {i + 1}: {name}")
        for i in range(min(MOST, len(places)))
        for name in names
    ]


def _plane(classes: np.ndarray, places: np.ndarray, axes_of: np.ndarray, title: str) -> Chart:
    from matplotlib import colormaps

    (left, right), (lower, upper) = ((axis[0], axis[-1]) for axis in axes_of)
    pixels = colormaps["tab20"](classes.astype(int) % 20)
    pixels[..., 3] = 0.8

    def paint(axes: Any) -> None:
        axes.imshow(pixels, extent=(left, right, lower, upper), origin="lower", interpolation="none", aspect="auto")
        axes.scatter(places[:, 0], places[:, 1], s=26, color=INK, marker="x", linewidths=1.4)
        axes.grid(visible=False)
        axes.set(xlabel="towards the second image", ylabel="towards the third")

    return Chart(title, draw(paint, f"Predicted classes on {title}"), "A colour is a class; crosses are the three images.")


def grids(arrays: Mapping[str, np.ndarray]) -> list[Chart]:
    """Similarity of every layer of the teacher (down) with every layer of a student (across)."""
    prefix = "cka/grid/"
    return [
        _grid(values.astype(float), name.removeprefix(prefix)) for name, values in arrays.items() if name.startswith(prefix)
    ]


def _grid(values: np.ndarray, name: str) -> Chart:
    filled = np.nan_to_num(values)

    def paint(axes: Any) -> None:
        fill(axes, np.clip(filled, 0, 1) * 0.9, RIGHT, (-0.5, values.shape[1] - 0.5, values.shape[0] - 0.5, -0.5))
        for row, column in np.ndindex(values.shape):
            axes.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(values.shape[1]))
        axes.set_yticks(range(values.shape[0]))
        axes.grid(visible=False)
        axes.set(xlabel=f"layer of {name}", ylabel="layer of the teacher")

    return Chart(f"CKA with {name}", draw(paint, f"Similarity of layers, teacher and {name}"))


def cam_triplets(arrays: Mapping[str, np.ndarray], classes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """For each example (caption, data URI): the image, then the same under the map of each network."""
    prefix = "localisation/cam/"
    names = [name for name in arrays if name.startswith(prefix)]
    if not names:
        return []
    found = []
    for i, image in enumerate(arrays["localisation/images"].astype(float)):
        word = _word(classes, arrays["localisation/labels"][i])
        overlays = [(_short(name.removeprefix(prefix)), png(_under(image, arrays[name][i].astype(float)))) for name in names]
        found.append([(word, png(image)), *overlays])
    return found


def attacked_images(arrays: Mapping[str, np.ndarray], classes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """For each example (caption, data URI): an image, what fools the teacher in its place, and the change, largest at full strength."""
    prefix = "adversarial-transfer/"
    if f"{prefix}clean" not in arrays:
        return []
    found = []
    for i, (clean, attacked) in enumerate(zip(arrays[f"{prefix}clean"], arrays[f"{prefix}attacked"], strict=True)):
        change = attacked.astype(float) - clean.astype(float)
        shown = png(0.5 + change / max(2 * float(np.abs(change).max()), 1e-9))
        found.append(
            [(_word(classes, arrays[f"{prefix}labels"][i]), png(clean)), ("attacked", png(attacked)), ("change", shown)]
        )
    return found


def _word(classes: Sequence[str], label: object) -> str:
    number = int(str(label))
    return classes[number] if 0 <= number < len(classes) else str(number)


def _under(image: np.ndarray, cam: np.ndarray) -> np.ndarray:
    height, width = image.shape[1:]
    cells = cam[(np.arange(height) * cam.shape[0] // height)[:, None], np.arange(width) * cam.shape[1] // width]
    colour = np.repeat(image, 3, axis=0) if image.shape[0] == 1 else image
    covered: np.ndarray = colour * (1 - COVER * cells) + np.array(HEAT)[:, None, None] * COVER * cells
    return covered


def _role(name: str) -> int:
    return {"teacher": 6, "student": 0, "independent": 5}.get(name.partition(":")[0].partition(" ")[0], 1)


def _short(name: str) -> str:
    own = name.partition(":")[2] or name  # the role is told by place and colour
    text = "".join(c if c.isprintable() else "?" for c in own)
    return text if len(text) <= 20 else text[:19] + "…"
