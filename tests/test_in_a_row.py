"""Several runs in a row: one that diverges does not take the others along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from overproof.cli import call
from overproof.config import resolve
from overproof.folder import RunFolder
from overproof.run.in_a_row import DivergedError
from overproof.run.recipes import read_recipe, run_recipe
from overproof.run.reproduce import reproduce
from overproof.run.seeds import execute_seeds

RECIPE = """
[recipe]
title = "one diverges"
[defaults]
data = { name = "digits", limit_train = 100, limit_test = 50 }
model = { name = "mlp", hidden = [8] }
train = { epochs = 1 }
evaluation = { curve = [] }
[runs.good]
method.name = "ce"
[runs.bad]
method.name = "ce"
train.lr = 1e30
[runs.student-of-bad]
verb = "distill"
teacher.run = "@bad"
method.name = "kd"
[runs.student]
verb = "distill"
teacher.run = "@good"
method.name = "kd"
[[figures]]
name = "clean"
run = "student"
metric = "clean"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipes" / "diverging.toml"
    path.parent.mkdir()
    path.write_text(RECIPE)
    return path


def test_a_run_that_diverges_takes_only_those_along_that_need_it(recipe: Path, tmp_path: Path) -> None:
    for _ in range(2):  # and repeated, it is the same
        with pytest.raises(
            DivergedError, match=r"(?s)2 of 4 runs.*bad: The weights after step 1 are useless.*student-of-bad: It needs bad"
        ) as told:
            run_recipe(read_recipe(recipe), tmp_path / "runs")
        assert [folder.path.name for folder in told.value.done] == ["good", "student"]
    assert RunFolder(tmp_path / "runs" / "student").status["state"] == "done"
    assert not (tmp_path / "runs" / "student-of-bad").exists()
    assert reproduce(out=tmp_path, results=tmp_path / "results", home=recipe.parent) == {"diverging": "diverged"}


def test_the_command_shows_the_others(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["run", str(recipe), "--out", str(tmp_path / "runs"), "--json"]) == 1
    out, err = capsys.readouterr()
    assert [row["name"] for row in json.loads(out)["runs"]] == ["good", "student"]
    assert "2 of 4 runs have no result" in err
    assert (tmp_path / "runs" / "report.html").exists()


def test_seeds_that_diverge_leave_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from overproof.run import in_a_row

    known = in_a_row.execute

    def execute(config, folder, **options):  # type: ignore[no-untyped-def]
        changed = resolve(config.table(), {"train": {"lr": 1e30}}) if config.seed == 1 else config
        return known(changed, folder, **options)

    monkeypatch.setattr(in_a_row, "execute", execute)
    config = resolve({"data": {"name": "digits", "limit_train": 100}, "model": {"name": "mlp"}, "train": {"epochs": 1}})
    with pytest.raises(DivergedError, match="1 of 3 runs") as told:
        execute_seeds(config, tmp_path, [0, 1, 2])
    assert [folder.path.name for folder in told.value.done] == ["seed-0", "seed-2"]
