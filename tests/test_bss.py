"""Boundary supporting samples: closed forms on linear networks, the method's terms, and how alike boundaries are."""

from __future__ import annotations

import copy
import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import overproof
from overproof.attacks import BSS as Attack
from overproof.attacks import draw_targets, predictions, walk_to_boundary
from overproof.attacks.bss import check_walk
from overproof.attacks.randomness import Streams
from overproof.cli import call
from overproof.errors import DataError, NoGradientError, UnknownNameError, UsageError
from overproof.evaluation import boundary_similarity, compare, evaluate
from overproof.evaluation.comparison import Sample
from overproof.losses.boundaries import boundary_gap, direction_similarity, discrepancy, length_similarity
from overproof.losses.divergences import cross_entropy, kl_divergence
from overproof.methods import METHODS
from overproof.methods.bss import BSS, base_rows
from overproof.methods.kd import KD
from overproof.run.recipes import read_recipe
from overproof.testing import check_attack, check_method, small_batch, small_model
from overproof.training.meter import EpochTeller
from overproof.types import Batch, Progress

ROOT = Path(__file__).resolve().parents[1]
EPS = 1e-4
SHAPE = (1, 4, 4)
START = Progress(step=0, total=10)


def planes(weight: Tensor, bias: Tensor) -> nn.Sequential:
    """Logits linear in the pixels."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], weight.shape[0])).double()
    with torch.no_grad():
        model[1].weight.copy_(weight)
        model[1].bias.copy_(bias)
    return model


def two_ahead(seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A linear network of three classes, a grey image on which class 0 is 2 ahead of class 1 and far ahead of class 2; and g."""
    weight = 0.3 * torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    image = torch.full((1, *SHAPE), 0.5, dtype=torch.float64)
    bias = torch.tensor([2.0, 0.0, -50.0], dtype=torch.float64) - weight @ image.flatten()
    return planes(weight, bias), image, weight[0] - weight[1]


def walked(model: nn.Module, images: Tensor, **options: Any) -> Any:
    """From class 0 to class 1."""
    classes = torch.zeros(len(images), dtype=torch.long)
    return walk_to_boundary(model, images, classes, classes + 1, **{"clamp": False, **options})


def gap_of(walk: Any) -> float:
    return float(walk.logits[0, 0] - walk.logits[0, 1])


# The walk


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20])
def test_gap_of_a_linear_network_shrinks_geometrically(steps: int) -> None:
    """L_i + eps = (1 - eta ||g||)^i (L_0 + eps)."""
    model, image, g = two_ahead()
    walk = walked(model, image, step_size=0.3 / float(g.norm()), steps=steps)
    assert gap_of(walk) == pytest.approx(0.7**steps * (2 + EPS) - EPS, abs=1e-12)
    assert not walk.crossed.any()
    assert not walk.strayed.any()


def test_crossing_comes_when_the_formula_says_so() -> None:
    model, image, g = two_ahead()
    rate = 0.3 / float(g.norm())
    needed = math.floor(math.log(EPS / (2 + EPS)) / math.log(0.7)) + 1
    assert not walked(model, image, step_size=rate, steps=needed - 1).crossed.any()
    walk = walked(model, image, step_size=rate, steps=needed)
    assert walk.crossed.all()
    assert -EPS < gap_of(walk) < 0
    assert torch.equal(walked(model, image, step_size=rate, steps=needed + 50).images, walk.images)


def test_a_long_step_crosses_at_once_and_goes_too_far() -> None:
    model, image, g = two_ahead()
    walk = walked(model, image, step_size=1.5 / float(g.norm()))
    assert gap_of(walk) == pytest.approx(-0.5 * (2 + EPS) - EPS, abs=1e-12)


@pytest.mark.parametrize("newton", [True, False])
def test_inverse_slope_is_the_orthogonal_projection(newton: bool) -> None:
    model, image, g = two_ahead()
    walk = walked(model, image, step_size="newton" if newton else 1 / float(g.norm()))
    expected = image.flatten() - (2 + EPS) * g / g.square().sum()
    torch.testing.assert_close(walk.images.flatten(), expected, atol=1e-12, rtol=0)
    assert gap_of(walk) == pytest.approx(-EPS, abs=1e-12)


def test_steps_are_parallel_to_the_normal_and_add_up() -> None:
    model, image, g = two_ahead()
    rate, steps = 0.3 / float(g.norm()), 6
    change = (walked(model, image, step_size=rate, steps=steps).images - image).flatten()
    assert float(change @ g / (change.norm() * g.norm())) == pytest.approx(-1, abs=1e-12)
    assert float(change.norm()) == pytest.approx(rate * sum(0.7**i * (2 + EPS) for i in range(steps)), abs=1e-12)


