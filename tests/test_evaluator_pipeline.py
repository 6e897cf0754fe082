"""The evaluator at work: queues, randomness, curves, sizes, counts, warnings, interruption."""

from __future__ import annotations

import json
import math
import sys
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

from overproof import console
from overproof.attacks import FGSM, PGD, Threat
from overproof.attacks.base import BudgetAttack, MinimumNormAttack
from overproof.attacks.randomness import Streams, uniform
from overproof.attacks.threats import Linf
from overproof.data import ImageSet, Splits
from overproof.errors import DataError, NoGradientError, UsageError
from overproof.evaluation import evaluate, verdict
from overproof.evaluation.counting import Passes
from overproof.evaluation.inputs import normalised_twice
from overproof.evaluation.metrics import calibration_error, quantile, surviving, wilson
from overproof.evaluation.pipeline import Chunk, Lane
from overproof.evaluation.plan import Plan
from overproof.folder import plain
from overproof.models.classifier import Classifier
from overproof.types import Batch


class Threshold(nn.Module):
    """Class 1 iff the mean of the image is above 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        value = 10 * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-value, value], 1)


@dataclass(frozen=True, kw_only=True)
class Shift(BudgetAttack):
    """Moves every pixel towards the other side of 0.5 by the radius, and remembers its batches."""

    log: list[int] = field(default_factory=list, compare=False, repr=False)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Any = None) -> Tensor:
        self.log.append(len(images))
        sign = 1.0 - 2.0 * labels.view(-1, 1, 1, 1)
        return (images + self.eps * sign).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Several:
    """Attacks in order, as one."""

    members: dict[str, Any]

    @property
    def threat(self) -> Threat:
        return next(iter(self.members.values())).threat

    targeted = False

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Any = None) -> Tensor:
        raise AssertionError("the evaluator runs the members itself")


@dataclass(frozen=True, kw_only=True)
class Nearest(MinimumNormAttack):
    """The exact answer for `Threshold` under Linf, where it is within `reach`."""

    norm: Any = "Linf"
    reach: float = 1.0

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Any = None) -> Tensor:
        distance = 0.5 - images + 1e-4 * (1.0 - 2.0 * labels.view(-1, 1, 1, 1))
        return torch.where(distance.abs() <= min(self.eps, self.reach), images + distance, images)


def points(values: list[float], wrong: int = 0) -> ImageSet:
    """One-pixel images with their classes under `Threshold`; the last `wrong` have the other label."""
    x = torch.tensor(values)
    labels = (x > 0.5).long()
    if wrong:
        labels[-wrong:] = 1 - labels[-wrong:]
    return ImageSet(x.view(-1, 1, 1, 1), labels, classes=("low", "high"))


def many(count: int = 50) -> ImageSet:
    return points(((torch.arange(count) + 0.5) / count).tolist())


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 4)).eval()


@pytest.fixture
def noise(net: nn.Sequential) -> ImageSet:
    """Images with the labels the network gives them."""
    torch.manual_seed(1)
    images = torch.rand(60, 1, 8, 8)
    with torch.no_grad():
        return ImageSet(images, net(images).argmax(1), classes=4)


def same(one: Any, other: Any) -> None:
    assert one.samples.keys() == other.samples.keys()
    for name in one.samples:
        np.testing.assert_array_equal(one.samples[name], other.samples[name], err_msg=name)


# Queues


def test_members_meet_what_the_ones_before_left_in_full_batches() -> None:
    small, large = Shift(eps=0.2), Shift(eps=0.4)
    result = evaluate(
        Threshold(), many(50), attacks={"all": Several(members={"small": small, "large": large})}, batch_size=8, sanity=0
    )
    assert small.log == [8] * 6 + [2]
    assert sum(large.log) == 30
    assert large.log[:-1] == [8] * (len(large.log) - 1)
    assert result.robust["all"] == 10 / 50
    by, distance = result.samples["all/by"], np.abs((np.arange(50) + 0.5) / 50 - 0.5)
    assert by.tolist() == [0 if d < 0.2 else 1 if d < 0.4 else -1 for d in distance]
    members = result.summary["attacks"]["all"]["members"]
    assert {name: (m["attacked"], m["broken"]) for name, m in members.items()} == {"small": (50, 20), "large": (30, 20)}
    assert list(members) == ["small", "large"]
    sizes = result.samples["all/size"]
    np.testing.assert_allclose(sizes[by == 0], 0.2, atol=1e-6)


def test_members_of_members_and_the_curve_of_a_combination() -> None:
    inner = Several(members={"a": Shift(eps=0.1), "b": Shift(eps=0.3)})
    result = evaluate(
        Threshold(), many(50), attacks={"x": Several(members={"in": inner, "c": Shift(eps=0.2)})}, curve=[0.2, 0.4], sanity=0
    )
    assert list(result.summary["attacks"]["x"]["members"]) == ["in/a", "in/b", "c"]
    assert result.summary["curve"]["robust"] == [30 / 50, 10 / 50]


class Endless:
    """Batches made on the way, which it only remembers weakly."""

    def __init__(self, batches: int, size: int) -> None:
        self.count, self.size, self.alive, self.most = batches, size, [], 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(self.count):
            self.most = max(self.most, sum(reference() is not None for reference in self.alive))
            images = torch.rand(self.size, 1, 4, 4, generator=torch.Generator().manual_seed(number))
            images = (images - images.mean((1, 2, 3), keepdim=True) + 0.45).clamp(0, 1)
            self.alive.append(weakref.ref(images))
            yield images, torch.zeros(self.size, dtype=torch.long)
            del images


@pytest.mark.parametrize("batches", [10, 80])
def test_memory_does_not_grow_with_the_data(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks: list[int] = []
    flush = Lane.flush
    monkeypatch.setattr(Lane, "flush", lambda lane, *rest: (peaks.append(lane.peak), flush(lane, *rest))[1])
    data = Endless(batches, 8)
    attacks = {"all": Several(members={name: Shift(eps=0.01 * n) for n, name in enumerate("abcd")}), "one": Shift(eps=0.3)}
    evaluate(Threshold(), data, attacks=attacks, batch_size=16, sanity=0)
    assert data.most <= 12
    assert peaks
    assert max(peaks) <= 16 + 8


def test_lane_by_itself() -> None:
    """Every image passes every stage once, in order, while it is let on."""
    met: dict[int, list[int]] = {0: [], 1: [], 2: []}

    def work(stage: int, chunk: Chunk) -> Tensor:
        met[stage] += chunk.rows.tolist()
        return chunk.rows % (stage + 2) != 0

    lane = Lane((0, 1, 2), 4, work)
    for part in torch.arange(21).split(5):
        lane.feed(Chunk(part.float().view(-1, 1, 1, 1), part, part, part))
    lane.flush()
    assert met == {0: list(range(21)), 1: [n for n in range(21) if n % 2], 2: [n for n in range(21) if n % 2 and n % 3]}
    assert lane.waiting == 0


# Randomness and places


@dataclass(frozen=True, kw_only=True)
class Guess(BudgetAttack):
    """Uniform noise."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Any = None) -> Tensor:
        assert isinstance(generator, Streams)
        return (images + uniform(images, generator, -self.eps, self.eps)).clamp(0, 1)


