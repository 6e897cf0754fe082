"""The detector: its recursions in closed form, its thresholds, the attacks that know it, and what is told of it."""

from __future__ import annotations

import copy
import math
import runpy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from overproof.attacks.adam import AdamAttack, Aim, swapped
from overproof.attacks.base import predictions
from overproof.attacks.eot import EOT
from overproof.attacks.randomness import Streams, normal, other_classes
from overproof.attacks.threats import Linf
from overproof.errors import DataError, NoGradientError, UsageError
from overproof.evaluation.counting import Passes
from overproof.evaluation.detection import measure_detector, over_steps
from overproof.evaluation.metrics import area, roc
from overproof.guards import GUARDS, load_guards, save_guard
from overproof.guards.base import Judgement
from overproof.guards.detector import Detector
from overproof.guards.detector_attacks import SegmentSearch, ThroughNoise, WhiteBox
from overproof.guards.detector_scores import Walk, fitting_sigma, noise_shift
from overproof.guards.detector_thresholds import joint_rank, parts_of, suspicion, thresholds_at
from overproof.losses.divergences import cross_entropy
from overproof.losses.margins import margin
from overproof.testing import check_attack, check_guard, small_batch, small_model

GOALS = ("targeted", "ce", "margin")


def binary(scale: float = 0.3) -> nn.Sequential:
    """Logits (0, w x + b), with margins of any size around grey."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double().requires_grad_(False)
    model[1].weight[0], model[1].bias[0] = 0, 0
    model[1].weight[1] = scale * torch.randn(16, dtype=torch.float64)
    model[1].bias[1] = -0.5 * model[1].weight[1].sum()
    return model


def around_grey(count: int, spread: float) -> Tensor:
    return 0.5 + spread * torch.randn(count, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def fair(seed: int = 0, count: int = 120) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network that knows its three classes from each other, random images, and the classes it gives them."""
    model, images = small_model(seed).double().eval(), small_batch(count, seed=seed).images.double()
    with torch.no_grad():
        model[-1].weight *= 4
        model[-1].bias -= model(images).mean(0)
        return model, images, model(images).argmax(1)


@pytest.fixture(scope="module")
def fitted() -> tuple[Detector, nn.Module, Tensor, Tensor]:
    model, images, labels = fair()
    return Detector(fpr=0.2, cap=30, untargeted_cap=30).fit(model, images, labels), model, images, labels


# Walks


@pytest.mark.parametrize("goal", GOALS)
def test_steps_follow_the_scalar_recursion(goal: str) -> None:
    """m <- m - a ||w||^2 g(m): g = sigmoid(m) targeted, sigmoid(-m) on the cross-entropy of the own class, 1 on the margin."""
    model, images = binary(), around_grey(40, 0.06)
    weight = model[1].weight[1]
    signed = (model(images)[:, 1]).tolist()
    force = {"targeted": lambda m: 1 / (1 + math.exp(-m)), "ce": lambda m: 1 / (1 + math.exp(m)), "margin": lambda m: 1.0}[goal]
    step, cap, expected = 0.013, 60, []
    for value in signed:
        m, k = abs(value), 0
        while m > 0 and k < cap:
            m, k = m - step * float(weight @ weight) * force(m), k + 1
        expected.append(k)
    assert max(abs(v) for v in signed) * float(weight.abs().max() / (weight @ weight)) < 0.25, "the box must not interfere"
    base = model(images).argmax(1)
    found = Walk(goal=goal, step_size=step, cap=cap).count(model, images, base, 1 - base)
    assert found.tolist() == expected
    assert len(set(expected)) > 5
    assert max(expected) < cap


