"""Figures of samples, and runs that evolve generators: kept, resumed, looked at."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import overproof
from overproof import console
from overproof.cli import call
from overproof.config import resolve
from overproof.data import ImageSet, Splits
from overproof.data.toys import TOYS, lattice, ring
from overproof.errors import FolderError, NonFiniteLossError, OverproofError, UnknownNameError, UsageError
from overproof.evaluation import generative
from overproof.folder import RunFolder
from overproof.models.sampling import load_generator, sample
from overproof.run.course import checked_evolution, planned
from overproof.run.execute import execute, resume
from overproof.run.recipes import read_recipe
from overproof.run.seeds import figures
from overproof.training.checkpoints import load_checkpoint
from overproof.training.evolving import Evolver
from overproof.training.safety import Interrupted

TOY = {"generations": 12, "test_every": 6, "test_samples": 64, "width": 16, "batch_size": 8, "evaluation_size": 16}
SMALL = {"generations": 4, "test_every": 2, "test_samples": 32, "width": 4, "latent": 5, "batch_size": 4, "evaluation_size": 8}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Brightness(nn.Module):
    """A classifier of two classes, dark and bright, with a layer to read features from."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 2)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[-20.0], [20.0]]))
            self.fc.bias.copy_(torch.tensor([10.0, -10.0]))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(images.mean(dim=(1, 2, 3))[:, None])
        return logits


# ---- toys and figures


def test_toys_are_what_the_papers_describe() -> None:
    eight, grid = ring(), lattice()
    torch.testing.assert_close(eight.centres.norm(dim=1), torch.full((8,), 2 / 1.414))
    apart = torch.cdist(grid.centres, grid.centres).fill_diagonal_(9).min()
    assert float(apart) == pytest.approx(2 / 2.828, abs=1e-5)
    for toy in (eight, grid):
        points = toy.draw(20_000, stream())
        away = torch.cdist(points, toy.centres).min(dim=1).values
        assert float(away.square().mean().sqrt()) == pytest.approx(toy.sigma * math.sqrt(2), rel=0.05)
        assert generative.modes(points, toy.centres, toy.sigma) == {"modes": len(toy.centres), "near": 1.0}
    roll = TOYS["swiss-roll"]().draw(5000, stream())
    radius = roll.norm(dim=1) * 7.5
    assert 1.5 * math.pi - 1.5 < float(radius.min())
    assert float(radius.max()) < 4.5 * math.pi + 1.5
    assert [TOYS[name]().name for name in TOYS] == list(TOYS)


def test_toys_depend_on_the_generator_alone() -> None:
    for toy in (make() for make in TOYS.values()):
        assert torch.equal(toy.draw(5, stream(3)), toy.draw(5, stream(3)))
        assert not torch.equal(toy.draw(5, stream(3)), toy.draw(5, stream(4)))


def test_mmd_against_loops_and_its_limits() -> None:
    a, b = torch.randn(6, 2, generator=stream()).double(), 1 + torch.randn(5, 2, generator=stream(1)).double()
    both = torch.cat([a, b])
    width = sum(float((x - y).square().sum()) for x in both for y in both) / (11 * 10) / 4

    def k(xs: Tensor, ys: Tensor) -> float:
        found = [sum(math.exp(-float((x - y).square().sum()) / (width * 2**j)) for j in range(5)) for x in xs for y in ys]
        return sum(found) / len(found)

    assert generative.mmd2(a, b) == pytest.approx(k(a, a) + k(b, b) - 2 * k(a, b), abs=1e-12)
    assert generative.mmd2(a, a) == 0
    same, other = ring().draw(512, stream(2)), ring().draw(512, stream(3))
    near = generative.mmd2(same, other)
    assert 0 < near < 0.02
    assert generative.mmd2(same, other + 1) > 10 * near
    assert generative.mmd2(torch.zeros(3, 2), torch.zeros(4, 2)) == 0


def test_modes_count_what_is_near_and_often_enough() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    points = torch.zeros(1000, 2)
    points[:24, 0] = 10.0
    assert generative.modes(points, centres, 0.1) == {"modes": 1.0, "near": 1.0}
    points[24:25, 0] = 10.0
    assert generative.modes(points, centres, 0.1) == {"modes": 2.0, "near": 1.0}
    points[:500, 0] = 11.3  # 13 sigma away
    assert generative.modes(points, centres, 0.1) == {"modes": 1.0, "near": 0.5}