def test_verdicts_do_not_depend_on_batches_or_order(net: nn.Module, noise: ImageSet) -> None:
    attacks = {"pgd": PGD(eps=0.05, steps=2, random_start=True), "guess": Guess(eps=0.3)}
    one, other = (evaluate(net, noise, attacks=attacks, batch_size=size, sanity=0) for size in (7, 64))
    assert 0 < one.robust["guess"] < 1
    assert 0 < one.robust["pgd"] < 1
    for name in ("pgd/robust", "guess/robust", "pgd/prediction", "guess/prediction"):
        np.testing.assert_array_equal(one.samples[name], other.samples[name])
    np.testing.assert_allclose(one.samples["guess/size"], other.samples["guess/size"], atol=1e-6)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    mixed = evaluate(net, noise.subset(order), attacks=attacks, batch_size=16, sanity=0)
    np.testing.assert_array_equal(mixed.samples["guess/robust"], one.samples["guess/robust"][order.numpy()])
    np.testing.assert_array_equal(mixed.samples["index"], order.numpy())
    assert (
        evaluate(net, noise, attacks=attacks, seed=1, sanity=0).samples["guess/size"].tolist()
        != one.samples["guess/size"].tolist()
    )


class Items(torch.utils.data.Dataset):
    def __init__(self, data: ImageSet) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.data.images[row], int(self.data.labels[row])


