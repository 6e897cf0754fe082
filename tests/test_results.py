"""RESULTS.md: figures by subject and metric, or one below the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from overproof.errors import FolderError
from overproof.folder import write_json
from overproof.run.results import write_results

RECIPE = """
figures = [{ name = "a", run = "one", metric = "clean" }]
[recipe]
title = "Small"
[defaults.data]
name = "digits"
[runs.one]
"""


def figure(name: str, mean: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "mean": mean, "standard_error": None, "published": None, "source": "", "percent": True, **more}


def table(place: Path, figures: list[dict[str, Any]]) -> str:
    recipe = place / "small.toml"
    recipe.write_text(RECIPE)
    about = {"seeds": [0], "seconds": {"one": 2.0}, "notes": "", "command": "overproof reproduce small", "environment": {}}
    write_json(place / "results" / "small.json", {"figures": figures, **about})
    write_results([recipe], place / "results", place / "RESULTS.md")
    return (place / "RESULTS.md").read_text()


def test_subjects_and_metrics_become_rows_and_columns(tmp_path: Path) -> None:
    figures = [figure(f"{who}, {what}", 0.5) for who in ("KD", "CE", "AT (teacher, 2)") for what in ("clean", "PGD")]
    figures[1] |= {"mean": 0.25, "standard_error": 0.01}
    figures += [figure("CE minus KD, PGD", -0.125), figure("agreement", 1.0)]
    text = table(tmp_path, figures)
    assert "| | clean | PGD |\n|---|---|---|\n| KD | 50.00 | 25.00 ± 1.00 |\n" in text
    assert "| AT (teacher, 2) | 50.00 | 50.00 |\n| CE minus KD |  | -12.50 |\n\n| figure | ours |" in text
    assert "| agreement | 100.00 |" in text


def test_many_metrics_of_few_subjects_are_rows(tmp_path: Path) -> None:
    figures = [figure(f"{who}: {what}", 7.5, percent=False) for who in ("ce", "fim") for what in ("a", "b", "c, d")]
    assert "| | ce | fim |\n|---|---|---|\n| a | 7.50 | 7.50 |\n| b |" in table(tmp_path, figures)


def test_what_makes_no_grid_is_listed(tmp_path: Path) -> None:
    assert "| a, x | 50.00 |\n| b, y | 50.00 |" in table(
        tmp_path, [figure("a, x", 0.5), figure("b, y", 0.5), figure("c, z", 1)]
    )
    twice = [figure(name, 0.5) for name in ("a, x", "a, y", "b, x", "b, y", "a, x")]
    assert "| a | 50.00 | 50.00 |" in table(tmp_path, twice)
    assert "| a, x | 50.00 |" in table(tmp_path, twice)


def test_published_figures_stand_beside_ours(tmp_path: Path) -> None:
    text = table(tmp_path, [figure(f"{who}, {what}", 0.5, published=0.75, source="Table 1") for who in "ab" for what in "xy"])
    assert "| b, y | 50.00 | 75.00 | Table 1 |" in text


def test_tables_of_scripts_stand_behind_the_recipes(tmp_path: Path) -> None:
    told = {"title": "Turned", "columns": ["sigma", "clean", "pgd"], "rows": [["off", 0.5, None], ["70", 0.25, 1.0]]}
    write_json(
        tmp_path / "results" / "table-knob.json", {"about": "A knob.", "tables": [told], "environment": {"device": "cpu"}}
    )
    text = table(tmp_path, [figure("a, x", 0.5)])
    assert (
        "## knob\n\nA knob.\n\nTurned:\n\n| sigma | clean | pgd |\n|---|---|---|\n| off | 50.0 |  |\n| 70 | 25.0 | 100.0 |"
        in text
    )


def test_somebody_elses_file_is_kept(tmp_path: Path) -> None:
    table(tmp_path, [figure("a", 1.0)])
    (tmp_path / "RESULTS.md").write_text("mine")
    with pytest.raises(FolderError, match="somebody else's file"):
        write_results([], tmp_path / "results", tmp_path / "RESULTS.md")
    assert (tmp_path / "RESULTS.md").read_text() == "mine"


def test_small_figures_keep_their_digits(tmp_path: Path) -> None:
    figures = [figure("median", 0.0194, percent=False, standard_error=0.0012), figure("share", 0.0194), figure("none", 0.0)]
    shown = table(tmp_path, figures)
    assert "| median | 0.019 ± 0.001 |" in shown
    assert "| share | 1.94 |" in shown
    assert "| none | 0.00 |" in shown