def test_histogram_entropy_and_spread() -> None:
    images = torch.zeros(8, 1, 4, 4)
    images[:6] = 1.0
    shares = generative.histogram(Brightness(), images)
    assert shares.tolist() == [0.25, 0.75]
    assert generative.entropy(shares) == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert generative.entropy(torch.tensor([1.0, 0.0]).double()) == 0
    assert generative.covered(torch.tensor([0.94, 0.03, 0.02, 0.01]).double()) == 3
    assert generative.spread(torch.ones(5, 2)) == 0
    assert generative.spread(torch.tensor([[0.0], [1.0]])) == 1


def test_frechet_distance_of_equal_and_moved_sets() -> None:
    judge = Brightness()
    before = {name: value.clone() for name, value in judge.state_dict().items()}
    images = torch.rand(200, 1, 4, 4, generator=stream())
    assert generative.frechet(images, images, judge) == pytest.approx(0, abs=1e-6)
    # One feature, the mean brightness: the distance is (difference of means)^2 + (difference of deviations)^2.
    other = images * 0.5 + 0.4
    a, b = (x.mean(dim=(1, 2, 3)).double() for x in (images, other))
    wanted = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert generative.frechet(images, other, judge) == pytest.approx(float(wanted), rel=1e-3)
    assert judge.training
    assert all(torch.equal(value, before[name]) for name, value in judge.state_dict().items())
    assert judge.fc.weight.dtype == torch.float32


def test_inception_score_is_the_number_of_classes_where_all_are_sure_and_equal() -> None:
    images = torch.zeros(400, 1, 2, 2)
    images[::2] = 1.0
    assert generative.inception_score(images, Brightness()) == pytest.approx(2.0, abs=0.1)
    assert generative.inception_score(torch.ones(40, 1, 2, 2), Brightness()) == pytest.approx(1.0, abs=1e-6)
    judge, state = Brightness(), torch.get_rng_state()
    generative.inception_score(images, judge)
    assert torch.equal(torch.get_rng_state(), state)


def without_torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "torch_fidelity" else find(name, *rest))


def test_inception_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    without_torch_fidelity(monkeypatch)
    with pytest.raises(UsageError, match="pip install torch-fidelity"):
        generative.frechet(torch.rand(4, 1, 4, 4), torch.rand(4, 1, 4, 4))
    with pytest.raises(UsageError, match="pip install torch-fidelity"):
        generative.inception_score(torch.rand(4, 1, 4, 4))


def test_missing_inception_is_said_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    without_torch_fidelity(monkeypatch)
    with pytest.raises(UsageError, match="A Fréchet distance with Inception features needs torch-fidelity"):
        overproof.evolve((torch.rand(60, 1, 8, 8), torch.arange(60) % 3), out="r", features="inception", **SMALL)
    assert not Path("r").exists()


# ---- runs


def test_a_run_on_the_plane(capsys: pytest.CaptureFixture[str]) -> None:
    run = overproof.evolve("8-gaussians", out="r", **TOY)
    folder = run.folder
    assert folder.status["state"] == "done"
    assert folder.status["step"] == 12
    found = folder.samples
    assert found["samples"] == 64
    assert found["compared with"] == "fresh points"
    assert found["figures"].keys() == {"spread", "mmd2", "modes", "near"}
    assert sum(found["selected"].values()) == pytest.approx(1)
    assert found["selected"].keys() == {"heuristic", "least-squares", "minimax", "crossover"}
    records = folder.metrics
    assert [r["step"] for r in records] == [6, 12]
    assert {"fitness", "discriminator", "mmd2", "selected/crossover"} <= records[0]["train"].keys()
    assert Image.open("r/samples/step-00000012.png").size == (3 * 195, 3 * 98)  # real points, and samples
    again = load_generator("r")
    noise = again.draw(3, stream())
    assert torch.equal(again(noise), run.model(noise))
    evolution = folder.config["evolution"]
    assert evolution["latent"] == 2
    assert evolution["discriminator_steps"] == 1
    assert evolution["gradient_penalty"] == 0
    assert not {"model", "method", "train", "evaluation"} & folder.config.keys()
    assert figures(folder)["selected crossover"] == found["selected"]["crossover"]
    assert figures(folder)["mmd2"] == found["figures"]["mmd2"]
    assert overproof.evolve("8-gaussians", out="r", resume=True, **TOY).folder.status["state"] == "done"