def test_index_is_the_position_whatever_the_data_come_from(net: nn.Module, noise: ImageSet) -> None:
    loader = torch.utils.data.DataLoader(Items(noise), batch_size=9)
    ready = [Batch(noise.images[part], noise.labels[part], part) for part in torch.arange(60).split(11)]
    kinds = (noise, (noise.images, noise.labels), Items(noise), loader, list(loader), ready)
    found = [evaluate(net, data, attacks={"g": Guess(eps=0.3)}, batch_size=16, sanity=0) for data in kinds]
    for result in found:
        assert result.samples["index"].tolist() == list(range(60))
        np.testing.assert_array_equal(result.samples["g/robust"], found[0].samples["g/robust"])


def test_a_model_that_rolls_dice_is_judged_the_same_twice(noise: ImageSet) -> None:
    class Dice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.net((x + torch.randn_like(x)).flatten(1))

    torch.manual_seed(0)
    model, before = Dice(), torch.get_rng_state()
    options: dict[str, Any] = {"attacks": {"pgd": PGD(eps=0.1, steps=2)}, "sanity": 0}
    first, again, other = (evaluate(model, noise, seed=seed, **options) for seed in (2, 2, 3))
    same(first, again)
    assert not np.array_equal(first.samples["confidence"], other.samples["confidence"])
    assert torch.equal(before, torch.get_rng_state())


def test_validation_does_not_depend_on_batches(net: nn.Module, noise: ImageSet) -> None:
    from lightning.fabric import Fabric

    from overproof.data import make_loader
    from overproof.training.validation import validate

    fabric = Fabric(accelerator="cpu", devices=1)
    found = [validate(net, make_loader(noise, size), fabric=fabric, attack=Guess(eps=0.3)) for size in (7, 60)]
    assert found[0]["robust"] == found[1]["robust"]
    assert 0 < found[0]["robust"] < 1


# Curves and sizes


def test_sizes_and_the_free_curve_of_a_minimum_norm_attack() -> None:
    data = points([0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 0.45], wrong=1)
    result = evaluate(Threshold(), data, attacks={"near": Nearest(reach=0.35)}, sanity=0)
    facts = result.summary["attacks"]["near"]
    exact = np.sort([math.inf, math.inf, 0.3, 0.2, 0.1, 0.1, 0.2, 0.3, math.inf]) + 1e-4
    assert facts["sizes"]["found"] == 6
    assert facts["sizes"]["median"] == pytest.approx(exact[4], abs=1e-5)
    assert facts["sizes"]["q10"] == pytest.approx(0.1 + 1e-4, abs=1e-5)
    assert facts["sizes"]["q90"] is None
    assert facts["sizes"]["mean"] is None
    assert facts["eps"] is None
    assert result.robust["near"] == 3 / 10
    assert result.worst_case is None
    assert result.samples["near/size"][9] == 0
    assert np.isinf(result.samples["near/size"][0])
    curve = result.summary["curve"]
    assert len(curve["eps"]) == 21
    assert curve["eps"][0] == 0
    assert curve["eps"][-1] == pytest.approx(0.3001, abs=1e-5)
    rows = result.samples
    right, sizes = rows["label"] == rows["prediction"], rows["near/size"].astype(float)
    assert curve["robust"] == [float((right & (sizes > eps)).mean()) for eps in curve["eps"]]
    assert (curve["robust"][0], curve["robust"][10]) == (0.9, 0.7)
    json.dumps(plain(result.summary), allow_nan=False)


