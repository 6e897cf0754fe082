"""Distillation without data: the game's gradients in closed form, its parts, and whole runs that see no image."""

from __future__ import annotations

import copy
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import overproof
from overproof import console
from overproof.attacks.base import logits_of
from overproof.config import resolve
from overproof.data import ImageSet, NoImages, Splits, load_data, load_extra
from overproof.errors import DataError, FolderError, UsageError
from overproof.losses.synthesis import absolute_difference, batch_statistics, imbalance, squared_difference, statistics_gap
from overproof.methods.dafl import DAFL
from overproof.methods.data_free_parts import Game, Source, figures
from overproof.methods.data_free_pool import Pool
from overproof.methods.dfad import DFAD
from overproof.methods.dfq import DFQ
from overproof.methods.zskt import ZSKT
from overproof.models import Classifier, Normalize, create_model
from overproof.models.blocks import Doubling
from overproof.models.generators import critic, dcgan, make_generator, mlp_critic, upsampling
from overproof.models.sampling import grid, load_generator, rebuild_generator, sample, save_generator
from overproof.run import generating
from overproof.run.execute import execute, resume
from overproof.run.judging import evaluate_run
from overproof.testing import check_method, small_batch, small_model
from overproof.training.artefacts import pictured
from overproof.training.safety import Interrupted
from overproof.types import Batch, Progress

NOW, SHAPE = Progress(), (1, 8, 8)
SMALL: dict[str, Any] = {"image_shape": SHAPE, "latent": 6, "width": 4}


