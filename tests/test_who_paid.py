"""Figures by class, who paid, the panel of the report, and the command that tells."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

import overproof
from overproof.cli import call
from overproof.errors import DataError, UsageError
from overproof.evaluation.grouping import group_figures, shares, spearman
from overproof.evaluation.groups import Model, Record
from overproof.evaluation.intervals import Z, paired, student
from overproof.folder import RunFolder, write_arrays, write_json, write_toml
from overproof.report import write_report
from overproof.report.alone import alone_for
from overproof.report.group_text import groups_text
from overproof.report.payers import payers, verdict
from overproof.report.reading import read_runs
from overproof.run.grouping import group_report, losers
from overproof.run.seeds import figures

ROOT = Path(__file__).resolve().parents[1]


# Statistics


def test_students_t() -> None:
    for freedom in (1, 2, 5, 10, 11, 15, 40, 1000):
        assert student(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), abs=6e-4)


def test_paired_interval_is_that_of_bonett_and_price() -> None:
    gained, lost, count = 7, 2, 40
    differences = np.zeros((1, count))
    differences[0, :gained], differences[0, gained : gained + lost] = 1, -1
    up, down = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    half = Z * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    assert paired(differences) == pytest.approx([up - down - half, up - down + half], abs=1e-12)
    low, high = paired(np.zeros((1, 3)))
    assert low < -0.5  # three images without a difference say little
    assert high > 0.5
    assert paired(np.ones((1, 1)))[1] == 1


def test_paired_interval_with_seeds() -> None:
    same = np.repeat(np.array([[1.0, -1, -1, 0, 0, 0, 0, 0, -1, 0]]), 4, axis=0)
    assert paired(same) == pytest.approx(paired(same[:1]))  # repeating a result makes it no surer
    generator = np.random.default_rng(0)
    noisy = generator.choice([-1.0, 0, 1], size=(4, 10))
    middle = noisy.mean(axis=0).sum() / 12
    images = ((noisy.mean(axis=0) ** 2).sum() + 2) / 12 - middle**2
    seeds = noisy.mean(axis=1).var(ddof=1) / 4
    half = math.sqrt(Z**2 * images / 12 + scipy.stats.t.ppf(0.975, 3) ** 2 * seeds)
    assert paired(noisy) == pytest.approx([max(middle - half, -1), min(middle + half, 1)], abs=1e-4)


def test_paired_interval_covers() -> None:
    generator = np.random.default_rng(1)
    hit = 0
    for _ in range(1000):
        low, high = paired(generator.choice([-1.0, 0, 1], p=[0.15, 0.8, 0.05], size=(1, 25)))
        hit += low <= -0.1 <= high
    assert 0.93 <= hit / 1000 <= 0.99


def test_rank_correlation() -> None:
    generator = np.random.default_rng(2)
    a, b = generator.integers(0, 6, 30).astype(float), generator.normal(size=30)
    assert spearman(a.tolist(), b.tolist()) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1, 2], [2, 1]) is None


def test_shares() -> None:
    found = shares(np.array([0, 0, 2]), np.array([True, False, True]), 3)
    assert found[[0, 2]].tolist() == [0.5, 1]
    assert np.isnan(found[1])


# Figures by group

LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
TEACHER = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
ALONE = np.array([0, 0, 0, 0, 1, 1, 1, 0, 0, 0])
TAUGHT = np.array([0, 0, 0, 1, 1, 1, 2, 0, 2, 2])


def rows(prediction: np.ndarray, **more: np.ndarray) -> dict[str, np.ndarray]:
    return {"index": np.arange(len(LABELS)), "label": LABELS, "prediction": prediction, **more}


def models() -> list[Model]:
    taught = Record.of(rows(TAUGHT, teacher_prediction=TEACHER, nll=np.full(10, math.log(2))), classes=3)
    return [
        Model("t", "teacher", {0: Record.of(rows(TEACHER), classes=3)}),
        Model("a", "alone", {0: Record.of(rows(ALONE), classes=3)}),
        Model("s", "student", {0: taught}, "a"),
    ]


def test_figures_by_hand() -> None:
    report = group_figures(models(), ["x", "y", "z"], worst=2, train=[90, 9, 3], reliability=[0.9, 0.1, 0.5], source="here")
    teacher, alone, taught = report.models
    assert report.count == [4, 4, 2]
    assert alone.recall == [1, 0.75, 0]
    assert taught.recall == [0.75, 0.5, 1]
    assert (taught.average, taught.worst, taught.worst_k) == (0.75, 0.5, 0.625)
    assert taught.copied == [0.25, 0.25, 0]
    assert taught.own == [0, 0.25, 0]
    assert taught.amplification == [0, 0, 0]
    assert taught.margin == pytest.approx([0.25] * 3)  # (3 / 2 - 1) / 2
    assert teacher.margin is alone.copied is None
    assert [change.difference for change in taught.changes] == [-0.25, -0.25, 1]
    for change, (gained, lost, count) in zip(taught.changes, [(0, 1, 4), (0, 1, 4), (2, 0, 2)], strict=True):
        expected = paired(np.array([[1] * gained + [-1] * lost + [0] * (count - gained - lost)]))
        assert [change.low, change.high] == pytest.approx(expected)
    assert taught.spearman == pytest.approx(scipy.stats.spearmanr([0.9, 0.1, 0.5], [-0.25, -0.25, 1]).statistic)
    assert (
        verdict(taught)
        == "2 of 3 groups lost accuracy, 0 of them by more than their interval (0.1 would by chance, had nothing changed)."
    )
    summary = json.loads(json.dumps(report.summary))
    assert summary["models"][2]["fell"] == ["x", "y"]
    assert summary["models"][2]["paid"] == []
    text = groups_text(report)
    assert "s against a: 2 of 3 groups lost accuracy" in text
    assert "copied from the teacher 25.0, own 0.0" in text
    assert "0.90" in text


def test_amplification_is_copied_plus_own_minus_the_teachers_error() -> None:
    generator = np.random.default_rng(3)
    label, theirs, mine = generator.integers(0, 4, (3, 200))
    samples = {"index": np.arange(200), "label": label, "prediction": mine, "teacher_prediction": theirs}
    found = group_figures([Model("s", "student", {0: Record.of(samples, classes=4)})], list("abcd")).models[0]
    for c in range(4):
        error = float((theirs != label)[label == c].mean())
        assert found.amplification[c] == pytest.approx(found.copied[c] + found.own[c] - error)


def test_means_over_seeds_and_groups_without_images() -> None:
    first, second = (Record.of(rows(p), classes=4) for p in (ALONE, TAUGHT))
    found = group_figures([Model("a", "alone", {0: first, 7: second})], ["x", "y", "z", "none"], worst=9)
    (alone,) = found.models
    assert alone.recall == [0.875, 0.625, 0.5, None]
    assert alone.worst == pytest.approx((0 + 0.5) / 2)  # the worst class of each seed, not of the mean
    assert found.k == 3
    assert alone.seeds == [0, 7]


def test_only_seeds_that_both_have_are_paired() -> None:
    a, s = (Record.of(rows(p), classes=3) for p in (ALONE, TAUGHT))
    known = [Model("a", "alone", {0: a, 1: s}), Model("s", "student", {1: s, 2: s}, "a")]
    assert {change.difference for change in group_figures(known, list("xyz")).models[1].changes} == {0}
    assert group_figures([known[0], Model("s", "student", {5: s}, "a")], list("xyz")).models[1].changes == []


def test_the_order_of_the_images_does_not_matter() -> None:
    order = np.random.default_rng(0).permutation(10)
    mixed = {name: values[order] for name, values in rows(TAUGHT).items()}
    known = models()
    known[2] = Model("s", "student", {0: Record.of(mixed, classes=3)}, "a")
    assert group_figures(known, list("xyz")).models[2].recall == [0.75, 0.5, 1]


def test_what_cannot_be_compared_is_refused() -> None:
    other = {**rows(ALONE), "index": np.arange(10) + 1}
    with pytest.raises(DataError, match="a and b were not evaluated on the same images"):
        group_figures([*models()[1:2], Model("b", "alone", {0: Record.of(other, classes=3)})], list("xyz"))
    with pytest.raises(UsageError, match="worst 0 groups"):
        group_figures(models(), list("xyz"), worst=0)
    with pytest.raises(DataError, match="no model has been evaluated"):
        group_figures([], list("xyz"))
    with pytest.raises(DataError, match="no rows for label"):
        Record.of({"index": LABELS, "prediction": LABELS}, classes=3)
    with pytest.raises(DataError, match=r"does not know the subgroups.*data\.attribute"):
        Record.of(rows(ALONE), classes=3, by="attribute")


# The report


def folder(
    path: Path, prediction: np.ndarray, *, seed: int = 0, method: str = "kd", teacher: str | None = "teacher", **about: Any
) -> Path:
    """A run folder with rows; `about`: train, group, model, reliability, repeat."""
    repeat = about.get("repeat", 1)
    config: dict[str, Any] = {
        "seed": seed,
        "data": {"name": "digits", **about.get("data", {})},
        "model": {"name": about.get("model", "mlp")},
        "method": {"name": method},
        "train": {"epochs": 3, "workers": seed, **about.get("train", {})},
    }
    write_toml(path / "config.toml", config | ({"teacher": {"run": str(path.parent / teacher)}} if teacher else {}))
    write_json(path / "status.json", {"state": "done"})
    write_json(path / "model.json", {"parameters": 7})
    samples = {name: np.tile(values, repeat) for name, values in rows(prediction).items()} | {"index": np.arange(10 * repeat)}
    summary: dict[str, Any] = {
        "clean": float((prediction == LABELS).mean()),
        "samples": 10 * repeat,
        "classes": ["x", "y", "z"],
    }
    if teacher:
        samples["teacher_prediction"] = np.tile(TEACHER, repeat)
    if about.get("group"):
        samples["group"] = samples["index"] % 2
        summary["attribute"] = {"name": "camera", "names": ["old", "new"]}
    write_arrays(path / "evaluations" / "test-best.npz", samples)
    write_json(path / "evaluations" / "test-best.json", summary)
    if about.get("reliability"):
        write_json(
            path / "method.json",
            {"group": "class", "names": ["x", "y", "z"], "reliability": about["reliability"], "kind": "margin"},
        )
        write_json(path / "data.json", {"classes": ["x", "y", "z"], "counts": {"train": [90, 9, 3]}})
    return path


def test_the_panel_names_who_paid(tmp_path: Path) -> None:
    alone = folder(tmp_path / "alone", ALONE, method="ce", teacher=None, repeat=40)
    taught = folder(tmp_path / "taught", TAUGHT, repeat=40, reliability=[0.9, 0.1, 0.5])
    source = write_report([taught, alone]).read_text()
    assert 'href="#paid"' in source
    assert "2 of 3 groups lost accuracy, 2 of them by more than their interval" in source
    assert "58.3 alone, 75.0 distilled; the worst 0.0 and 50.0" in source
    assert ">-25.0<" in source
    assert '<span class="suspect">yes</span>' in source
    assert "Change of accuracy by class" in source
    assert ">0.10<" in source  # how reliable the teacher is
    assert "differs by more" not in source
    (panel,) = payers(read_runs([taught, alone]))
    assert panel.reports[0].train == [90, 9, 3]
    assert [change.paid for change in panel.reports[0].models[-1].changes] == [True, True, False]


def test_the_panel_finds_the_student_alone_beside_the_run(tmp_path: Path) -> None:
    folder(tmp_path / "wrong-seed", TEACHER, method="ce", teacher=None, seed=1)
    folder(tmp_path / "wrong-net", TEACHER, method="ce", teacher=None, model="cnn")
    folder(tmp_path / "robust", TEACHER, method="pgd-at", teacher=None)
    taught = folder(tmp_path / "taught", TAUGHT)
    (panel,) = payers(read_runs([taught]))
    assert "No student trained alone was found" in panel.problem
    assert "No student trained alone was found" in write_report([taught]).read_text()
    folder(tmp_path / "longer", ALONE, method="ce", teacher=None, train={"epochs": 9, "lr": 0.5})
    (panel,) = payers(read_runs([taught]))
    assert not panel.problem
    assert panel.notes[-1].endswith("so the teacher alone cannot be blamed: train.epochs, train.lr.")
    folder(tmp_path / "just-so", ALONE, method="ce", teacher=None, train={"workers": 5})
    (run,) = read_runs([taught])
    match = alone_for(run, [run])
    assert (match.run.name, match.differs) == ("just-so", [])


def test_robust_students_are_compared_with_robust_ones(tmp_path: Path) -> None:
    folder(tmp_path / "alone", ALONE, method="ce", teacher=None)
    taught = folder(tmp_path / "taught", TAUGHT, method="rslad")
    assert payers(read_runs([taught]))[0].problem
    folder(tmp_path / "robust", ALONE, method="trades", teacher=None)
    assert "robust" in payers(read_runs([taught]))[0].notes[0]


def test_in_self_distillation_the_teacher_is_the_student_alone(tmp_path: Path) -> None:
    folder(tmp_path / "teacher", TEACHER, method="ce", teacher=None)
    taught = folder(tmp_path / "taught", TAUGHT)
    (run,) = read_runs([taught])
    assert alone_for(run, [run]).run.name == "teacher"
    folder(tmp_path / "twin", ALONE, method="ce", teacher=None)
    assert alone_for(run, [run]).run.name == "twin"


def test_seeds_are_taken_together(tmp_path: Path) -> None:
    runs = [folder(tmp_path / f"seed-{s}" / "taught", TAUGHT, seed=s, train={"workers": 0}) for s in (0, 1, 2)]
    runs += [folder(tmp_path / f"seed-{s}" / "alone", ALONE, method="ce", teacher=None, seed=s) for s in (0, 1)]
    (panel,) = payers(read_runs(runs))
    assert panel.reports[0].models[-1].seeds == [0, 1]
    assert "Only 2 of 3 seeds have a student trained alone." in panel.notes
    apart = [
        folder(tmp_path / name / "seed-0", p, method=m, teacher=t)
        for name, p, m, t in (("t", TAUGHT, "kd", "x"), ("a", ALONE, "ce", None))
    ]
    assert payers(read_runs(apart[:1]))[0].problem == ""  # OUT/seed-0 is compared with OTHER/seed-0


def test_subgroups_have_a_table_of_their_own(tmp_path: Path) -> None:
    folder(tmp_path / "alone", ALONE, method="ce", teacher=None, group=True)
    taught = folder(tmp_path / "taught", TAUGHT, group=True)
    (panel,) = payers(read_runs([taught]))
    assert [report.by for report in panel.reports] == ["class", "camera"]
    assert panel.reports[1].names == ["old", "new"]
    assert "Change of accuracy by camera" in write_report([taught]).read_text()


@pytest.mark.parametrize("damage", [b"PK nonsense", None, "short", "labels"])
def test_damaged_rows_are_named_and_harm_nothing_else(tmp_path: Path, damage: Any) -> None:
    folder(tmp_path / "alone", ALONE, method="ce", teacher=None)
    taught = folder(tmp_path / "taught", TAUGHT)
    place = taught / "evaluations" / "test-best.npz"
    if damage is None:
        place.unlink()
    elif isinstance(damage, bytes):
        place.write_bytes(damage)
    else:
        wrong = {"short": {"prediction": TAUGHT[:3]}, "labels": {"label": LABELS[::-1].copy()}}[damage]
        write_arrays(place, rows(TAUGHT) | wrong)
    source = write_report([taught]).read_text()
    assert "Nobody knows who paid: " in source
    assert 'id="overview"' in source


def test_odd_side_facts_are_left_out(tmp_path: Path) -> None:
    folder(tmp_path / "alone", ALONE, method="ce", teacher=None)
    taught = folder(tmp_path / "taught", TAUGHT, reliability=[0.9, 0.1])
    for odd in ([1], {"counts": {"train": [1]}}, {"counts": 3}, "text"):
        write_json(taught / "data.json", odd)
        (panel,) = payers(read_runs([taught]))
        assert not panel.problem
        assert panel.reports[0].train is panel.reports[0].reliability is None
        assert "Who paid" in write_report([taught]).read_text()


def test_reliabilities_of_different_kinds_are_not_averaged(tmp_path: Path) -> None:
    runs = [
        folder(tmp_path / name, TAUGHT, reliability=values) for name, values in (("a", [0.9, 0.1, 0.5]), ("b", [0.7, 0.3, 0.5]))
    ]
    assert group_report(runs).reliability == pytest.approx([0.8, 0.2, 0.5])
    write_json(runs[1] / "method.json", {**RunFolder(runs[1]).method, "kind": "accuracy"})
    assert group_report(runs).reliability == [0.9, 0.1, 0.5]
    alone = folder(tmp_path / "c", ALONE, method="ce", teacher=None, seed=0)
    other = folder(tmp_path / "d", TAUGHT, seed=4)
    assert "No student trained alone was found for: d." in group_report([*runs, other, alone]).notes


def test_runs_without_a_teacher_have_no_panel(tmp_path: Path) -> None:
    assert 'id="paid"' not in write_report([folder(tmp_path / "alone", ALONE, method="ce", teacher=None)]).read_text()


def test_many_classes_are_shortened(tmp_path: Path) -> None:
    count = 60
    labels = np.arange(count * 4) % count
    for name, method, teacher, wrong in (
        ("alone", "ce", None, labels < 0),
        ("taught", "kd", "t", (labels % 2 == 0) & (np.arange(240) < 120)),
    ):
        run = folder(tmp_path / name, ALONE, method=method, teacher=teacher)
        found = {"index": np.arange(240), "label": labels, "prediction": np.where(wrong, (labels + 1) % count, labels)}
        write_arrays(run / "evaluations" / "test-best.npz", found)
        write_json(run / "evaluations" / "test-best.json", {"clean": 0.5, "classes": [f"<class {i}>" for i in range(count)]})
    source = write_report([tmp_path / "taught"]).read_text()
    assert "And 10 more that lost less." in source
    assert "The 15 largest losses and gains of 60." in source
    assert "<class" not in source
    report = group_report([tmp_path / "taught"], reliability=False)
    assert len(groups_text(report).splitlines()) < 90


# The command


def test_command_on_made_up_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = folder(tmp_path / "alone", ALONE, method="ce", teacher=None, group=True)
    taught = folder(tmp_path / "taught", TAUGHT, group=True, reliability=[0.9, 0.1, 0.5])
    folder(tmp_path / "teacher", TEACHER, method="ce", teacher=None, model="big", group=True)
    assert call(["groups", str(taught), "--worst", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(m["name"], m["role"]) for m in found["models"]] == [
        ("teacher", "teacher"),
        ("alone", "alone"),
        ("taught", "student"),
    ]
    assert found["models"][2]["fell"] == ["x", "y"]
    assert found["reliability"] == [0.9, 0.1, 0.5]
    assert found["train"] == [90, 9, 3]
    assert call(["groups", str(taught), "--by", "attribute"]) == 0
    assert "groups by camera" in capsys.readouterr().out
    assert call(["groups", str(alone)]) == 2
    assert "None of these runs was distilled" in capsys.readouterr().err
    assert call(["groups", str(taught), "--evaluation", "test-last"]) == 1
    assert "has no evaluation 'test-last' (known: test-best)" in capsys.readouterr().err
    named = folder(tmp_path / "elsewhere" / "cnn", ALONE, method="ce", teacher=None, model="cnn", group=True)
    report = group_report([taught], alone=[named], reliability=False)
    assert any("model or method" in note for note in report.notes)
    assert losers(RunFolder(taught), RunFolder(alone), "test-best") == {"fell": 2.0, "paid": 0.0}


def test_without_a_student_alone_the_rest_is_told(tmp_path: Path) -> None:
    taught = folder(tmp_path / "taught", TAUGHT, reliability=[0.9, 0.1, 0.5])
    report = group_report([taught])
    assert [model.role for model in report.models] == ["teacher", "student"]  # the teacher as the student's evaluation knew it
    assert report.models[0].recall == [0.75, 0.5, 1]
    assert "No student trained alone was found" in report.notes[0]
    assert "No student trained alone" in groups_text(report)


def test_from_training_to_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    brief = {"epochs": 2, "long_tail": 10, "validation": 0.3, "batch_size": 32}
    overproof.train("mlp", "digits", out="teacher", **brief)
    overproof.train("mlp", "digits", out="alone", model_options={"hidden": (12,)}, **brief)
    for name, method in (("kd", "kd"), ("ada", "ada-alpha")):
        overproof.distill("mlp", "teacher", "digits", method=method, out=name, model_options={"hidden": (12,)}, **brief)
    report = overproof.group_report(["kd", "ada"], worst=3)
    teacher, alone, kd, ada = report.models
    assert [model.role for model in report.models] == ["teacher", "alone", "student", "student"]
    for model, run in ((teacher, "teacher"), (alone, "alone"), (kd, "kd"), (ada, "ada")):
        summary = RunFolder(run).evaluations["test-best"]
        assert model.recall == pytest.approx(summary["per_class"]["clean"])
        assert model.average == pytest.approx(np.mean(summary["per_class"]["clean"]))
        found = figures(RunFolder(run))
        assert (found["class-mean"], found["worst-3"], found["worst-1"]) == pytest.approx(
            (model.average, model.worst_k, model.worst)
        )
    assert report.reliability == pytest.approx(RunFolder("ada").method["reliability"])
    assert report.train == RunFolder("kd").data["counts"]["train"]
    assert not report.notes[0].startswith("It differs")
    gap = kd.average - alone.average
    assert np.mean([change.difference for change in kd.changes]) == pytest.approx(gap)
    measured = overproof.group_report(["kd"])  # plain distillation measured nothing, so it is done now
    assert measured.reliability == pytest.approx(report.reliability, abs=1e-6)
    assert "held-out images" in measured.source
    assert overproof.group_report(["kd"], reliability=False).reliability is None
    assert call(["groups", "kd", "ada"]) == 0
    assert "kd against alone" in capsys.readouterr().out
    assert call(["show", "ada"]) == 0
    assert "reliability of the teacher by class" in capsys.readouterr().out
    source = Path("kd/report.html") if Path("kd/report.html").exists() else write_report(["kd"])
    assert "Who paid" in source.read_text()


def test_reliability_that_cannot_be_known_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taught = folder(tmp_path / "taught", TAUGHT)
    report = group_report([taught])
    assert report.reliability is None
    assert "how reliable the teacher is remains unknown" in capsys.readouterr().err


def test_the_page_on_it_runs(tmp_path: Path) -> None:
    from overproof.cli import app
    from test_docs import blocks, run_python

    (code,) = blocks(ROOT / "docs/who-paid.md", "python")
    assert run_python(code, tmp_path).startswith("0.")
    commands = [line.split() for block in blocks(ROOT / "docs/who-paid.md", "sh") for line in block.splitlines()]
    assert len(commands) >= 10
    for _, *words in commands:
        app.parse_args(words, exit_on_error=False, print_error=False)


def test_another_threat_is_said(tmp_path: Path) -> None:
    taught = folder(tmp_path / "taught", TAUGHT, method="ard")
    alone = folder(tmp_path / "alone", ALONE, method="pgd-at", teacher=None)
    (student, other), _ = read_runs([taught, alone]), None
    found = alone_for(student, [other])
    assert found is not None
    assert found.differs == []
    for path, eps in ((taught, 0.1), (alone, "2/255")):
        config = RunFolder(path).config
        write_toml(path / "config.toml", {**config, "method": {**config["method"], "eps": eps}})
    student, other = read_runs([taught, alone])
    found = alone_for(student, [other])
    assert found is not None
    assert found.differs == ["method.eps"]


def test_students_of_different_teachers_share_no_reliability(tmp_path: Path) -> None:
    first = folder(tmp_path / "a" / "taught", TAUGHT, reliability=[0.9, 0.1, 0.5])
    second = folder(tmp_path / "b" / "student", ALONE, reliability=[0.2, 0.2, 0.2])
    assert group_report([first]).summary["reliability"] == pytest.approx([0.9, 0.1, 0.5])
    both = group_report([first, second]).summary
    assert both["reliability"] is None
    assert any("different teachers" in note for note in both["notes"])
    names = [model["name"] for model in both["models"] if model["role"] == "teacher"]
    assert len({*names}) == 2
