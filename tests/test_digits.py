"""The main job on real digits: distillation keeps accuracy, adversarial methods earn robustness. Margins hold over three seeds."""

from __future__ import annotations

import json
from pathlib import Path

from overproof.run.recipes import read_recipe, run_recipe
from overproof.run.seeds import figures

ROOT = Path(__file__).resolve().parents[1]


def test_the_demo_shortened(tmp_path: Path) -> None:
    recipe = read_recipe(ROOT / "recipes" / "demo.toml")
    runs = run_recipe(recipe, tmp_path, seeds=[0], overrides=["train.epochs=12", "evaluation.curve=[]"])[0]
    found = {name: figures(folder) for name, folder in runs.items()}
    for name in ("student-pgd-at", "student-rslad", "teacher-robust"):
        assert found[name]["pgd-20"] > found["student-ce"]["pgd-20"] + 0.30, name
        assert found[name]["pgd-20"] <= found[name]["fgsm"], "an iterative attack weaker than a single step"
        assert found[name]["clean"] > 0.90, name
    assert found["student-kd"]["clean"] > found["student-ce"]["clean"] - 0.02
    assert found["student-kd"]["agreement"] > 0.95
    sizes = {name: folder.evaluations["test-best"]["parameters"] for name, folder in runs.items()}
    assert sizes["teacher"] > 4 * sizes["student-kd"]


def test_recorded_figures_hold_what_is_claimed() -> None:
    """results/demo.json, three seeds: robust students at least 30 points above the plain one, KD at least as accurate as CE."""
    result = json.loads((ROOT / "results" / "demo.json").read_text())
    value = {figure["name"]: figure for figure in result["figures"]}
    assert len(result["seeds"]) == 3
    for method in ("PGD-AT", "RSLAD"):
        assert min(value[f"{method} minus CE, PGD-20 at 0.15"]["values"]) >= 0.30
    assert value["KD minus CE, clean"]["mean"] >= 0