def test_clamp_keeps_the_walk_in_the_box() -> None:
    model, image, g = two_ahead()
    inside = walked(model, image, step_size=1 / float(g.norm()), clamp=True, steps=3).images
    outside = walked(model, image, step_size=1 / float(g.norm()), steps=3).images
    assert float(outside.min()) < 0 or float(outside.max()) > 1
    assert float(inside.min()) >= 0
    assert float(inside.max()) <= 1


def test_scaled_logits_walk_alike_with_inversely_scaled_steps() -> None:
    model, image, g = two_ahead()
    large = planes(10 * model[1].weight, 10 * model[1].bias)
    rate = 0.3 / float(g.norm())
    ends = (
        walked(model, image, step_size=rate, steps=8).images,
        walked(large, image, step_size=rate / 10, overshoot=10 * EPS, steps=8).images,
    )
    torch.testing.assert_close(*ends, atol=1e-12, rtol=0)


def test_finished_walks_stand_still_and_cost_nothing() -> None:
    """One image crosses after one step, the other after five; the network sees both only as long as both walk."""
    model, image, g = two_ahead()
    near = image - (2 - 5e-5) * (g / g.square().sum()).view(1, *SHAPE)
    images, sizes = torch.cat([near, image]), []
    handle = model.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    walk = walked(model, images, step_size=0.9 / float(g.norm()))
    handle.remove()
    assert sizes == [2, 2, 1, 1, 1, 1]
    assert walk.crossed.all()
    for row in range(2):
        alone = walked(model, images[row : row + 1], step_size=0.9 / float(g.norm()))
        torch.testing.assert_close(walk.images[row], alone.images[0], atol=1e-12, rtol=0)
        torch.testing.assert_close(walk.logits[row], model(walk.images[row : row + 1])[0].detach(), atol=1e-12, rtol=0)


def test_a_third_class_ends_the_walk() -> None:
    """z = (1 - t, t, 0.6) along t: the third class takes over at t = 0.4, before the second one does."""
    way = torch.full((16,), 0.25, dtype=torch.float64)
    model = planes(torch.stack([-way, way, 0 * way]), torch.tensor([1.0, 0.0, 0.6], dtype=torch.float64))
    walk = walked(model, torch.zeros(1, *SHAPE, dtype=torch.float64), step_size=0.1)
    assert walk.strayed.all()
    assert not walk.crossed.any()
    assert int(walk.logits.argmax()) == 2


def test_no_slope_no_step() -> None:
    dead = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        dead[1].bias.fill_(-100)
        dead[3].bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    image = torch.full((2, *SHAPE), 0.5, dtype=torch.float64)
    for step_size in (0.3, "newton"):
        walk = walked(dead, image, step_size=step_size)
        assert torch.equal(walk.images, image)
        assert not (walk.crossed | walk.strayed).any()


def test_a_network_without_gradient_says_so() -> None:
    class Cut(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.detach().flatten(1)[:, :3]

    with pytest.raises(NoGradientError, match="detach"):
        walked(Cut(), torch.tensor([1.0, 0.5, 0.2] + [0.0] * 13).view(1, *SHAPE))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_mode_does_not_matter(context: Any) -> None:
    model, image, _ = two_ahead()
    outside = walked(model, image).images
    with context():
        image = image.clone()
        walk = walked(model, image)
    assert torch.equal(walk.images, outside)
    assert not walk.logits.requires_grad
    assert model[1].weight.grad is None


@pytest.mark.parametrize(
    "options", [{"step_size": 0.0}, {"step_size": "long"}, {"step_size": math.inf}, {"overshoot": 0.0}, {"steps": 0}]
)
def test_bad_walks_are_refused_everywhere(options: dict[str, Any]) -> None:
    value = repr(next(iter(options.values())))
    model, image, _ = two_ahead()
    for attempt in (
        lambda: walked(model, image, **options),
        lambda: Attack(**options),
        lambda: BSS(small_model(0), small_model(1), **options),
        lambda: boundary_similarity(model, model, image, **options),
    ):
        with pytest.raises(UsageError, match=value):
            attempt()
    check_walk("nobody", "newton", 1e-4, 1)


# Classes


def test_classes_are_drawn_with_their_probability() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.5, -1.0]]).expand(100_000, -1)
    drawn = draw_targets(logits, torch.zeros(100_000, dtype=torch.long), torch.Generator().manual_seed(0))
    found = torch.bincount(drawn, minlength=4) / 100_000
    q = logits[0].softmax(0)
    assert found[0] == 0
    torch.testing.assert_close(found[1:], q[1:] / (1 - q[0]), atol=0.01, rtol=0)


