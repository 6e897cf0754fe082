"""The report is made from folders alone: finished, running, damaged or hostile ones."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from overproof.cli import call
from overproof.errors import FolderError, UnknownNameError, UsageError
from overproof.evaluation.records import fingerprint
from overproof.folder import write_arrays, write_json, write_toml
from overproof.report import group_by_seed, summarise, text_table, write_report
from overproof.report.learned import method_text
from overproof.report.words import evaluation_text

HOSTILE = "<script>alert('x')</script>\"'&$x_1$"


def make_run(folder: Path, seed: int = 0, **about) -> Path:
    """A run folder as the toolkit leaves it. `about`: method, clean, robust, classes, epochs, parameters, attacks, channels."""
    method, clean, robust = about.get("method", "rslad"), about.get("clean", 0.97), about.get("robust", 0.55)
    classes = about.get("classes", [str(i) for i in range(10)])
    epochs, parameters = about.get("epochs", 8), about.get("parameters", 75290)
    rng = np.random.default_rng(seed)
    write_toml(
        folder / "config.toml",
        {
            "seed": seed,
            "out": str(folder),
            "verb": "distill",
            "data": {"name": "fashion-mnist", "validation": 0.1, "augment": ["crop"]},
            "model": {"name": "resnet8"},
            "teacher": {"run": "runs/teacher"},
            "method": {"name": method, "temperature": 4.0},
            "train": {"epochs": epochs, "batch_size": 128, "lr": 0.1},
        },
    )
    write_json(
        folder / "environment.json",
        {"python": "3.12.3", "torch": "2.15.0", "device": "cpu", "command": "overproof distill"},
    )
    write_json(
        folder / "status.json",
        {"state": "done", "epoch": epochs, "epochs": epochs, "seconds": 312.4, "best_epoch": epochs - 2},
    )
    write_json(folder / "model.json", {"spec": {"name": "resnet8"}, "class": "ResNet", "parameters": parameters})
    lines = []
    for epoch in range(epochs):
        rise = 1 - math.exp(-(epoch + 1) / epochs * 3)
        noise = rng.normal(0, 0.01, 4).tolist()
        train = {
            "loss": 2.3 - 1.8 * rise + noise[0],
            "accuracy": 0.1 + 0.85 * rise + noise[1],
            method: 1.5 - 1.2 * rise,
            "ce": 0.8 - 0.6 * rise,
        }
        found = {"clean": clean * rise + noise[2], "robust": robust * rise + noise[3], "loss": 2.2 - 1.7 * rise}
        lines.append({"epoch": epoch, "step": 352 * (epoch + 1), "lr": 0.1, "train": train, "validation": found})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if about.get("evaluated", True):
        write_json(
            folder / "evaluations" / "test.json",
            evaluation(clean, robust, classes, about.get("attacks", ("pgd-20", "fgsm"))),
        )
        write_arrays(folder / "evaluations" / "test-gallery.npz", gallery(rng, about.get("channels", 1)))
    return folder


def evaluation(clean: float, robust: float, classes: list[str], attacks: tuple[str, ...]) -> dict:
    facts = {
        "threat": "Linf",
        "eps": 0.15,
        "success_denominator": 970,
        "mean_size": 0.149,
        "invalid": 0,
        "seconds": 2.1,
    }
    shares = [min(1.0, max(0.0, clean - 0.1 + 0.2 * math.sin(3 * i))) for i in range(len(classes))]
    return {
        "model": "resnet8",
        "data": "fashion-mnist",
        "split": "test",
        "weights": "best",
        "samples": 1000,
        "classes": classes,
        "clean": clean,
        "attacks": {
            name: {
                **facts,
                "attack": f"{name}(Linf(0.15))",
                "robust": robust + 0.03 * i,
                "success_rate": 1 - robust / clean,
            }
            for i, name in enumerate(attacks)
        },
        "worst_case": robust,
        "curve": {
            "attack": "pgd-20",
            "threat": "Linf",
            "eps": [0, 0.05, 0.1, 0.15],
            "robust": [clean, 0.85 * clean, 0.8 * robust, robust / 2],
        },
        "agreement": {"teacher": "runs/teacher", "clean": 0.96, "robust": 0.8},
        "ece": 0.021,
        "nll": 0.1,
        "per_class": {
            "count": [100] * len(classes),
            "clean": shares,
            "robust": [0.6 * share for share in shares[:-1]] + [None],
        },
        "parameters": 75290,
        "macs": 12_000_000,
        "latency_ms": {"batch": 1, "median": 1.234},
        "device": "cpu",
        "seconds": 3.4,
        "warnings": ["one of the images looked back"],
    }


def gallery(rng: np.random.Generator, channels: int) -> dict[str, np.ndarray]:
    clean = np.zeros((6, channels, 28, 28), np.uint8)
    grid = np.mgrid[:28, :28]
    for i in range(6):
        ring = np.abs(np.hypot(grid[0] - 14, grid[1] - 14) - 4 - i) < 2
        clean[i] = (ring * np.linspace(255, 160, channels)[:, None, None]).astype(np.uint8)
    adversarial = np.clip(clean / 255 + 0.15 * rng.choice([-1, 1], clean.shape), 0, 1).astype(np.float32)
    label = np.arange(6) % 3
    facts = {
        "label": label,
        "clean_prediction": label,
        "adversarial_prediction": (label + 1) % 3,
        "attack": np.array(["pgd-20"] * 6),
    }
    return {"clean": clean, "adversarial": adversarial, **facts}


class Page(HTMLParser):
    """What a browser would see: elements that could run or load something, and unbalanced ones."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.scripts, self.loads, self.handlers, self.open = 0, [], [], []
        self.feed(self.source)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.loads += [
            v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith(("data:image/png;base64,", "#"))
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page(path: Path) -> Page:
    found = Page(path)
    assert (found.scripts, found.loads, found.handlers) == (1, [], [])
    assert not re.search(r"url\((?!#)", found.source)
    assert "@import" not in found.source
    return found


def test_one_run(tmp_path):
    path = write_report([make_run(tmp_path / "rslad-digits")])
    assert path == tmp_path / "rslad-digits" / "report.html"
    source = page(path).source
    assert "<h1>rslad-digits</h1>" in source
    assert "Robust accuracy (worst case over: pgd-20, fgsm) 55.0 ± 1.6 %" in source
    assert "binomial standard error" in source
    assert source.count("data:image/png;base64,") == 18
    assert "change &times; 3" in source  # 0.5 / 0.15, rounded down
    for fact in ("one of the images looked back", "12 M", "1.23 ms", "pgd-20(Linf(0.15))", "temperature = 4.0"):
        assert fact in source
    assert 'id="seeds"' not in source


def test_drawings_are_small_and_take_the_colours_of_the_page(tmp_path):
    runs = [make_run(tmp_path / f"run-{i}", i, epochs=400) for i in range(10)]
    drawings = re.findall(r'<svg viewBox="[\d. ]+" role="img".*?</svg>', page(write_report(runs)).source, re.DOTALL)
    assert len(drawings) >= 15
    assert max(map(len, drawings)) < 60_000
    for drawing in drawings:
        assert "<text" in drawing
        assert "currentColor" in drawing
        assert "var(--s0)" in drawing
        assert not re.search(r"(fill|stroke): #", drawing)
    assert "guessing, 1 of 10" in "".join(drawings)


def test_many_runs_and_the_best_of_each_column(tmp_path):
    runs = [make_run(tmp_path / f"m{i}", method=f"m{i}", clean=0.9 + i / 100, robust=0.5 - i / 100) for i in range(6)]
    path = write_report(runs, title="Six of them")
    assert path == tmp_path / "report.html"
    source = page(path).source
    assert "Robust accuracy over clean accuracy, a dot per run" in source
    best = re.findall(r'class="number best"[^>]*>([^<]*)<', source)
    assert sorted(best) == ["50.0 ± 1.6", "50.0 ± 1.6", "53.0 ± 1.6", "95.0 ± 0.7"]  # worst case, pgd-20, fgsm, clean


def test_figures_measured_differently_are_not_ranked(tmp_path):
    runs = [make_run(tmp_path / "a", clean=0.9), make_run(tmp_path / "b", clean=0.8, robust=0.7, attacks=("fgsm",))]
    source = page(write_report(runs)).source
    best = re.findall(r'class="number best"[^>]*>([^<]*)<', source)
    assert "90.0 ± 0.9" in best
    assert not any("70.0" in cell for cell in best)
    assert "attacked differently" in source


def test_a_run_that_is_not_finished(tmp_path):
    run = make_run(tmp_path / "young", evaluated=False)
    write_json(
        run / "status.json",
        {"state": "failed", "epoch": 3, "epochs": 8, "message": "The loss is not finite at step 9."},
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 8, "tra')
    source = page(write_report([run])).source
    assert "young: failed" in source
    assert "3 of 8 epochs done" in source
    assert "The loss is not finite at step 9." in source
    assert "No evaluation was made" in source
    assert "could not be used" not in source  # a cut last line is what a crash leaves behind


def test_a_run_that_was_never_attacked(tmp_path):
    run = make_run(tmp_path / "calm")
    summary = evaluation(0.9, 0.5, ["a", "b"], ())
    write_json(run / "evaluations" / "test.json", {**summary, "worst_case": None, "curve": None, "agreement": None})
    source = page(write_report([run])).source
    assert "Never attacked, so nothing is known about the robustness of: calm." in source
    assert "robust %" not in source


def test_nothing_but_a_status(tmp_path):
    write_json(tmp_path / "bare" / "status.json", {"state": "running"})
    assert "bare: running" in page(write_report([tmp_path / "bare"])).source
    (row,) = summarise([tmp_path / "bare"])
    assert row["clean"] is row["robust"] is row["parameters"] is None
    assert "bare" in text_table([row])


DAMAGE = [
    ("status.json", b"{"),
    ("status.json", b"[1]"),
    ("config.toml", b"a = = 1"),
    ("environment.json", b"\xff\xfe"),
    ("model.json", b"null"),
    ("metrics.jsonl", b"{\n{}\n{}\n"),
    ("metrics.jsonl", b"\xff\n\xff\n"),
    ("evaluations/test.json", b'{"clean": "much"}'),
    ("evaluations/test.json", b"nonsense"),
    ("evaluations/test-gallery.npz", b"PK nonsense"),
]


def test_damage_is_named_and_harms_nothing_else(tmp_path):
    runs = [make_run(tmp_path / "whole")]
    for i, (name, content) in enumerate(DAMAGE):
        runs.append(make_run(tmp_path / f"broken-{i}", i, clean=0.8 + i / 100))
        (runs[-1] / name).write_bytes(content)
    source = page(write_report(runs)).source
    warned = re.search(r"Some files could not be used</strong>(.*?)</div>", source, re.DOTALL)
    said = re.findall(r"<li>(.*?)</li>", warned[1], re.DOTALL)
    assert len(said) == len(DAMAGE)
    for i, ((name, _), text) in enumerate(zip(DAMAGE, said, strict=True)):
        assert f"broken-{i}:" in text
        assert name.split("/")[-1].split(".")[0].removeprefix("test-") in text
        evaluated = name != "evaluations/test.json"
        assert (f">{80 + i}.0 ± " in source) == evaluated


def test_values_of_the_wrong_kind_do_not_stop_the_report(tmp_path):
    run = make_run(tmp_path / "odd")
    odd = {
        "clean": 0.5,
        "attacks": {"x": {"robust": "high"}, "y": 3},
        "curve": [1],
        "per_class": {"clean": ["a", 0.5]},
        "classes": 7,
    }
    write_json(
        run / "evaluations" / "test.json",
        {**odd, "samples": float("nan"), "worst_case": None, "latency_ms": {"median": "?"}},
    )
    (run / "metrics.jsonl").write_text(
        '{"epoch": 0, "train": 3, "validation": {"clean": "x"}}\n7\n{"epoch": 1, "train": {"loss": NaN}}\n'
    )
    write_arrays(
        run / "evaluations" / "test-gallery.npz",
        {"clean": np.zeros((2, 1, 4, 4), np.uint8), "adversarial": np.zeros(3)},
    )
    assert "gallery" in page(write_report([run])).source


def test_hostile_names_come_out_harmless(tmp_path):
    run = make_run(tmp_path / "<b onclick=x>", method=HOSTILE, classes=[HOSTILE, "--><b>", "\x00\x1b[31m"], attacks=(HOSTILE,))
    write_json(run / "status.json", {"state": HOSTILE, "message": HOSTILE})
    write_json(run / "environment.json", {HOSTILE: HOSTILE})
    (run / "evaluations" / "test.json").rename(run / "evaluations" / "test&<i>.json")
    second = make_run(tmp_path / "second", method=HOSTILE)
    source = page(write_report([run, second], title=HOSTILE)).source  # `page` finds any element that came alive
    assert "<b onclick" not in source
    assert "alert(" in source
    assert source.count("<script") == 1
    text = text_table(summarise([run, second]))
    assert "\x1b" not in text


def sanity(suspected: bool) -> dict:
    checks = [
        {"name": "gradients", "passed": not suspected, "value": 128 * suspected, "limit": 3, "text": "Gradients are <blind>."},
        {"name": "black box", "passed": True, "value": 1, "limit": 3, "text": "Nothing to see."},
    ]
    return {"suspected": suspected, "samples": 128, "threat": "Linf", "eps": 0.15, "checks": checks, "seconds": 4.5}


def judged(folder: Path, suspected: bool, **about) -> Path:
    """A run whose evaluation has everything: the sanity panel, an attack of many members, one without radius, sizes, passes."""
    run = make_run(folder, **about)
    path = run / "evaluations" / "test.json"
    summary = json.loads(path.read_text())
    work = {"forward": 26000, "backward": 13000, "forward_per_image": 26.8, "backward_per_image": 13.4}
    confusion = [[3 * (j == (i + 1) % 10) for j in range(10)] for i in range(10)]
    summary["attacks"]["pgd-20"] |= {"passes": work, "confusion": confusion, "interval": [0.52, 0.58]}
    members = {"apgd-ce": {"broken": 300, "attacked": 970}, "square": 7}
    summary["attacks"]["fgsm"] |= {"members": members, "no_gradient": True}
    sizes = {"median": 0.4321, "q10": 0.11, "q90": 0.99, "found": 960}
    least = {"attack": "DDN()", "threat": "L2", "eps": None, "robust": 0.0, "success_denominator": 970, "seconds": 1.0}
    summary["attacks"]["ddn"] = {**least, "sizes": sizes}
    write_json(path, {**summary, "clean_interval": [0.95, 0.98], "sanity": sanity(suspected)})
    around = np.linspace(-0.3, 0.3, 25)
    size = np.abs(around[:, None]) + np.abs(around)
    surface = {"surface": np.stack([size - k for k in range(1, 5)]), "surface_size": np.stack([size] * 4)}
    surface |= {"surface_radius": around, "surface_label": np.arange(4)}
    write_arrays(run / "evaluations" / "test-gallery.npz", {**gallery(np.random.default_rng(0), 1), **surface})
    return run


def test_masked_gradients_are_marked_everywhere(tmp_path):
    masked, honest = judged(tmp_path / "masked", True, robust=0.9, method="m"), judged(tmp_path / "honest", False, robust=0.5)
    poor = judged(tmp_path / "poor", False, robust=0.4)
    source = page(write_report([masked, honest, poor])).source
    assert "90.0 ± 0.9, masked gradients suspected" in source
    assert re.search(r'masked: <span class="suspect">masked gradients suspected', source)
    assert source.count("masked gradients suspected") < 10
    best = re.findall(r'class="number best"[^>]*>([^<]*)<', source)
    assert "50.0 ± 1.6" in best
    assert not any(text.startswith("90.0") for text in best)
    assert "Gradients are &lt;blind&gt;." in source
    assert "Hollow: masked gradients suspected." in source
    rows = summarise([masked, honest])
    assert [row["suspected"] for row in rows] == [True, False]
    text = text_table(group_by_seed(rows))
    assert "masked gradients suspected" in text
    assert "Masked gradients suspected (?) for: masked." in text


def test_what_attacks_say_of_themselves(tmp_path):
    source = page(write_report([judged(tmp_path / "run", False)])).source
    assert "worst case over: pgd-20, fgsm)" in source  # an attack without radius has no part in it
    for fact in ("0.4321 (0.11 to 0.99)", "26.8 + 13.4", "broken by apgd-ce: 300, square: 7", "no gradient", "ddn size"):
        assert fact in source
    assert "pgd-20: 30 images broken." in source
    assert source.count("Margin around an image of") == 4
    drawings = re.findall(r'<svg viewBox="[\d. ]+" role="img".*?</svg>', source, re.DOTALL)
    fields = [drawing for drawing in drawings if "Margin around" in drawing or "Which class became" in drawing]
    assert len(fields) == 5
    for drawing in fields:
        assert len(drawing) < 25_000
        assert not re.search(r"(fill|stroke): #", drawing)
        assert "data:image/png;base64," in drawing


def test_damaged_fields_are_left_out(tmp_path):
    run = judged(tmp_path / "run", False)
    path = run / "evaluations" / "test.json"
    summary = json.loads(path.read_text())
    summary["attacks"]["pgd-20"] |= {"confusion": [[1, 2], [3]], "passes": 7, "sizes": "large", "members": [1], "interval": [0]}
    write_json(path, {**summary, "sanity": {"checks": ["bad", {"name": 3}], "eps": "x", "suspected": "perhaps"}})
    odd = {"surface": np.zeros((4, 3, 3)), "surface_size": np.zeros((4, 2, 2)), "surface_radius": np.zeros(3)}
    write_arrays(run / "evaluations" / "test-gallery.npz", {**odd, "surface_label": np.zeros(4)})
    source = page(write_report([run])).source
    assert "the loss surface of &#39;test&#39; cannot be drawn" in source
    assert "Which class became" not in source
    assert "masked gradients suspected" in source  # a check that does not say it passed has not


def test_an_evaluation_in_words(tmp_path):
    run = judged(tmp_path / "run", True)
    summary = json.loads((run / "evaluations" / "test.json").read_text())
    text = evaluation_text(summary)
    assert "clean accuracy 97.00% [95.0, 98.0]" in text
    assert re.search(r"pgd-20 +Linf\(0.15\)  robust accuracy 55.00% \[52.0, 58.0\]  26.8 \+ 13.4 passes an image", text)
    assert re.search(r"ddn +L2  median size 0.4321, 80 % from 0.11 to 0.99, 960 of 970 broken", text)
    assert "broken by: apgd-ce 300, square 7" in text
    assert "NO GRADIENT" in text
    assert "MASKED GRADIENTS SUSPECTED" in text
    assert "failed: gradients. Gradients are <blind>." in text
    assert "black box 1/3" in text
    calm = evaluation_text({**summary, "sanity": sanity(False)})
    assert "no masked gradients seen" in calm
    assert "SUSPECTED" not in calm
    old = evaluation_text(evaluation(0.9, 0.5, ["a", "b"], ("pgd",)))
    assert "sanity" not in old
    assert "clean accuracy 90.00%\n" in old
    bare = {"threat": "L2", "eps": None, "sizes": {"median": None, "found": 0}, "success_denominator": 9, "seconds": 1}
    blind = evaluation_text({**summary, "attacks": {"ddn": bare}})
    assert "L2  median size infinite, 0 of 9 broken" in blind


def test_no_torch(tmp_path):
    run = make_run(tmp_path / "run")
    code = (
        "import sys; from overproof.report import *; "
        f"print(text_table(group_by_seed(summarise([{str(run)!r}])))); write_report([{str(run)!r}]); "
        "assert not {'torch', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (run / "report.html").stat().st_size > 20_000


def test_same_folder_same_page(tmp_path):
    run = make_run(tmp_path / "run")
    first = write_report([run]).read_bytes()
    assert write_report([run]).read_bytes() == first


def test_summary_of_a_run(tmp_path):
    (row,) = summarise([make_run(tmp_path / "run", 7, clean=0.9, robust=0.5)])
    assert {
        key: row[key] for key in ("name", "method", "data", "model", "parameters", "seed", "agreement", "ece", "seconds")
    } == {
        "name": "run",
        "method": "rslad",
        "data": "fashion-mnist",
        "model": "resnet8",
        "parameters": 75290,
        "seed": 7,
        "agreement": 0.96,
        "ece": 0.021,
        "seconds": 312.4,
    }
    assert row["clean_se"] == pytest.approx(math.sqrt(0.9 * 0.1 / 1000))
    assert row["robust_se"] == pytest.approx(math.sqrt(0.25 / 1000))
    assert row["attacks"] == {"pgd-20": 0.5, "fgsm": pytest.approx(0.53)}


def test_runs_of_one_name_are_told_apart(tmp_path):
    names = [
        row["name"]
        for row in summarise([make_run(tmp_path / "a" / "kd"), make_run(tmp_path / "b" / "kd"), tmp_path / "a" / "kd"])
    ]
    assert names == ["a/kd", "b/kd"]


def test_text_table_is_aligned(tmp_path):
    lines = text_table(summarise([make_run(tmp_path / "a"), make_run(tmp_path / "much-longer", 11, clean=1.0)])).splitlines()
    head, rule, first, second = lines[:4]
    assert set(rule) == {"-"}
    assert head.index("method") == first.index("rslad") == second.index("rslad")
    assert head.index("clean %") + len("clean %") == first.index("97.0 ± 0.5") + len("97.0 ± 0.5")
    assert any("worst case over: pgd-20, fgsm" in line for line in lines)


def test_seeds_are_taken_together_and_paired(tmp_path):
    base = [make_run(tmp_path / f"kd-s{s}", s, method="kd", clean=c, robust=0.5) for s, c in enumerate((0.90, 0.92, 0.94))]
    ours = [make_run(tmp_path / f"ard-s{s}", s, method="ard", clean=c, robust=0.6) for s, c in enumerate((0.91, 0.94, 0.97))]
    alone = make_run(tmp_path / "ce", 5, method="ce", clean=0.8)
    rows = summarise([*base, *ours, alone])
    kd, ard, ce = group_by_seed(rows, baseline="kd-s1")
    assert [g["name"] for g in (kd, ard, ce)] == ["kd", "ard", "ce"]
    assert (kd["n"], kd["se"], kd["clean"]) == (3, "seeds", pytest.approx(0.92))
    assert kd["clean_se"] == pytest.approx(0.02 / math.sqrt(3))
    assert ard["clean_difference"] == pytest.approx(0.02)  # 0.01, 0.02, 0.03
    assert ard["clean_difference_se"] == pytest.approx(0.01 / math.sqrt(3))
    assert (ard["clean_difference_n"], ard["robust_difference"], ard["baseline"]) == (3, pytest.approx(0.1), "kd")
    assert "clean_difference" not in kd
    assert (ce["n"], ce["se"], ce["clean_difference"]) == (1, "binomial", None)
    assert ce["clean_se"] == pytest.approx(math.sqrt(0.16 / 1000))
    assert "+2.0 ± 0.6" in text_table([kd, ard, ce])
    source = page(write_report([*base, *ours, alone], baseline="kd")).source
    assert 'id="seeds"' in source
    assert "standard error of the mean over seeds" in source


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (("kd-s1", "kd-s10"), "kd"),
        (("kd-seed-1", "kd-seed-2"), "kd"),
        (("resnet8-0", "resnet8-1"), "resnet8"),
        (("seed-0/student", "seed-1/student"), "student"),
        (("0", "1"), "rslad"),
        (("resnet20",), "resnet20"),
    ],
)
def test_groups_have_the_name_that_their_runs_share(tmp_path, names, group):
    runs = [make_run(tmp_path / name, seed, epochs=1) for seed, name in enumerate(names)]
    assert [row["name"] for row in group_by_seed(summarise(runs))] == [group]


def test_seeds_measured_differently_are_never_averaged(tmp_path):
    rows = summarise([make_run(tmp_path / "a-0", 0), make_run(tmp_path / "a-1", 1, attacks=("fgsm",))])
    assert [group["n"] for group in group_by_seed(rows)] == [1, 1]


def test_repeating_a_seed_is_no_second_seed(tmp_path):
    (group,) = group_by_seed(summarise([make_run(tmp_path / "a", 3), make_run(tmp_path / "b", 3)]))
    assert (group["n"], group["se"]) == (1, "binomial")


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(UsageError, match="Name at least one"):
        write_report([])
    with pytest.raises(FolderError, match="absent"):
        summarise([tmp_path / "absent"])
    with pytest.raises(UnknownNameError, match=r"baseline 'kdd'.*'kd'"):
        group_by_seed(summarise([make_run(tmp_path / "kd")]), baseline="kdd")


def with_learned(folder: Path) -> Path:
    """A run whose method learned a policy, and boxes to be looked at."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["train"] |= {
            "magnitude/rotate": 0.5 + 0.01 * line["epoch"],
            "magnitude/noise": 0.4,
            "applied per draw/rotate": 0.2,
        }
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [
        {"operations": ["rotate", f"noise-{i}"], "weight": i / 66, "probabilities": [0.25, 0.5], "magnitudes": [0.75, 0.1]}
        for i in range(12)
    ]
    damaged = [{"operations": ["rotate"], "weight": None}, {"operations": ["a", "b"], "weight": 1.0, "probabilities": [1]}, 7]
    write_json(folder / "method.json", {"adapter_parameters": 12345, "searched_steps": 700, "policy": rows + damaged})
    boxes = np.array([[[0.0, 0.25, 0.5, 1.0], [0.5, 0.5, 0.75, 0.75]]] * 3)
    write_arrays(folder / "method.npz", {"images": np.zeros((3, 1, 8, 8)), "student_boxes": boxes, "teacher_boxes": boxes / 2})
    return folder


def test_what_a_method_learned(tmp_path: Path) -> None:
    run = with_learned(make_run(tmp_path / "sokd"))
    page = write_report([run]).read_text()
    assert "Inside the method" in page
    assert "12,345" in page or "12.3 k" in page
    assert page.count("magnitude over epochs") == 1
    assert "applied per draw over epochs" in page
    assert "noise-11 (0.50, 0.10)" in page
    assert "noise-1 (" not in page
    assert "And 2 lighter pairs" in page
    assert page.count('<span class="boxed">') == 6
    assert '<rect x="0.0" y="25.0" width="50.0" height="75.0"/>' in page
    assert "Training: magnitude/rotate" not in page
    text = method_text(json.loads((run / "method.json").read_text()))
    assert "12,345 parameters of adapters" in text
    assert "700 steps of search, 12 pairs" in text
    assert "rotate (probability 0.25, magnitude 0.75), then noise-11 (probability 0.50, magnitude 0.10)" in text


def test_damaged_learned_parts_are_named(tmp_path: Path) -> None:
    run = with_learned(make_run(tmp_path / "sokd"))
    (run / "method.npz").write_bytes(b"no archive")
    page = write_report([run]).read_text()
    assert "method.npz" in page
    assert "Some files could not be used" in page
    write_arrays(run / "method.npz", {"images": np.zeros((3, 1, 8, 8)), "student_boxes": np.zeros((1, 2, 4))})
    assert "method.npz cannot be shown" in write_report([run]).read_text()
    (run / "method.json").write_text("[1]")
    assert "Inside the method" in write_report([run]).read_text()  # the lines over epochs are still there


def test_nothing_learned_says_nothing(tmp_path: Path) -> None:
    assert "Inside the method" not in write_report([make_run(tmp_path / "kd")]).read_text()
    assert method_text({}) == ""


def measure(run: Path, name: str, attacks: tuple[str, ...] = (), rows: dict | None = None, **about) -> None:
    """One more evaluation in a run folder; `about`: clean, robust and any key of the summary."""
    summary = evaluation(about.pop("clean", 0.97), about.pop("robust", 0.5), ["a", "b"], attacks)
    calm = {"curve": None, "agreement": None} if attacks else {"worst_case": None, "curve": None, "agreement": None}
    write_json(run / "evaluations" / f"{name}.json", {**summary, **calm, **about})
    if rows:
        write_arrays(run / "evaluations" / f"{name}.npz", rows)


def weights(run: Path, content: bytes) -> str:
    (run / "weights").mkdir(exist_ok=True)
    (run / "weights" / "best.safetensors").write_bytes(content)
    return fingerprint(run, "best")


OTHERS = {
    "fewer images": {"samples": 30},
    "other data": {"data": "folder:other", "samples": 5000},
    "the data changed": {"protocol": {"data": {"name": "fashion-mnist", "strength": 2}}, "samples": 5000},
    "another split": {"split": "train", "samples": 5000},
    "the last weights": {"weights": "last", "samples": 5000},
    "guards": {"guard": {"guards": ["cache"]}, "samples": 5000},
}


@pytest.mark.parametrize("about", OTHERS.values(), ids=OTHERS)
def test_what_measures_something_else_stands_for_no_run(tmp_path: Path, about: dict) -> None:
    run = make_run(tmp_path / "f", evaluated=False)
    measure(run, "test-best", clean=0.424)
    measure(run, "test", clean=0.4, **about)
    (row,) = summarise([run])
    assert (row["evaluation"], row["clean"], row["samples"], row["apart"]) == ("test-best", 0.424, 1000, [])


def test_the_evaluation_of_most_images_stands_for_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "f", evaluated=False)
    measure(run, "test-best", samples=50)
    same = {"name": "fashion-mnist", "validation": 0.1, "augment": [], "root": "elsewhere", "validation_from": "train"}
    measure(run, "test", clean=0.8, protocol={"data": same, "limit": None})
    assert summarise([run])[0]["clean"] == 0.8
    measure(run, "another", clean=0.7, attacks=("fgsm",))
    assert summarise([run])[0]["evaluation"] == "another"  # as many images, and it has more to tell


@pytest.mark.parametrize(("part", "said"), [("other data", "data folder:other"), ("the last weights", "last weights")])
def test_a_stand_in_is_labelled(tmp_path: Path, part: str, said: str) -> None:
    run = make_run(tmp_path / "f", evaluated=False)
    measure(run, "test", **OTHERS[part])
    rows = summarise([run])
    assert f"Not on its own test images with its best weights, which nobody evaluated: f ({said})." in text_table(rows)
    assert f"nobody evaluated: f ({said})." in text_table(group_by_seed(rows))


def test_an_evaluation_of_other_weights_is_out_of_date(tmp_path: Path) -> None:
    run = make_run(tmp_path / "f", evaluated=False)
    measure(run, "test", clean=0.3, samples=2000, fingerprint=weights(run, b"early"))
    assert summarise([run])[0]["clean"] == 0.3
    made_of = weights(run, b"late")
    measure(run, "test-best", clean=0.9, fingerprint=made_of)
    (row,) = summarise([run])
    assert (row["evaluation"], row["outdated"]) == ("test-best", ["test"])
    assert "Out of date, since the run has other weights now, and left out of the row of f: test." in text_table([row])
    assert "out of date: the run has other weights now" in page(write_report([run])).source
    measure(run, "test", clean=0.3, samples=2000)  # one that does not say what weights it is of
    assert summarise([run])[0]["clean"] == 0.3
    (run / "evaluations" / "test.json").unlink()
    weights(run, b"later still")
    (row,) = summarise([run])
    assert row["clean"] is None
    assert "No evaluation was made" not in text_table([row])
    (run / "weights" / "best.safetensors").unlink()  # nobody can know
    assert summarise([run])[0]["clean"] == 0.9


def test_attacks_of_all_evaluations_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "f", evaluated=False)
    measure(run, "test-best")
    measure(run, "test-few", attacks=("pgd-20",), samples=30, robust=0.4)
    rows = summarise([run])
    text = text_table(rows)
    assert "Never attacked" not in text
    assert "40.0 ± 8.9 (30 images)" in text
    assert "(30 images)" in text_table(group_by_seed(rows))
    assert "± 8.9 (30 images)" in page(write_report([run])).source
    measure(run, "test-pgd", attacks=("pgd-20",), robust=0.6)
    (row,) = summarise([run])
    assert (row["robust"], row["attacks"], row["attacks_samples"]) == (0.6, {"pgd-20": 0.6}, {"pgd-20": 1000})
    measure(run, "test-last", attacks=("fgsm",), weights="last", robust=0.1)
    measure(run, "guarded", attacks=("fgsm",), guard={"guards": ["cache"]}, robust=0.1)
    assert summarise([run])[0]["attacks"] == {"pgd-20": 0.6}


def test_another_attack_of_the_same_name_is_told_apart(tmp_path: Path) -> None:
    run = make_run(tmp_path / "f")
    measure(run, "stronger", attacks=("fgsm",), robust=0.1, samples=900)
    path = run / "evaluations" / "stronger.json"
    path.write_text(path.read_text().replace("fgsm(Linf(0.15))", "fgsm(Linf(0.3))"))
    (row,) = summarise([run])
    assert row["attacks"] == {"pgd-20": 0.55, "fgsm": pytest.approx(0.58), "fgsm (stronger)": 0.1}
    assert row["worst"] == ["pgd-20", "fgsm"]


def test_the_worst_case_over_evaluations_is_that_of_each_image(tmp_path: Path) -> None:
    run, index = make_run(tmp_path / "f", evaluated=False), np.arange(4)
    same = {"index": index, "label": index % 2}
    holds = [np.array(part, bool) for part in ([1, 1, 0, 0], [0, 1, 1, 0])]
    measure(run, "a", attacks=("pgd-20",), samples=4, rows={**same, "pgd-20/robust": holds[0]})
    measure(run, "b", attacks=("fgsm",), samples=4, rows={**same, "fgsm/robust": holds[1]})
    (row,) = summarise([run])
    assert (row["robust"], row["worst"]) == (0.25, ["pgd-20", "fgsm"])
    measure(run, "b", attacks=("fgsm",), samples=4, robust=0.4, rows={**same, "index": index + 1, "fgsm/robust": holds[1]})
    (row,) = summarise([run])  # rows of other images tell nothing together
    assert (row["robust"], row["worst"]) == (0.4, ["fgsm"])


def test_gradients_masked_in_any_evaluation_of_the_row_are_suspected(tmp_path: Path) -> None:
    run = make_run(tmp_path / "f")
    measure(run, "few", attacks=("square",), samples=30, sanity=sanity(True))
    assert summarise([run])[0]["suspected"]
    measure(run, "few", attacks=("square",), samples=30, sanity=sanity(True), weights="last")
    assert not summarise([run])[0]["suspected"]


def test_damage_is_told_on_the_terminal_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "p")
    (run / "evaluations" / "test.json").write_text("nonsense")
    for command in ("show", "report"):
        assert call([command, str(run)]) == 0
        said = capsys.readouterr()
        assert said.err.count("test.json is not readable as JSON") == 1
        assert "No evaluation was made" not in said.out
    text = text_table(summarise([run]))
    assert "Damaged, and left out of the row of p: test. Delete the file and evaluate again." in text


@pytest.mark.parametrize(("content", "told"), [("[]", "holds a list where a JSON object"), ("{}", ""), ("{", "not readable")])
def test_a_run_of_unknown_state_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, told: str) -> None:
    (tmp_path / "status.json").write_text(content)
    assert call(["show", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert f"{tmp_path}: unknown" in said.out
    assert told in said.err


def test_what_is_no_run_folder_is_no_misspelt_name(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "runs" / "ok")
    (tmp_path / "runs" / "ok" / "weights").mkdir()
    (tmp_path / "lack").mkdir()
    monkeypatch.chdir(tmp_path)
    for place, remedy in (
        ("lack", "--out"),
        ("runs", "It holds some: overproof report runs."),
        ("runs/okk", "--out"),
        ("runs/ok/weights", "It lies in one: overproof show runs/ok."),
    ):
        assert call(["show", place]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"overproof: {place} is not a run folder")
        assert remedy in said
        assert "cka" not in said


def test_a_folder_of_runs_is_reported_as_its_runs(tmp_path: Path) -> None:
    for name in ("zebra", "seed-1/kd", "seed-0/kd", "seed-0/deeper/kd", ".hidden/kd"):
        make_run(tmp_path / "runs" / name, epochs=1)
    (tmp_path / "runs" / "notes.txt").write_text("not a folder")
    (tmp_path / "empty").mkdir()
    assert [row["name"] for row in summarise([tmp_path / "runs"])] == ["seed-0/kd", "seed-1/kd", "zebra"]
    names = [row["name"] for row in summarise([tmp_path / "runs" / "zebra", tmp_path / "runs"])]
    assert names == ["zebra", "seed-0/kd", "seed-1/kd"]
    assert write_report([tmp_path / "runs"]) == tmp_path / "runs" / "report.html"
    with pytest.raises(FolderError, match="empty is not a run folder.*holds none"):
        summarise([tmp_path / "runs", tmp_path / "empty"])
