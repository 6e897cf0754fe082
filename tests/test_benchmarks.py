"""Benchmarks end with the promised JSON line and with equal outcomes; their times are nobody's assertion."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def test_step_overhead_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = runpy.run_path(str(ROOT / "benchmarks" / "step_overhead.py"))
    monkeypatch.setitem(module["measure"].__globals__, "BLOCKS", 1)
    monkeypatch.setitem(module["measure"].__globals__, "STEPS", 2)
    monkeypatch.setitem(module["measure"].__globals__, "BATCH", 8)
    with monkeypatch.context() as patch:
        patch.setattr("statistics.stdev", lambda values: 0.0)
        module["main"]()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["name"] == "step_overhead"
    assert set(line["ratios"]) == {"kd_resnet8", "kd_resnet20"}
    assert line["equal"] is True


def test_peers_are_compared_with_the_fastest_correct_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    judged = runpy.run_path(str(ROOT / "benchmarks" / "attack_peers.py"))["judged"]
    rows = {
        "ours": {"robust": 0.50, "seconds": 2.0},
        "ours, no early stop": {"robust": 0.50, "seconds": 9.0},
        "weak and fast": {"robust": 0.60, "seconds": 1.0},
        "correct": {"robust": 0.502, "seconds": 4.0},
        "slow": {"robust": 0.50, "seconds": 8.0},
    }
    assert judged("pgd", rows) == (0.5, True)
    assert judged("pgd", {**rows, "ours": {"robust": 0.51, "seconds": 2.0}})[1] is False
    assert judged("autoattack", {**rows, "slow": {"robust": 0.496, "seconds": 8.0}})[1] is False
    assert judged("pgd", {"ours": rows["ours"]}) == (None, True)


def test_robust_step_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = runpy.run_path(str(ROOT / "benchmarks" / "robust_step.py"))
    small = {"PAIRS": 2, "WARM": 1, "BATCH": 8, "PROOF": 4, "STEPS": 3, "STUDENTS": {"cpu": ("resnet8",)}}
    for name, value in small.items():
        monkeypatch.setitem(module["measure"].__globals__, name, value)
    monkeypatch.setattr("sys.argv", ["robust_step.py"])
    module["main"]()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["name"] == "robust_step"
    assert set(line["ratios"]) == {"pgd_at_resnet8", "iad_resnet8"}
    assert line["equal"] is True


def test_fisher_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = runpy.run_path(str(ROOT / "benchmarks" / "fisher.py"))
    small = {"TURNS": 2, "WARM": 1, "CASES": (("lenet5", 3, 6),), "peak_elsewhere": lambda *case: 1.0}
    for name, value in small.items():
        monkeypatch.setitem(module["main"].__globals__, name, value)
    monkeypatch.setattr("sys.argv", ["fisher.py", "--images", "4"])
    module["main"]()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["name"] == "fisher"
    promised = {
        f"{who}_lenet_3" for who in ("exact", "rademacher", "fdkl", "label", "hutchinson", "lambda", "loop", "vectorised")
    }
    assert set(line["ratios"]) == promised | {f"lambda_max_{way}_lenet_3" for way in ("rows", "dxd", "power")}
    assert line["equal"] is True


def test_nim_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = runpy.run_path(str(ROOT / "benchmarks" / "nim.py"))
    small = {"PAIRS": 2, "WARM": 1, "BATCH": 8, "ASKED": 2, "DRAWS": 3, "memory": lambda case, who, device: 2.0}
    for name, value in small.items():
        monkeypatch.setitem(module["main"].__globals__, name, value)
    monkeypatch.setattr("sys.argv", ["nim.py"])
    module["main"]()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["name"] == "nim"
    assert set(line["ratios"]) == {f"{case}{kind}" for case in ("step", "inference", "eot") for kind in ("", "_memory")}
    assert line["equal"] is True


def test_guards_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = runpy.run_path(str(ROOT / "benchmarks" / "guards.py"))

    def here(way: str, case: tuple[int, int], queries: int, device: str) -> tuple[dict[str, float], Any]:
        keys, asked = module["numbers"](case[0], case[1], 0, device), module["numbers"](queries, case[1], 1, device)
        labels = torch.arange(case[0]) * 10 // case[0]
        return {"seconds": 2.0 if way == "direct" else 1.0, "mib": 1.0}, module["WAYS"][way](asked, keys, labels)

    for name, value in {"elsewhere": here, "QUICK": ((3_000, 32),)}.items():
        monkeypatch.setitem(module["main"].__globals__, name, value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["guards.py", "--part", "cache", "--quick"])
    module["main"]()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["name"] == "guards"
    assert line["ratios"] == {"cache_3k_32": 0.5, "cache_memory_3k_32": 1.0}
    assert line["equal"] is True


def test_probes_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = runpy.run_path(str(ROOT / "benchmarks" / "probes.py"))
    small = {"PLANES": {"planes": 2, "side": 4}, "EPOCHS": 1, "NETWORKS": ({"widths": (4, 6)}, {"widths": (4,)})}
    for name, value in small.items():
        monkeypatch.setitem(module["main"].__globals__, name, value)
    monkeypatch.setattr("sys.argv", ["probes.py", "--images", "40", "--turns", "1"])
    module["main"]()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["name"] == "probes"
    assert set(line["ratios"]) == {"suite"}


def test_the_suite_of_probes_is_compared_by_maps_and_groups_too() -> None:
    scores = runpy.run_path(str(ROOT / "benchmarks" / "probes.py"))["scores"]
    number = {"value": 0.5}
    found = {
        "localisation": {"rows": [{"quantity": "map", "condition": "", "scores": {"student over independent": number}}]},
        "group-bias": {"rows": [{"quantity": "accuracy", "condition": "a", "scores": {"student": number, "teacher": number}}]},
        "boundary-similarity": {"rows": [{"quantity": "same", "condition": "", "scores": {"student": number}}]},
    }
    names = {"student": "student:a", "student over independent": "student:a over independent:0"}
    assert scores(found, names) == {
        ("localisation", "map", "", "student:a over independent:0"): 0.5,
        ("group-bias", "accuracy", "a", "student:a"): 0.5,
    }


def test_generative_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = runpy.run_path(str(ROOT / "benchmarks" / "generative.py"))
    small = {
        "TURNS": 2,
        "WARM": 1,
        "WIDTH": 4,
        "CASES": {"cpu": ("resnet8", "resnet8", 4)},
        "peak_elsewhere": lambda who, device: 1.0,
    }
    for name, value in small.items():
        monkeypatch.setitem(module["main"].__globals__, name, value)
    monkeypatch.setattr("sys.argv", ["generative.py", "--part", "dfad"])
    module["main"]()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["name"] == "generative"
    assert set(line["ratios"]) == {"dfad_exact", "dfad_fast"}
    assert line["equal"] is True


def test_steps_of_networks_are_compared_and_not_their_weights() -> None:
    same = runpy.run_path(str(ROOT / "benchmarks" / "generative.py"))["same_steps"]
    step = [torch.full((4,), 1e-5), torch.full((3,), 1e-6)]
    assert same(step, [value * 1.01 for value in step])
    assert not same(step, [step[0], step[1] * 1.05])
    assert not same(step, [torch.zeros(4), step[1]])
    assert not same([torch.zeros(4)], [torch.zeros(4)]), "nothing has moved"


def test_evolution_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = runpy.run_path(str(ROOT / "benchmarks" / "evolution.py"))
    for name, value in {"TURNS": 2, "WARM": 1, "CHECKED": 5}.items():
        monkeypatch.setitem(module["main"].__globals__, name, value)
    monkeypatch.setattr("sys.argv", ["evolution.py"])
    module["main"]()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["name"] == "evolution"
    assert set(line["ratios"]) == {"cegan", "cegan_same_loop", "cegan_code", "straightforward"}
    assert line["equal"] is True