def test_curve_of_a_minimum_norm_attack_at_given_radii_costs_nothing() -> None:
    calls: list[int] = []

    class Counted(Nearest):
        def __call__(self, *given: Any, **named: Any) -> Tensor:
            calls.append(1)
            return super().__call__(*given, **named)

    data = points([0.1, 0.2, 0.6, 0.9])
    result = evaluate(Threshold(), data, attacks={"near": Counted()}, curve=[0.0, 0.15, 0.35, 0.5], sanity=0)
    assert result.summary["curve"]["robust"] == [1.0, 0.75, 0.5, 0.0]
    assert len(calls) == 1


def test_worst_case_leaves_out_attacks_without_a_radius() -> None:
    result = evaluate(Threshold(), many(50), attacks={"near": Nearest(), "shift": Shift(eps=0.2)}, sanity=0)
    assert result.robust == {"near": 0.0, "shift": 30 / 50}
    assert result.worst_case == 30 / 50


def test_a_combination_of_minimum_norm_attacks_keeps_the_smaller_change() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Far(Nearest):
        def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Any = None) -> Tensor:
            return (1.0 - labels.view(-1, 1, 1, 1)).expand_as(images)

    data = points([0.1, 0.2, 0.6, 0.9])
    result = evaluate(Threshold(), data, attacks={"x": Several(members={"far": Far(), "near": Nearest(reach=0.31)})}, sanity=0)
    np.testing.assert_allclose(result.samples["x/size"], [0.9, 0.3001, 0.1001, 0.9], atol=1e-4)
    assert result.samples["x/by"].tolist() == [0, 1, 1, 0]


def test_images_broken_on_the_curve_are_left_alone() -> None:
    log: list[int] = []
    attack = Shift(eps=0.1, log=log)
    result = evaluate(Threshold(), many(50), attacks={"shift": attack}, curve=[0.1, 0.2, 0.4], sanity=0)
    assert result.summary["curve"]["robust"] == [0.8, 0.6, 0.2]
    assert sorted(log) == [30, 40, 50, 50]


@pytest.mark.parametrize("eps", [-0.1, math.inf, math.nan])
def test_impossible_radii_are_refused(eps: float) -> None:
    with pytest.raises(UsageError):
        evaluate(Threshold(), many(4), attacks={"near": Nearest()}, curve=[eps])


# Figures


def test_targets_and_what_became_of_them(net: nn.Module, noise: ImageSet) -> None:
    result = evaluate(net, noise, attacks={"t": PGD(eps=0.3, steps=20, targeted=True), "u": Guess(eps=0.5)}, sanity=0)
    rows, facts = result.samples, result.summary["attacks"]["t"]
    assert (rows["t/target"] != rows["label"]).all()
    attempts, successes = (np.array(facts["targeted"][key]) for key in ("attempts", "successes"))
    assert attempts.sum() == 60
    assert np.trace(attempts) == 0
    assert successes.sum() == (rows["t/prediction"] == rows["t/target"]).sum() > 0
    confusion = np.array(result.summary["attacks"]["u"]["confusion"])
    expected = np.zeros((4, 4), int)
    np.add.at(expected, (rows["label"][~rows["u/robust"]], rows["u/prediction"][~rows["u/robust"]]), 1)
    np.testing.assert_array_equal(confusion, expected)


def test_wide_matrices_go_into_the_samples_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 60))
    images = torch.rand(30, 1, 2, 2)
    data = ImageSet(images, model(images).argmax(1), classes=60)
    result = evaluate(model, data, attacks={"g": Guess(eps=0.5), "t": FGSM(eps=0.5, targeted=True)}, sanity=0)
    assert "confusion" not in result.summary["attacks"]["g"]
    assert "targeted" not in result.summary["attacks"]["t"]
    assert result.samples["g/confusion"].shape == (60, 60)
    assert result.samples["t/targeted/attempts"].sum() == 30
    result.save(tmp_path)