def test_classes_are_drawn_even_where_nothing_is_left_of_their_probability() -> None:
    logits = torch.tensor([[1000.0, 1.0, 1.0]]).expand(2000, -1)
    assert float(logits[0].softmax(0)[0]) == 1
    drawn = draw_targets(logits, torch.zeros(2000, dtype=torch.long), torch.Generator().manual_seed(0))
    assert sorted(set(drawn.tolist())) == [1, 2]
    assert 0.4 < float((drawn == 1).float().mean()) < 0.6
    two = draw_targets(torch.tensor([[0.0, -1e4]]).expand(1000, -1), torch.zeros(1000, dtype=torch.long))
    assert (two == 1).all()


def test_classes_belong_to_the_image() -> None:
    logits, base = torch.randn(20, 7, generator=torch.Generator().manual_seed(1)), torch.arange(20) % 7
    streams = Streams.named(torch.arange(20), "test")
    together = draw_targets(logits, base, streams)
    rows = torch.tensor([13, 4])
    apart = draw_targets(logits[rows], base[rows], Streams.named(torch.arange(20), "test").rows(rows))
    assert torch.equal(together[rows], apart)
    assert len(set(together.tolist())) > 2


# Similarities


def test_losses_are_their_formulas() -> None:
    torch.manual_seed(0)
    target, logits, labels = torch.randn(6, 5).double(), torch.randn(6, 5).double(), torch.arange(6) % 5
    p, q = target.softmax(1), logits.softmax(1)
    by_hand = [sum(float((p[n, k] - q[n, k]) ** 2) for k in range(5) if k != labels[n]) for n in range(6)]
    torch.testing.assert_close(discrepancy(target, logits, labels), torch.tensor(by_hand, dtype=torch.float64))
    torch.testing.assert_close(boundary_gap(logits, labels, (labels + 1) % 5)[2], logits[2, 2] - logits[2, 3])
    assert boundary_gap(logits.bfloat16(), labels, labels).dtype == torch.float32
    u, v = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 0.0]]]]), torch.tensor([[[[4.0, 0.0]]], [[[1.0, 0.0]]]])
    torch.testing.assert_close(length_similarity(u, v), torch.tensor([0.8, 0.0]))
    torch.testing.assert_close(direction_similarity(u, v), torch.tensor([0.6, 0.0]))
    assert torch.equal(length_similarity(u[1:], u[1:]), torch.zeros(1))


def halves(normal: Tensor, distance: float) -> nn.Sequential:
    """Two classes with the boundary at `distance` from the grey image, normal to `normal`; class 0 on its side."""
    unit = normal / normal.norm()
    offset = distance - float(unit.sum()) * 0.5
    return planes(torch.stack([unit / 2, -unit / 2]), torch.tensor([offset / 2, -offset / 2], dtype=torch.float64))


