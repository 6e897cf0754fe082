"""Linear probes: nothing but the last layer learns, the run folder is one like any other, bad input is named."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import overproof
from overproof.cli import call
from overproof.config import resolve
from overproof.data import Splits
from overproof.errors import OverproofError, UsageError
from overproof.features import Tap, last_linear
from overproof.folder import RunFolder
from overproof.methods.linear_probe import LinearProbe
from overproof.models.factory import rebuild
from overproof.models.heads import with_new_head
from overproof.run.prepare import checked
from overproof.run.probing import probe_table
from overproof.testing import check_method, small_batch, small_model
from overproof.types import Progress

NOW = Progress()
QUICK = ["--set", "data.limit_train=120", "--set", "data.limit_test=30", "--epochs", "1"]
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def robust(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by PGD-AT on digits."""
    out = tmp_path_factory.mktemp("probe") / "robust"
    command = ["train", "--data", "digits", *QUICK, "--model", "cnn", "--set", "model.widths=[4,8]", "--method", "pgd-at"]
    command += ["--set", "method.eps=0.1", "--set", "method.steps=2", "--set", "train.validation_limit=20"]
    assert call([*command, "--out", str(out)]) == 0
    return out


# The method


@pytest.mark.parametrize("images", ["clean", "adv"])
def test_contract(images: str) -> None:
    check_method(lambda student: LinearProbe(student, images=images, eps=0.1, steps=2), teacher=False)


@pytest.mark.parametrize("images", ["clean", "adv"])
def test_nothing_but_the_last_layer_changes(images: str) -> None:
    objective, batch = LinearProbe(small_model(0), images=images, eps=0.1, steps=2).train(), small_batch(8)
    before = copy.deepcopy(objective.trained_state())
    optimizer = torch.optim.SGD(list(objective.trainable()), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        objective(batch, NOW).losses["ce"].backward()
        optimizer.step()
    for name, value in objective.trained_state().items():
        assert torch.equal(value, before[name]) != name.startswith("student.6"), name
    assert objective.student.training


def test_gradient_in_closed_form() -> None:
    """d/dW = (p - onehot)^T f / N, for features of the network in use."""
    objective, batch = LinearProbe(small_model(0)).train(), small_batch(8)
    output = objective(batch, NOW)
    output.losses["ce"].backward()
    student = objective.student.eval()
    with torch.no_grad():
        features = student[:-1](batch.images)
        gap = student(batch.images).softmax(1) - F.one_hot(batch.labels, 3)
    torch.testing.assert_close(student[6].weight.grad, gap.T @ features / 8)
    torch.testing.assert_close(student[6].bias.grad, gap.mean(0))
    torch.testing.assert_close(output.logits, student(batch.images))


def test_adversarial_probes_are_attacked_through_the_whole_network() -> None:
    objective, batch = LinearProbe(small_model(0), images="adv", eps=0.3, step_size=0.1, steps=5).eval(), small_batch(8)
    torch.manual_seed(0)
    attacked = objective(batch, NOW).losses["ce"]
    clean = F.cross_entropy(objective.student(batch.images), batch.labels)
    assert float(attacked.detach()) > float(clean.detach()) + 1e-3


def test_only_adversarial_probes_are_chosen_by_robust_accuracy() -> None:
    assert LinearProbe(small_model()).validation_attack is None
    attack = LinearProbe(small_model(), images="adv", eps=0.2, norm="L2").validation_attack
    assert (attack.eps, attack.norm) == (0.2, "L2")


# The new last layer


NETWORKS = {
    "ours": lambda: overproof.create_model("resnet8", 10, 3, 32),
    "transformer": lambda: overproof.create_model("vit-tiny", 10, 3, 32, depth=2, embed_dim=24),
    "timm": lambda: overproof.create_model("timm:resnet10t", 10, 3, 32),
    "torchvision": lambda: overproof.create_model("torchvision:mobilenet_v3_small", 10, 3, 32),
    "bare timm": lambda: timm.create_model("resnet10t", num_classes=10),
    "bare torchvision": lambda: torchvision.models.squeezenet1_1(num_classes=10),
    "without bias": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 6), nn.ReLU(), nn.Linear(6, 10, bias=False)),
}


