"""explain, on run folders: command line, files, report, and figures of recipes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import overproof
from overproof.cli import call
from overproof.config import resolve
from overproof.errors import FolderError, UnknownNameError, UsageError
from overproof.folder import read_arrays, read_json, write_arrays, write_json
from overproof.report import write_report
from overproof.report.explanation import explained, explanation_text, verdict
from overproof.report.probes import robustness
from overproof.report.reading import read_runs
from overproof.run import reproduce
from overproof.run.explaining import Subject, explain_runs, material_of, resemblance
from overproof.run.recipes import read_recipe, run_recipe
from overproof.run.reproduce import result_of
from overproof.training.safety import Interrupted

FEW = {"limit_train": 150, "limit_test": 60, "epochs": 2}
BRIEF = [
    "--set",
    "decision-planes.planes=3",
    "--set",
    "decision-planes.side=8",
    "--set",
    "corruptions.severities=[5,1]",
    "--set",
    "adversarial-transfer.eps=0.3",
    "--set",
    "boundary-similarity.images=10",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("runs")
    small = {**FEW, "model_options": {"widths": (4, 8)}}
    for seed, name in enumerate(("teacher", "alone-0", "alone-1")):
        overproof.train("cnn", "digits+rgb", seed=seed, out=top / name, **small)
    overproof.distill("cnn", top / "teacher", "digits+rgb", seed=5, out=top / "kd", **small)
    overproof.train("mlp", "digits+rgb", out=top / "mlp", **FEW)
    return top


def command(runs: Path, *more: str) -> list[str]:
    return ["explain", str(runs / "teacher"), str(runs / "kd"), *more]


def both(runs: Path) -> list[str]:
    return ["--independent", str(runs / "alone-0"), "--independent", str(runs / "alone-1")]


def test_all_probes_of_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command(runs, *both(runs), "--probes", "all", *BRIEF, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == read_json(runs / "kd" / "explanation.json")
    assert set(found["probes"]) == set(overproof.PROBES.names())
    assert found["domains"] == ["color", "blobs", "inverted", "sketch"]
    assert found["runs"]["student:kd"] == str(runs / "kd")
    assert found["data"] == "digits+rgb"
    assert found["probes"]["shape-bias"]["skipped"]
    assert found["probes"]["cka"]["controlled"] is True
    assert found["probes"]["adversarial-transfer"]["facts"]["eps"] == 0.3
    assert list((runs / "teacher" / "probes").glob("*.safetensors"))
    arrays = read_arrays(runs / "kd" / "explanation.npz")
    assert arrays["decision-planes/plane/teacher"].shape == (2, 8, 8)
    assert arrays["localisation/cam/student:kd"].ndim == 3
    page = (runs / "kd" / "report.html").read_text()
    for words in (
        "What was distilled",
        "What was passed on",
        "Fooled by images made against the teacher",
        "plane 1: student:kd",
    ):
        assert words in page, words
    for words in (
        "CKA with independent:alone-0",
        "Where they look",
        "shape-bias was skipped",
        "Same answer to both views: crop",
        *(f"Accuracy on spoilt images: {kind}" for kind in ("noise", "blur", "contrast", "jpeg")),
    ):
        assert words in page, words
    assert page.count('alt="teacher"') == page.count('alt="kd"') == 6
    assert 1 <= page.count('alt="attacked"') <= 6
    text = explanation_text(found)
    assert "60 test images of digits+rgb" in text
    assert "skipped shape-bias: No images with conflicting cues" in text
    assert "controls: independent seeds" in text


def test_a_few_probes_in_words_elsewhere(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "there"
    more = [
        "--probes",
        "crop,domains",
        "--domain",
        "noise:5",
        "--domain",
        "digits+sketch",
        "--no-keep",
        "--out",
        str(out),
        "--limit",
        "30",
    ]
    assert call(command(runs, "--independent", str(runs / "alone-0"), *more)) == 0
    said = capsys.readouterr()
    assert "uncontrolled" in said.out
    assert "fewer than two independent students" in said.out
    assert "note: name two students without teacher" in said.err
    found = read_json(out / "explanation.json")
    assert (found["domains"], found["images"]) == (["noise:5", "digits+sketch"], 30)
    assert [row["condition"] for row in found["probes"]["domains"]["rows"]][2::2] == ["seen", "noise:5", "digits+sketch"]


def test_other_roles_groups_and_skipped_probes(runs: Path, tmp_path: Path) -> None:
    groups = tmp_path / "groups.csv"
    index = overproof.load_data("digits+rgb", limit_test=60).test.index.tolist()
    groups.write_text("index,group\n" + "".join(f"{i},{'odd' if i % 2 else 'even'}\n" for i in index))
    found = explain_runs(
        runs / "teacher",
        [runs / "kd", runs / "kd"],
        others={"independent": [runs / "alone-0", runs / "alone-1"], "control": [runs / "mlp"], "plain": [runs / "alone-1"]},
        subject=Subject(groups=groups, deprived="odd", domains=["none"]),
        probes=["group-bias", "localisation", "domains"],
        keep=False,
    )
    assert list(found.facts["runs"]) == [
        "teacher",
        "student:kd",
        "student:kd (2)",
        "independent:alone-0",
        "independent:alone-1",
        "control:mlp",
        "plain:alone-1",
    ]
    assert found["group-bias"].facts["deprived"] == "odd"
    assert "control:mlp" in found["group-bias"].controls
    assert "'control:mlp'" in found["localisation"].skipped
    assert "plain:alone-1" in found["group-bias"].accuracy
    assert set(found.skipped) == {"localisation", "domains"}


def test_groups_that_the_data_know(tmp_path: Path) -> None:
    from PIL import Image

    index = []
    for label in ("a", "b"):
        for i in range(8):
            path = tmp_path / "data" / "train" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 30 * i).save(path)
            index.append(f"train/{label}/{i}.png,{'old' if i % 2 else 'new'}")
    side = tmp_path / "cameras.csv"
    side.write_text("file,camera\n" + "\n".join(index))
    data = {"name": f"folder:{tmp_path / 'data'}", "attribute_file": str(side), "validation": 0.0, "test": 0.5}
    config = resolve({"data": data})
    seen = material_of(config, Subject(domains=["none"], deprived="old"))
    assert seen.groups is not None
    assert (seen.groups.names, seen.groups.deprived) == (("new", "old"), "old")
    levels = (seen.images[:, 0, 0, 0] * 255 / 30).round().long()
    assert torch.equal(seen.groups.numbers, levels % 2)  # as written down for each file


def test_what_cannot_be_explained(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, code, words in (
        (["--probes", "cam"], 2, "Unknown probe 'cam'"),
        (["--independent", "runs/none"], 1, "not a run folder"),
        (["--set", "cka=3"], 2, "write PROBE.option=value"),
        (["--deprived", "x"], 2, "give that file with --groups"),
        (["--domain", "colour"], 2, "colour"),
        (["--groups", str(runs / "kd" / "config.toml"), "--probes", "group-bias"], 1, "no column `group`"),
        (["--domain", "digits", "--probes", "domains"], 0, ""),
        (["--data", "digits", "--probes", "crop"], 1, "The images have 1 channels"),
    ):
        assert call(command(runs, *more, "--out", str(tmp_path))) == code, more
        assert words in capsys.readouterr().err, more
    wide = tmp_path / "wide"
    images = torch.rand(20, 3, 8, 8)
    model = overproof.create_model("cnn", 4, 3, 8)
    overproof.train(
        model, (images, torch.arange(20) % 4), test_data=(images, torch.arange(20) % 4), epochs=1, batch_size=10, out=wide
    )
    with pytest.raises(UsageError, match=r"'teacher' has 10 classes and 'independent:wide' has 4"):
        explain_runs(runs / "teacher", [runs / "kd"], others={"independent": [wide]}, keep=False)
    for run, what in (("alone-0", "letter"), ("alone-1", "sign")):  # the images are numbered, which agrees with any names
        shutil.copytree(runs / run, tmp_path / what)
        write_json(tmp_path / what / "data.json", {"classes": [f"{what}-{k}" for k in range(10)]})
    both_named = {"independent": [tmp_path / "letter", tmp_path / "sign"]}
    with pytest.raises(UsageError, match=r"independent:sign .*has 10 classes \(sign-0, .*independent:letter .* \(letter-0, "):
        explain_runs(runs / "teacher", [runs / "kd"], others=both_named, keep=False)
    with pytest.raises(UsageError, match="kd has the teacher .*teacher, so it is no independent student"):
        explain_runs(runs / "teacher", [runs / "kd"], others={"independent": [runs / "alone-0", runs / "kd"]}, keep=False)
    with pytest.raises(UsageError, match=r"'independent:alone-0' and 'independent:alone-0 \(2\)' have the same weights"):
        explain_runs(runs / "teacher", [runs / "kd"], others={"independent": [runs / "alone-0"] * 2}, keep=False)
    with pytest.raises(UsageError, match="trained on data of a program"):
        explain_runs(wide, [wide])
    with pytest.raises(UsageError, match="at least one student"):
        explain_runs(runs / "teacher", [])
    with pytest.raises(FolderError):
        explain_runs(tmp_path / "nothing", [runs / "kd"])


def test_independent_students_that_began_like_a_student_are_named(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overproof.train("cnn", "digits+rgb", seed=5, out=tmp_path / "twin", **FEW, model_options={"widths": (4, 8)})
    independent = ["--independent", str(tmp_path / "twin"), "--independent", str(runs / "alone-1")]
    few = ["--probes", "corruptions", "--set", "corruptions.severities=[1]", "--out", str(tmp_path / "out")]
    assert call(command(runs, *independent, *few)) == 0
    assert "independent:twin began with the weights of a student" in capsys.readouterr().err
    assert call(command(runs, *independent, *few, "--foreign", str(runs / "alone-0"))) == 0
    assert "began with the weights" not in capsys.readouterr().err
    assert call(command(runs, *both(runs), *few)) == 0
    assert "began with the weights" not in capsys.readouterr().err


def test_probes_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["list", "probes"]) == 0
    assert "adversarial-transfer" in capsys.readouterr().out
    assert call(["show", "decision-planes"]) == 0
    assert "planes = 50" in capsys.readouterr().out


def test_verdicts() -> None:
    def told(value: float, low: float, high: float, *controls: float, chance: float = 0.0) -> str:
        row = {
            "gap": {"value": value, "low": low, "high": high},
            "controls": {str(i): {"value": c} for i, c in enumerate(controls)},
        }
        return verdict({"rows": [row], "controlled": bool(controls), "chance": chance})

    assert told(0.1, 0.05, 0.15, 0.02, -0.03) == "clear"
    assert told(-0.1, -0.15, -0.05, 0.02) == "clear"
    assert told(0.1, 0.05, 0.15, 0.12) == "not clear"
    assert told(0.1, -0.05, 0.25, 0.01) == "not clear"
    assert told(0.1, 0.05, 0.15) == "uncontrolled"
    assert told(0.6, 0.55, 0.65, 0.47, chance=0.5) == "clear"
    assert told(0.6, 0.55, 0.65, 0.38, chance=0.5) == "not clear"
    assert told(0.6, 0.55, 0.65, 0.0, chance=0.5) == "not clear"  # a control of 0 is far from chance here
    assert told(0.1, 0.05, 0.15, 0.02, float("nan")) == "not clear"
    assert told(0.6, 0.55, 0.65, float("nan"), chance=0.5) == "not clear"
    assert verdict({"rows": [{"gap": None}], "controlled": True}) == ""
    assert verdict({}) == ""


def test_a_line_of_accuracy_for_every_model_over_the_severity(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn = []

    def keep(paint: Any, title: str) -> str:
        axes = Figure().subplots()
        paint(axes)
        drawn.append((title, {line.get_label(): line.get_xydata().tolist() for line in axes.lines}))
        return ""

    def row(quantity: str, condition: str, value: float) -> dict[str, Any]:
        number = {"value": value, "low": value - 0.1, "high": value + 0.1}
        return {"quantity": quantity, "condition": condition, "scores": {"teacher": number, "student:kd": number}}

    monkeypatch.setattr("overproof.report.probes.draw", keep)
    rows = [row("same answer as the teacher", "noise 1", 0.3), row("accuracy", "", 0.2), row("accuracy", "blur 3", 0.1)]
    charts = robustness({"rows": [*rows, row("accuracy", "noise 5", 0.5), row("accuracy", "noise 1", 0.75)]})
    assert [chart.title for chart in charts] == ["Accuracy on spoilt images: noise"]  # one severity makes no line
    assert drawn == [("accuracy (%) over severity of noise", {name: [[1, 75], [5, 50]] for name in ("teacher", "kd")})]
    assert robustness({}) == []


def test_damaged_explanations_are_named(runs: Path, tmp_path: Path) -> None:
    import shutil

    run = Path(shutil.copytree(runs / "alone-0", tmp_path / "run"))
    assert "What was distilled" not in write_report([run]).read_text()
    (run / "explanation.json").write_text("{")
    assert "explanation.json" in write_report([run]).read_text()
    row = {
        "quantity": "<b>q</b>",
        "condition": "",
        "scores": {},
        "controls": {},
        "gap": {"value": 0.1, "low": 0.0, "high": 0.2},
    }
    write_json(
        run / "explanation.json", {"images": 3, "accuracy": {"<i>": 0.5}, "probes": {"crop": {"question": "?", "rows": [row]}}}
    )
    page = write_report([run]).read_text()
    assert "&lt;b&gt;q" in page
    assert "<i> 50.00" not in page
    assert "+10.0 [+0.0, +20.0]" in page
    write_arrays(run / "explanation.npz", {"decision-planes/plane/teacher": np.zeros((2, 4, 4))})
    page = write_report([run]).read_text()
    assert "pictures cannot be drawn" in page
    assert "+10.0" in page
    (run / "explanation.npz").write_bytes(b"no archive")
    assert "cannot be shown" in write_report([run]).read_text()
    for odd in ([1], {"probes": [1]}, {"probes": {"a": {"rows": [1]}}}, {"probes": {"a": 3}, "accuracy": 4}):
        write_json(run / "explanation.json", odd)
        (one,) = read_runs([run])
        assert explained(one) is None or explained(one).charts == []


RECIPE = """
[recipe]
seeds = [0]
[defaults.data]
name = "digits+rgb"
limit_train = 200
limit_test = 40
[defaults.model]
name = "cnn"
widths = [8]
[defaults.train]
epochs = 20
batch_size = 25
optimizer = "adam"
lr = 0.02
[defaults.evaluation]
weights = ["last"]
[runs.teacher]
[runs.alone]
seed = 7
[runs.kd]
verb = "distill"
method.name = "kd"
teacher = { run = "@teacher", which = "last" }
"""
FIGURE = '[[figures]]\nname = "f"\nrun = "kd"\nevaluation = "test-last"\nagainst = "teacher"\n'


def test_figures_of_recipes_by_probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, figures = tmp_path / "r.toml", []
    quantities = {
        "accuracy": 'data = "color"',
        "consensus": "",
        "planes": "options = { planes = 2, side = 4 }",
        "fooled": "options = { eps = 0.5 }",
    }
    for metric, more in quantities.items():
        figures.append(f'{FIGURE}metric = "{metric}"\n{more}\n')
    figures.append(f'{FIGURE}metric = "consensus"\nminus = "alone"\n')
    path.write_text(RECIPE + "\n".join(figures))
    recipe = read_recipe(path)
    assert recipe.config("alone", tmp_path, 3).seed == 10
    folders = run_recipe(recipe, tmp_path / "out")
    asked = tmp_path / "asked.json"
    found = result_of(recipe, folders, kept=asked)["figures"]
    with monkeypatch.context() as patched:
        patched.setattr(reproduce, "resemblance", None)  # nobody is asked twice
        assert result_of(recipe, folders, kept=asked)["figures"] == found
        (tmp_path / "out" / "kd" / "weights" / "last.safetensors").touch()
        with pytest.raises(TypeError):
            result_of(recipe, folders, kept=asked)
        with pytest.raises(Interrupted, match="between two figures"):
            result_of(recipe, folders, kept=asked, deadline=0.0)
    values = [figure["mean"] for figure in found]
    model = overproof.load(tmp_path / "out" / "kd", "last")
    test = overproof.load_data("digits+rgb+color", limit_test=40).test
    with torch.no_grad():
        expected = float((model(test.images.float() / 255).argmax(1) == test.labels).double().mean())
    assert values[0] == pytest.approx(expected)
    assert all(0 <= value <= 1 for value in values[1:4])
    alone = resemblance(tmp_path / "out" / "alone", tmp_path / "out" / "teacher", "last", data="", metric="consensus")[
        "consensus"
    ]
    assert values[4] == pytest.approx(values[1] - alone)
    kept = sorted((tmp_path / "out" / "teacher" / "probes").glob("*.safetensors"))
    assert kept  # the teacher's answers, for all figures and seeds of students
    times = [path.stat().st_mtime_ns for path in kept]
    resemblance(tmp_path / "out" / "kd", tmp_path / "out" / "teacher", "last", data="", metric="consensus")
    assert [path.stat().st_mtime_ns for path in kept] == times
    for wrong, error, words in (
        (f'{FIGURE}metric = "acuracy"\n', UnknownNameError, "accuracy"),
        (f'{FIGURE}metric = "agreement"\ndata = "color"\n', UsageError, "`data` needs"),
        (f'{FIGURE}metric = "accuracy"\ndata = "colour"\n', UnknownNameError, "colour"),
        (f'{FIGURE}metric = "accuracy"\ndata = "color+noise:9"\n', UsageError, "noise"),
    ):
        path.write_text(RECIPE + wrong)
        with pytest.raises(error, match=words):
            read_recipe(path)


def test_a_plain_configuration_keeps_its_seed(tmp_path: Path) -> None:
    path = tmp_path / "plain.toml"
    path.write_text('seed = 4\n[data]\nname = "digits"\n')
    recipe = read_recipe(path)
    assert recipe.about.seeds == [4]
    assert recipe.config("plain", tmp_path, 4).seed == 4
