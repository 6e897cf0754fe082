"""Benchmarks end with the promised JSON line and with equal outcomes; their times are nobody's assertion."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

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