@pytest.mark.parametrize("kind", [kind for kind in NETWORKS if kind != "bare torchvision"])
def test_a_copy_with_new_last_layer(kind: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[kind]().eval()
    state = copy.deepcopy(model.state_dict())
    made = with_new_head(model, 4)
    layer = last_linear(made)
    assert made(IMAGES).shape == (2, 4)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for name, value in made.state_dict().items():
        assert name.startswith(f"{layer}.") or torch.equal(value, state[name]), name
    assert made.state_dict().keys() == state.keys()
    features = [Tap(net, [f"{layer}:input"])(IMAGES)[1][f"{layer}:input"] for net in (model, made)]
    torch.testing.assert_close(*features)
    if isinstance(made, overproof.Classifier):
        again = rebuild(made.spec).eval()
        again.load_state_dict(made.state_dict())
        torch.testing.assert_close(again(IMAGES), made(IMAGES))
        assert model.spec["classes"] == 10


def test_a_new_layer_has_the_type_of_the_old_one() -> None:
    assert with_new_head(small_model().double(), 7)[6].weight.dtype == torch.float64


def test_networks_without_a_linear_layer() -> None:
    with pytest.raises(OverproofError, match="SqueezeNet has no linear layer"):
        with_new_head(NETWORKS["bare torchvision"](), 4)


# The verb


def test_a_run_folder_like_any_other(robust: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["probe-linear", str(robust), "--out", "probe", "--epochs", "2", "--lr", "0.05", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["runs"][0]
    assert row["method"] == "linear-probe"
    folder, source = RunFolder("probe"), RunFolder(robust)
    assert folder.config["model"] == {
        "name": "cnn", "pretrained": False, "widths": [4, 8], "run": str(robust), "which": "best",
    }  # fmt: skip
    assert folder.config["data"] == source.config["data"]
    assert folder.config["train"]["epochs"] == 2
    found, known = (f.evaluations["test-best"]["attacks"]["pgd-20"] for f in (folder, source))
    assert found["attack"] == known["attack"]
    before, after = (load_file(path / "weights" / "best.safetensors") for path in (robust, Path("probe")))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert before.keys() - same == {"net.fc.weight", "net.fc.bias"}
    assert call(["resume", "probe"]) == 0
    capsys.readouterr()
    assert call(["evaluate", "probe", "--attack", "fgsm", "--eps", "0.1", "--json", "--sanity", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["attacks"]["fgsm"]["eps"] == 0.1
    assert call(["run", "probe/config.toml", "--out", "again"]) == 0
    again = load_file("again/config/weights/best.safetensors")
    assert all(torch.equal(again[name], value) for name, value in after.items())


def test_what_a_probe_takes_over(robust: Path) -> None:
    table = probe_table(robust, which="last")
    assert table["model"] == {"name": "cnn", "run": str(robust), "which": "last"}
    assert table["method"] == {"name": "linear-probe", "eps": 0.1, "steps": 2}
    assert table["data"]["limit_train"] == 120
    assert set(table["evaluation"]["attacks"]) == {"pgd-20"}
    assert probe_table(robust, data="mnist")["data"] == {"name": "mnist"}


def test_options_that_mean_something_else_are_not_taken_over(robust: Path, tmp_path: Path) -> None:
    place = tmp_path / "bss"
    shutil.copytree(robust, place)
    text = (place / "config.toml").read_text()
    start = text.index("[method]")
    end = text.find("\n[", start + 1)
    (place / "config.toml").write_text(text[:start] + '[method]\nname = "bss"\nsteps = 10\n' + (text[end:] if end > 0 else ""))
    assert probe_table(place)["method"] == {"name": "linear-probe"}


def test_options_of_the_verb(robust: Path) -> None:
    command = ["probe-linear", str(robust), "--images", "adv", "--which", "last", "--seed", "3", "--epochs", "1", "--out", "p"]
    assert call([*command, "--attack", "fgsm:eps=0.05", "--augment", "crop:1", "--set", "method.steps=1"]) == 0
    config = RunFolder("p").config
    assert config["method"] == {"name": "linear-probe", "images": "adv", "eps": 0.1, "steps": 1}
    assert config["model"]["which"] == "last"
    assert (config["seed"], config["data"]["augment"]) == (3, ["crop:1"])
    assert set(config["evaluation"]["attacks"]) == {"fgsm:eps=0.05"}
    assert "robust" in RunFolder("p").metrics[0]["validation"]


def test_other_data(robust: Path, digits: Splits) -> None:
    """Odd or even: two classes instead of ten, from tensors of the caller's."""
    train, test = (overproof.ImageSet(part.images, part.labels % 2) for part in (digits.train.subset(range(80)), digits.test))
    run = overproof.probe_linear(robust, train, test_data=test.subset(range(30)), epochs=2, lr=0.05, eps=0.2, out="odd")
    assert run.model(digits.test.images[:4] / 255).shape == (4, 2)
    assert run.folder.config["evaluation"]["attacks"]["pgd-20"]["eps"] == 0.1  # the run's own attacks
    assert run.folder.config["method"]["eps"] == 0.2
    loaded = overproof.load("odd")
    assert loaded.spec["classes"] == 2
    torch.testing.assert_close(loaded(digits.test.images[:4] / 255), run.model.eval()(digits.test.images[:4] / 255))


def test_own_data_of_the_run_in_python(robust: Path) -> None:
    run = overproof.probe_linear(robust, epochs=1, limit_train=50)
    assert run.path == Path("runs/linear-probe-1")
    assert run.folder.config["data"]["limit_train"] == 50
    assert run.folder.config["data"]["limit_test"] == 30


def test_a_network_of_the_callers_is_left_as_it_is(digits: Splits) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 5))
    before = copy.deepcopy(network.state_dict())
    run = overproof.probe_linear(network, digits, epochs=1, out="p", attacks=[overproof.FGSM(eps=0.1)])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert torch.equal(run.model[1].weight, network[1].weight)
    assert run.model[3].weight.shape == (10, 12)
    assert all(parameter.requires_grad for parameter in run.model.parameters())
    assert "fgsm" in run.evaluations["test-best"]["attacks"]


RECIPE = """
[recipe]
title = "Probes"
[defaults.data]
name = "digits"
limit_train = 120
limit_test = 30
[defaults.train]
epochs = 1
[runs.features]
model = { name = "mlp", hidden = [12] }
[runs.probe]
model.run = "@features"
method = { name = "linear-probe", eps = 0.1 }
[runs.tuned]
model.run = "@features"
"""


def test_recipes_begin_with_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """With another method than a probe all layers are trained further."""
    Path("r.toml").write_text(RECIPE)
    assert call(["run", "r.toml"]) == 0
    assert RunFolder("runs/r/probe").config["model"]["hidden"] == [12]
    states = {name: load_file(f"runs/r/{name}/weights/last.safetensors") for name in ("features", "probe", "tuned")}
    first = "net.layers.0.0.weight"
    assert torch.equal(states["features"][first], states["probe"][first])
    assert not torch.equal(states["features"][first], states["tuned"][first])
    Path("bad.toml").write_text(RECIPE.replace("@features", "@feature"))
    assert call(["run", "bad.toml"]) == 2
    assert "Did you mean 'features'" in capsys.readouterr().err


# Bad input


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 1, "nowhere is not a run folder"),
        (["ROBUST", "--data", "digit"], 2, "Did you mean 'digits'"),
        (["ROBUST", "--images", "both"], 2, "both"),
        (["ROBUST", "--set", "method.temperature=3"], 2, "linear-probe"),
        (["ROBUST", "--set", "model.weights=w.safetensors"], 2, "brings its own weights"),
    ],
)
def test_bad_commands(arguments: list[str], code: int, message: str, robust: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(robust) if argument == "ROBUST" else argument for argument in arguments]
    assert call(["probe-linear", *given, "--out", "x"]) == code
    assert message in capsys.readouterr().err
    assert not Path("x").exists()


