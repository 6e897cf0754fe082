"""Runs on changed sets: whom the teacher has learned from, and what a run is judged on when other data are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from overproof.config import RunConfig, resolve
from overproof.data import DATA
from overproof.data.load import read_parts
from overproof.data.modifiers import same_source
from overproof.errors import UnknownNameError
from overproof.folder import RunFolder, write_toml
from overproof.registry import Entry
from overproof.run import judging
from overproof.run.comparing import _common
from overproof.run.course import checked_evolution
from overproof.run.guarding import guard_data
from overproof.run.prepare import UserData, data_of
from overproof.run.studying import learned


def small_model(seed: int) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source without a test part."""
    whole = {"train": read_parts("digits", None, {})["train"]}
    monkeypatch.setitem(DATA._entries, "single", Entry("single", lambda: whole))


def taught(tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> RunConfig:
    """The configuration of a student of a run on the data `theirs`."""
    write_toml(tmp_path / "teacher" / "config.toml", resolve({"data": theirs}).table())
    return resolve({"data": ours, "teacher": {"run": str(tmp_path / "teacher")}})


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"name": "digits+rgb"}, {"name": "digits", "validation": 0}),
        ({"name": "digits"}, {"name": "digits+mixed:inverted", "split_seed": 1}),
        ({"name": "digits+mixed:inverted", "validation": 0.3}, {"name": "digits+rgb", "long_tail": 20.0}),
        ({"name": "digits"}, {"name": "digits+mixed:inverted+contrast:1", "split_seed": 3, "limit_train": 401}),
        ({"name": "single", "test": 0.3, "validation_from": "test"}, {"name": "single", "test": 0.2}),
        ({"name": "single+inverted", "test": 0.3}, {"name": "single", "test": 0.3, "validation_from": "test"}),
    ],
)
@pytest.mark.usefixtures("single")
def test_a_teacher_that_saw_the_held_out_pictures(tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Counted against the teacher's set as it was trained on, whatever changed it."""
    data, seen = data_of(resolve({"data": ours})), data_of(resolve({"data": theirs})).train
    expected = int(torch.isin(data.validation.origin, seen.origin).sum())
    assert expected > 0
    assert learned(taught(tmp_path, ours, theirs), data) == expected


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"name": "digits"}, {"name": "digits+mixed:inverted"}),
        ({"name": "digits+mixed:inverted"}, {"name": "digits+rgb"}),
        ({"name": "digits+rgb", "validation_from": "test"}, {"name": "digits", "validation": 0}),
    ],
)
def test_a_teacher_that_did_not(
    tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert learned(taught(tmp_path, ours, theirs), data_of(resolve({"data": ours}))) == 0
    assert "nobody can tell" not in capsys.readouterr().err


def test_what_nobody_can_know_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = data_of(resolve({}))
    run = taught(tmp_path, {"name": "digits"}, {"name": "mnist"})
    foreign = resolve({"teacher": {"name": "mlp", "weights": "x.safetensors"}})
    gone = resolve({"teacher": {"run": str(tmp_path / "gone")}})
    cases = (
        (run, data, "its run was made from mnist"),
        (foreign, data, "it comes without a run"),
        (gone, data, "gone is not there"),
        (run, UserData(data.train, data.validation), "the images come from a program"),
    )
    for config, images, why in cases:
        assert learned(config, images) == 0
        said = capsys.readouterr().err
        assert "nobody can tell whether the teacher has learned from the held-out images" in said
        assert why in said


def test_one_folder_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert same_source("parquet:x", "parquet:./x+noise:3")
    assert same_source(f"folder:{tmp_path}/x+rgb", "folder:y/../x")
    assert not same_source("parquet:x", "folder:x")
    assert not same_source("parquet:x", "parquet:y")
    assert not same_source("hub:x", "hub:./x")
    assert same_source("digits", "digits+rgb")


OWN = {"name": "digits", "validation": 0.5, "validation_from": "test", "split_seed": 4, "limit_test": 60}


def test_a_changed_set_is_divided_as_the_runs_own(tmp_path: Path) -> None:
    config = resolve({"data": OWN})
    own = data_of(config)
    guarded = guard_data(config, "digits+noise:3", ())
    folders = [RunFolder(tmp_path / name) for name in "ab"]
    compared = data_of(_common([config, config], folders, "digits+noise:3"))
    result = judging._measure(small_model(0), config, attacks={}, data="digits+noise:3", sanity=0)
    for test in (guarded.test, compared.test):
        assert test.name == "digits+noise:3"
        assert torch.equal(test.index, own.test.index)
    assert torch.equal(guarded.validation.index, own.validation.index)
    assert result.samples["index"].tolist() == own.test.index.tolist()
    assert result.summary["protocol"]["data"]["validation_from"] == "test"
    changed = guard_data(config, "digits+noise:3", ("data.split_seed=5",))
    assert not torch.equal(changed.test.index, own.test.index)
    other = _common([config, config], folders, "mnist").data
    assert (other.name, other.validation, other.split_seed, other.validation_from) == ("mnist", 0.5, 4, "train")


def test_the_runs_own_teacher_has_the_weights_it_taught_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(path: Any, which: str = "best", *, trusted: bool = False) -> Any:
        asked.append(which)
        return small_model(1)

    monkeypatch.setattr(judging, "load_model", load)
    table = taught(tmp_path, {**OWN, "limit_test": 30}, {"name": "digits"}).table()
    for which in ("last", "best"):
        config = resolve(table, {"teacher": {"which": which}})
        protocol = judging._measure(small_model(0), config, attacks={}, sanity=0).summary["protocol"]
        assert protocol.get("teacher_weights") == (None if which == "best" else which)
    assert asked == ["last", "best"]


def test_evolution_on_a_changed_set() -> None:
    assert checked_evolution(resolve({"verb": "evolve", "data": {"name": "digits+rgb"}})).data.name == "digits+rgb"
    with pytest.raises(UnknownNameError, match="data"):
        checked_evolution(resolve({"verb": "evolve", "data": {"name": "diggits+rgb"}}))