def test_similarity_is_one_with_itself() -> None:
    images = torch.rand(30, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = planes(weight, -weight.sum(dim=1) / 2)
    found = boundary_similarity(model, model, images)
    assert found.mag_sim == pytest.approx(1, abs=1e-12)
    assert found.ang_sim == pytest.approx(1, abs=1e-12)
    assert found.images == 30
    assert 0 < found.pairs <= 90
    assert found.kept == pytest.approx(found.pairs / 90)
    for step_size in (0.05, 0.3):
        again = boundary_similarity(model, model, images, step_size=step_size, steps=60)
        assert (again.mag_sim, again.ang_sim) == (pytest.approx(1), pytest.approx(1))


def test_similarity_of_half_spaces_is_angle_and_ratio_of_distances() -> None:
    image, first = torch.full((1, *SHAPE), 0.5, dtype=torch.float64), torch.eye(16, dtype=torch.float64)[0]
    turned = 0.6 * first + 0.8 * torch.eye(16, dtype=torch.float64)[5]
    options: dict[str, Any] = {"overshoot": 1e-9}
    angle = boundary_similarity(halves(first, 0.2), halves(turned, 0.2), image, **options)
    assert angle.ang_sim == pytest.approx(0.6, abs=1e-7)
    assert angle.mag_sim == pytest.approx(1, abs=1e-7)
    length = boundary_similarity(halves(first, 0.1), halves(first, 0.4), image, **options)
    assert length.mag_sim == pytest.approx(0.25, abs=1e-7)
    assert length.ang_sim == pytest.approx(1, abs=1e-7)
    # One image: drawn with replacement it is always the same.
    assert length.mag_sim_interval == (length.mag_sim, length.mag_sim)


def test_newton_similarity_does_not_see_the_scale_of_the_logits() -> None:
    image = torch.full((1, *SHAPE), 0.5, dtype=torch.float64)
    ways = torch.eye(16, dtype=torch.float64)
    model, other = halves(ways[0], 0.1), halves(ways[0] + ways[1], 0.3)
    large = planes(50 * other[1].weight, 50 * other[1].bias)
    plain, scaled = (boundary_similarity(model, net, image, overshoot=1e-9) for net in (other, large))
    assert plain.mag_sim == pytest.approx(1 / 3, abs=1e-6)
    assert (scaled.mag_sim, scaled.ang_sim) == (pytest.approx(plain.mag_sim, abs=1e-6), pytest.approx(plain.ang_sim, abs=1e-6))


def two_models(images: Tensor) -> list[nn.Module]:
    """Two networks that use all their classes on these images."""
    models = [small_model(seed).eval() for seed in (3, 4)]
    with torch.no_grad():
        for model in models:
            model[-1].bias -= model(images).mean(0)
    return models


def test_similarity_counts_what_it_should() -> None:
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    models = two_models(images)
    labels = predictions(models[0], images)
    agree = int((labels == predictions(models[1], images)).sum())
    assert 0 < agree < 40
    found = boundary_similarity(*models, images, labels, steps=60)
    assert found.images == agree
    assert boundary_similarity(*models, images, steps=60) == found
    small = boundary_similarity(*models, images, labels, steps=60, batch_size=5)
    assert (small.mag_sim, small.ang_sim) == (pytest.approx(found.mag_sim, abs=1e-3), pytest.approx(found.ang_sim, abs=1e-3))
    one = boundary_similarity(*models, images, labels, targets=1, steps=60)
    assert one.pairs <= agree < found.pairs
    low, high = found.ang_sim_interval
    assert low < found.ang_sim < high
    assert boundary_similarity(*models, images, labels, steps=60, seed=1).ang_sim_interval != found.ang_sim_interval


def test_similarity_says_why_it_is_not_to_be_had() -> None:
    model, images = small_model(3).eval(), small_batch(8).images
    labels = predictions(model, images)
    with pytest.raises(DataError, match="none among 8 images on which both models are right"):
        boundary_similarity(model, model, images, (labels + 1) % 3)
    with pytest.raises(DataError, match="None of 16 pairs of walks crossed"):
        boundary_similarity(model, model, images, step_size=1e-9, steps=1)
    with pytest.raises(UsageError, match="One model has 3 classes and the other 10"):
        boundary_similarity(model, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), images)
    for options in ({"targets": 0}, {"resamples": 0}, {"batch_size": 0}):
        with pytest.raises(UsageError, match="at least 1"):
            boundary_similarity(model, model, images, **options)


# Comparing two models


def test_comparison_counts_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.1, 0.9]]).view(5, 1, 1, 2)
    first, second = nn.Flatten(), nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        second[1].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    images = scores.clone()
    images[1] = torch.tensor([0.6, 0.4])  # here the second model says 1
    labels = torch.tensor([0, 0, 1, 1, 0])
    found = compare(first, second, (images, labels), names=("one", "two"))
    assert (found.names, found.samples, found.only) == (("one", "two"), 5, (1, 0))
    assert found.clean == (3 / 5, 2 / 5)
    assert found.agreement == 4 / 5
    assert found.difference == pytest.approx(1 / 5)
    half = 1.959964 * math.sqrt((1 / 5 - 1 / 25) / 5)
    assert found.difference_interval == pytest.approx([0.2 - half, 0.2 + half])
    assert found.clean_intervals[0][0] < 3 / 5 < found.clean_intervals[0][1]
    assert found.boundary is None
    assert found.summary["boundary"] is None


def test_comparison_does_not_depend_on_the_batch_and_leaves_the_models_alone() -> None:
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    models = two_models(images)
    data = (images, predictions(models[0], images))
    for model in models:
        model.train()
        model[1].eval()
    before = [copy.deepcopy(model.state_dict()) for model in models]
    with torch.no_grad():
        found = [
            compare(*models, data, metric=("boundary",), images=6, batch_size=size, steps=60, targets=1) for size in (7, 40)
        ]
    assert found[0].summary == found[1].summary
    assert found[0].boundary is not None
    assert found[0].boundary.images == 6
    for model, state in zip(models, before, strict=True):
        assert (model.training, model[1].training) == (True, False)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_sample_is_fair_and_its_own() -> None:
    numbers = torch.arange(1000)
    images = numbers.view(-1, 1, 1, 1).float()
    whole, parts = Sample(100, 0), Sample(100, 0)
    whole.offer(images, numbers, numbers)
    for part in torch.randperm(1000, generator=torch.Generator().manual_seed(0)).split(64):
        parts.offer(images[part], numbers[part], numbers[part])
    assert all(torch.equal(a, b) for a, b in zip(whole.kept, parts.kept, strict=True))
    chosen = whole.kept[2]
    assert len(set(chosen.tolist())) == 100
    assert 400 < float(chosen.float().mean()) < 600
    other = Sample(100, 1)
    other.offer(images, numbers, numbers)
    assert set(other.kept[2].tolist()) != set(chosen.tolist())