def test_a_stopped_run_goes_on_with_the_same_bits() -> None:
    config = resolve({"verb": "evolve", "data": {"name": "25-gaussians"}, "evolution": {"population": 2, **TOY}})
    execute(config, "whole")
    with pytest.raises(Interrupted, match="overproof resume cut"):
        execute(config, "cut", deadline=0.0)
    assert RunFolder("cut").status["state"] == "interrupted"
    for _ in range(3):
        with pytest.raises(Interrupted):
            resume("cut", deadline=0.0)
    assert RunFolder("cut").status["step"] == 4
    resume("cut")
    whole, cut = (load_file(f"{name}/weights/generator.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert RunFolder("whole").samples == RunFolder("cut").samples
    same = [[{k: v for k, v in r.items() if k != "seconds"} for r in RunFolder(n).metrics] for n in ("whole", "cut")]
    assert same[0] == same[1]
    with pytest.raises(FolderError, match="holds another run"):
        execute(config, "cut")


def test_seeds_decide_everything() -> None:
    one, two, other = (overproof.evolve("8-gaussians", out=f"r{i}", seed=s, **TOY) for i, s in enumerate((1, 1, 2)))
    noise = one.model.draw(4, stream())
    assert torch.equal(one.model(noise), two.model(noise))
    assert not torch.equal(one.model(noise), other.model(noise))


def test_a_run_on_digits_with_a_judge(capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--data", "digits", "--set", "data.limit_train=200", "--set", "data.limit_test=50"]
    assert call(["train", *quick, "--model", "mlp", "--epochs", "1", "--out", "judge"]) == 0
    capsys.readouterr()
    options = [text for key, value in SMALL.items() for text in ("--set", f"evolution.{key}={value}")]
    assert (
        call(
            [
                "evolve",
                *quick,
                "--judge",
                "judge",
                "--out",
                "r",
                "--mutation",
                "heuristic",
                "--mutation",
                "wgan",
                *options,
                "--json",
            ]
        )
        == 0
    )
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert {"entropy", "classes", "fid by judge", "is by judge", "spread", "mmd2"} == found["figures"].keys()
    assert len(found["histogram"]) == 10
    assert sum(found["histogram"]) == pytest.approx(1)
    assert sorted(p.name for p in Path("r/samples").iterdir()) == ["step-00000002.png", "step-00000004.png"]
    images = sample(load_generator("r"), 5)
    assert images.shape == (5, 1, 8, 8)
    assert float(images.min()) >= 0
    assert RunFolder("r").config["judge"]["run"] == "judge"
    assert Path("r/report.html").exists()
    assert call(["show", "r"]) == 0
    assert "selected heuristic" in capsys.readouterr().out
    page = Path("r/report.html").read_text()
    assert "Samples of the generator" in page
    assert "is by judge" in page
    assert "No evaluation was made of this run" not in page
    assert call(["report", "r", "judge", "-o", "both.html"]) == 0
    capsys.readouterr()
    assert call(["evolve", *quick, "--config", "r/config.toml", "--out", "again", "--generations", "2"]) == 0
    told = capsys.readouterr().out
    assert "selected heuristic" in told
    assert "fid by judge" in told
    assert RunFolder("again").config["evolution"]["mutations"] == ["heuristic", "wgan"]


def test_another_name_leaves_the_options_of_the_first_behind(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_quiet(False)
    overproof.evolve("8-gaussians", out="first", **TOY)
    again = ["evolve", "--config", "first/config.toml", "--generations", "2"]
    assert call([*again, "--name", "egan", "--out", "second"]) == 0
    assert "first/config.toml is of 'cegan': its options are not those of 'egan'" in capsys.readouterr().err
    found = RunFolder("second").config["evolution"]
    fresh = checked_evolution(
        resolve({"verb": "evolve", "data": {"name": "8-gaussians"}, "evolution": {"name": "egan"}})
    ).evolution
    course = {"generations": 2, "test_every": 6, "test_samples": 64, "width": 16}
    assert found == resolve({"verb": "evolve", "evolution": {**fresh, **course}}).table()["evolution"]
    assert (found["fitness"], found["crossovers"]) == ("egan", 0)
    for number, words in enumerate((["--name", "cegan"], [])):
        assert call([*again, *words, "--out", f"same-{number}"]) == 0
        assert RunFolder(f"same-{number}").config["evolution"]["batch_size"] == TOY["batch_size"]
    assert "are left out" not in capsys.readouterr().err
    Path("own.toml").write_text(
        'verb = "evolve"\ndata.name = "8-gaussians"\nevolution = { width = 16, test_samples = 64, margin = 0.5 }\n'
    )
    assert call(["evolve", "--config", "own.toml", "--name", "iegan", "--generations", "2", "--out", "own"]) == 0
    assert RunFolder("own").config["evolution"]["margin"] == 0.5, "what a file without a name says is the user's word"


def test_images_as_a_tensor_and_a_judge_as_a_module() -> None:
    judge = Brightness()
    images = torch.rand(60, 3, 12, 12, generator=stream())
    run = overproof.evolve(images, name="egan", judge=judge, out="r", **SMALL)
    assert run.model(run.model.draw(2, stream())).shape == (2, 3, 12, 12)
    assert run.folder.samples["figures"]["classes"] in (1, 2)
    assert run.folder.samples["compared with"] == "training images"
    assert judge.training
    assert all(p.requires_grad for p in judge.parameters())
    with pytest.raises(UsageError, match="was made from Python objects"):
        resume("r")
    assert overproof.evolve(images, name="egan", judge=judge, out="r", resume=True, **SMALL).model.latent == 5


def test_splits_and_several_seeds(capsys: pytest.CaptureFixture[str], digits: overproof.Splits) -> None:
    run = overproof.evolve(digits, name="gan", **SMALL)
    assert run.path == Path("runs/gan-1")
    assert run.folder.samples["compared with"] == "test images"
    options = [text for key, value in TOY.items() for text in ("--set", f"evolution.{key}={value}")]
    assert call(["evolve", "--data", "swiss-roll", "--name", "gan", "--out", "s", "--seeds", "0,1", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    assert [Path(row["path"]).name for row in found] == ["seed-0", "seed-1"]
    assert found[0]["figures"].keys() == {"spread", "mmd2"}


def test_collapse_is_told_once_with_its_quantity(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_quiet(False)
    images = torch.rand(60, 1, 8, 8, generator=stream())
    # A generator that stays as it began: grey pictures, all alike.
    run = overproof.evolve(images, out="r", **{**SMALL, "generations": 8}, lr=1e-12)
    told = capsys.readouterr().err
    assert told.count("warning: mode collapse: samples differ from each other by 0% of what real ones do") == 1
    assert run.folder.samples["figures"]["spread"] < 0.01
    assert len(run.folder.samples["warnings"]) == 1
    assert ["alarm" in record for record in run.folder.metrics] == [False, True, True, True]


def test_lost_modes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_quiet(False)
    run = overproof.evolve("25-gaussians", out="r", **TOY, lr=1e-12)
    assert re.search(r"lost modes: samples reach \d of 25 modes", capsys.readouterr().err)
    assert run.folder.samples["figures"]["modes"] < 12


def test_lost_classes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    class Sure(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 10)
            nn.init.zeros_(self.fc.weight)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.fc(images.flatten(1))
            return logits

    console.set_quiet(False)
    run = overproof.evolve(torch.rand(60, 1, 8, 8, generator=stream()), judge=Sure(), out="r", **SMALL)
    assert "lost classes: the judge sees 1 of 10 classes in the samples (entropy 0.00 nats)" in capsys.readouterr().err
    assert run.folder.samples["histogram"].count(0.0) == 9


def test_divergence_leaves_a_failed_run() -> None:
    with pytest.raises(NonFiniteLossError):
        overproof.evolve("8-gaussians", out="r", **TOY, lr=1e30, discriminator_lr=1e30)
    assert RunFolder("r").status["state"] == "failed"


@pytest.mark.parametrize("part", ["critic", "generator"])
def test_a_diverged_state_replaces_no_good_one(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Evolver._generation

    def spoiled(self: Evolver, real: Tensor) -> float:
        fitness = step(self, real)
        if self.step == 9:
            numbers = next(self.evolution.critic.parameters()) if part == "critic" else self.evolution.population[0].weights
            numbers.detach().fill_(float("nan"))
        return fitness

    monkeypatch.setattr(Evolver, "_generation", spoiled)
    # A checkpoint after each generation, of which those from the ninth on must not be kept.
    clock = SimpleNamespace(monotonic=itertools.count(step=100).__next__, perf_counter=time.perf_counter)
    monkeypatch.setattr("overproof.training.evolving.time", clock)
    with pytest.raises(NonFiniteLossError):
        overproof.evolve("8-gaussians", out="r", **TOY)
    state = load_checkpoint(Path("r"))
    assert state is not None
    assert state["step"] == 8
    assert all(bool(value.isfinite().all()) for value in state["evolution"]["critic"].values())


# ---- what is refused


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            {"evolution": {"mutatons": ["wgan"]}},
            r"Unknown key of \[evolution\] for 'cegan': 'mutatons'. Did you mean 'mutations'",
        ),
        ({"evolution": {"name": "cegn"}}, "Unknown evolution 'cegn'. Did you mean 'cegan'"),
        ({"evolution": {"generations": 0}}, "evolution.generations=0 must be at least 1"),
        ({"evolution": {"critic_width": 0}}, "evolution.critic_width=0 must be at least 1"),
        ({"evolution": {"generator": "dcgn"}}, "Unknown generator 'dcgn'. Did you mean 'dcgan'"),
        ({"data": {"name": "9-gaussians"}}, "Unknown data '9-gaussians'. Did you mean '8-gaussians'"),
        ({"data": {"name": "swiss-roll"}, "judge": {"run": "x"}}, "nothing for a judge or Inception to look at"),
        ({"data": {"name": "swiss-roll"}, "evolution": {"features": "inception"}}, "nothing for a judge"),
        ({"data": {"name": "swiss-roll"}, "evolution": {"generator": "dcgan"}}, "only the generator mlp"),
        ({"data": {"name": "swiss-roll", "augment": ["flip"]}}, "is for images"),
        ({"data": {"augment": ["mixup:0.2"]}}, "would learn to make mixed images"),
        ({"verb": "train", "evolution": {}}, r"\[evolution\] belongs to verb = 'evolve'"),
        ({"evolution": {"mutations": ["heuristic"]}}, "needs two mutated children to cross"),
    ],
)
def test_configurations_that_cannot_be(layer: dict[str, Any], message: str) -> None:
    config = resolve({"verb": "evolve", "evolution": {}}, layer)
    with pytest.raises(UsageError, match=message):
        execute(config, "r")
    assert not Path("r").exists()


def test_defaults_of_the_plane_and_of_images() -> None:
    course, settings, name = planned(resolve({"verb": "evolve", "data": {"name": "8-gaussians"}}))
    assert (course.generator, course.latent, course.law, course.width, name) == ("mlp", 2, "normal", 512, "cegan")
    assert (settings.batch_size, settings.discriminator_steps, settings.gradient_penalty) == (64, 1, 0)
    wgan = {"discriminator_loss": "wgan", "mutations": ["wgan"], "crossovers": 0}
    _, settings, _ = planned(resolve({"verb": "evolve", "data": {"name": "8-gaussians"}, "evolution": wgan}))
    assert settings.gradient_penalty == 10
    course, settings, _ = planned(resolve({"verb": "evolve", "evolution": {"name": "iegan"}}))
    assert (course.generator, course.latent, course.law) == ("transposed", 100, "uniform")
    assert (settings.fitness, settings.lr, settings.gradient_penalty) == ("iegan", 2e-4, 10)
    filled = checked_evolution(resolve({"verb": "evolve"}))
    assert checked_evolution(resolve(filled.table())).table() == filled.table()
    changed = checked_evolution(resolve({"verb": "evolve", "data": {"name": "digits+rgb"}}))
    assert changed.data.name == "digits+rgb"
    with pytest.raises(UnknownNameError, match="no-set"):
        checked_evolution(resolve({"verb": "evolve", "data": {"name": "no-set+rgb"}}))


def test_images_that_cannot_be_made_or_are_too_few() -> None:
    with pytest.raises(UsageError, match="even size, at least 4, not .1, 9, 9."):
        overproof.evolve(torch.rand(60, 1, 9, 9), out="r", **SMALL)
    assert not Path("r").exists()
    with pytest.raises(UsageError, match="multiples of 16, not .1, 8, 8."):
        overproof.evolve(torch.rand(60, 1, 8, 8), out="r", generator="dcgan", **SMALL)
    with pytest.raises(UsageError, match="A generation takes 12 real images, and there are 11"):
        overproof.evolve(torch.rand(11, 1, 8, 8), out="r", **SMALL)
    with pytest.raises(UsageError, match="batch_size=1 images, judged by 8, and a network that normalises over its batch"):
        overproof.evolve(torch.rand(60, 1, 16, 16), out="r", **{**SMALL, "batch_size": 1})
    batches = DataLoader(TensorDataset(torch.rand(60, 1, 8, 8), torch.zeros(60, dtype=torch.long)), batch_size=10)
    for given in (iter([torch.rand(4, 1, 8, 8)]), batches):
        with pytest.raises(UsageError, match="brings batches of its own or has no length"):
            overproof.evolve(given, out="r", **SMALL)


def test_images_without_a_test_part_are_compared_with_themselves(tmp_path: Path) -> None:
    own = ImageSet(torch.rand(60, 1, 8, 8, generator=stream()), torch.zeros(60, dtype=torch.long), classes=1)
    run = overproof.evolve(Splits(own, None, None), out=tmp_path / "r", **SMALL)
    assert "training images" in json.dumps(run.folder.samples)


def test_judges_that_do_not_fit() -> None:
    images = torch.rand(60, 1, 8, 8)
    with pytest.raises(UsageError, match=r"The judge cannot take images of shape \(1, 8, 8\)"):
        overproof.evolve(images, judge=nn.Linear(5, 3), out="r", **SMALL)
    with pytest.raises(UsageError, match=r"The judge gives \(2, 1\) for two images"):
        overproof.evolve(images, judge=nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), out="r", **SMALL)
    without_linear = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(OverproofError, match="has no linear layer"):
        overproof.evolve(images, judge=without_linear, out="r", **SMALL)
    assert not Path("r").exists(), "said before the first generation"


def test_usage_errors_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["evolve", "--data", "8-gaussians", "--out", "r", "--mutation", "minimx"]) == 2
    assert "Unknown mutation 'minimx'. Did you mean 'minimax'" in capsys.readouterr().err
    assert call(["list", "evolutions", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["cegan", "egan", "gan", "iegan"]
    assert call(["show", "cegan"]) == 0
    assert "crossovers = 1" in capsys.readouterr().out


def test_evolutions_in_recipes() -> None:
    Path("x.toml").write_text(
        '[defaults]\nverb = "evolve"\n[runs.judge]\nverb = "train"\n[runs.g]\ndata.name = "digits"\njudge.run = "@judge"\n'
        '[runs.g.evolution]\nname = "gan"\n[[figures]]\nname = "classes"\nrun = "g"\nmetric = "classes"\npercent = false\n'
    )
    recipe = read_recipe("x.toml")
    config = recipe.config("g", Path("runs"), 3)
    assert (config.judge.run, config.seed, config.verb) == ("runs/judge", 3, "evolve")
    Path("y.toml").write_text('[runs.g]\nverb = "evolve"\njudge.run = "@later"\n[runs.later]\n')
    with pytest.raises(UsageError, match="judge of run 'g'"):
        read_recipe("y.toml")


# ---- that anything is learned


def test_samples_come_nearer_to_the_law() -> None:
    how = {"test_every": 1000, "test_samples": 512, "width": 64, "lr": 1e-3, "discriminator_lr": 1e-3}
    begun, ended = [], []
    for seed in range(3):
        early, late = (
            overproof.evolve("8-gaussians", out=f"r{seed}-{count}", seed=seed, generations=count, **how).folder.samples
            for count in (1, 150)
        )
        begun.append(early["figures"]["mmd2"])
        ended.append(late["figures"]["mmd2"])
        assert min(share for name, share in late["selected"].items() if name in ("crossover", "least-squares")) > 0
    assert all(late < early for late, early in zip(ended, begun, strict=True))
    assert sum(ended) < 0.3 * sum(begun)  # measured: 0.19; one seed in three happens to begin near the law


def test_the_report_counts_generations(tmp_path: Path) -> None:
    run = overproof.evolve("8-gaussians", out=tmp_path / "r", **TOY)
    page = overproof.write_report([run.path]).read_text("utf-8")
    assert "over generations, a line" in page
    assert "over epochs, a line" not in page