def test_rates_name_their_denominators_and_intervals() -> None:
    data = points([0.1, 0.4, 0.45, 0.6, 0.9, 0.55], wrong=1)
    result = evaluate(Threshold(), data, attacks={"s": Shift(eps=0.15)}, sanity=0)
    facts = result.summary["attacks"]["s"]
    assert (facts["success_rate"], facts["success_denominator"]) == (3 / 5, 5)
    assert (facts["fooling_ratio"], facts["fooling_denominator"]) == (3 / 6, 6)
    assert facts["interval"] == wilson(2, 6)
    assert result.summary["clean_interval"] == wilson(5, 6)
    assert result.summary["worst_case_interval"] == wilson(2, 6)


def test_passes_are_counted_and_hooks_removed(noise: ImageSet) -> None:
    class Constant(nn.Module):
        """Never wrong about class 0, with a gradient: no attack ever stops early."""

        def forward(self, x: Tensor) -> Tensor:
            value = x.flatten(1).mean(1)
            return torch.stack([value + 5, -value, -value, -value], 1)

    model, data = Constant(), ImageSet(noise.images, torch.zeros(60, dtype=torch.long), classes=4)
    steps = PGD(eps=0.1, steps=5, random_start=False, early_stop=False)
    result = evaluate(model, data, attacks={"pgd": steps}, curve=[0.05, 0.1], batch_size=16, sanity=0)
    passes = result.summary["attacks"]["pgd"]["passes"]
    assert passes["backward"] == 5 * 60
    assert passes["backward_per_image"] == 5
    assert passes["forward"] >= 5 * 60
    assert result.summary["passes"]["backward"] == 3 * 5 * 60
    assert not model._forward_hooks


def test_passes_by_hand() -> None:
    model, passes, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), Passes(), torch.rand(5, 1, 2, 2, requires_grad=True)
    with passes.of(model):
        logits = model(x)
        torch.autograd.grad(logits[:, 0].sum(), x, retain_graph=True)
        torch.autograd.grad(logits[:, 1].sum(), x)
        with torch.no_grad():
            model(x[:2])
    model(x)
    with pytest.raises(AttributeError), passes.of(model):
        model("no images")
    assert (passes.forward, passes.backward) == (7, 10)
    assert not model._forward_hooks


def test_statistics() -> None:
    assert wilson(0, 10) == pytest.approx([0.0, 0.27754], abs=1e-4)
    assert wilson(50, 100) == pytest.approx([0.40383, 0.59617], abs=1e-4)
    values = np.array([3.0, 1.0, 2.0, 8.0])
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert quantile(values, share) == pytest.approx(np.quantile(values, share))
    assert quantile(np.array([1.0, math.inf, math.inf]), 0.5) == math.inf
    assert quantile(np.array([1.0, 2.0, math.inf]), 0.5) == 2.0
    both = surviving([(100, 20), (80, 40)])
    assert float(both) == pytest.approx(0.4)
    assert both.half == pytest.approx(1.96 * math.sqrt(0.4 * 0.6 / 100), rel=1e-3)
    assert f"{both:.3f}" == "40.0 ± 9.6 %"
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(500, 6), torch.randint(0, 6, (500,))
    confidence, predicted = logits.softmax(1).max(1)
    ours = calibration_error(confidence.numpy(), (predicted == labels).numpy())
    theirs = multiclass_calibration_error(logits.softmax(1), labels, num_classes=6, n_bins=15)
    assert ours == pytest.approx(float(theirs), abs=1e-5)


def test_progress_shows_the_estimate_and_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(console.Bar, "update", lambda bar, done, images=0, **facts: said.append(bar._facts(facts, images, 1e9)))
    evaluate(Threshold(), many(50), attacks={"shift": Shift(eps=0.2)}, batch_size=25, sanity=0)
    assert said[-1].startswith("clean 100.0 ± ")
    assert "shift 60.0 ± 13.6 %" in said[-1]


# Distrust


@dataclass(frozen=True, kw_only=True)
class Blind(BudgetAttack):
    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Any = None) -> Tensor:
        raise NoGradientError("none")