@pytest.mark.parametrize("goal", GOALS)
def test_a_constant_classifier_never_leaves(goal: str) -> None:
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return 0 * images.flatten(1).sum(1, keepdim=True) + torch.tensor([1.0, 0.0, 0.5], dtype=images.dtype)

    images = small_batch(4).images
    base = torch.zeros(4, dtype=torch.long)
    assert Walk(goal=goal, cap=7).count(Constant(), images, base, base + 1).tolist() == [7] * 4
    streams = Streams.named(torch.arange(4), 0)
    assert torch.equal(noise_shift(Constant(), images, Constant()(images), streams, sigma=1.0, draws=3), torch.zeros(4))
    with pytest.raises(UsageError, match="Half of 4 natural images keep their class for 40 steps"):
        Walk(goal=goal).fitted(Constant(), images, base, base + 1)

    class Blind(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.tensor([[1.0, 0.0]]).expand(len(images), -1)

    with pytest.raises(NoGradientError):
        Walk(goal=goal).count(Blind(), images, base, base + 1)


class Watched(nn.Module):
    """Remembers what was asked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.detach().clone())
        return self.model(images)


@pytest.mark.parametrize("radius", [0.0, 0.03, 0.5])
def test_walks_stay_within_radius_and_box(radius: float) -> None:
    model, images, base = fair()
    x, watched = images[:1], Watched(model)
    walk = Walk(goal="targeted", step_size=1e6, radius=radius, cap=5)
    count = walk.count(watched, x, base[:1], (base[:1] + 1) % 3)
    points = torch.cat(watched.seen)
    assert float((points - x).abs().max()) <= radius + 1e-12
    assert float(points.min()) >= 0
    assert float(points.max()) <= 1
    if radius == 0:
        assert count.tolist() == [5]
    else:
        assert float((points - x).abs().max()) > radius / 2


@pytest.mark.parametrize("goal", GOALS)
def test_one_forward_per_step_and_only_for_those_who_walk(goal: str) -> None:
    model, images, base = fair()
    target, passes = (base + 1) % 3, Passes()
    walk = Walk(goal=goal, cap=25).fitted(model, images[:64], base[:64], target[:64])
    with passes.of(model):
        counts = walk.count(model, images, base, target)
    assert int(counts.min()) >= 1
    assert len(set(counts.tolist())) > 3
    assert passes.forward == int((counts + 1).clamp(max=25).sum())
    alone = [int(walk.count(model, images[i : i + 1], base[i : i + 1], target[i : i + 1])) for i in range(0, 120, 7)]
    assert counts[::7].tolist() == alone
    rows = torch.tensor([3, 50, 4])
    assert torch.equal(walk.count(model, images[rows], base[rows], target[rows]), counts[rows])


def test_leaving_is_not_reaching() -> None:
    """The walk ends with whatever class takes over, here never the target."""

    class Third(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            s = images.flatten(1).sum(1)
            return torch.stack([0 * s, 2 * s - 20, s - 8], dim=1)

    images = torch.full((1, 1, 4, 4), 0.49, dtype=torch.float64)
    zero, watched = torch.zeros(1, dtype=torch.long), Watched(Third())
    assert Walk(goal="targeted", step_size=0.004, cap=30).count(watched, images, zero, zero + 1).tolist() == [2]
    assert Third()(watched.seen[-1]).argmax(1).tolist() == [2]


@pytest.mark.parametrize("goal", GOALS)
def test_step_sizes_are_fitted_to_the_median(goal: str) -> None:
    model, images, base = fair()
    target = (base + 1) % 3
    for start in (1e-5, 0.01, 1e3):
        walk = Walk(goal=goal, step_size=start).fitted(model, images[:64], base[:64], target[:64])
        assert walk == replace(Walk(goal=goal), step_size=walk.step_size)
        median = float(replace(walk, cap=40).count(model, images[:64], base[:64], target[:64]).float().median())
        assert 5 <= median <= 10


def test_tiny_caps_still_find_a_step_size() -> None:
    model, images, base = fair()
    walk = Walk(goal="margin", cap=3).fitted(model, images[:64], base[:64], base[:64])
    assert float(walk.count(model, images[:64], base[:64], base[:64]).float().median()) < 3


# Noise


def test_noise_by_hand_and_its_limits() -> None:
    model, images, _ = fair()
    logits, streams = model(images).detach(), Streams.named(torch.arange(120), 1)
    assert torch.equal(noise_shift(model, images, logits, streams, sigma=0.0, draws=2), torch.zeros(120).double())
    twice = noise_shift(model, images, logits, Streams.named(torch.arange(120), 1), sigma=0.1, draws=2).detach()
    again, by_hand = Streams.named(torch.arange(120), 1), torch.zeros(120).double()
    for _ in range(2):
        by_hand += (logits.softmax(1) - model(images + normal(images, again, 0.1)).softmax(1)).abs().sum(1).detach() / 2
    torch.testing.assert_close(twice, by_hand)
    assert float(twice.min()) > 0
    assert float(noise_shift(model, images, logits, streams, sigma=100.0).detach().max()) <= 2 + 1e-12


def test_boundless_noise_makes_a_coin_of_the_answer() -> None:
    """A confident h is (0, 1) or (1, 0); beside a fair coin its distance is 0 or 2, 1 in the mean."""
    model = binary(scale=200.0)
    images = around_grey(40, 0.3)
    images = images[model(images)[:, 1].abs() > 10][:20]
    logits = model(images)
    assert float(logits.softmax(1).amax(1).min()) > 0.999
    shift = noise_shift(model, images, logits, Streams.named(torch.arange(20), 0), sigma=1e4, draws=200)
    assert abs(float(shift.mean()) - 1) < 0.08  # four standard errors of 4,000 coins


def test_noise_is_fitted_to_keep_most_classes() -> None:
    model, images, base = fair(count=400)
    sigma = fitting_sigma(model, images, Streams.named(torch.arange(400), 0))
    noisy = images + normal(images, Streams.named(torch.arange(400), 1), sigma)
    assert abs(float((predictions(model, noisy) == base).float().mean()) - 0.97) < 0.03
    assert 1e-3 < sigma < 1


# Thresholds


def scores(count: int, seed: int) -> Tensor:
    """Three criteria, two of them discrete with many ties."""
    rng = np.random.default_rng(seed)
    rows = [rng.random(count), rng.integers(1, 12, count), np.minimum(rng.integers(1, 40, count), 20)]
    return torch.tensor(np.stack(rows), dtype=torch.float32)


@pytest.mark.parametrize("fpr", [0.01, 0.05, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_joint_thresholds(fpr: float, seed: int) -> None:
    natural, others = scores(300, seed), scores(200, seed + 100) * 1.3
    rank = joint_rank(natural, fpr)
    limits = thresholds_at(natural, rank)
    own = (natural > limits[:, None]).any(0)
    assert float(own.double().mean()) <= fpr
    if rank > 1:
        looser = (natural > thresholds_at(natural, rank - 1)[:, None]).any(0)
        assert float(looser.double().mean()) > fpr, "a smaller rank would have done"
    assert torch.equal(suspicion(natural, others) >= rank, (others > limits[:, None]).any(0))
    assert torch.equal(suspicion(natural, natural) >= rank, own)
    shuffled = natural[:, torch.randperm(300, generator=torch.Generator().manual_seed(seed))]
    assert joint_rank(shuffled, fpr) == rank
    assert torch.equal(thresholds_at(shuffled, rank), limits)


def test_thresholds_fall_with_the_rate_and_unmeasured_scores_do_not_count() -> None:
    natural = scores(300, 0)
    ranks = [joint_rank(natural, fpr) for fpr in (0.02, 0.05, 0.1, 0.2, 0.4)]
    assert ranks == sorted(ranks, reverse=True)
    assert len(set(ranks)) == 5
    nothing = torch.full((3, 1), math.nan)
    assert suspicion(natural, nothing).tolist() == [0]
    assert suspicion(natural, torch.tensor([[math.nan], [100.0], [0.0]])).tolist() == [300]


def test_too_few_images_are_told_how_many_are_needed() -> None:
    for criteria, fpr, held_out in ((3, 0.1, 0.25), (1, 0.1, 0.5), (2, 0.03, 0.1), (3, 0.3, 0.9)):
        few = next(n for n in range(1, 10_000) if n - max(math.floor(held_out * n), 1) >= math.ceil(criteria / fpr - 1e-9))
        assert parts_of(few, criteria, fpr, held_out) == max(math.floor(held_out * few), 1)
        with pytest.raises(UsageError, match="needs at least") as error:
            parts_of(few - 1, criteria, fpr, held_out)
        assert f"at least {few} natural" in str(error.value)
    model, images, labels = fair()
    with pytest.raises(UsageError, match=r"fpr=0.01 with 3 criteria needs at least 399 natural images .* there are 120"):
        Detector(fpr=0.01).fit(model, images, labels)


# The detector


def test_rates_and_facts(fitted) -> None:
    detector, model, images, _ = fitted
    told = detector.describe()
    assert (told["natural_images"], told["held_out_images"]) == (90, 30)
    assert told["fpr"] == 0.2
    assert float((detector.natural > torch.tensor(list(detector.thresholds.values()))[:, None]).any(0).double().mean()) <= 0.2
    held = (detector.held > torch.tensor(list(detector.thresholds.values()))[:, None]).any(0).double().mean()
    assert told["realised_fpr"] == pytest.approx(float(held))
    assert abs(told["realised_fpr"] - 0.2) < 0.25
    assert set(told["criteria"]) == {"noise", "targeted", "untargeted"}
    assert told["sigma"] > 0
    for name in ("targeted", "untargeted"):
        assert 4 <= told["criteria"][name]["natural_median"] <= 12
        assert detector.probe.walks[name].step_size == told[f"{name}_step"]
    judged = detector(model, images, Streams.named(torch.arange(120), 5))
    union = torch.stack([judged.parts[name] > limit for name, limit in detector.thresholds.items()]).any(0)
    assert torch.equal(judged.rejected, union)
    assert torch.equal(judged.rejected, judged.score > detector.cut)
    assert 0 < int(judged.rejected.sum()) < 60


def test_fit_is_repeatable_and_forgets(fitted) -> None:
    detector, model, images, labels = fitted
    other = Detector(fpr=0.5, cap=30, untargeted_cap=30)
    other.fit(*fair(3, 60))
    other.fit(model, images, labels, fpr=0.2)
    assert torch.equal(other.natural, detector.natural)
    assert other.facts == detector.facts
    assert other.fpr == 0.2
    wrong = labels.clone()
    wrong[::10] = (wrong[::10] + 1) % 3
    assert Detector(fpr=0.2, cap=5, untargeted_cap=5).fit(model, images, wrong).describe()["natural_images"] == 81
    assert not torch.equal(
        Detector(fpr=0.2, cap=30, untargeted_cap=30, seed=1).fit(model, images, labels).natural, detector.natural
    )


def test_bytes_and_floats_are_the_same_images() -> None:
    model, images, _ = fair()
    pixels = (255 * images).round().to(torch.uint8)
    labels = predictions(model, pixels.double() / 255)
    options: dict[str, Any] = {
        "fpr": 0.2,
        "cap": 8,
        "untargeted_cap": 8,
        "sigma": 0.1,
        "targeted_step": 0.1,
        "untargeted_step": 0.1,
    }
    first, second = (Detector(**options).fit(model, x, labels) for x in (pixels, pixels.float() / 255))
    assert torch.equal(first.natural, second.natural)


def test_other_rates_need_no_new_measurement(fitted) -> None:
    detector, model, images, labels = fitted
    afresh = Detector(fpr=0.4, cap=30, untargeted_cap=30).fit(model, images, labels)
    moved = copy.deepcopy(detector).set_rate(0.4)
    assert moved.thresholds == afresh.thresholds
    assert moved.describe() == afresh.describe()
    with pytest.raises(UsageError, match="needs at least"):
        copy.deepcopy(detector).set_rate(0.01)
    with pytest.raises(UsageError, match=r"fpr=1.5"):
        copy.deepcopy(detector).set_rate(1.5)


def test_single_criteria(fitted) -> None:
    detector, model, images, _ = fitted
    for name in detector.criteria:
        part = detector.only(name)
        ordered = detector.natural[detector.criteria.index(name)].sort().values
        limit = part.thresholds[name]
        assert float((ordered > limit).double().mean()) <= 0.2
        assert limit <= detector.thresholds[name]
        streams = Streams.named(torch.arange(120), 5)
        torch.testing.assert_close(part(model, images, streams).parts[name], detector(model, images, streams).parts[name])


def test_stopping_early_changes_no_verdict(fitted) -> None:
    detector, model, images, _ = fitted
    for rate in (0.2, 0.4, 0.7):
        whole = copy.deepcopy(detector).set_rate(rate)
        quick = copy.deepcopy(whole)
        quick.stop_early = True
        streams, passes, fewer = Streams.named(torch.arange(120), 9), Passes(), Passes()
        with passes.of(model):
            full = whole(model, images, streams)
        with fewer.of(model):
            short = quick(model, images, streams)
        assert torch.equal(full.rejected, short.rejected)
        assert fewer.forward < passes.forward
        assert bool((short.score <= full.score).all())
        assert torch.equal(short.score[~short.rejected], full.score[~full.rejected])
        assert bool(short.parts["untargeted"][short.rejected].isnan().any())
        assert torch.equal(short.score > whole.cut, full.rejected)


def test_a_criterion_that_cannot_fire_is_not_measured_early(fitted) -> None:
    detector, model, images, _ = fitted
    dead = copy.deepcopy(detector)
    dead.natural[2] = 30
    dead._set(0.2).stop_early = True
    assert dead.thresholds["untargeted"] == 30
    found = dead(model, images, Streams.named(torch.arange(120), 9))
    assert bool(found.parts["untargeted"].isnan().all())
    assert bool((found.score <= 1).all())


@pytest.mark.parametrize("early", [False, True])
def test_batch_is_the_loop_over_singles(fitted, early: bool) -> None:
    detector, model, images, _ = fitted
    detector = copy.deepcopy(detector)
    detector.stop_early = early
    streams = Streams.named(torch.arange(120), 2)
    together = detector(model, images, streams)
    assert torch.equal(detector(model, images, Streams.named(torch.arange(120), 2)).score, together.score)
    for i in range(0, 120, 9):
        alone = detector(model, images[i : i + 1], streams.rows(torch.tensor([i])))
        for name, values in together.parts.items():
            torch.testing.assert_close(values[i : i + 1], alone.parts[name], equal_nan=True)
        assert bool(alone.rejected) == bool(together.rejected[i])


def test_the_model_is_left_alone_and_modes_do_not_matter(fitted) -> None:
    detector, model, images, _ = fitted
    model = copy.deepcopy(model).train()
    model[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    streams = Streams.named(torch.arange(120), 2)
    expected = detector(fitted[1], images, streams).score
    assert torch.equal(detector(model, images, streams).score, expected)
    with torch.inference_mode():
        assert torch.equal(detector(model, images.clone(), streams).score, expected)
    Detector(fpr=0.2, cap=5, untargeted_cap=5).fit(model, images, predictions(model, images))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_noise_is_differentiable(fitted) -> None:
    detector, model, images, _ = fitted
    x = images[:5].clone().requires_grad_()
    streams = Streams.named(torch.arange(5), 2)
    (gradient,) = torch.autograd.grad(detector(model, x, streams).parts["noise"].sum(), x)
    noise = normal(x.detach(), streams.fork(0), detector.probe.sigma)
    direct = (model(x).softmax(1) - model(x + noise).softmax(1)).abs().sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(direct, x)[0], rtol=1e-6, atol=1e-9)
    assert not detector(model, images[:5], streams).parts["noise"].requires_grad


def test_saved_and_loaded(fitted, tmp_path) -> None:
    detector, model, images, _ = fitted
    assert GUARDS.get("detector").load() is Detector
    save_guard(detector, tmp_path)
    loaded = load_guards(tmp_path)["detector"]
    loaded.check(model)
    streams = Streams.named(torch.arange(120), 2)
    ours, theirs = detector(model, images, streams), loaded(model, images, streams)
    assert torch.equal(ours.score, theirs.score)
    assert torch.equal(ours.rejected, theirs.rejected)
    assert loaded.describe() == detector.describe()
    assert loaded.options() == detector.options()


def test_two_classes_and_odd_shapes() -> None:
    model = binary(1.0)
    images = around_grey(80, 0.05).clamp(0, 1)
    detector = Detector(fpr=0.2, cap=30, untargeted_cap=30, untargeted_loss="ce").fit(model, images, model(images).argmax(1))
    assert bool((detector(model, images).parts["targeted"] >= 1).all())
    tall = small_batch(60, shape=(3, 5, 7))
    net = small_model(1, channels=3).eval()
    with torch.no_grad():
        net[-1].bias -= net(tall.images).mean(0)
    labels = predictions(net, tall.images)
    assert Detector(fpr=0.2, criteria=("noise",)).fit(net, tall.images, labels)(net, tall.images[:1]).score.shape == (1,)


def test_bad_input() -> None:
    model, images, labels = fair()
    for options, words in {
        "fpr": ({"fpr": 0.0}, "fpr=0.0"),
        "unknown": ({"criteria": ("noise", "luck")}, "name some of noise, targeted, untargeted"),
        "twice": ({"criteria": ("noise", "noise")}, "each once"),
        "none": ({"criteria": ()}, "name some of"),
        "loss": ({"untargeted_loss": "dlr"}, "known are margin and ce"),
        "held": ({"held_out": 1.0}, "held_out must lie in"),
        "radius": ({"radius": 1.5}, "radius in"),
        "draws": ({"draws": 0}, r"Detector\(draws=0\)"),
        "cap": ({"untargeted_cap": 0}, r"Detector\(untargeted_cap=0\)"),
        "sigma": ({"sigma": -0.1}, r"Detector\(sigma=-0.1\)"),
        "step": ({"targeted_step": 0.0}, r"Detector\(targeted_step=0.0\)"),
    }.values():
        with pytest.raises(UsageError, match=words):
            Detector(**options)
    with pytest.raises(UsageError, match="not fitted"):
        Detector()(model, images)
    with pytest.raises(UsageError, match="not fitted"):
        WhiteBox(detector=Detector())
    with pytest.raises(DataError, match="120 images, but 119 labels"):
        Detector(fpr=0.2).fit(model, images, labels[1:])
    single = nn.Sequential(nn.Flatten(), nn.Linear(64, 1)).double()
    with pytest.raises(DataError, match="at least two classes"):
        Detector(fpr=0.2).fit(single, images, torch.zeros(120, dtype=torch.long))
    with pytest.raises(UsageError, match="keep their class"):
        Detector(fpr=0.2, radius=0.0).fit(model, images, labels)


# Adam


def test_swapped_probabilities() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]])
    expected = torch.tensor([[0.1, 0.2, 0.7], [0.1, 0.6, 0.3]])
    assert torch.equal(swapped(p, torch.tensor([0, 1]), torch.tensor([2, 1])), expected)


@pytest.mark.parametrize("loss", ["swap", "ce", "margin"])
def test_adam_goes_on_behind_the_boundary(loss: str) -> None:
    """Two classes, linear, far from the box: the farthest point of the ball has the margin m + eps ||w||_1."""
    model, images = binary(1.0), around_grey(6, 0.05)
    labels = model(images).argmax(1)
    attack = AdamAttack(eps=0.1, loss=loss, steps=150, learning_rate=0.003)
    found = attack(model, images, labels)
    best = margin(model(images), labels) + 0.1 * model[1].weight[1].abs().sum()
    # "swap" is content where h equals the exchanged answer, which lies as far behind the boundary as the image lay before it.
    mirror = -margin(model(images), labels)
    reached = margin(model(found), labels)
    if loss == "swap":
        torch.testing.assert_close(reached, torch.minimum(best, mirror), atol=0.03, rtol=0)
    else:
        torch.testing.assert_close(reached, best, atol=1e-3, rtol=1e-3)
    assert bool((reached > 0).all())


def test_adam_margin_is_content_with_its_confidence() -> None:
    model, images = binary(1.0), around_grey(6, 0.05)
    labels = model(images).argmax(1)
    reached = margin(
        model(AdamAttack(eps=0.4, loss="margin", confidence=0.3, steps=40, learning_rate=0.005)(model, images, labels)), labels
    )
    assert bool((reached >= 0.3).all())
    assert bool((reached < 2).all())


def test_adam_is_never_worse_than_the_original() -> None:
    model, images, labels = fair()
    wrong = (labels + 1) % 3
    found = AdamAttack(eps=0.1, steps=5)(model, images, wrong, torch.Generator().manual_seed(0))
    assert bool((predictions(model, found) != wrong).all())
    aimed = AdamAttack(eps=0.1, steps=5, targeted=True)(model, images, labels, torch.Generator().manual_seed(0))
    assert bool((predictions(model, aimed) == labels).all())
    for options in ({"steps": 0}, {"learning_rate": 0.0}, {"confidence": -1.0}, {"loss": "dlr"}):
        with pytest.raises(UsageError):
            AdamAttack(**options)


# Attacks that know the detector


def white(fitted, **options: Any) -> WhiteBox:
    return WhiteBox(detector=fitted[0], eps=0.08, steps=3, **options)


def aims(model: nn.Module, images: Tensor, labels: Tensor) -> Aim:
    target = (labels + 1) % 3
    return Aim(target, swapped(model(images).softmax(1).detach(), labels, target), Streams.named(torch.arange(len(labels)), 3))


@pytest.mark.parametrize("loss", ["swap", "ce", "margin"])
def test_white_box_is_gray_box_without_the_detector(fitted, loss: str) -> None:
    _, model, images, labels = fitted
    gray = AdamAttack(eps=0.08, steps=6, loss=loss)(model, images, labels, torch.Generator().manual_seed(4))
    for weights, same in (((1.0, 0.0, 0.0, 0.0), True), ((1.0, 1.0, 1.0, 1.0), False)):
        attack = replace(white(fitted, loss=loss, weights=weights), steps=6)
        assert torch.equal(attack(model, images, labels, torch.Generator().manual_seed(4)), gray) is same


@pytest.mark.parametrize("loss", ["swap", "margin"])
def test_white_box_terms_by_hand(fitted, loss: str) -> None:
    detector, model, images, labels = fitted
    images, labels = images[:7], labels[:7]
    probe, target = detector.probe, (labels + 1) % 3

    def lack(logits: Tensor, goal: Tensor) -> Tensor:
        return (margin(logits, goal) + 20).clamp(min=0) if loss == "margin" else cross_entropy(logits, goal)

    def value(*weights: float) -> Tensor:
        x = images.clone().requires_grad_()
        return white(fitted, loss=loss, weights=weights).objective(model, x, model(x), aims(model, images, labels)).detach()

    logits, streams = model(images), aims(model, images, labels).streams
    first = cross_entropy(logits, aims(model, images, labels).swapped) if loss == "swap" else lack(logits, target)
    torch.testing.assert_close(value(1, 0, 0, 0), first)
    firm = noise_shift(model, images, logits, Streams.named(torch.arange(7), 3), sigma=probe.sigma)
    torch.testing.assert_close(value(0, 1, 0, 0), firm)
    goal = other_classes(target, 3, streams)
    assert not bool((goal == target).any())
    for index, name, aim in ((2, "targeted", goal), (3, "untargeted", target)):
        x, walk = images.clone().requires_grad_(), probe.walks[name]
        base = model(x).argmax(1)
        (gradient,) = torch.autograd.grad(walk.value(model(x), base, aim).sum(), x)
        moved = (images - walk.step_size * gradient).clamp(0, 1)
        moved = images + (moved - images).clamp(-walk.radius, walk.radius)
        weights = [0.0] * 4
        weights[index] = 3.0
        torch.testing.assert_close(value(*weights), (3 if index == 2 else -3) * lack(model(moved), aim))


def test_backward_takes_steps_for_the_identity(fitted) -> None:
    """The gradient of l(A(x)) at x is that of l at A(x)."""
    detector, model, images, labels = fitted
    images, labels = images[:7], labels[:7]
    walk, goal = detector.probe.walks["targeted"], aims(model, images, labels).target
    x = images.clone().requires_grad_()
    (inner,) = torch.autograd.grad(cross_entropy(model(x), goal).sum(), x)
    moved = walk.step(images, inner, images).requires_grad_()
    (expected,) = torch.autograd.grad(cross_entropy(model(moved), goal).sum(), moved)
    attack = white(fitted)
    after = attack._after(walk, model, (x, model(x)), goal)
    (found,) = torch.autograd.grad(attack.lack(after, goal).sum(), x)
    torch.testing.assert_close(found, expected)
    assert float((moved - images).detach().abs().max()) > 1e-4


def test_samples_are_averaged(fitted) -> None:
    _, model, images, labels = fitted
    images, labels = images[:7], labels[:7]

    def value(samples: int) -> Tensor:
        x = images.clone().requires_grad_()
        attack = white(fitted, weights=(0.0, 1.0, 1.0, 0.0), samples=samples)
        return attack.objective(model, x, model(x), aims(model, images, labels)).detach()

    many = torch.stack([value(64), value(128)])
    assert float((many[0] - many[1]).abs().mean()) < float((value(1) - many[1]).abs().mean())


@dataclass(frozen=True)
class Shift:
    """An attack that adds a constant, and counts whom it was asked to attack."""

    by: float
    asked: list[int]
    targeted: bool = False

    @property
    def threat(self) -> Linf:
        return Linf(self.by)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        self.asked.append(len(images))
        return (images + self.by).clamp(0, 1)


class Brightness(nn.Module):
    """Class 1 is brighter than 0.4."""

    def forward(self, images: Tensor) -> Tensor:
        s = images.flatten(1).mean(1)
        return torch.stack([0.4 - s, s - 0.4], dim=1)


def test_segment_search_finds_the_most_natural_wrong_point() -> None:
    """The nearest to 0.65 of brightness is most natural; darker than 0.4 is right and does not count."""

    def judge(model: nn.Module, images: Tensor, streams: Streams) -> Judgement:
        score = (images.flatten(1).mean(1) - best).abs()
        return Judgement(score, score > 0.1)

    images, labels, asked = torch.full((3, 1, 4, 4), 0.2).double(), torch.zeros(3, dtype=torch.long), []
    images[2] = 0.9  # classified wrongly as it is, and nothing more natural ahead
    attack = SegmentSearch(detector=judge, inner=Shift(0.6, asked), points=21)
    best = 0.65
    found = attack(Brightness(), images, labels).flatten(1).mean(1)
    assert found[:2].sub(0.65).abs().max() < 0.011
    assert float(found[2]) == pytest.approx(0.9)
    assert asked == [3, 1, 1], "images that pass are left alone"
    best = 0.0
    found = attack(Brightness(), images, labels).flatten(1).mean(1)
    assert 0.4 < float(found[0]) < 0.41, "the point just behind the boundary is nearest"
    far = torch.full((1, 1, 4, 4), 0.2).double()
    none = SegmentSearch(detector=judge, inner=Shift(0.1, []))(Brightness(), far, labels[:1])
    assert torch.equal(none, far), "what cannot be made wrong stays as it is"
    for option in ("points", "restarts", "looks"):
        with pytest.raises(UsageError, match=f"{option}=0"):
            SegmentSearch(detector=judge, **{option: 0})


def test_segment_search_looks_again_at_the_best_place() -> None:
    calls: list[int] = []

    def judge(model: nn.Module, images: Tensor, streams: Streams) -> Judgement:
        calls.append(len(images))
        score = torch.full((len(images),), 0.3 if len(calls) % 2 else 0.7)
        return Judgement(score, score > 0.5)

    image = torch.full((1, 1, 2, 2), 0.2)
    asked: list[int] = []
    SegmentSearch(detector=judge, inner=Shift(0.6, asked), points=2, looks=2)(
        Brightness(), image, torch.zeros(1, dtype=torch.long)
    )
    assert asked == [1, 1, 1], "one bad look keeps the image open"
    assert len(calls) == 3 * (2 + 2), "in each restart two places, and the best of them twice more"


def test_contracts() -> None:
    detector = Detector(fpr=0.2, cap=6, untargeted_cap=6, targeted_step=0.5, untargeted_step=0.1).fit(*fair())
    quick = copy.deepcopy(detector)
    quick.stop_early = True
    for attack in (
        WhiteBox(detector=detector, eps=0.08, steps=2),
        WhiteBox(detector=detector, eps=0.5, steps=2, norm="L2", loss="margin", targeted=True, samples=2),
        WhiteBox(detector=detector.only("noise"), eps=0.08, steps=2),
        SegmentSearch(detector=quick, eps=0.08, inner={"attack": "adam", "steps": 2}, points=2, restarts=2),
        SegmentSearch(detector=detector, eps=0.08, inner="fgsm", points=2, restarts=1, targeted=True),
    ):
        check_attack(attack)
    check_attack(ThroughNoise(inner={"attack": "pgd", "steps": 2}, eps=0.08, samples=2, sigma=0.05), alone=False)


def test_through_noise_is_expectation_over_the_detectors_noise() -> None:
    model, images, labels = fair()
    inner = {"attack": "adam", "steps": 4, "eps": 0.08}
    plain = EOT(inner=inner, samples=1)(model, images, labels, torch.Generator().manual_seed(0))
    same = ThroughNoise(inner=inner, samples=1, sigma=0.0)(model, images, labels, torch.Generator().manual_seed(0))
    assert torch.equal(plain, same)
    loud = ThroughNoise(inner=inner, samples=4, sigma=0.2)(model, images, labels, torch.Generator().manual_seed(0))
    assert not torch.equal(plain, loud)
    with pytest.raises(UsageError, match="sigma=-1"):
        ThroughNoise(sigma=-1)


# What is told of it


class Ruler:
    """A detector by brightness, whose every figure is known."""

    thresholds, cut = {"brightness": 0.5}, 0.5

    def __call__(self, model: nn.Module, images: Tensor, streams: Streams | None = None) -> Judgement:
        score = images.flatten(1).mean(1)
        return Judgement(score, score > 0.5, {"brightness": score})


def test_measured_figures_by_hand() -> None:
    levels = torch.tensor([0.1, 0.16, 0.22, 0.28, 0.31, 0.35, 0.38, 0.9, 0.45])
    images = levels.view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 0])  # the last is wrong from the beginning
    attacks = {"little": Shift(0.1, []), "middle": Shift(0.2, []), "much": Shift(0.6, [])}
    found = measure_detector(Ruler(), Brightness(), images, labels, attacks=attacks, batch_size=4)
    told = found.summary()
    assert (told["images"], told["clean"], told["clean_rejected"], told["clean_kept"]) == (8, 8 / 9, 1 / 8, 7 / 9)
    little, middle, much = (told["attacks"][name] for name in attacks)
    for facts, wrong, passed in ((little, 3, 3), (middle, 5, 2), (much, 7, 0)):
        assert facts["success"] == wrong / 8
        assert facts["wrong_and_not_rejected"] == passed / 8
        assert facts["detected"] == facts["detected_by"]["brightness"] == pytest.approx(1 - passed / wrong)
        assert facts["interval"][0] <= passed / 8 <= facts["interval"][1]
    assert much["area"] == pytest.approx(52 / 56)
    assert told["strongest"] == "little"
    looser = Ruler()
    looser.cut, looser.thresholds = 0.96, {"brightness": 0.96}
    assert found.at(looser).summary()["attacks"]["much"]["wrong_and_not_rejected"] == 6 / 8
    assert found.at(looser).strongest == "much"
    assert sum(told["histograms"]["brightness"]["counts"]["natural"]) == 8
    with pytest.raises(DataError, match="none of these 2 images right"):
        measure_detector(Ruler(), Brightness(), images[:2], 1 - labels[:2], attacks={})


def test_measurement_checks_what_attacks_return() -> None:
    images, labels = torch.full((4, 1, 4, 4), 0.2), torch.zeros(4, dtype=torch.long)

    @dataclass(frozen=True)
    class Cheat(Shift):
        @property
        def threat(self) -> Linf:
            return Linf(0.01)

    found = measure_detector(Ruler(), Brightness(), images, labels, attacks={"cheat": Cheat(0.25, [])})
    told = found.summary()["attacks"]["cheat"]
    assert told["success"] == 0
    assert told["detected"] is None
    assert told["area"] is None


def test_receiver_curve_by_hand() -> None:
    false, true = roc(np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.3, 0.5]))
    assert false.tolist() == [0, 0, 0.25, 0.5, 0.75, 1]
    assert true.tolist() == [0, 0.5, 0.5, 1, 1, 1]
    assert area(false, true) == pytest.approx((1 + 1 + 1 + 1 + 1 + 1 + 0.5 + 0) / 8)
    same = np.array([0.5, 0.5, 0.5])
    assert area(*roc(same, same)) == 0.5


def test_scores_over_the_steps_of_an_attack(fitted) -> None:
    detector, model, images, labels = fitted
    attack = AdamAttack(eps=0.3, learning_rate=0.01)
    told = over_steps(detector, model, images[:40], labels[:40], attack=attack, steps=(1, 5, 40))
    assert told["steps"] == [0, 1, 5, 40]
    for name, facts in told["criteria"].items():
        assert facts["threshold"] == detector.thresholds[name]
        kept = [i for i in range(4) if facts["median"][i] is not None]
        assert {0, 3} <= set(kept)
        assert all(facts["low"][i] <= facts["median"][i] <= facts["high"][i] for i in kept)
    with pytest.raises(UsageError, match="Shift has no option `steps`"):
        over_steps(detector, model, images[:4], labels[:4], attack=Shift(0.1, []))


def test_report_draws_the_detector(fitted, tmp_path) -> None:
    from overproof.folder import write_json, write_toml
    from overproof.report import write_report

    detector, model, images, labels = fitted
    attacks = {"shallow <b>": AdamAttack(eps=0.1, steps=2), "deep": AdamAttack(eps=0.3, steps=20)}
    found = measure_detector(detector, model, images[:40], labels[:40], attacks=attacks).summary()
    found["over_steps"] = over_steps(detector, model, images[:20], labels[:20], attack=attacks["deep"], steps=(1, 10))
    write_toml(tmp_path / "run" / "config.toml", {"seed": 0})
    write_json(tmp_path / "run" / "evaluations" / "detector.json", {"clean": found["clean"], "samples": 40, "detection": found})
    page = write_report([tmp_path / "run"]).read_text("utf-8")
    for words in (
        'id="detection"',
        "Detection over false alarms",
        "Scores as the attack goes on",
        "Scores: noise",
        found["strongest"][:4],
    ):
        assert words in page
    assert "<b>" not in page.replace("<body>", "")
    assert page.count("<svg viewBox") >= 5
    found["histograms"] = {"noise": {"edges": "?"}}
    write_json(tmp_path / "run" / "evaluations" / "detector.json", {"clean": 0.9, "samples": 40, "detection": found})
    assert "scores cannot be drawn" in write_report([tmp_path / "run"]).read_text("utf-8")


def test_the_benchmarks_plain_procedure_gives_the_same_verdicts(fitted) -> None:
    """Written down a second time, one image after the other with two forward passes per step."""
    root = Path(__file__).resolve().parents[1] / "benchmarks"
    plain = runpy.run_path(str(root / "detector.py"))["plain_verdicts"]
    detector, model, images, _ = fitted
    streams = Streams.named(torch.arange(120), 11)
    noise = normal(images, streams.fork(0), detector.probe.sigma)
    targets = other_classes(predictions(model, images), 3, streams.fork(1)).tolist()
    rejected = detector(model, images, streams).rejected
    rows = torch.cat([rejected.nonzero().flatten()[:8], (~rejected).nonzero().flatten()[:8]])
    found = plain(detector, model, images[rows], noise[rows], [targets[i] for i in rows.tolist()])
    assert found == rejected[rows].tolist() == [True] * 8 + [False] * 8


def test_the_contract_of_a_guard() -> None:
    check_guard(lambda: Detector(criteria=("noise", "untargeted"), fpr=0.2, draws=3, untargeted_loss="ce", untargeted_cap=50))
