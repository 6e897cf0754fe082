"""Public conformance suites: run them over your own methods and attacks, as ours are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from overproof.attacks.base import Attack
from overproof.methods.objective import Objective
from overproof.types import Batch, Progress

CLASSES = 3


def small_model(seed: int = 0, channels: int = 1) -> nn.Module:
    """A network with everything that could be disturbed: BatchNorm statistics, dropout, modes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = (nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2))
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, CLASSES))


def small_batch(count: int = 6, seed: int = 0, shape: tuple[int, int, int] = (1, 8, 8)) -> Batch:
    """Random images in [0, 1], some pixels at the ends, with random labels."""
    generator = torch.Generator().manual_seed(seed)
    images = (torch.rand(count, *shape, generator=generator) * 1.2 - 0.1).clamp(0, 1)
    return Batch(images, torch.randint(0, CLASSES, (count,), generator=generator), torch.arange(count))


def _state(module: nn.Module) -> dict[str, Any]:
    return {
        "tensors": copy.deepcopy(module.state_dict()),
        "modes": [m.training for m in module.modules()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "flags": [p.requires_grad for p in module.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules()],
    }


def _assert_same(before: dict[str, Any], module: nn.Module, who: str) -> None:
    after = _state(module)
    for name, value in before["tensors"].items():
        assert torch.equal(value, after["tensors"][name]), f"{who} changed {name}"
    for kind in ("modes", "flags", "hooks"):
        assert before[kind] == after[kind], f"{who} changed the model's {kind}"
    for old, new in zip(before["gradients"], after["gradients"], strict=True):
        assert (old is None) == (new is None), f"{who} left a gradient in a parameter, or removed one"
        assert old is None or torch.equal(old, new), f"{who} changed a parameter's gradient"


def check_attack(attack: Attack, *, alone: bool = True) -> None:
    """Assert the contract of an attack.

    Shape, type, range and budget for batches of 1, 3 and 8 and odd shapes; the originals untouched; the same result for the
    same generator; the model's parameters, buffers, modes, gradients, flags and hooks as before, whatever mode it was in;
    a batch gives what its images give one by one.

    Args:
        attack: any value with the contract of `attacks.Attack`.
        alone: assert the last point too; an attack that draws its random numbers for the whole batch cannot keep it.

    Raises:
        AssertionError: names what was broken.
    """
    assert isinstance(attack, Attack), f"{attack!r} lacks `threat`, `targeted` or `__call__`"
    for count, shape in ((1, (1, 8, 8)), (3, (3, 5, 7)), (8, (1, 9, 9))):
        model, batch = small_model(channels=shape[0]), small_batch(count, shape=shape)
        for training in (True, False):
            model.train(training)
            model[1].train(not training)  # type: ignore[index]
            before, images = _state(model), batch.images.clone()
            found = attack(model, batch.images, batch.labels, torch.Generator().manual_seed(1))
            _assert_same(before, model, "the attack")
            assert torch.equal(images, batch.images), "the attack changed the images it was given"
            assert found.shape == images.shape, f"shape {tuple(found.shape)} instead of {tuple(images.shape)}"
            assert found.dtype == images.dtype, f"type {found.dtype} instead of {images.dtype}"
            assert not found.requires_grad, "the result carries a graph"
            assert bool(found.isfinite().all()), "the result holds NaN or infinity"
            assert bool((found >= 0).all() and (found <= 1).all()), "the result leaves [0, 1]"
            size = attack.threat.size(found - images)
            assert bool((size <= attack.threat.eps * (1 + 1e-5) + 1e-6).all()), f"distance {size.max():.6g} is over budget"
            again = attack(model, batch.images, batch.labels, torch.Generator().manual_seed(1))
            assert torch.equal(found, again), "the same generator gave another result"
    if alone:
        _check_alone(attack)


def _check_alone(attack: Attack) -> None:
    # In double precision: other batch sizes round differently, and a sign of a tiny gradient must not turn over that.
    model, batch = small_model(5).double().eval(), small_batch(5, seed=2)
    images, generator = batch.images.double(), torch.Generator().manual_seed(3)
    together = attack(model, images, batch.labels, torch.Generator().manual_seed(3))
    parts = [attack(model, images[i : i + 1], batch.labels[i : i + 1], generator) for i in range(len(images))]
    apart = (together - torch.cat(parts)).flatten(1).abs().amax(dim=1)
    assert bool((apart <= 1e-6).all()), f"a batch gives other images than its images one by one: differences {apart.tolist()}"


def check_method(
    build: Callable[..., Objective], *, teacher: bool = True, network: Callable[[int], nn.Module] = small_model
) -> None:
    """Assert the contract of a method.

    One forward returns named, finite, differentiable 0-d terms and logits (N, K) for every phase; the student learns from
    their sum; the teacher's tensors, modes and gradients stay as they are and it stays in eval mode; nothing is left in
    `.grad` by the forward; the same seed gives the same losses; `trained_state` restores training and holds no teacher.

    Args:
        build: called as `build(student, teacher)`, or `build(student)` without a teacher.
        teacher: whether the method takes one.
        network: makes student and teacher from a seed, for methods that do not take any network: images (N, 1, 8, 8) -> logits (N, 3).

    Raises:
        AssertionError: names what was broken.
    """
    student, master = network(0), network(1).eval()
    objective = build(student, master) if teacher else build(student)
    objective.train()
    batch, progress = small_batch(8), Progress(step=3, total=10, epoch=1)
    frozen = _state(master)
    for phase in objective.phases:
        losses = _check_forward(objective, batch, progress, phase)
        if teacher:
            assert not any(m.training for m in master.modules()), "the teacher is in train mode"
            assert all(torch.equal(v, frozen["tensors"][k]) for k, v in master.state_dict().items()), "the teacher changed"
        objective.zero_grad()
        torch.manual_seed(0)
        _assert_repeats(objective, batch, progress, phase)
        _assert_descends(objective, batch, progress, phase, losses.keys())
    _check_state(objective, build, [network(2), *([network(1).eval()] if teacher else [])])


def _check_forward(objective: Objective, batch: Batch, progress: Progress, phase: str) -> dict[str, Tensor]:
    objective.zero_grad()
    torch.manual_seed(0)
    output = objective(batch, progress, phase)
    assert output.losses, "no loss term"
    for name, value in output.losses.items():
        assert value.dim() == 0, f"loss term {name!r} is not 0-d"
        assert bool(value.isfinite()), f"loss term {name!r} is {float(value)}"
    assert output.logits.shape == (len(batch), CLASSES), f"logits have shape {tuple(output.logits.shape)}"
    assert all(p.grad is None for p in objective.parameters()), "the forward left a gradient in a parameter"
    sum(output.losses.values(), torch.zeros(())).backward()
    trainable = list(objective.trainable(phase))
    assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trainable), "nothing learns"
    if objective.teacher is not None:
        assert all(p.grad is None for p in objective.teacher.parameters()), "the teacher received a gradient"
    losses: dict[str, Tensor] = output.losses
    return losses