def test_an_attack_without_gradient_does_not_end_the_evaluation() -> None:
    attacks = {
        "blind": Blind(),
        "both": Several(members={"blind": Blind(eps=0.2), "shift": Shift(eps=0.2)}),
        "shift": Shift(eps=0.2),
    }
    result = evaluate(Threshold(), many(50), attacks=attacks, sanity=0)
    assert result.robust == {"blind": 1.0, "both": 0.6, "shift": 0.6}
    facts = result.summary["attacks"]
    assert facts["blind"]["no_gradient"] is True
    assert facts["both"]["no_gradient"] is True
    assert facts["both"]["members"]["shift"]["no_gradient"] is False
    assert facts["shift"]["no_gradient"] is False
    texts = [text for text in result.summary["warnings"] if "says nothing about robustness" in text]
    assert [text.partition(":")[0] for text in texts] == ["blind", "both (blind)"]


class Foreign(nn.Module):
    """A network that normalises by itself."""

    class InputNormalizer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.tensor([0.5]).view(1, 1, 1, 1))
            self.register_buffer("std", torch.tensor([0.25]).view(1, 1, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return (x - self.mean) / self.std

    def __init__(self) -> None:
        super().__init__()
        self.first = self.InputNormalizer()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.first(x))


def test_a_model_that_normalises_twice_is_named(noise: ImageSet) -> None:
    from torchvision.transforms import Normalize

    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(
                [Foreign(), Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), mean=0.4, std=0.3)]
            )

        def forward(self, x: Tensor) -> Tensor:
            return sum(part(x) for part in self.parts)

    simple = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    twice = {
        "net.first": Classifier(Foreign(), mean=0.5, std=0.2),
        "net.normalize": Classifier(Classifier(simple, mean=0.5, std=0.2), mean=0.1, std=0.9),
        "1": nn.Sequential(Normalize([0.5], [0.5]), Normalize([0.5], [0.5]), simple),
    }
    for name, model in twice.items():
        assert normalised_twice(model, noise.images[:1]) == name
        warnings = evaluate(model, noise, sanity=0).summary["warnings"]
        assert any(name in text and "twice" in text for text in warnings)
        assert not any(module._forward_pre_hooks for module in model.modules())
    for model in (Foreign(), Classifier(Foreign()), Ensemble(), Classifier(Classifier(simple, mean=0.5, std=0.2)), simple):
        assert normalised_twice(model, noise.images[:1]) is None


@pytest.mark.parametrize("kind", ["pair", "list", "dataset", "loader"])
def test_pixels_are_checked_wherever_they_come_from(kind: str) -> None:
    images, labels = 2 * torch.rand(6, 1, 2, 2) - 1, torch.zeros(6, dtype=torch.long)

    class Own:
        def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
            yield Batch(images, labels, torch.arange(6))

    class Set(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, row: int) -> tuple[Tensor, int]:
            return images[row], 0

    data = {"pair": (images, labels), "list": [(images, labels)], "dataset": Set(), "loader": Own()}[kind]
    with pytest.raises(DataError, match=r"from -0\.\d+ to .*put the normalisation into the model"):
        evaluate(Threshold(), data)


# Sanity panel


