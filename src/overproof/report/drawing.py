"""Drawings as SVG that lives inside the page: it takes the page's colours and font, and stays small."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any

# Okabe and Ito's palette without its yellow, which no white page can carry; the page may lighten each through --sN.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#8a8a8a")
DASHES = ((0, ()), (0, (5, 2)), (0, (1.5, 1.5)))
SIZE = (4.6, 2.9)  # inches
INK = "#010203"  # stands for the page's text colour until the drawing is finished
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "overproof",
    "text.parse_math": False,  # a class called "$x$" is a name, not an equation
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
}


def line_style(position: int) -> dict[str, Any]:
    """Colour and dashes of the run at `position`: 21 runs can be told apart."""
    return {"color": PALETTE[position % len(PALETTE)], "linestyle": DASHES[position // len(PALETTE) % len(DASHES)]}


def swatch(position: int) -> dict[str, str]:
    """The same for the page's own legend."""
    dashes = DASHES[position // len(PALETTE) % len(DASHES)][1]
    return {"color": f"var(--s{position % len(PALETTE)})", "dashes": " ".join(str(2 * length) for length in dashes)}


def draw(paint: Callable[[Any], None], label: str, *, bottom: float = 0.45) -> str:
    """What `paint(axes)` draws, as an <svg> element described by `label`; `bottom` inches are kept for the x axis."""
    import matplotlib
    from matplotlib.figure import Figure

    (width, height), left = SIZE, 0.6
    buffer = io.StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context(STYLE):
        warnings.simplefilter("ignore")  # a letter absent from matplotlib's font is drawn by the browser's
        figure = Figure(figsize=SIZE)
        axes = figure.add_axes((left / width, bottom / height, 0.97 - left / width, 0.96 - bottom / height))
        paint(axes)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    body = svg[svg.index(">") + 1 :]
    box = re.search(r'viewBox="([\d. ]+)"', svg)
    used = set(re.findall(r"#([\w-]+)\)|href=\"#([\w-]+)\"", body))
    kept = {name for pair in used for name in pair if name}
    body = re.sub(r' id="([\w.-]+)"', lambda match: match[0] if match[1] in kept else "", body)
    body = re.sub(r"(?<=[=\" (-])(\d+\.\d{2})\d+(?=[\" ,)\n])", r"\1", body)
    body = re.sub(r"font: ([\d.]+px)[^;\"]*|font-family: [^;\"]*", lambda m: f"font-size: {m[1]}" if m[1] else "", body)
    body = body.replace(f": {INK}", ": currentColor")
    for position, color in enumerate(PALETTE):
        body = body.replace(f": {color}", f": var(--s{position})")
    body = re.sub(r"\n\s*", "\n", body)
    described = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<svg viewBox="{box[1] if box else "0 0 331 209"}" role="img" aria-label="{described}">{body}'