def test_comparison_refuses_what_makes_no_sense() -> None:
    model, batch = small_model(0), small_batch(8)
    data = (batch.images, batch.labels)
    with pytest.raises(UnknownNameError, match="'bundary'.*'boundary'"):
        compare(model, model, data, metric=["bundary"])
    with pytest.raises(UnknownNameError, match="'step'.*'steps'"):
        compare(model, model, data, metric="boundary", step=3)
    with pytest.raises(UsageError, match="steps: give these options a metric"):
        compare(model, model, data, steps=3)
    with pytest.raises(UsageError, match="metric on 0 images"):
        compare(model, model, data, metric="boundary", images=0)
    with pytest.raises(UsageError, match="One model has 3 classes and the other 10"):
        compare(model, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), data)
    wrong = (predictions(model, batch.images) + 1) % 3
    with pytest.raises(DataError, match="no image that both models get right"):
        compare(model, model, (batch.images, wrong), metric="boundary")


# The attack


@pytest.mark.parametrize(
    "attack",
    [Attack(), Attack(targeted=True), Attack(step_size="newton", eps=0.5), Attack(steps=2, step_size=0.5, targeted=True)],
    ids=repr,
)
def test_attack_keeps_the_contract(attack: Attack) -> None:
    check_attack(attack)