def test_bad_calls(digits: Splits) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(UsageError, match=r"probe_linear\(network, data\)"):
        overproof.probe_linear(network)
    data = TensorDataset(digits.train.images[:32] / 255, digits.train.labels[:32])
    with pytest.raises(UsageError, match="ImageSet"):
        overproof.probe_linear(network, DataLoader(data, batch_size=16), out="x")
    with pytest.raises(UsageError, match="Did you mean 'epochs'"):
        overproof.probe_linear(network, digits, epoch=1, out="x")
    colour: Any = (torch.rand(8, 3, 9, 9), torch.arange(8) % 2)
    with pytest.raises(UsageError, match="shape"):
        overproof.probe_linear(network, colour, out="x")
    overproof.train(network, digits, epochs=1, out="own")
    with pytest.raises(UsageError, match="data of a program"):
        overproof.probe_linear("own")
    assert not Path("x").exists()


def test_a_run_still_to_come_is_no_error_yet() -> None:
    config = resolve({"model": {"run": "later"}, "method": {"name": "linear-probe"}})
    assert checked(config).model.run == "later"
    with pytest.raises(OverproofError, match="later is not a run folder"):
        overproof.probe_linear("later")


# What the page says


def page(language: str) -> str:
    text = (Path(__file__).resolve().parents[1] / "docs" / "robust-features.md").read_text("utf-8")
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL))


def test_commands_of_the_page_are_understood(robust: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from overproof.run import execute as room

    seen = []
    monkeypatch.setattr(room, "execute", lambda config, *_, **__: seen.append(checked(config)) or sys.exit(0))
    commands = [line.replace("runs/student", str(robust)) for line in page("sh").splitlines()]
    for command in commands:
        with pytest.raises(SystemExit):
            call(command.split()[1:])
    assert len(seen) == len(commands) >= 4


def test_the_page_in_python(capsys: pytest.CaptureFixture[str]) -> None:
    exec(page("python"), {})
    assert 0 <= float(capsys.readouterr().out) <= 1