def _assert_repeats(objective: Objective, batch: Batch, progress: Progress, phase: str) -> None:
    state, seen = copy.deepcopy(objective.state_dict()), []
    for _ in range(2):
        objective.load_state_dict(copy.deepcopy(state))
        torch.manual_seed(0)
        seen.append(objective(batch, progress, phase).losses)
    assert seen[0].keys() == seen[1].keys(), "the loss terms change their names between steps"
    for name, value in seen[0].items():
        assert torch.equal(value, seen[1][name]), f"the same seed gave another {name!r}: {float(value)}, {float(seen[1][name])}"


def _assert_descends(objective: Objective, batch: Batch, progress: Progress, phase: str, names: Any) -> None:
    state = copy.deepcopy(objective.state_dict())
    optimizer = torch.optim.SGD(list(objective.trainable(phase)), lr=0.02)
    totals = []
    for _ in range(12):
        torch.manual_seed(0)
        optimizer.zero_grad()
        total = sum(objective(batch, progress, phase).losses[name] for name in names)
        totals.append(float(total.detach()))
        total.backward()
        optimizer.step()
    objective.load_state_dict(state)
    assert min(totals[1:]) < totals[0], f"twelve small steps did not lower the loss: {totals[0]:.4g} -> {totals[-1]:.4g}"


def _check_state(objective: Objective, build: Callable[..., Objective], networks: list[nn.Module]) -> None:
    saved = copy.deepcopy(objective.trained_state())
    assert not any(name.startswith("teacher.") for name in saved), "trained_state holds the teacher"
    other = build(*networks)
    other.load_trained_state(saved)
    for name, value in other.trained_state().items():
        assert torch.equal(value, saved[name]), f"load_trained_state did not restore {name}"