def flat(classes: int = 3, seed: int = 0) -> nn.Sequential:
    """Logits linear in the pixels, in double precision."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes, bias=False)).double()


def game(student: nn.Module, teacher: nn.Module, **options: Any) -> DFAD:
    torch.manual_seed(7)
    return DFAD(student, teacher, **{**SMALL, **options}).to(next(student.parameters()).dtype)


def blank(count: int = 5) -> Batch:
    return Batch(torch.zeros(()).expand(count, *SHAPE), torch.zeros(count, dtype=torch.long), torch.arange(count))


def made(objective: DFAD, count: int = 5, seed: int = 1) -> Tensor:
    """The images that the next turn under this seed is made on."""
    torch.manual_seed(seed)
    state = copy.deepcopy(objective.generator.state_dict())
    images: Tensor = objective.generator(objective.generator.draw(count)).detach()
    objective.generator.load_state_dict(state)
    return images


def turn(objective: DFAD, phase: str, count: int = 5, seed: int = 1) -> Any:
    objective.zero_grad()
    torch.manual_seed(seed)
    output = objective(blank(count), NOW, phase)
    sum(output.losses.values()).backward()
    return output


# The formulas


def test_gradients_of_linear_networks_are_the_closed_form() -> None:
    """dL_S/dW_s = sign((W_s - W_t) X^T) X / NK;  dL_G/dx_n = -(W_s - W_t)^T sign((W_s - W_t) x_n) / NK."""
    student, teacher = flat(seed=0), flat(seed=1)
    objective = game(student, teacher).train()
    images = made(objective).flatten(1)
    gap = (student[1].weight - teacher[1].weight).detach()
    signs = (images @ gap.T).sign()
    turn(objective, "student")
    torch.testing.assert_close(student[1].weight.grad, signs.T @ images / 15, atol=1e-12, rtol=0)
    assert all(p.grad is None for p in objective.generator.parameters())

    seen: list[Tensor] = []
    handle = objective.generator.register_forward_hook(lambda module, args, out: out.register_hook(seen.append) and None)
    turn(objective, "generator")
    handle.remove()
    torch.testing.assert_close(seen[0].flatten(1), -signs @ gap / 15, atol=1e-12, rtol=0)
    assert student[1].weight.grad is None, "the generator's turn computed a gradient for the student"
    assert any(bool(p.grad.abs().sum() > 0) for p in objective.generator.parameters())


def test_a_copy_of_the_teacher_is_a_fixed_point() -> None:
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).double().eval()
    objective = game(copy.deepcopy(teacher), teacher)
    objective.eval()
    before = copy.deepcopy(objective.generator.state_dict())
    for phase in ("student", "generator"):
        optimizer = torch.optim.Adam(list(objective.trainable(phase)), 1e-3)
        output = turn(objective, phase)
        assert float(output.logs.get("relative discrepancy", 0.0)) < 1e-12
        assert all(p.grad is None or float(p.grad.abs().max()) == 0 for p in objective.parameters())
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in objective.generator.state_dict().items())


@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_the_log_form_damps_the_gradient_by_one_plus_d(weight: float) -> None:
    plain, damped = (game(flat(seed=0), flat(seed=1), log_form=log, adversarial=weight).train() for log in (False, True))
    distance = -turn(plain, "generator").losses["adversarial"].item() / weight
    value = turn(damped, "generator").losses["adversarial"].item()
    assert value == pytest.approx(-weight * torch.tensor(distance).double().log1p().item())
    for a, b in zip(plain.generator.parameters(), damped.generator.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad / (1 + distance), atol=1e-12, rtol=1e-9)


def test_logits_are_compared_and_not_probabilities() -> None:
    """L1 sees a constant added to all logits, which no softmax does."""
    student, teacher = flat(seed=0), flat(seed=1)
    with torch.no_grad():
        target, logits = (net(torch.rand(4, 1, 8, 8).double()) for net in (teacher, student))
    assert float((absolute_difference(target + 9, logits) - absolute_difference(target, logits)).abs().min()) > 1
    shifted = nn.Sequential(teacher, Plus(9.0))
    values = {}
    for criterion in ("l1", "mse", "kl"):
        values[criterion] = [
            turn(game(student, net, criterion=criterion).train(), "student").losses["imitation"].item()
            for net in (teacher, shifted)
        ]
    assert values["kl"][0] == pytest.approx(values["kl"][1], abs=1e-12)
    assert values["l1"][1] > values["l1"][0] + 1
    assert values["mse"][1] > values["mse"][0] + 1


class Plus(nn.Module):
    def __init__(self, constant: float) -> None:
        super().__init__()
        self.constant = constant

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.constant


def test_distances_are_means_over_classes() -> None:
    target, logits = torch.tensor([[1.0, -2.0], [0.0, 0.5]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(absolute_difference(target, logits), torch.tensor([2.0, 0.25]))
    torch.testing.assert_close(squared_difference(target, logits), torch.tensor([5.0, 0.125]))


@pytest.mark.parametrize("criterion", ["l1", "kl"])
def test_small_steps_go_the_right_way(criterion: str) -> None:
    """On the same noise the generator's step does not lower D, and the student's does not raise it."""
    objective = game(flat(seed=0), flat(seed=1), criterion=criterion).train()
    for phase, sign in (("generator", 1), ("student", -1)):
        optimizer = torch.optim.SGD(list(objective.trainable(phase)), 1e-3)
        before = abs(sum(turn(objective, phase).losses.values()).item())
        optimizer.step()
        after = abs(sum(turn(objective, phase).losses.values()).item())
        assert sign * (after - before) > 0, phase


def test_imbalance_is_least_where_classes_are_equal() -> None:
    even = torch.eye(4).repeat(3, 1) * 50
    assert float(imbalance(even)) == pytest.approx(-torch.tensor(4.0).log().item(), abs=1e-6)
    one = torch.zeros(12, 4)
    one[:, 0] = 1e4
    one.requires_grad_()
    value = imbalance(one)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert bool(one.grad.isfinite().all())
    logits = torch.randn(6, 4, dtype=torch.float64)
    p = logits.softmax(1).mean(0)
    torch.testing.assert_close(imbalance(logits), (p * p.log()).sum())


def test_statistics_gap_is_the_distance_of_means_and_biased_variances() -> None:
    torch.manual_seed(0)
    inputs, mean, var = torch.randn(3, 2, 4, 4).double(), torch.randn(2).double(), torch.rand(2).double()
    m, v = inputs.mean((0, 2, 3)), inputs.var((0, 2, 3), correction=0)
    torch.testing.assert_close(statistics_gap(batch_statistics(inputs), mean, var), (m - mean).norm() + (v - var).norm())
    assert float(statistics_gap(batch_statistics(inputs), m, v)) == pytest.approx(0, abs=1e-12)
    vectors = inputs.flatten(1)
    gap = (vectors.mean(0) - 1).norm() + (vectors.var(0, correction=0) - 1).norm()
    torch.testing.assert_close(statistics_gap(batch_statistics(vectors), torch.ones(32).double(), torch.ones(32).double()), gap)


def test_the_generators_terms_are_the_formulas() -> None:
    student, teacher = small_model(0).double().eval(), small_model(1).double().eval()
    weights = {"onehot": 0.5, "balance": 2.0, "statistics": 3.0, "activation": 0.1, "adversarial": 1.5}
    objective = game(student, teacher, criterion="kl", **weights)
    objective.eval()
    images = made(objective)
    losses = {name: value.item() for name, value in turn(objective, "generator").losses.items()}
    with torch.no_grad():
        inner = teacher[0](images)
        features = teacher[5](teacher[4](teacher[2](teacher[1](inner))))
        target, logits = teacher(images), student(images)
        p = target.softmax(1).mean(0)
        norm = teacher[1]
        gap = (inner.mean((0, 2, 3)) - norm.running_mean).norm() + (
            inner.var((0, 2, 3), correction=0) - norm.running_var
        ).norm()
    expected = {
        "one-hot": 0.5 * F.cross_entropy(target, target.argmax(1)),
        "balance": 2 * (p * p.log()).sum(),
        "statistics": 3 * gap,
        "activation": -0.1 * features.abs().mean(),
        "adversarial": -1.5 * F.kl_div(logits.log_softmax(1), target.softmax(1), reduction="batchmean"),
    }
    assert losses == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-9)


# The turns


def test_turns_and_optimisers() -> None:
    student, teacher = small_model(0), small_model(1)
    assert DFAD(student, teacher, **SMALL).turns == (*("student",) * 5, "generator")
    assert ZSKT(student, teacher, **SMALL).turns == (*("student",) * 10, "generator")
    assert DAFL(student, teacher, **SMALL).turns == ("student", "generator")
    assert DFQ(student, teacher, **SMALL).turns == (*("student",) * 10, "generator")
    shared = DFAD(student, teacher, shared=True, student_steps=2, **SMALL)
    assert shared.turns == ("generator", "student", "student")
    still = DFAD(student, teacher, images="untrained", student_steps=3, **SMALL)
    assert still.turns == ("student",) * 3
    assert still.artefacts() == {}
    assert shared.artefacts() == {"generator": shared.generator}
    assert shared.settings("student") == {}
    adam = {"optimizer": "adam", "lr": 0.01, "betas": (0.5, 0.9), "weight_decay": 0.0}
    assert DFAD(student, teacher, generator_lr=0.01, generator_betas=(0.5, 0.9), **SMALL).settings("generator") == adam
    owners = [{id(p) for p in shared.trainable(phase)} for phase in ("student", "generator")]
    assert owners == [{id(p) for p in net.parameters()} for net in (student, shared.generator)]


def test_the_student_keeps_its_mode_or_is_put_into_eval_mode() -> None:
    for mode, moves in (("train", True), ("eval", False)):
        student = small_model(0)
        objective = game(student, small_model(1), student_mode=mode).train()
        before = student[1].running_mean.clone()
        turn(objective, "generator")
        assert torch.equal(before, student[1].running_mean) is not moves
        assert all(module.training for module in student.modules())
        assert all(p.requires_grad for p in student.parameters())


def test_one_backward_pass_serves_both() -> None:
    """The generator gets the gradient of its own turn, and the student that of its turn on the same images."""
    for log in (False, True):
        plain, shared = (game(flat(seed=0), flat(seed=1), log_form=log, shared=s).train() for s in (False, True))
        apart, joint = turn(plain, "generator"), turn(shared, "generator")
        torch.testing.assert_close(apart.losses["adversarial"], joint.losses["adversarial"])
        for a, b in zip(plain.generator.parameters(), shared.generator.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-12, rtol=1e-9)
        assert shared.student[1].weight.grad is None
        images = made(plain)
        loss = absolute_difference(plain.teacher(images), plain.student(images)).mean()
        (expected,) = torch.autograd.grad(loss, [plain.student[1].weight])
        output = turn(shared, "student")
        torch.testing.assert_close(output.losses["imitation"], loss)
        torch.testing.assert_close(shared.student[1].weight.grad, expected, atol=1e-12, rtol=1e-9)
        again = turn(shared, "student", seed=5)
        assert float(again.losses["imitation"].detach()) != pytest.approx(float(loss.detach())), "only the first turn is served"


def test_replayed_images_come_with_the_teachers_answers() -> None:
    teacher = flat(seed=1)
    objective = game(flat(seed=0), teacher, replay=0.5, pool=6).train()
    pool = objective.pool
    assert isinstance(pool, Pool)
    turn(objective, "student", count=4)
    assert int(pool.used) == 4
    output = turn(objective, "student", count=4, seed=2)
    assert len(output.logits) == 4
    assert int(pool.used) == 6
    turn(objective, "student", count=4, seed=3)
    assert int(pool.used) == 8
    torch.testing.assert_close(teacher(pool.images), pool.logits)
    rows = {tuple(row.tolist()) for row in pool.images.flatten(1)}
    images, logits = pool.recall(50)
    assert len(images) == 6
    assert {tuple(row.tolist()) for row in images.flatten(1)} <= rows
    torch.testing.assert_close(teacher(images), logits)
    assert {"pool.images", "pool.logits", "pool.used"} <= objective.trained_state().keys()
    pool.keep(torch.ones(9, *SHAPE).double(), torch.ones(9, 3).double())
    assert float(pool.images.min()) == 1, "more than the pool holds"


@pytest.mark.parametrize(("count", "replay", "fresh"), [(8, 0.9, 2), (8, 0.5, 4), (2, 0.9, 2), (3, 0.9, 2)])
def test_replay_leaves_two_images_to_be_made(count: int, replay: float, fresh: int) -> None:
    objective = game(flat(seed=0), flat(seed=1), replay=replay, pool=16).train()
    drawn: list[int] = []
    objective.generator.register_forward_hook(lambda module, args, out: drawn.append(len(out)))
    for seed in (1, 2):
        assert len(turn(objective, "student", count=count, seed=seed).logits) == count
    assert drawn == [count, fresh]


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"replay": 0.5, "pool": 16}, {"log_form": True}, {"criterion": "mse"},
                                     {"student_mode": "eval"}, {"head": "sigmoid"}, {"head": "tanh"}])  # fmt: skip
def test_options_keep_the_contract(options: dict[str, Any]) -> None:
    check_method(lambda student, teacher: DFAD(student, teacher, **SMALL, **options))


@pytest.mark.parametrize("images", ["untrained", "noise"])
def test_baselines_learn_without_a_generator_that_learns(images: Any) -> None:
    objective = game(flat(seed=0), flat(seed=1), images=images).train()
    optimizer = torch.optim.SGD(objective.student.parameters(), 0.02)
    values = []
    for seed in range(40):
        output = turn(objective, "student", count=16, seed=seed)
        values.append(float(output.losses["imitation"]))
        optimizer.step()
    assert values[-1] < 0.7 * values[0]
    assert "fakes/diversity" in output.logs


def test_folded_teacher_gives_the_same_turn() -> None:
    student, teacher = small_model(0).double(), small_model(1).double().eval()
    with torch.no_grad():
        teacher[1].running_mean.uniform_(-1, 1)
        teacher[1].running_var.uniform_(0.5, 2)
    quick = game(student, teacher).train()
    slow = game(copy.deepcopy(student), copy.deepcopy(teacher)).train()
    slow._served = lambda images: slow.teacher  # type: ignore[method-assign]
    for phase in ("student", "generator"):
        a, b = (turn(objective, phase).losses for objective in (quick, slow))
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=1e-9, rtol=1e-7)
    for p, q in zip(quick.generator.parameters(), slow.generator.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-9, rtol=1e-6)
    assert not any(
        isinstance(m, nn.BatchNorm2d) for m in quick._copy.now(quick.teacher, torch.rand(2, *SHAPE).double()).modules()
    ), "nothing was folded"
    assert not any("_copy" in name for name in quick.state_dict())


def test_what_is_said_about_the_images() -> None:
    images = torch.rand(8, *SHAPE)
    target = torch.eye(4)[torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])]
    found = figures(images, target)
    share = torch.tensor([4, 2, 1, 1]) / 8
    assert float(found["fakes/classes in use"]) == pytest.approx(float((-(share * share.log()).sum()).exp() / 4))
    assert float(found["fakes/largest class"]) == 0.5
    assert [float(found[f"fakes by class/{k}"]) for k in range(4)] == share.tolist()
    assert 0.8 < float(found["fakes/diversity"]) < 1.2
    same = figures(images[:1].expand(8, -1, -1, -1), target)
    assert float(same["fakes/diversity"]) == pytest.approx(0, abs=1e-6)
    assert not any("by class" in name for name in figures(images, torch.rand(8, 30)))


def test_concerns_name_the_quantity() -> None:
    objective = game(small_model(0), small_model(1))
    fine = {"relative discrepancy": 0.4, "fakes/largest class": 0.4, "fakes/diversity": 0.8}
    assert objective.concerns({}) == {}
    for value, known in ((0.95, False), (0.8, False), (0.5, False), (0.9, True), (0.88, True), (0.6, False)):
        assert ("divergence" in objective.concerns({**fine, "relative discrepancy": value})) is known, value
    assert "divergence" in game(small_model(0), small_model(1)).concerns({"relative discrepancy": 1.5}), (
        "in the first epoch too"
    )
    assert "0.90 times" in objective.concerns({**fine, "relative discrepancy": 0.9})["divergence"]
    assert "0.90 an epoch ago" in objective.concerns({**fine, "relative discrepancy": 0.95})["divergence"]
    assert objective.concerns(fine) == {}
    assert "in 97% of its images" in objective.concerns({**fine, "fakes/largest class": 0.97})["collapse"]
    assert "by 2.0% of all" in objective.concerns({**fine, "fakes/diversity": 0.02})["collapse"]
    for images in ("noise", "untrained"):
        still = game(small_model(0), small_model(1), images=images)
        assert still.concerns({**fine, "fakes/largest class": 0.97}) == {}, "no generator learns"


# Bad input


def test_bad_input_is_refused() -> None:
    student, teacher = small_model(0), small_model(1)
    bare = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(UsageError, match=r"this teacher \(Sequential\) has none. Say method.statistics=0"):
        DFQ(student, bare, **SMALL)
    with pytest.raises(UsageError, match=r"multiples of 4, not \(1, 10, 8\)"):
        DFAD(student, teacher, image_shape=(1, 10, 8))
    with pytest.raises(UsageError, match=r"multiples of 16, not \(1, 8, 8\).*Take upsampling"):
        DFAD(student, teacher, image_shape=SHAPE, generator="dcgan")
    with pytest.raises(UsageError, match="cannot make 1 image alone"):
        game(student, teacher)(blank(1), NOW, "student")
    with pytest.raises(UsageError, match="looks for nothing"):
        Game(adversarial=0.0)
    with pytest.raises(UsageError, match="none may be below 0"):
        Game(onehot=-1.0)
    for wrong in ({"student_steps": 0}, {"replay": 1.0}, {"pool": 0}):
        with pytest.raises(UsageError, match="student_steps >= 1, pool >= 1 and 0 <= replay < 1"):
            Game(**wrong)
    with pytest.raises(UsageError, match="whose weight is 0"):
        Game(shared=True, adversarial=0.0, onehot=1.0)
    with pytest.raises(UsageError, match="needs a generator that learns"):
        DFAD(student, teacher, shared=True, images="noise", **SMALL)
    with pytest.raises(UsageError, match="one for each of the 1 channels"):
        DFAD(student, teacher, **SMALL, mean=(0.1, 0.2))
    with pytest.raises(UsageError, match="std above 0"):
        DFAD(student, teacher, **SMALL, std=0.0)
    rates = ({"lr": 0.0}, {"lr": float("nan")}, {"betas": (0.5, 1.0)}, {"betas": (-0.1, 0.9)})
    for wrong in rates:
        with pytest.raises(UsageError, match="generator_lr=.* above 0, and generator_betas=.* in .0, 1."):
            Source(**wrong)
    for wrong in ({"width": 0}, {"latent": 0}):
        with pytest.raises(UsageError, match="width=.* and latent=.* must be at least 1"):
            Source(**wrong)
    for bounded in ({"head": "sigmoid"}, {"generator": "dcgan"}):
        for scale in ({"mean": 0.5}, {"std": 0.5}):
            with pytest.raises(UsageError, match="have no effect with generator=.* say head=batchnorm"):
                Source(**bounded, **scale)


# The normalisation


def test_the_teachers_first_layer_undoes_the_generators_scale_exactly() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4))
    teacher = Classifier(net, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)).double()
    objective = DFAD(copy.deepcopy(teacher), teacher, image_shape=(3, 8, 8), latent=6, width=4).double().train()
    noise = objective.generator.draw(7)
    normalised = objective.generator.net(noise)
    images = objective.generator(noise)
    assert float(images.min()) < 0, "nothing is clamped"
    torch.testing.assert_close(teacher.normalize(images), normalised, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("options", "shift", "scale"),
    [
        ({}, 0.3, 0.2),
        ({"head": "tanh"}, 0.3, 0.2),
        ({"head": "sigmoid"}, 0.0, 1.0),
        ({"generator": "dcgan"}, 0.5, 0.5),
        ({"generator": "dcgan", "head": "batchnorm"}, 0.3, 0.2),
        ({"mean": 0.7, "std": 0.1}, 0.7, 0.1),
        ({"images": "noise"}, 0.3, 0.2),
        ({"images": "noise", "generator": "dcgan", "mean": 0.7}, 0.7, 0.2),
    ],
)
def test_scales_of_the_images(options: dict[str, Any], shift: float, scale: float) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(256, 3))
    teacher = Classifier(net, mean=0.3, std=0.2)
    generator = Source(image_shape=(1, 16, 16), latent=4, width=2, **options).build(teacher, teacher)
    assert generator.shift.item() == pytest.approx(shift)
    assert generator.scale.item() == pytest.approx(scale)
    images = generator(generator.draw(64))
    assert images.shape == (64, 1, 16, 16)
    if shift == 0.5:
        assert 0 <= float(images.min()) < float(images.max()) <= 1


def test_a_teacher_without_normalisation_is_taken_to_know_ordinary_pixels() -> None:
    generator = Source(image_shape=(3, 8, 8), latent=4, width=2).build(small_model(), small_model(channels=3))
    assert generator.shift.flatten().tolist() == [0.5] * 3
    assert generator.scale.flatten().tolist() == [0.25] * 3


# Generators


@pytest.mark.parametrize("side", [4, 8, 28, 32])
def test_upsampling_normalises_each_channel_of_the_batch(side: int) -> None:
    torch.manual_seed(0)
    net = upsampling(10, (3, side, side), width=8).train()
    images = net(torch.randn(64, 10))
    assert images.shape == (64, 3, side, side)
    assert float(images.mean((0, 2, 3)).abs().max()) < 1e-4
    torch.testing.assert_close(images.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (7, 4)])
def test_doubling_is_upsampling_and_convolution(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = Doubling(3, 4).double()
    maps = torch.randn(2, 3, *shape, dtype=torch.float64, requires_grad=True)
    plain = F.conv2d(F.interpolate(maps, scale_factor=2), layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(maps), plain, atol=1e-12, rtol=0)
    weights = torch.randn_like(plain)
    ours, theirs = (
        torch.autograd.grad((out * weights).sum(), [maps, layer.weight, layer.bias]) for out in (layer(maps), plain)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_dcgan_fills_its_range_and_starts_small() -> None:
    torch.manual_seed(0)
    net = dcgan(10, (3, 32, 48), width=8)
    images = net(torch.randn(4, 10))
    assert images.shape == (4, 3, 32, 48)
    assert float(images.abs().max()) <= 1
    weights = torch.cat([m.weight.flatten() for m in net.modules() if isinstance(m, nn.ConvTranspose2d)])
    assert float(weights.std()) == pytest.approx(0.02, rel=0.05)


def test_all_generators_and_critics_fit_their_shapes() -> None:
    for name, shape, options in (
        ("transposed", (1, 28, 28), {"width": 4}),
        ("transposed", (3, 64, 64), {"width": 2}),
        ("mlp", (2,), {"width": 8}),
        ("mlp", (1, 8, 8), {"width": 8, "head": "tanh"}),
        ("upsampling", (1, 12, 20), {"width": 4, "head": "sigmoid"}),
        ("dcgan", (1, 16, 16), {"width": 2}),
    ):
        generator = make_generator(name, 5, shape, law="uniform", **options)
        noise = generator.draw(6)
        assert float(noise.abs().max()) <= 1
        assert generator(noise).shape == (6, *shape)
        judge = mlp_critic(shape, width=8) if shape == (2,) or shape[1] != shape[2] else critic(shape, width=2)
        assert judge(generator(noise)).shape == (6,)
        again = rebuild_generator(json.loads(json.dumps(generator.spec)))
        again.load_state_dict(generator.state_dict())
        assert torch.equal(again.eval()(noise), generator.eval()(noise))


def test_what_no_generator_can_make_is_refused() -> None:
    for name, shape in (("transposed", (1, 7, 7)), ("transposed", (1, 8, 16)), ("dcgan", (1, 24, 24)), ("upsampling", (2,))):
        with pytest.raises(UsageError, match=name):
            make_generator(name, 5, shape)
    with pytest.raises(UsageError, match="Did you mean 'dcgan'"):
        make_generator("dcgam", 5, SHAPE)
    with pytest.raises(UsageError, match="Unknown option of generator 'upsampling': 'with'"):
        make_generator("upsampling", 5, SHAPE, **{"with": 3})
    with pytest.raises(UsageError, match="Unknown head of a generator 'relu'"):
        make_generator("upsampling", 5, SHAPE, head="relu")
    with pytest.raises(UsageError, match="latent=0"):
        make_generator("upsampling", 0, SHAPE)
    with pytest.raises(UsageError, match="2 numbers for 1 channels"):
        make_generator("upsampling", 5, SHAPE, shift=[0.1, 0.2])


def test_samples_depend_on_the_seed_alone(tmp_path: Path) -> None:
    generator = make_generator("upsampling", 5, SHAPE, width=4, shift=0.5, scale=0.3).train()
    before = copy.deepcopy(generator.state_dict())
    many, few, other = sample(generator, 300), sample(generator, 7), sample(generator, 7, seed=1)
    assert torch.equal(many[:7], few)
    assert not torch.equal(few, other)
    assert float(many.min()) >= 0
    assert float(many.max()) <= 1
    assert generator.training
    assert all(torch.equal(v, before[k]) for k, v in generator.state_dict().items())
    picture = grid(few, columns=3)
    assert picture.shape == (1, 3 * 9 + 1, 3 * 9 + 1)
    assert torch.equal(picture[:, 1:9, 10:18], few[1])
    assert float(picture[:, 19:27, 10:18].min()) == 1, "where no image is, there is white"
    save_generator(generator, tmp_path)
    assert torch.equal(sample(load_generator(tmp_path), 7), few)
    with pytest.raises(UsageError, match="0 samples"):
        sample(generator, 0)


def test_pictures_are_few_and_include_the_last() -> None:
    for epochs in (1, 5, 500):
        moments = [epoch for epoch in range(epochs) if pictured(epoch, epochs)]
        assert moments[-1] == epochs - 1
        assert len(moments) <= 12
    assert [epoch for epoch in range(500) if pictured(epoch, 500)][:2] == [2, 13]


# Whole runs


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory: pytest.TempPathFactory, digits: Splits) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "run"
    overproof.train("cnn", "digits", model_options={"widths": (16, 32)}, epochs=2, batch_size=64, lr=0.1, out=out)
    return out


class Untouchable:
    """Training data that nobody may look at."""

    classes = tuple("0123456789")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the training data was asked for {name!r}")

    def __len__(self) -> int:
        raise AssertionError("the training data was counted")

    def __iter__(self) -> Any:
        raise AssertionError("the training data was read")


TINY: dict[str, Any] = {"epochs": 2, "steps_per_epoch": 3, "batch_size": 16, "latent": 8, "width": 8, "lr": 0.05}
STUDENT: dict[str, Any] = {"model_options": {"widths": (8, 16)}}


def test_a_run_without_any_data(tmp_path: Path, teacher_run: Path) -> None:
    run = overproof.distill("cnn", teacher_run, None, method="dfad", out=tmp_path / "run", **TINY, **STUDENT)
    path = run.path
    assert run.folder.config["data"]["name"] == "none"
    assert run.evaluations == {}
    assert len(run.folder.metrics) == 2
    train = run.folder.metrics[-1]["train"]
    assert {"loss", "accuracy", "imitation", "adversarial", "relative discrepancy", "fakes/classes in use"} <= train.keys()
    assert train["loss"] == pytest.approx(train["imitation"]), "the loss is the student's"
    assert {"best", "last", "generator"} == {p.stem for p in (path / "weights").glob("*.safetensors")}
    teacher = overproof.load(teacher_run)
    assert torch.equal(run.model.normalize.mean, teacher.normalize.mean)
    assert sorted(p.name for p in (path / "samples").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    assert run.folder.method["images"] == "generated"
    page = overproof.write_report([path]).read_text("utf-8")
    assert "What the generator makes" in page
    assert page.count("samples of the generator after") == 2
    with pytest.raises(DataError, match="'none' holds no images.*--data"):
        evaluate_run(path, attacks={})


def test_training_data_are_never_touched_and_the_teacher_stays(tmp_path: Path, teacher_run: Path, digits: Splits) -> None:
    teacher = overproof.load(teacher_run)
    state, modes = copy.deepcopy(teacher.state_dict()), [m.training for m in teacher.modules()]
    student = create_model("cnn", 10, 1, 8, widths=(8, 16))
    data = Splits.__new__(Splits)
    object.__setattr__(data, "train", Untouchable())
    for part in ("validation", "test", "extra"):
        object.__setattr__(data, part, getattr(digits, part))
    run = overproof.distill(student, teacher, data, method="dfad", out=tmp_path / "run", **TINY)
    assert all(torch.equal(v, state[k]) for k, v in teacher.state_dict().items())
    assert modes == [m.training for m in teacher.modules()]
    assert set(run.evaluations) == {"test-best", "test-last"}
    assert run.evaluations["test-last"]["agreement"]
    assert run.folder.metrics[-1]["validation"]["clean"] >= 0


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, teacher_run: Path) -> None:
    how = {**TINY, **STUDENT, "method": "dfad", "shared": True, "replay": 0.5, "pool": 32}
    whole = overproof.distill("cnn", teacher_run, None, out=tmp_path / "whole", **how)
    config = resolve(whole.folder.config)
    with pytest.raises(Interrupted):
        execute(config, tmp_path / "cut", deadline=time.monotonic())
    resume(tmp_path / "cut")
    for name in ("last", "generator"):
        first, second = ((tmp_path / part / "weights" / f"{name}.safetensors").read_bytes() for part in ("whole", "cut"))
        assert first == second, name


def test_a_generator_is_sampled_and_is_extra_data(
    tmp_path: Path, teacher_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from overproof.cli import call

    run = overproof.distill("cnn", teacher_run, None, method="dfad", out=tmp_path / "run", **TINY, **STUDENT)
    assert call(["generate", str(run.path), "-n", "9", "-o", str(tmp_path / "grid.png"), "--zoom", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["count"] == 9
    from PIL import Image

    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (56, 56)
    extra = load_extra(
        f"generator:{run.path}",
        shape=SHAPE,
        classes=tuple("0123456789"),
        first=5,
        options={"count": 40, "labels": str(teacher_run)},
    )
    assert isinstance(extra, ImageSet)
    assert len(extra) == 40
    assert int(extra.index[0]) == 5
    pixels = (sample(load_generator(run.path), 40) * 255).round().to(torch.uint8)
    assert torch.equal(extra.images, pixels)
    assert torch.equal(extra.labels, overproof.load(teacher_run)(pixels / 255).argmax(1))
    mixed = overproof.distill(
        "cnn", teacher_run, "digits", method="kd", extra_data=f"generator:{run.path}", extra_share=0.5, epochs=1, batch_size=32,
        data_options={"extra_options": {"count": 64}, "limit_train": 64}, out=tmp_path / "mixed", **STUDENT,
    )  # fmt: skip
    assert mixed.evaluations["test-best"]["clean"] > 0
    assert call(["generate", str(run.path), "-o", "grid.jpg"]) == 2
    assert call(["generate", str(teacher_run), "-o", "grid.png"]) == 1
    assert "holds no generator" in capsys.readouterr().err
    (run.path / "weights" / "best.safetensors").unlink()
    with pytest.raises(FolderError, match="give labels=RUN"):
        load_data(f"generator:{run.path}", test=0.5)


def test_labelled_images_are_classified_as_they_are_kept(
    tmp_path: Path, teacher_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console.set_quiet(False)
    run = tmp_path / "run"
    shutil.copytree(teacher_run, run)
    for name, options in (("dark", {"shift": -9.0}), ("inside", {"head": "sigmoid"})):
        save_generator(make_generator("upsampling", 5, SHAPE, width=4, **options), run, name)
    seen: list[Tensor] = []
    monkeypatch.setattr(generating, "logits_of", lambda model, images: seen.append(images) or logits_of(model, images))
    told = {}
    for name in ("dark", "inside"):
        found = generating.generated(str(run), count=30, generator=name)["train"]
        torch.testing.assert_close(seen.pop(), found.images / 255, atol=1e-7, rtol=0)
        told[name] = capsys.readouterr().err
    assert re.search(r"100% of the pixels lie outside of \[0, 1\] and are cut off.*method.head=sigmoid", told["dark"])
    assert "cut off" not in told["inside"]


def test_baselines_run_without_a_generator_optimiser(tmp_path: Path, teacher_run: Path) -> None:
    run = overproof.distill("cnn", teacher_run, None, method="dfad", images="noise", out=tmp_path / "run", **TINY, **STUDENT)
    assert not (run.path / "weights" / "generator.safetensors").exists()
    assert "adversarial" not in run.folder.metrics[-1]["train"]


def test_what_makes_no_sense_is_refused_before_anything_is_written(tmp_path: Path, teacher_run: Path, digits: Splits) -> None:
    def distil(data: Any = None, **options: Any) -> Any:
        how = {"method": "dfad", "out": tmp_path / "no", **TINY, **STUDENT, **options}
        return overproof.distill("cnn", teacher_run, data, **how)

    with pytest.raises(UsageError, match="data.augment=\\['flip'\\] belongs to training on given images"):
        distil(augment=["flip"])
    with pytest.raises(UsageError, match="train.batch_size=1"):
        distil(batch_size=1)
    with pytest.raises(UsageError, match="train.cache_teacher=True belongs to"):
        distil(cache_teacher=True)
    with pytest.raises(UsageError, match="train.awp=0.005 belongs to"):
        distil(awp=0.005)
    with pytest.raises(UsageError, match="with 'kd' an epoch is one pass over the data"):
        overproof.distill("cnn", teacher_run, "digits", steps_per_epoch=3, out=tmp_path / "no")
    with pytest.raises(DataError, match="'none' holds no images"):
        overproof.distill("cnn", teacher_run, None, out=tmp_path / "no")
    images = ImageSet(torch.rand(20, 1, 12, 12), torch.arange(20) % 10, classes=10)
    with pytest.raises(UsageError, match="takes images of shape .1, 8, 8."):
        distil(test_data=images)
    few = ImageSet(torch.rand(20, 1, 8, 8), torch.arange(20) % 4, classes=4)
    with pytest.raises(UsageError, match="tells 10 classes apart, the data for the evaluation have 4"):
        distil(Splits(few, None, few))
    for given in (images, (few.images, few.labels)):
        with pytest.raises(UsageError, match="'dfad' looks at no training images.*test_data"):
            distil(given)
    mute = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(UsageError, match="give method.image_shape"):
        overproof.distill(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), mute, None, method="dfad", out=tmp_path / "no")
    with pytest.raises(UsageError, match="cannot take images of shape"):
        overproof.distill(copy.deepcopy(mute), mute, None, method="dfad", image_shape=(1, 12, 12), out=tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_the_command_line_needs_no_data(tmp_path: Path, teacher_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from overproof.cli import call

    words = ["distill", "--teacher", str(teacher_run), "--student", "cnn", "--method", "zskt", "--out", str(tmp_path / "run")]
    words += [
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--seeds",
        "3",
        "--set",
        "train.steps_per_epoch=2",
        "--set",
        "method.width=4",
    ]
    assert call([*words, "--set", "method.student_steps=1", "--set", "model.widths=[4, 8]"]) == 0, capsys.readouterr().err
    config = overproof.RunFolder(tmp_path / "run").config
    assert config["data"]["name"] == "none"
    assert config["seed"] == 3


def test_no_images_are_a_loader() -> None:
    nothing = NoImages((3, 8, 8), tuple("ab"), batch_size=4, steps=5, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    batches = list(nothing.to("cpu").batches(0, 3))
    assert len(nothing) == 5
    assert len(batches) == 2
    assert batches[0].images.shape == (4, 3, 8, 8)
    assert (nothing.channels, nothing.image_size) == (3, 8)
    assert nothing.mean_std()[0] == (0.1, 0.2, 0.3)


def test_small_batches_of_the_contract_are_only_counted() -> None:
    """What is in the batch does not matter: no image reaches a loss."""
    objective = game(flat(seed=0), flat(seed=1)).train()
    torch.manual_seed(3)
    first = objective(blank(8), NOW, "student").losses["imitation"]
    torch.manual_seed(3)
    assert torch.equal(first, objective(small_batch(8), NOW, "student").losses["imitation"])


# What fresh eyes found


def test_concerns_do_not_depend_on_where_a_run_was_cut(tmp_path: Path, teacher_run: Path) -> None:
    """One turn of the student and a rate far too large: it diverges, and says so in the same epochs."""
    how = {**TINY, **STUDENT, "method": "dfad", "student_steps": 1, "epochs": 3, "lr": 2.0, "generator_lr": 0.05}
    whole = overproof.distill("cnn", teacher_run, None, out=tmp_path / "whole", **how)
    config = resolve(whole.folder.config)
    with pytest.raises(Interrupted):
        execute(config, tmp_path / "cut", deadline=time.monotonic())
    resume(tmp_path / "cut")
    records = [(tmp_path / part / "metrics.jsonl").read_text().splitlines() for part in ("whole", "cut")]
    found = [[json.loads(line).get("concerns") for line in lines] for lines in records]
    assert found[0] == found[1]
    assert any(found[0]), "nothing was said at all"


def test_the_first_epoch_has_none_before_it() -> None:
    told = game(small_model(0), small_model(1)).concerns({"relative discrepancy": 1.13})["divergence"]
    assert "1.13 times" in told
    assert "ago" not in told


def test_labels_of_a_network_for_other_images_are_refused(tmp_path: Path, teacher_run: Path) -> None:
    generator = make_generator("upsampling", 4, (1, 16, 16), width=4, head="sigmoid")
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "config.toml").write_text('verb = "distill"\n')
    save_generator(generator, tmp_path / "made", "generator")
    with pytest.raises(
        UsageError, match=r"cannot name the classes of .*made's images of shape \(1, 16, 16\).*built for 8 pixels"
    ):
        generating.generated(str(tmp_path / "made"), count=4, labels=str(teacher_run))


def test_a_normalisation_that_no_image_passes_is_no_loss() -> None:
    teacher = small_model(1).double().eval()
    teacher.add_module("spare", nn.BatchNorm2d(2).double())
    whole = teacher.forward
    teacher.forward = lambda images: nn.Sequential(*list(teacher.children())[:-1])(images)  # type: ignore[method-assign]
    objective = game(small_model(0).double(), teacher, statistics=1.0)
    assert "spare" not in objective.normalisations
    assert "statistics" in turn(objective, "generator").losses
    teacher.forward = whole  # type: ignore[method-assign]


def test_a_normalisation_inside_of_the_teacher_is_found() -> None:
    teacher = nn.Sequential(Normalize(0.1, 0.2), nn.Flatten(), nn.Linear(64, 3))
    source = Source(**SMALL).build(flat().float(), teacher)
    assert (float(source.shift), float(source.scale)) == pytest.approx((0.1, 0.2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"student_mode": "evl"}, "eval"),
        ({"images": "nois"}, "noise"),
        ({"criterion": "l2"}, "l1"),
        ({"onehot": float("nan")}, "onehot"),
    ],
)
def test_misspelt_rules_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        game(flat(), flat(seed=1), **options)


@pytest.mark.parametrize(
    ("options", "words"), [({"law": "unifrom"}, "uniform"), ({"width": 0}, "width=0"), ({"depth": 0}, "depth=0")]
)
def test_generators_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_generator("mlp", 2, (2,), **options)


def test_does_robustness_survive_without_data(tmp_path: Path, digits: Splits) -> None:
    """A student of a robust teacher is attacked like any other, with best and with last weights."""
    attack = {"evaluation": {"attacks": {"fgsm": {"attack": "fgsm", "eps": 0.1}}, "curve": []}}
    teacher = tmp_path / "robust"
    overproof.train(
        "cnn", "digits", method="pgd-at", eps=0.1, steps=2, model_options={"widths": (8, 16)}, epochs=1, out=teacher
    )
    run = overproof.distill("cnn", teacher, "digits", method="dfad", out=tmp_path / "run", **TINY, **STUDENT, **attack)
    for name in ("test-best", "test-last"):
        assert 0 <= run.folder.evaluations[name]["attacks"]["fgsm"]["robust"] <= run.folder.evaluations[name]["clean"]
