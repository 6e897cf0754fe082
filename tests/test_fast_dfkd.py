"""Fast data-free distillation: its inner steps and its meta step written out, its pool, and whole runs."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import overproof
from overproof.config import resolve
from overproof.errors import UsageError
from overproof.methods.data_free_pool import BytePool
from overproof.methods.fast_dfkd import FastDFKD
from overproof.run.execute import execute, resume
from overproof.testing import small_model
from overproof.training.safety import Interrupted
from overproof.types import Batch, Progress

SHAPE = (1, 8, 8)
SMALL: dict[str, Any] = {"image_shape": SHAPE, "latent": 6, "width": 4, "pool": 20, "warmup": 1, "student_steps": 3}


def made(**options: Any) -> FastDFKD:
    teacher = small_model(1).double().eval()
    with torch.no_grad():
        teacher[1].running_mean.uniform_(-1, 1)
        teacher[1].running_var.uniform_(0.5, 2)
    torch.manual_seed(7)
    return FastDFKD(small_model(0).double(), teacher, **{**SMALL, "augment": (), **options}).double().train()


def turn(objective: FastDFKD, phase: str, count: int = 5, seed: int = 1) -> Any:
    objective.zero_grad()
    torch.manual_seed(seed)
    batch = Batch(torch.zeros(()).expand(count, *SHAPE), torch.zeros(count, dtype=torch.long), torch.arange(count))
    output = objective(batch, Progress(), phase)
    sum(output.losses.values()).backward()
    return output


def by_hand(objective: FastDFKD, past: tuple[Tensor, Tensor] | None, seed: int = 1, count: int = 5) -> Any:
    """Sum of the inner gradients, losses, images and statistics, with a deep copy of the generator and its own Adam."""
    net, student, teacher = copy.deepcopy(objective.generator), copy.deepcopy(objective.student).eval(), objective.teacher
    torch.manual_seed(seed)
    noise = objective.generator.draw(count).requires_grad_()
    classes = torch.randint(3, (count,))
    adam = torch.optim.Adam(
        [{"params": net.parameters()}, {"params": [noise], "lr": objective.latent_lr}], objective.source.lr, betas=(0.5, 0.999)
    )
    sums, totals, shown = [torch.zeros_like(p) for p in net.parameters()], [], []
    for _ in range(objective.inner_steps):
        images = net(noise)
        inputs, target = teacher[0](images), teacher(images)
        mean, var = inputs.mean((0, 2, 3)), inputs.var((0, 2, 3), correction=0)
        stats = (mean, var) if past is None else tuple(0.75 * p + 0.25 * o for p, o in zip(past, (mean, var), strict=True))
        total = 10 * ((stats[0] - teacher[1].running_mean).norm() + (stats[1] - teacher[1].running_var).norm())
        total = total + 0.5 * F.cross_entropy(target, classes)
        if past is not None:  # the first round is the warm-up
            logits = student(images)
            apart = F.kl_div(logits.log_softmax(1), target.softmax(1), reduction="none").sum(1)
            total = total - 1.33 * (apart * (logits.argmax(1) == target.argmax(1))).mean()
        adam.zero_grad()
        total.backward()
        for own, p in zip(sums, net.parameters(), strict=True):
            own += p.grad
        adam.step()
        totals.append(float(total.detach()))
        shown.append(images.detach())
    return sums, totals, shown, tuple(value.detach() for value in stats)


def test_the_meta_gradient_is_the_sum_of_the_inner_ones() -> None:
    objective = made(inner_steps=3, momentum=0.75)
    weights = copy.deepcopy(objective.generator.state_dict())
    past = None
    for seed in (1, 2):
        sums, totals, shown, stats = by_hand(objective, past, seed)
        output = turn(objective, "generator", seed=seed)
        for p, expected in zip(objective.generator.parameters(), sums, strict=True):
            torch.testing.assert_close(p.grad, expected, atol=1e-9, rtol=1e-7)
        best = min(range(3), key=totals.__getitem__)
        assert float(sum(output.losses.values()).detach()) == pytest.approx(totals[best], rel=1e-9)
        kept = objective.made.images[5 * (seed - 1) : 5 * seed]
        assert torch.equal(kept, (shown[best] * 255).round().byte())
        for name, value in zip(("mean", "var"), stats, strict=True):
            torch.testing.assert_close(objective.get_buffer(f"past_{name}_0"), value)
        past = stats
    assert set(output.losses) == {"statistics", "one-hot", "adversarial"}
    moved = {n for n, v in objective.generator.state_dict().items() if not torch.equal(v, weights[n])}
    assert moved, "its normalisations have seen images"
    assert all("running" in name or "tracked" in name for name in moved), "the optimiser moves the weights, nobody else"
    assert all(p.grad is None for net in (objective.student, objective.teacher) for p in net.parameters())


def test_the_student_learns_softened_predictions_from_the_pool() -> None:
    objective = made(temperature=4.0)
    for seed in range(6):  # 30 images into a pool of 20
        turn(objective, "generator", seed=seed)
    assert int(objective.made.used) == 30
    output = turn(objective, "student", seed=3)
    torch.manual_seed(3)
    images = objective.made.images[torch.randint(20, (5,))].double() / 255
    target, logits = objective.teacher(images), objective.student(images)
    expected = 16 * F.kl_div((logits / 4).log_softmax(1), (target / 4).softmax(1), reduction="batchmean")
    assert float(output.losses["imitation"]) == pytest.approx(float(expected), rel=1e-6)
    assert torch.equal(output.labels, target.argmax(1))
    assert all(p.grad is None for p in objective.generator.parameters())


def test_turns_rates_and_augmentation() -> None:
    objective = made(warmup=4, inner_steps=2, generator_lr=0.01)
    assert objective.turns == ("generator",) * 4 + ("student",) * 3
    names = [set(turn(objective, "generator", seed=seed).losses) for seed in range(5)]
    assert names == [{"statistics", "one-hot"}] * 4 + [{"statistics", "one-hot", "adversarial"}]
    assert objective.turns == ("generator", *("student",) * 3)
    own = {"optimizer": "adam", "lr": 0.02, "betas": (0.5, 0.999), "weight_decay": 0.0, "schedule": "constant", "warmup": 0.0}
    assert objective.settings("generator") == own
    assert objective.settings("student") == {}
    plain, moved = (made(augment=names) for names in ((), ("crop:2", "flip")))
    first, second = (turn(one, "generator").losses["statistics"] for one in (plain, moved))
    assert float(first.detach()) != float(second.detach())
    assert bool((moved.generator.net[0].weight.grad != 0).any()), "gradients pass the augmentation"


def test_the_oldest_leave_a_full_pool() -> None:
    pool = BytePool(3, (1, 1, 1))
    pool.keep(torch.tensor([0.1, 0.2]).view(2, 1, 1, 1))
    pool.keep(torch.tensor([0.3, 1.4]).view(2, 1, 1, 1))
    assert sorted(pool.images.flatten().tolist()) == [51, 76, 255]
    assert set((255 * pool.recall(50)).round().flatten().tolist()) == {51, 76, 255}
    pool.keep(torch.linspace(0, 0.9, 5).view(5, 1, 1, 1))  # more than find room
    assert sorted(pool.images.flatten().tolist()) == [115, 172, 230]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inner_steps": 0}, "inner_steps=0"),
        ({"warmup": 0}, "warmup=0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"latent_lr": 0.0}, "latent_lr"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"statistics": 0.0, "onehot": 0.0}, "statistics or onehot"),
        ({"augment": ("randaugment",)}, "randaugment"),
        ({"augment": ("mixup:1",)}, "mixup"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        made(**options)


def test_a_teacher_without_statistics_needs_the_other_term() -> None:
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(64, 3)) for _ in range(2)]
    with pytest.raises(UsageError, match="method.statistics=0"):
        FastDFKD(*networks, **SMALL)
    objective = FastDFKD(*networks, statistics=0.0, **SMALL).train()
    assert set(turn(objective, "generator").losses) == {"one-hot"}


def test_runs_go_on_bit_for_bit_and_leave_the_teacher_alone(tmp_path: Path) -> None:
    teacher = overproof.train(
        "cnn", "digits", model_options={"widths": (8, 16)}, epochs=1, batch_size=64, lr=0.1, out=tmp_path / "teacher"
    )
    before = copy.deepcopy(teacher.model.state_dict())
    options = {"latent": 8, "width": 8, "pool": 64, "warmup": 2, "student_steps": 4, "inner_steps": 2, "augment": ("crop:1",)}
    how: dict[str, Any] = {"epochs": 2, "steps_per_epoch": 2, "batch_size": 16, "lr": 0.05, **options}
    whole = overproof.distill(
        "cnn", tmp_path / "teacher", None, method="fast-dfkd", model_options={"widths": (4, 8)}, out=tmp_path / "whole", **how
    )
    assert {"imitation", "statistics", "one-hot", "fakes/diversity"} <= whole.folder.metrics[-1]["train"].keys()
    with pytest.raises(Interrupted):
        execute(resolve(whole.folder.config), tmp_path / "cut", deadline=time.monotonic())
    resume(tmp_path / "cut")
    for name in ("last", "generator"):
        first, second = ((tmp_path / part / "weights" / f"{name}.safetensors").read_bytes() for part in ("whole", "cut"))
        assert first == second, name
    after = overproof.load(tmp_path / "teacher").state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
