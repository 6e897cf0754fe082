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
