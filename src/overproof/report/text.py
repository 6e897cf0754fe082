"""What a reader must know about a table of runs, and the table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from overproof.report.table import SUSPECTED, Row, columns, comparable


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader must know to read the columns rightly."""
    said = []
    kinds = {row["se"] for row in rows if row["clean"] is not None}
    if "seeds" in kinds:
        said.append(
            "±: standard error of the mean over seeds" + (" (one seed: binomial, over images)." if len(kinds) > 1 else ".")
        )
    elif kinds:
        said.append("±: binomial standard error over the images of one evaluation; it does not cover the choice of seed.")
    said += [
        f"Δ: difference from {base}, paired by seed."
        for base in dict.fromkeys(filter(None, (row.get("baseline") for row in rows)))
    ]
    sets = list(dict.fromkeys(tuple(row["worst"]) for row in rows if row["robust"] is not None))
    said += [f"Robust accuracy (worst case over: {', '.join(names)})." for names in sets]
    masked = [row["name"] for row in rows if row.get("suspected")]
    if masked:
        said.append(
            f"{SUSPECTED.capitalize()} (?) for: {', '.join(masked)}. Their robustness is probably overestimated, and none of "
            "their robust figures is marked as best; the sanity panel says why."
        )
    calm = [row["name"] for row in rows if row["clean"] is not None and not row["attacks"] and not row["sizes"]]
    if calm:
        said.append(f"Never attacked, so nothing is known about the robustness of: {', '.join(calm)}.")
    if not comparable(rows, 0):
        said.append("The runs were measured on different images: their figures are not comparable, and none is marked as best.")
    elif not comparable(rows, 1):
        said.append(
            "The runs were attacked differently: their robust accuracies are not comparable, and none is marked as best."
        )
    missing = [row["name"] for row in rows if row["clean"] is None and not row.get("damaged") and not row.get("outdated")]
    if missing:
        said.append(f"No evaluation was made of: {', '.join(missing)}.")
    return said + [text for row in rows for text in _caveats(row)]


def _caveats(row: Row) -> list[str]:
    """What other images or weights than its own the figures of a row are of, and which evaluations have no part in them."""
    name, said = row["name"], []
    if row["apart"]:
        said.append(
            f"Not on its own test images with its best weights, which nobody evaluated: {name} ({', '.join(row['apart'])})."
        )
    left_out = {
        "damaged": ("Damaged", "Delete the file and evaluate again."),
        "outdated": ("Out of date, since the run has other weights now", "Evaluate again."),
    }
    for key, (why, remedy) in left_out.items():
        if row.get(key):
            said.append(f"{why}, and left out of the row of {name}: {', '.join(row[key])}. {remedy}")
    return said


def text_table(rows: Sequence[Row]) -> str:
    """The rows of `summarise` or `group_by_seed` as aligned plain text, with notes on how to read them."""
    if not rows:
        return "No runs."
    chosen = columns(rows)
    lines = [[column.head for column in chosen], *([column.show(row) for column in chosen] for row in rows)]
    clean = [["".join(c if c.isprintable() else "?" for c in cell) for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in clean) for i in range(len(chosen))]

    def aligned(line: Sequence[str]) -> str:
        cells = zip(line, widths, chosen, strict=True)
        return "  ".join(c.rjust(width) if column.numeric else c.ljust(width) for c, width, column in cells).rstrip()

    head, *body = [aligned(line) for line in clean]
    return "\n".join([head, "-" * max(map(len, (head, *body))), *body, "", *notes(rows)])
