"""The command line: exit codes, one paragraph per error, JSON on standard output alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from overproof.cli import call
from overproof.errors import UnknownNameError
from overproof.folder import RunFolder

QUICK = ["--data", "digits", "--set", "data.limit_train=200", "--set", "data.limit_test=50", "--epochs", "1"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def out(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


def test_train_distill_evaluate_report_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["train", *QUICK, "--model", "mlp", "--out", "runs/teacher"]) == 0
    assert "report: runs/teacher/report.html" in capsys.readouterr().out
    assert (
        call(
            [
                "distill",
                *QUICK,
                "--teacher",
                "runs/teacher",
                "--student",
                "mlp",
                "--out",
                "runs/kd",
                "--json",
                "--set",
                "method.temperature=4",
            ]
        )
        == 0
    )
    assert out(capsys)["runs"][0]["method"] == "kd"
    assert RunFolder("runs/kd").config["method"]["temperature"] == 4
    command = ["evaluate", "runs/kd", "--attack", "pgd", "--set", "attack.eps=8/255", "--set", "attack.steps=3", "--json"]
    assert call([*command, "--curve", "0,8/255"]) == 0
    summary = out(capsys)
    assert summary["attacks"]["pgd"]["eps"] == 8 / 255
    assert summary["curve"]["eps"] == [0, 8 / 255]
    assert summary["agreement"]["teacher"] == "runs/teacher"
    assert call([*command, "--limit", "20"]) == 0
    capsys.readouterr()
    assert {"test-pgd", "test-pgd-2", "test-best", "test-last"} == set(RunFolder("runs/kd").evaluations)
    assert call(["report", "runs/teacher", "runs/kd", "-o", "both.html"]) == 0
    assert "<html" in Path("both.html").read_text()
    capsys.readouterr()
    assert call(["show", "runs/kd", "--json"]) == 0
    assert out(capsys)["status"]["state"] == "done"
    assert call(["resume", "runs/kd"]) == 0


def test_the_headline_of_a_run_survives_later_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["train", *QUICK, "--model", "mlp", "--out", "runs/f"]) == 0
    attacked = ["--attack", "pgd:steps=3"]
    for extra in (
        ["--limit", "20"],
        ["--split", "train"],
        ["--set", "data.limit_test=200"],
        ["--which", "last", *attacked],
        ["--limit", "30", *attacked],
    ):
        assert call(["evaluate", "runs/f", *extra, "--sanity", "0"]) == 0
    capsys.readouterr()
    assert call(["show", "runs/f", "--json"]) == 0
    (row,) = out(capsys)["runs"]
    assert (row["evaluation"], row["samples"], row["apart"], row["outdated"]) == ("test-best", 50, [], [])
    assert (list(row["attacks"]), row["attacks_samples"]) == (["pgd:steps=3"], {"pgd:steps=3": 30})
    assert call(["show", "runs/f"]) == 0
    assert "Never attacked" not in capsys.readouterr().out
    Path("runs/f/weights/best.safetensors").write_bytes(b"other weights")
    assert call(["show", "runs/f", "--json"]) == 0
    (row,) = out(capsys)["runs"]
    assert "test-best" in row["outdated"]
    assert row["apart"] == ["last weights"]


def test_model_by_name_with_weights_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["train", *QUICK, "--model", "mlp", "--out", "runs/a"]) == 0
    capsys.readouterr()
    command = [
        "evaluate",
        "--model",
        "mlp",
        "--weights",
        "runs/a/weights/best.safetensors",
        "--data",
        "digits",
        "--json",
        "--set",
        "data.limit_test=50",
    ]
    assert call(command) == 0
    assert out(capsys)["clean"] == RunFolder("runs/a").evaluations["test-best"]["clean"]


def test_seeds_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["train", *QUICK, "--model", "mlp", "--out", "runs/many", "--seeds", "0,1", "--json"]) == 0
    result = out(capsys)
    assert [RunFolder(f"runs/many/seed-{s}").config["seed"] for s in (0, 1)] == [0, 1]
    (group,) = result["over_seeds"]
    accuracies = [RunFolder(f"runs/many/seed-{s}").evaluations["test-best"]["clean"] for s in (0, 1)]
    assert group["n"] == 2
    assert group["clean"] == pytest.approx(sum(accuracies) / 2)
    assert group["clean_se"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2)


RECIPE = """
[recipe]
title = "A test"
seeds = [0, 1]
[defaults.data]
name = "digits"
limit_train = 200
limit_test = 50
[defaults.model]
name = "mlp"
[defaults.train]
epochs = 1
[runs.teacher]
[runs.kd]
verb = "distill"
teacher.run = "@teacher"
method.name = "kd"
[[figures]]
name = "clean accuracy of KD"
run = "kd"
metric = "clean"
published = 0.5
source = "nowhere"
[[figures]]
name = "KD minus teacher"
run = "kd"
minus = "teacher"
metric = "clean"
"""


def test_recipe_and_reproduce(capsys: pytest.CaptureFixture[str]) -> None:
    from overproof.run.reproduce import reproduce

    Path("recipes").mkdir()
    Path("recipes/small.toml").write_text(RECIPE)
    assert call(["run", "recipes/small.toml", "--seeds", "0"]) == 0
    assert RunFolder("runs/small/kd").evaluations["test-best"]["agreement"]["teacher"] == "runs/small/teacher"
    assert reproduce(home=Path("recipes"), minutes=0) == {"small": "unfinished"}
    assert "Not measured yet" in Path("RESULTS.md").read_text()
    assert reproduce(home=Path("recipes")) == {"small": "measured"}
    assert reproduce(home=Path("recipes")) == {"small": "known"}
    result = json.loads(Path("results/small.json").read_text())
    values = [RunFolder(f"runs/reproduce/small/seed-{s}/kd").evaluations["test-best"]["clean"] for s in (0, 1)]
    assert result["figures"][0]["values"] == values
    assert result["figures"][0]["standard_error"] == pytest.approx(abs(values[0] - values[1]) / 2)
    table = Path("RESULTS.md").read_text()
    assert f"| clean accuracy of KD | {50 * sum(values):.2f} ±" in table
    assert "| 50.00 | nowhere |" in table


def test_runs_in_a_row_over_several_devices_are_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    Path("small.toml").write_text(RECIPE)
    assert call(["run", "small.toml", "--seeds", "0", "--set", "train.devices=2"]) == 2
    assert "torchrun --nproc-per-node" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_figures_of_what_a_method_told(tmp_path: Path) -> None:
    from overproof.run.seeds import figure_of

    folder = RunFolder(tmp_path)
    epochs = ({"loss": 2.0, "searched": 0.25}, {"loss": 1.0, "searched": 0.5}, {"loss": 0.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"train": told}) + "\n" for told in epochs))
    assert figure_of(folder, "logged loss") == 0.5
    assert figure_of(folder, "logged searched") == 0.5
    assert figure_of(folder, "first logged searched") == 0.25
    with pytest.raises(UnknownNameError, match="Did you mean 'searched'"):
        figure_of(folder, "logged serched")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('name = "kd"', 'name = "kdd"'), "Unknown method 'kdd'"),
        (('"@teacher"', '"@teahcer"'), "Did you mean 'teacher'"),
        (("epochs = 1", "epoch = 1"), "Did you mean 'epochs'"),
        (("[recipe]", "[recipes]"), "Did you mean 'recipe'"),
        (("published =", "publish ="), "publish"),
        (('metric = "clean"', 'metric = "deepfool fooling within reach"'), "'reach'"),
        (('metric = "clean"', 'metric = "mag-sim"\nagainst = "teacher"\noptions = { targts = 2 }'), "Did you mean 'targets'"),
        (('metric = "clean"', 'metric = "planes"\nagainst = "teacher"\noptions = { images = 2 }'), "'images'"),
    ],
)
def test_bad_recipes(change: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.toml").write_text(RECIPE.replace(*change))
    assert call(["run", "bad.toml"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists() or "kdd" in message


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", *QUICK, "--out", "x", "--method", "kd"], 2, "name a teacher"),
        (["train", *QUICK, "--out", "x", "--method", "pdg-at"], 2, "Did you mean 'pgd-at'"),
        (["train", *QUICK, "--out", "x", "--model", "resent20"], 2, "Did you mean 'resnet20'"),
        (["train", "--data", "digit", "--out", "x"], 2, "Did you mean 'digits'"),
        (["train", *QUICK, "--out", "x", "--set", "method.tau=3"], 2, "option of method 'ce'"),
        (["train", *QUICK, "--out", "x", "--seeds", "a"], 2, "whole numbers"),
        (["train", *QUICK, "--out", "x", "--seeds", "0,1", "--devices", "2"], 2, "torchrun --nproc-per-node"),
        (["train", *QUICK, "--out", "x", "--set", "train.loggers=['paper']"], 2, "train.loggers"),
        (["train", "--epochs", "nine", "--out", "x"], 2, "nine"),
        (["distill", *QUICK, "--teacher", "nowhere", "--student", "mlp", "--out", "x"], 1, "nowhere is not a run folder"),
        (["evaluate", "nowhere", "--attack", "pgd"], 1, "not a run folder"),
        (["evaluate", "--attack", "pgd"], 2, "Name a run folder"),
        (["evaluate", "nowhere", "--set", "attack.eps=1"], 2, "--attack"),
        (["report", "nowhere"], 1, "not a run folder"),
        (["list", "things"], 2, "things"),
        (["show", "rsald"], 2, "Did you mean 'rslad'"),
        (["run", "absent.toml"], 1, "does not exist"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_exit_codes_and_messages(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert not Path("x").exists(), "a refused command left a folder behind"


def test_other_folders_are_not_touched(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("precious")
    assert call(["train", *QUICK, "--model", "mlp", "--out", "mine"]) == 1
    assert "not a run folder" in capsys.readouterr().err
    assert [p.name for p in Path("mine").iterdir()] == ["thesis.txt"]


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["evaluate", "nowhere", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_help_names_every_command() -> None:
    """(That it imports nothing heavy, which is what makes it quick, is asserted in test_floors.)"""
    text = subprocess.run([sys.executable, "-m", "overproof", "--help"], check=True, capture_output=True, text=True).stdout
    commands = ("train", "distill", "probe-linear", "evaluate", "resume", "report", "list", "show", "demo", "run", "reproduce")
    for command in commands:
        assert command in text


def test_lists_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("methods", "attacks", "models", "data", "guards", "probes"):
        assert call(["list", kind, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert all({"name", "paper", "tags"} <= set(row) for row in rows)
        assert rows or kind in ("guards", "probes")


def test_two_processes_equal_one_with_the_doubled_batch() -> None:
    """A BN-free model over gloo: same weights as one process with twice the batch, and no copy drifts."""
    code = "import sys; from overproof.cli import main; main()"
    shared = [
        "--data",
        "digits",
        "--model",
        "mlp",
        "--set",
        "data.limit_train=400",
        "--set",
        "data.limit_test=40",
        "--epochs",
        "2",
    ]
    shared += ["--lr", "0.05", "--set", "train.accelerator=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, extra in (("one", ["--batch-size", "64"]), ("two", ["--batch-size", "32", "--devices", "2"])):
        Path("main.py").write_text(code)
        command = [sys.executable, "main.py", "train", *shared, *extra, "--out", f"runs/{name}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(f"runs/{name}/weights/last.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-6, rtol=1e-5)
    first, second = (RunFolder(f"runs/{name}").metrics for name in ("one", "two"))
    assert first[-1]["validation"] == pytest.approx(second[-1]["validation"], abs=1e-5)
    assert first[-1]["step"] == second[-1]["step"]


def test_a_runs_configuration_repeats_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["train", *QUICK, "--model", "mlp", "--seed", "7", "--out", "runs/first"]) == 0
    assert call(["run", "runs/first/config.toml", "--out", "runs/again"]) == 0
    first, again = (load_file(f"runs/{name}/weights/last.safetensors") for name in ("first", "again/config"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    Path("rslad.toml").write_text('[method]\nname = "rslad"\neps = 0.1\nsteps = 1\n')
    command = ["distill", *QUICK, "--config", "rslad.toml", "--teacher", "runs/first", "--student", "mlp", "--out", "runs/kd"]
    assert call(command) == 0
    assert RunFolder("runs/kd").config["method"]["name"] == "rslad"
    assert RunFolder("runs/kd").evaluations["test-best"]["attacks"]["pgd-20"]["eps"] == 0.1


def test_code_named_in_files_needs_trust(capsys: pytest.CaptureFixture[str]) -> None:
    Path("hostile.toml").write_text('[model]\nname = "os:system"\n')
    for command in (["run", "hostile.toml"], ["train", *QUICK, "--config", "hostile.toml", "--out", "x"]):
        assert call(command) == 2
        assert "--trust" in capsys.readouterr().err


def test_torchrun_processes_are_used() -> None:
    """Under torchrun the processes it started train one model together, and one of them speaks."""
    Path("main.py").write_text("from overproof.cli import main; main()")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        "main.py",
        "train",
        *QUICK,
    ]
    command += [
        "--model",
        "mlp",
        "--set",
        "train.accelerator=cpu",
        "--set",
        "train.checkpoint_seconds=0",
        "--out",
        "runs/two",
        "--json",
    ]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["runs"][0]["state"] == "done"
    # 200 images, batches of 2 x 128 do not fill: one near-equally cut step in the epoch
    assert RunFolder("runs/two").metrics[-1]["step"] == 1


def test_a_curve_without_attack_is_refused_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["train", *QUICK, "--model", "mlp", "--out", "x", "--set", "evaluation.curve=[0.1]"]) == 2
    assert "needs an attack" in capsys.readouterr().err
    assert not Path("x").exists()


def test_evaluations_are_not_overwritten_nor_written_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    for out in ("runs/t", "runs/u"):
        assert call(["train", *QUICK, "--model", "mlp", "--out", out]) == 0
    assert call(["evaluate", "runs/t", "--attack", "fgsm", "--name", "../../evil"]) == 2
    assert call(["evaluate", "runs/t", "--attack", "fgsm", "--name", "test-best"]) == 0
    assert call(["evaluate", "runs/t", "--attack", "fgsm", "--teacher", "runs/u"]) == 0
    assert call(["evaluate", "runs/t", "--attack", "fgsm"]) == 0
    assert call(["evaluate", "runs/t", "--attack", "fgsm"]) == 0
    assert set(RunFolder("runs/t").evaluations) == {"test-best", "test-last", "test-best-2", "test-fgsm", "test-fgsm-2"}
    assert RunFolder("runs/t").evaluations["test-best"]["attacks"] == {}
    assert call(["evaluate", "runs/t", "--attack", "fgsm", "--curve", "0.1,-0.2"]) == 2
    assert call(["evaluate", "runs/t", "--model", "mlp"]) == 2


def test_folders_of_the_user_stay(capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    for out in ("empty", "a/b/c"):
        assert call(["train", "--data", "folder:/nonexistent", "--out", out]) == 1
    assert Path("empty").is_dir()
    assert not list(Path("empty").iterdir())
    assert not Path("a").exists()


def test_impossible_devices_are_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["train", *QUICK, "--model", "mlp", "--out", "x", "--devices", "foo"]) == 2
    assert "train.devices='foo'" in capsys.readouterr().err
