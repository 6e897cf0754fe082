"""What the README and the docs say, runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTING = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
torch.set_num_threads(1)
images, labels = torch.rand(32, 3, 32, 32), torch.arange(32) % 10
my_loader = my_test_loader = DataLoader(TensorDataset(images, labels), batch_size=16)
my_student = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
"""


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text("utf-8"), flags=re.DOTALL)


def run_python(code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_example(tmp_path: Path) -> None:
    code = "\n".join(blocks(ROOT / "README.md", "python"))
    code += "\nserved = torch.export.load('student.pt2').module()\nassert torch.equal(served(images), student(images))\n"
    assert "Evaluation(clean" in run_python(SETTING + code, tmp_path)
    assert (tmp_path / "runs/mine/config.toml").exists()


def test_extending_examples(tmp_path: Path) -> None:
    code = "\n".join(blocks(ROOT / "docs/extending.md", "python"))
    code += (
        "\nfrom overproof.testing import check_attack, check_guard, check_method\nimport overproof\n"
        "check_method(MarginKD)\ncheck_attack(TopLogit(eps=0.1))\ncheck_guard(Blur)\n"
        "nets = {n: overproof.create_model('cnn', 2, 3, 8) for n in ('teacher', 'student', 'independent:0', 'independent:1')}\n"
        "told = overproof.explain(nets, (torch.rand(40, 3, 8, 8), torch.arange(40) % 2), probes='same-mistakes')\n"
        "assert 'independent seeds' in told['same-mistakes'].controls\n"
        "run = overproof.train('my-net', 'my-set', epochs=1, batch_size=32, attacks=['top-logit'], out='r')\n"
        "assert run.evaluations['test-best']['attacks']['top-logit']['robust'] >= 0\n"
    )
    run_python(code, tmp_path)


def test_flat_networks_example(tmp_path: Path) -> None:
    (code,) = blocks(ROOT / "docs/flat-networks.md", "python")
    assert "tensor" in run_python("import torch; torch.set_num_threads(1)\n" + code, tmp_path)


def test_distilling_example(tmp_path: Path) -> None:
    (code,) = blocks(ROOT / "docs/distilling.md", "python")
    float(
        run_python(
            SETTING + "import copy\nmy_dataset, my_teacher = (images, labels), copy.deepcopy(my_student)\n" + code, tmp_path
        ).split()[-1]
    )


def test_guards_example(tmp_path: Path) -> None:
    code, *_ = blocks(ROOT / "docs/guards.md", "python")
    names = "model, validation_images, validation_labels = my_student, *(torch.rand(32, 3, 32, 32), labels)\n"
    names += "test_images, test_labels = torch.rand(16, 3, 32, 32), labels[:16]\n"
    tail = (
        "\nassert verdict.probabilities.shape == (16, 10) and result.summary['guard']['strongest'] in ('pgd', 'pgd-transfer')"
    )
    run_python(SETTING + names + code.replace("Cache()", 'Cache(layers=("0",))') + tail, tmp_path)


def test_purifier_example(tmp_path: Path) -> None:
    code, *_ = blocks(ROOT / "docs/purifier.md", "python")
    names = "overproof_data = (torch.rand(64, 3, 32, 32), torch.arange(64) % 10)\nmodel = my_student\n"
    names += "images, labels = overproof_data\ntest_images, test_labels = torch.rand(16, 3, 32, 32), labels[:16]\n"
    tail = "\nassert torch.equal(off.logits, model(test_images)) and averaged.logits.shape == (16, 10)"
    tail += "\nassert result.summary['purifier']['sigma'] == ['off', 70.0]"
    small = code.replace("epochs=100", "epochs=1").replace("epochs=30", "epochs=1").replace("steps=40", "steps=2")
    run_python(SETTING + names + small + tail, tmp_path)


def test_evolving_example(tmp_path: Path) -> None:
    (code,) = blocks(ROOT / "docs/evolving-generators.md", "python")
    names = "images = torch.rand(150, 3, 8, 8)\nclassifier = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))\n"
    assert "'fid by judge'" in run_python(SETTING + names + code + "\nassert made.shape == (8, 3, 8, 8)", tmp_path)


def test_explain_example(tmp_path: Path) -> None:
    (code,) = blocks(ROOT / "docs/explain.md", "python")
    names = "from overproof import create_model\n"
    names += "teacher, student, first, second = (create_model('cnn', 10, 3, 32, widths=(4, 8)) for _ in range(4))\n"
    names += "group_of_each_image = labels % 2\n"
    tail = "\nassert found['group-bias'].facts['deprived'] == 'south' and not found.skipped"
    assert "Number(value=" in run_python(SETTING + names + code + tail, tmp_path)
    assert (tmp_path / "runs/explanation.json").exists()


def test_without_data_example(tmp_path: Path) -> None:
    (code,) = blocks(ROOT / "docs/without-data.md", "python")
    names = "import copy\nmy_teacher = copy.deepcopy(my_student)\n"
    run_python(SETTING + names + code + "\nassert grid.exists() and len(run.folder.metrics) == 1", tmp_path)


def test_readme_commands_name_real_options() -> None:
    """Every command of the README is understood (shown by asking each for its help) and its options exist."""
    from overproof.cli import app

    names = (
        "distilling",
        "attacks",
        "guards",
        "purifier",
        "evolving-generators",
        "explain",
        "without-data",
        "who-paid",
        "flat-networks",
    )
    pages = ("README.md", *(f"docs/{name}.md" for name in names))
    text = "\n".join(block for page in pages for block in blocks(ROOT / page, "sh"))
    commands = [line.split("#")[0].split() for line in text.splitlines() if line.startswith("overproof")]
    assert len(commands) >= 4
    for _, *words in commands:
        app.parse_args(words, exit_on_error=False, print_error=False)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_recipes_are_valid(path: Path) -> None:
    from overproof.run.prepare import checked
    from overproof.run.recipes import read_recipe

    recipe = read_recipe(path)
    assert recipe.about.title
    for run in recipe.runs:
        checked(recipe.config(run, Path("out"), 0))


def test_example_plugin_keeps_the_contract(tmp_path: Path) -> None:
    code = (
        "from overproof.registry import load_plugin; load_plugin(r'%s')\n"
        "from overproof import METHODS; from overproof.testing import check_method\n"
        "check_method(METHODS.get('margin-kd').load())"
    )
    run_python(code % (ROOT / "examples" / "plugin_method.py"), tmp_path)


def test_nothing_speaks_of_one_machine() -> None:
    words = re.compile(r"/work/|/tmp/|/root/|/home/\w")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *(ROOT / "src").rglob("*.py"), *ROOT.glob("results/*.json")]:
        assert not words.search(path.read_text("utf-8")), path