def test_attack_reaches_chosen_classes_just_behind_the_boundary() -> None:
    weight = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    model = planes(weight, -weight.sum(dim=1) / 2)
    images = torch.rand(60, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 0.2 + 0.4
    logits = model(images).detach()
    goals = (logits.argmax(1) + 1) % 4
    found = Attack(targeted=True, step_size="newton")(model, images, goals)
    moved = (found != images).flatten(1).any(dim=1)
    assert moved.float().mean() > 0.5
    assert torch.equal(predictions(model, found)[moved], goals[moved])
    after = model(found).detach()
    gaps = (after.gather(1, goals[:, None]) - after.gather(1, logits.argmax(1)[:, None])).squeeze(1)[moved]
    assert float(gaps.max()) < 0.05


def test_attack_without_target_takes_likely_classes_and_any_that_come() -> None:
    model = small_model(5).double().eval()
    images = torch.rand(40, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model[-1].bias -= model(images).mean(0)
    labels = predictions(model, images)
    found = Attack(step_size="newton")(model, images, labels, torch.Generator().manual_seed(0))
    broken = predictions(model, found) != labels
    assert broken.float().mean() > 0.8
    assert torch.equal(found[~broken], images[~broken])
    wrong = (labels + 1) % 3
    assert torch.equal(Attack()(model, images, wrong), images)  # misclassified already
    sizes = (found - images).flatten(1).norm(dim=1)
    near = Attack(step_size="newton", eps=float(sizes.median()))(model, images, labels, torch.Generator().manual_seed(0))
    assert 0 < int((predictions(model, near) != labels).sum()) < int(broken.sum())


def test_attack_by_name_and_its_figures() -> None:
    model, batch = small_model(5).eval(), small_batch(20)
    result = evaluate(model, (batch.images, predictions(model, batch.images)), attacks=["bss"], sanity=0)
    assert result.summary["attacks"]["bss"]["sizes"]["found"] >= 0
    with pytest.raises(UsageError, match="norms L2, not 'Linf'"):
        Attack(norm="Linf")


# The method


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).double()


def agreed(count: int = 12) -> tuple[nn.Sequential, nn.Sequential, Batch]:
    """A student and a teacher, and images with the teacher's labels, of which the student gets some right."""
    student, teacher = net(0), net(1)
    images = torch.rand(count, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for model in (student, teacher):
            model[-1].bias -= model(images).mean(0)
        labels = teacher(images).argmax(1)
        assert 2 <= int((student(images).argmax(1) == labels).sum()) < count
    return student, teacher, Batch(images, labels, torch.arange(count))


def test_bases_are_right_for_both_and_differ_most_first() -> None:
    labels = torch.zeros(5, dtype=torch.long)
    target = torch.tensor([[4.0, 0, 0], [4.0, 2, 0], [4.0, 0, 3], [0.0, 4, 0], [4.0, 3, 0]])
    logits = torch.tensor([[4.0, 0, 0], [4.0, 0, 2], [4.0, 3, 0], [4.0, 0, 0], [0.0, 3, 0]])
    # The first is rated alike by both, the fourth is wrong for the teacher, the fifth for the student.
    assert discrepancy(target, logits, labels)[0] == 0
    assert base_rows(target, logits, labels, count=5).tolist() == [2, 1, 0]
    assert base_rows(target, logits, labels, count=2).tolist() == [2, 1]
    assert base_rows(target, logits, (labels + 1) % 3, count=5).tolist() == []


def test_weights_at_the_ends_of_epochs_are_the_authors() -> None:
    objective, epochs = BSS(small_model(0), small_model(1)), 80
    for e in range(1, epochs + 1):
        alpha, beta = objective.weights(e / epochs)
        assert alpha == pytest.approx(1 + 3 * (1 - e / epochs))
        assert beta == pytest.approx(max(2 * (1 - 4 / 3 * e / epochs), 0), abs=1e-12)
        assert (beta == 0) == (e >= 60)
    assert objective.weights(1.0)[0] == 1
    assert objective.weights(1.2) == (1, 0)
    own = BSS(small_model(0), small_model(1), kd_weight=(0.5, 2.0), bss_weight=3.0, bss_until=0.5)
    assert own.weights(0.25) == (0.875, 1.5)
    assert own.weights(0.5)[1] == 0


def trained(objective: Any, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """Weights and state of the generator after three steps."""
    objective.train()
    optimizer = torch.optim.SGD(objective.trainable(), lr=0.1, momentum=0.9)
    torch.manual_seed(7)
    for step in range(3):
        optimizer.zero_grad()
        sum(objective(batch, Progress(step, 10)).losses.values()).backward()
        optimizer.step()
    return objective.student.state_dict(), torch.get_rng_state()


def test_without_samples_it_is_plain_distillation_bit_for_bit() -> None:
    """tau^2 = 4 and its inverse are exact, so the two ways of weighting give the same bits."""
    batch, students = small_batch(8), [small_model(0), small_model(0)]
    ours = BSS(students[0], small_model(1), temperature=2.0, kd_weight=(3.0, 3.0), bss_weight=0.0)
    plain = KD(students[1], small_model(1), temperature=2.0, ce_weight=1.0, kd_weight=0.75)
    (first, drawn), (second, expected) = trained(ours, batch), trained(plain, batch)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert torch.equal(drawn, expected)


def test_nothing_walks_once_the_weight_is_zero() -> None:
    student, teacher, batch = agreed()
    calls: list[int] = []
    teacher.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    output = BSS(student, teacher)(batch, Progress(step=7, total=10))
    assert set(output.losses) == {"ce", "kd"}
    assert output.logs is None
    assert calls == [12]
    output = BSS(student, teacher)(batch, Progress(step=6, total=10))
    assert set(output.losses) == {"ce", "kd", "bss"}
    assert len(calls) > 3


@pytest.mark.parametrize("keep_failed", [True, False])
def test_terms_and_gradient_are_the_papers(keep_failed: bool) -> None:
    """Cross-entropy between the two at temperature 3, without tau^2; the samples are constants."""
    student, teacher, batch = agreed()
    options = {"base_samples": 5, "step_size": 2.0, "steps": 3, "keep_failed": keep_failed}
    torch.manual_seed(3)
    output = BSS(student, teacher, **options)(batch, START)
    sum(output.losses.values()).backward()
    found = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    with torch.no_grad():
        target, seen = teacher(batch.images), student(batch.images)
    rows = base_rows(target, seen, batch.labels, count=5)
    torch.manual_seed(3)
    base = target[rows].argmax(1)
    walk = walk_to_boundary(teacher, batch.images[rows], base, draw_targets(target[rows], base), step_size=2.0, steps=3)
    assert 0 < int(walk.crossed.sum()) < len(rows)
    kept = torch.ones_like(walk.crossed) if keep_failed else walk.crossed

    def distance(teachers: Tensor, students: Tensor) -> Tensor:
        return -((teachers / 3).softmax(1) * (students / 3).log_softmax(1)).sum(1).mean()

    ce = cross_entropy(student(batch.images), batch.labels).mean()
    kd = 3.7 * distance(target, student(batch.images))
    with torch.no_grad():
        known = teacher(walk.images[kept])
    term = 2 * (1 - 0.1 / 0.75) * distance(known, student(walk.images[kept]))
    (ce + kd + term).backward()
    for gradient, parameter in zip(found, student.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-12, rtol=1e-9)
    entropy = 2 * (1 - 0.1 / 0.75) * distance(known, known)
    torch.testing.assert_close(output.losses["bss"], term - entropy, atol=1e-10, rtol=0)
    assert output.logs is not None
    for name, count in (("base", len(rows)), ("crossed", walk.crossed.sum()), ("strayed", walk.strayed.sum())):
        assert float(output.logs[f"bss-{name}"]) == pytest.approx(int(count) / len(batch))


def test_contract_with_every_option() -> None:
    check_method(BSS)
    options = {"keep_failed": False, "step_size": "newton", "steps": 20, "base_samples": 3, "clamp": False}
    check_method(lambda student, teacher: BSS(student, teacher, **options))
    assert type(METHODS.create("bss", small_model(0), small_model(1), step_size="1/4", kd_weight=[2, 1])) is BSS


def test_samples_stay_in_the_box_only_if_asked() -> None:
    student, teacher, batch = agreed()
    with torch.no_grad():
        target = teacher(batch.images)
    for clamp in (True, False):
        samples = BSS(student, teacher, step_size=3.0, clamp=clamp).walk(batch.images, target).images
        assert (bool((samples >= 0).all()) and bool((samples <= 1).all())) == clamp


def test_walks_go_over_a_cheaper_copy_that_gives_the_same() -> None:
    teacher, images = small_model(5).double().eval(), small_batch(12).images.double()
    objective = BSS(small_model(0).double(), teacher, step_size="newton")
    with torch.no_grad():
        teacher[-1].bias -= teacher(images).mean(0)
        target = teacher(images)
    torch.manual_seed(0)
    found = objective.walk(images, target)
    torch.manual_seed(0)
    base = target.argmax(1)
    expected = walk_to_boundary(teacher, images, base, draw_targets(target, base), step_size="newton")
    assert expected.crossed.any()
    torch.testing.assert_close(found.images, expected.images, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-9, rtol=0)
    quick = objective._quick_teacher(images)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in quick.modules())
    assert not any(module is quick for module in objective.modules())
    assert objective.walk(images, target).images.shape == images.shape
    assert objective._quick_teacher(images) is quick


def test_one_base_and_none() -> None:
    """BatchNorm over vectors refuses a batch of one: a lone sample goes twice, and its term is its own."""
    student, teacher, batch = agreed()
    student = nn.Sequential(*student, nn.BatchNorm1d(3).double()).train()
    objective = BSS(student, teacher, base_samples=1)
    output = objective(batch, START)
    assert round(float(output.logs["bss-base"]) * len(batch)) == 1
    labels = (batch.labels + 1) % 3
    output = objective(Batch(batch.images, labels, batch.index), START)
    assert float(output.losses["bss"]) == 0
    assert {name: float(value) for name, value in output.logs.items()} == dict.fromkeys(output.logs, 0.0)
    sum(output.losses.values()).backward()
    student, teacher, batch = agreed()
    torch.manual_seed(0)
    term = BSS(student, teacher, base_samples=1)(batch, START).losses["bss"]
    with torch.no_grad():
        rows = base_rows(teacher(batch.images), student(batch.images), batch.labels, count=1)
        torch.manual_seed(0)
        walk = BSS(student, teacher).walk(batch.images[rows], teacher(batch.images[rows]))
        expected = kl_divergence(walk.logits, student(walk.images), temperature=3.0)
    torch.testing.assert_close(term.detach(), 2 * (1 - 0.1 / 0.75) * expected[0])


def test_student_sees_images_and_samples_in_two_forwards() -> None:
    student, teacher, batch = small_model(0).train(), small_model(1), small_batch(16)
    labels = predictions(teacher, batch.images)
    with torch.no_grad():
        student[-1].weight.copy_(teacher[-1].weight)
        student[-1].bias.zero_()
        student[-1].bias[int(labels.mode().values)] = 5.0
    BSS(student, teacher).train()(Batch(batch.images, labels, batch.index), START)
    assert int(student[1].num_batches_tracked) == 2
    assert not teacher.training


def test_mixed_labels_and_half_precision() -> None:
    student, teacher, batch = small_model(0).train(), small_model(1), small_batch(16)
    labels = nn.functional.one_hot(predictions(teacher, batch.images), 3).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = BSS(student, teacher, step_size=0.5)(Batch(batch.images, 0.8 * labels + 0.1, batch.index), START)
        empty = BSS(student, teacher)(Batch(batch.images, 1 - labels, batch.index), START)
    assert float(empty.losses["ce"].detach()) > 0
    for found in (output, empty):
        assert torch.stack(list(found.losses.values())).isfinite().all()
        sum(found.losses.values()).backward()


def test_walks_that_fail_are_told_with_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    objective = BSS(small_model(0), small_model(1))
    assert objective.concerns({"loss": 1.0}) == {}
    assert objective.concerns({"bss-base": 0.4, "bss-crossed": 0.2, "bss-strayed": 0.2}) == {}
    (short,) = objective.concerns({"bss-base": 0.4, "bss-crossed": 0.1, "bss-strayed": 0.1}).values()
    assert "only 25% of the walks" in short
    assert "larger method.step_size or more method.steps (now 0.06 pixel units" in short
    (far,) = objective.concerns({"bss-base": 0.4, "bss-crossed": 0.0, "bss-strayed": 0.3}).values()
    assert "only 0% of the walks" in far
    assert "third class: choose a smaller method.step_size (now" in far
    teller = EpochTeller(9, objective.concerns)
    for epoch in range(3):
        teller.tell(epoch, {"train": {"loss": 1.0, "accuracy": 0.5, "bss-base": 0.4, "bss-crossed": 0.1}})
    assert capsys.readouterr().err.count("warning: bss: only 25%") == 1


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"kd_weight": (-1.0, 1.0)}, {"bss_weight": -1.0}, {"bss_until": 0.0}, {"base_samples": 0}],
)
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    (value,) = options.values()
    with pytest.raises(UsageError, match=f"bss: needs .*{str(value).replace('(', '.').replace(')', '.')}"):
        BSS(small_model(0), small_model(1), **options)