@pytest.fixture
def panel(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in that remembers what it was asked."""
    asked: list[Any] = []
    module = types.ModuleType("overproof.evaluation.sanity")

    def fake(model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, *, seed: int = 0, source: Any = None) -> Any:
        asked.append((images, labels, threat, seed))
        summary = {"checks": [], "suspected": False, "samples": len(images), "seconds": 1.0}
        return types.SimpleNamespace(summary=summary, arrays={"surface": np.zeros(3)})

    module.panel = fake
    monkeypatch.setitem(sys.modules, "overproof.evaluation.sanity", module)
    return asked


def test_panel_gets_the_first_images_that_are_right(panel: list[Any]) -> None:
    data = points([0.6, 0.1, 0.2, 0.3, 0.8, 0.9])
    data.labels[0] = 0
    attacks = {"near": Nearest(), "shift": Shift(eps=0.2), "other": Shift(eps=0.1)}
    result = evaluate(Threshold(), data, attacks=attacks, sanity=3, batch_size=2, seed=4)
    ((images, labels, threat, seed),) = panel
    torch.testing.assert_close(images.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    assert labels.tolist() == [0, 0, 0]
    assert threat == Linf(0.2)
    assert seed == 4
    assert result.summary["sanity"]["samples"] == 3
    assert "surface" in result.gallery


def test_panel_can_be_switched_off_and_needs_a_radius(panel: list[Any]) -> None:
    assert "sanity" not in evaluate(Threshold(), many(9), attacks={"s": Shift(eps=0.1)}, sanity=0).summary
    assert "sanity" not in evaluate(Threshold(), many(9), attacks={"near": Nearest()}).summary
    assert "sanity" not in evaluate(Threshold(), many(9)).summary
    assert not panel


# Interruption


class Stops:
    """An attack that is interrupted at its n-th call."""

    def __init__(self, inner: Any, calls: float, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.inner, self.calls, self.made, self.error = inner, calls, 0, error

    @property
    def threat(self) -> Threat:
        return self.inner.threat

    targeted = False

    def __repr__(self) -> str:
        return repr(self.inner)

    def __call__(self, *given: Any, **named: Any) -> Tensor:
        self.made += 1
        if self.made > self.calls:
            raise self.error
        return self.inner(*given, **named)


def _attacks(calls: float) -> dict[str, Any]:
    members = {"a": PGD(eps=0.03, steps=2), "b": Stops(PGD(eps=0.06, steps=2), calls)}
    return {"pgd": PGD(eps=0.05, steps=2), "all": Several(members=members), "near": Guess(eps=0.2)}


class Noisy(nn.Module):
    """A classifier that rolls dice of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x + 0.3 * torch.randn_like(x))
        return logits


def test_dice_fall_the_same_after_an_interruption(net: nn.Module, noise: ImageSet, tmp_path: Path) -> None:
    model, place = Noisy(net).eval(), tmp_path / "kept.npz"
    options: dict[str, Any] = {"batch_size": 7, "sanity": 0}

    def attacks(calls: float) -> dict[str, Any]:
        quick = PGD(eps=0.03, steps=2, early_stop=False)
        return {"all": Several(members={"a": Stops(FGSM(eps=0.01), calls), "b": quick}), "pgd": quick}

    whole = evaluate(model, noise, attacks=attacks(math.inf), **options)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, noise, attacks=attacks(3), resume=place, **options)
    same(whole, evaluate(model, noise, attacks=attacks(math.inf), resume=place, **options))


@pytest.mark.parametrize("calls", [0, 1, 3, 5])
def test_an_interrupted_evaluation_goes_on_to_the_same_record(
    net: nn.Module, noise: ImageSet, calls: int, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"curve": [0.02, 0.08], "batch_size": 7, "sanity": 0}
    whole = evaluate(net, noise, attacks=_attacks(math.inf), **options)
    place = tmp_path / "kept.npz"
    with pytest.raises(KeyboardInterrupt):
        evaluate(net, noise, attacks=_attacks(calls), resume=place, **options)
    assert place.exists()
    attacks = _attacks(math.inf)
    resumed = evaluate(net, noise, attacks=attacks, resume=place, **options)
    same(whole, resumed)
    assert attacks["all"].members["b"].made + calls == whole.summary["attacks"]["all"]["members"]["b"]["attacked"] // 7 + 1
    for key in ("passes", "curve", "clean", "worst_case", "ece", "nll"):
        assert whole.summary[key] == resumed.summary[key], key
    assert whole.gallery.keys() == resumed.gallery.keys()
    assert all(np.array_equal(whole.gallery[key], resumed.gallery[key]) for key in whole.gallery)
    attacks = _attacks(0)  # everything is known: nothing is attacked again
    same(whole, evaluate(net, noise, attacks=attacks, resume=place, **options))
    assert attacks["all"].members["b"].made == 0


@pytest.mark.parametrize("change", ["weights", "seed", "pixels", "curve", "damage", "fewer", "size"])
def test_another_evaluation_starts_anew(
    net: nn.Sequential, noise: ImageSet, change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, options = tmp_path / "kept.npz", {"curve": [0.1], "seed": 0, "batch_size": 16, "sanity": 0}
    images = list(zip(noise.images.split(16), noise.labels.split(16), strict=True))
    with pytest.raises(KeyboardInterrupt):
        evaluate(net, images, attacks=_attacks(1), resume=place, **options)
    if change == "weights":
        nn.init.normal_(net[4].weight)
    elif change in ("seed", "curve"):
        options[change] = {"seed": 1, "curve": [0.2]}[change]
    elif change == "pixels":
        images[0] = (images[0][0].flip(0), images[0][1])
    elif change == "fewer":
        images = images[1:]
    elif change == "size":
        options["batch_size"] = 9  # allowed: the verdicts do not depend on it
    else:
        place.write_bytes(place.read_bytes()[:200])
    capsys.readouterr()
    resumed = evaluate(net, images, attacks=_attacks(math.inf), resume=place, **options)
    assert ("starting anew" in capsys.readouterr().err) == (change != "size")
    fresh = evaluate(net, images, attacks=_attacks(math.inf), **options)
    assert resumed.robust == fresh.robust
    np.testing.assert_array_equal(resumed.samples["index"], fresh.samples["index"])


def test_sigterm_keeps_what_is_known(net: nn.Module, noise: ImageSet, tmp_path: Path) -> None:
    import os
    import signal

    @dataclass(frozen=True, kw_only=True)
    class Killed(Guess):
        def __call__(self, *given: Any, **named: Any) -> Tensor:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(*given, **named)

    place = tmp_path / "kept"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt):
        evaluate(net, noise, attacks={"g": Guess(eps=0.1), "k": Killed()}, resume=place, sanity=0)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert place.exists()


def test_it_is_written_now_and_then(net: nn.Module, noise: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from overproof.evaluation import partial

    monkeypatch.setattr(partial, "EVERY", 0.0)
    written: list[int] = []
    monkeypatch.setattr(partial, "write_arrays", lambda path, arrays: written.append(len(arrays["_row"])))
    evaluate(net, noise, attacks={"g": Guess(eps=0.1)}, resume=tmp_path / "kept", batch_size=10, sanity=0)
    assert written[0] == 10
    assert written[-1] == 60


def test_plan_names_its_randomness() -> None:
    """Two attacks, or two members, never share their draws."""
    plan = Plan({"a": Several(members={"x": Guess(), "y": Guess()}), "b": Guess()}, (0.1, 0.2), 0)
    keys = [stage.key for stages in plan.lanes.values() for stage in stages]
    assert len(set(keys)) == len(keys) == 7
    index = torch.arange(5)
    assert len({tuple(Streams.named(index, 0, *key).keys.tolist()) for key in keys}) == 7


def test_targets_belong_to_the_image(net: nn.Module, noise: ImageSet) -> None:
    attack = FGSM(eps=0.1, targeted=True)
    index = torch.arange(60)
    whole = verdict(attack, net, noise.images, noise.labels, Streams.named(index, 0))
    part = verdict(attack, net, noise.images[7:9], noise.labels[7:9], Streams.named(index[7:9], 0))
    assert whole.targets is not None
    assert part.targets is not None
    assert torch.equal(whole.targets[7:9], part.targets)
    assert bool((whole.targets != noise.labels).all())
    assert len(set(whole.targets.tolist())) == 4


def test_digits_end_to_end(digits: Splits, panel: list[Any]) -> None:
    """A user's own module on a real set, all options at once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    result = evaluate(model, digits.test.subset(range(40)), attacks=["pgd", "fgsm"], curve=[0.01], teacher=model, batch_size=16)
    assert result.summary["agreement"]["clean"] == 1.0
    assert set(result.summary["attacks"]["pgd"]) >= {"interval", "passes", "confusion", "fooling_ratio", "no_gradient", "sizes"}