# From the outside


QUICK = ["--data", "digits", "--set", "data.limit_train=200", "--set", "data.limit_test=60", "--set", "model.hidden=[16]"]


def test_runs_warn_and_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(["train", *QUICK, "--epochs", "8", "--model", "mlp", "--out", "teacher"]) == 0
    assert "warning" not in capsys.readouterr().err
    bss = ["--method", "bss", "--set", "method.step_size=0.0001", "--set", "train.batch_size=50"]
    assert call(["distill", *QUICK, *bss, "--epochs", "4", "--teacher", "teacher", "--student", "mlp", "--out", "student"]) == 0
    assert "warning: bss: only" in capsys.readouterr().err
    records = [json.loads(line)["train"] for line in Path("student/metrics.jsonl").read_text().splitlines()]
    assert records[1]["bss-base"] > 0
    assert "bss" not in records[3]
    command = ["compare", "student", "teacher", "--metric", "boundary", "--images", "10", "--steps", "20"]
    assert call([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["names"] == ["student", "teacher"]
    assert found["clean"][0] == overproof.RunFolder("student").evaluations["test-best"]["clean"]
    assert found["boundary"]["images"] == 10
    assert 0 < found["boundary"]["mag_sim"] <= 1
    assert call([*command, "--targets", "2", "--step-size", "0.3", "--which", "last", "--limit", "40"]) == 0
    text = capsys.readouterr().out
    assert "40 images, A: student, B: teacher" in text
    assert "MagSim (distance)" in text
    assert "from 10 images" in text
    assert call(["compare", "student", "teacher", "--steps", "3"]) == 2
    assert "give these options a metric" in capsys.readouterr().err
    assert call(["train", "--data", "digits", *QUICK[2:4], "--epochs", "1", "--model", "mlp", "--out", "other"]) == 0
    capsys.readouterr()
    assert call(["compare", "student", "other"]) == 2
    assert "different data (data.limit_test 60 and None); name a set for both with --data" in capsys.readouterr().err
    assert call(["compare", "student", "other", "--data", "digits", "--limit", "50"]) == 0
    assert "50 images" in capsys.readouterr().out


RECIPE = """
[recipe]
title = "A test"
[defaults.data]
name = "digits"
limit_train = 200
limit_test = 60
[defaults.model]
name = "mlp"
[defaults.train]
epochs = 2
[runs.teacher]
[runs.kd]
verb = "distill"
teacher.run = "@teacher"
method.name = "kd"
[[figures]]
name = "MagSim"
run = "kd"
against = "teacher"
metric = "mag-sim"
[[figures]]
name = "AngSim minus that of the teacher with itself"
run = "kd"
minus = "teacher"
against = "teacher"
metric = "ang-sim"
"""


def test_recipes_compare_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from overproof.run import reproduce

    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/small.toml").write_text(RECIPE)
    made: list[Any] = []
    real = reproduce.similarities
    monkeypatch.setattr(reproduce, "similarities", lambda *args, **kept: made.append(args) or real(*args, **kept))
    assert reproduce.reproduce(home=Path("recipes")) == {"small": "measured"}
    mag, ang = (figure["mean"] for figure in json.loads(Path("results/small.json").read_text())["figures"])
    assert 0 < mag < 1
    assert -2 < ang < 0
    assert len(made) == 2
    for wrong, message in (('against = "nobody"', "'nobody'"), ('against = "teacher"\nevaluation = "x"', "'clean'")):
        text = RECIPE.replace('against = "teacher"\nmetric = "mag-sim"', f'{wrong}\nmetric = "clean"')
        Path("recipes/small.toml").write_text(text)
        with pytest.raises(UnknownNameError, match=message):
            read_recipe("recipes/small.toml")


def test_benchmark_ends_with_its_line_and_equal_outcomes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = runpy.run_path(str(ROOT / "benchmarks" / "bss_step.py"))
    small = {"BATCH": 64, "BASES": 8, "BLOCKS": 2, "EPOCHS": 1, "TEACHER": "mlp", "STUDENT": "mlp", "LEARNING_RATE": 0.01}
    for name, value in small.items():
        monkeypatch.setitem(module["measure"].__globals__, name, value)
    module["main"]()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["name"] == "bss_step"
    assert set(line["ratios"]) == {"bss_step", "bss_samples"}
    assert line["equal"] is True
