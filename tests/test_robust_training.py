"""What goes with any robust method: perturbed weights, growing radii, a generator's images, the choice of the best weights, an alarm."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.fabric import Fabric
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import overproof
from overproof.attacks.base import BudgetAttack
from overproof.config import TrainConfig, resolve
from overproof.data import DeviceLoader, ImageSet, Splits, StreamSet, load_extra, make_loader, make_mixed
from overproof.errors import DataError, UsageError
from overproof.folder import RunFolder, read_toml, write_toml
from overproof.methods import METHODS, objective, robust_objective
from overproof.methods.ard import ARD
from overproof.methods.ce import CE
from overproof.methods.crd import CRD
from overproof.methods.gacd import GACD
from overproof.methods.kd import KD
from overproof.methods.pgd_at import PGDAT
from overproof.methods.rslad import RSLAD
from overproof.methods.trades import TRADES
from overproof.networks import buffers_unchanged, unchanged
from overproof.run.execute import execute, resume
from overproof.run.robust import warm_up
from overproof.testing import small_batch, small_model
from overproof.training import loop
from overproof.training.averaging import make_averaged, measure_statistics
from overproof.training.awp import moved, worst_gradients
from overproof.training.safety import Interrupted
from overproof.training.schedules import learning_rate
from overproof.training.selection import Selection, collapsed
from overproof.training.validation import validate
from overproof.types import Batch, Output, Progress

ROOT = Path(__file__).resolve().parents[1]
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL: dict[str, Any] = {
    "data": {"name": "digits", "limit_train": 200, "limit_test": 40},
    "model": {"name": "cnn", "widths": [4, 8]},
    "train": {"epochs": 2, "batch_size": 32, "lr": 0.05},
}
ROBUST: dict[str, Any] = {"method": {"name": "pgd-at", "eps": 0.1, "steps": 2}, "train": {"validation_steps": 2}}


def weights(run: Path, which: str = "last") -> dict[str, Tensor]:
    return load_file(run / "weights" / f"{which}.safetensors")


def same(first: Path, second: Path) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def passes(method: objective.Objective, batch: Batch, progress: Progress | None = None) -> Any:
    """The forward and backward pass of the loop, by hand."""

    def run() -> Output:
        method.zero_grad()
        output = method(batch, progress or Progress())
        sum(output.losses.values()).backward()
        return output

    return run


# Adversarial weight perturbation


def softmax_gradient(weight: Tensor, bias: Tensor, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    p = (x @ weight.T + bias).softmax(1)
    p[torch.arange(len(x)), labels] -= 1
    return p.T @ x / len(x), p.mean(0)


def test_perturbed_weights_of_a_linear_model_in_closed_form(linear: nn.Sequential) -> None:
    layer: Any = linear[1]
    batch = Batch(torch.rand(5, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1]), torch.arange(5))
    x, weight, bias = batch.images.flatten(1), layer.weight.detach().clone(), layer.bias.detach().clone()
    g, _ = softmax_gradient(weight, bias, x, batch.labels)
    worse = weight + 0.02 * weight.norm() * g / g.norm()
    method = CE(linear)
    output = worst_gradients(passes(method, batch), method, "train", gamma=0.02)
    expected = softmax_gradient(worse, bias, x, batch.labels)
    torch.testing.assert_close((layer.weight.grad, layer.bias.grad), expected, atol=1e-14, rtol=0)
    assert torch.equal(layer.weight.detach(), weight)
    assert torch.equal(layer.bias.detach(), bias)
    losses = [nn.functional.cross_entropy(x @ w.T + bias, batch.labels) for w in (weight, worse)]
    torch.testing.assert_close(output.losses["ce"].detach(), losses[1], atol=1e-14, rtol=0)
    torch.testing.assert_close(output.logs["awp rise"], losses[1] - losses[0], atol=1e-14, rtol=0)
    assert float(output.logs["awp rise"]) > 0


def test_both_passes_see_the_images_crafted_at_the_unmoved_weights(linear: nn.Sequential) -> None:
    """On a linear student they are the corners; the second pass is then the closed form at the moved weights."""
    layer: Any = linear[1]
    batch = Batch(torch.full((3, 1, 4, 4), 0.5, dtype=torch.float64), torch.tensor([0, 1, 0]), torch.arange(3))
    direction = (layer.weight[1] - layer.weight[0]).detach().sign().view(1, 1, 4, 4)
    corners = batch.images + 0.1 * torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64).view(3, 1, 1, 1) * direction
    method = PGDAT(linear, eps=0.1, step_size=0.05, steps=8)
    worst_gradients(passes(method, batch), method, "train", gamma=0.5)
    x, weight, bias = corners.flatten(1), layer.weight.detach(), layer.bias.detach()
    g, _ = softmax_gradient(weight, bias, x, batch.labels)
    expected = softmax_gradient(weight + 0.5 * weight.norm() * g / g.norm(), bias, x, batch.labels)
    torch.testing.assert_close((layer.weight.grad, layer.bias.grad), expected, atol=1e-12, rtol=0)


def test_attack_and_teacher_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = [], []
    original = robust_objective.ascend
    monkeypatch.setattr(robust_objective, "ascend", lambda *a, **k: made.append(1) or original(*a, **k))
    teacher = small_model(1).eval()
    teacher.register_forward_hook(lambda *_: asked.append(1))
    method = ARD(small_model(0), teacher, kd_weight=0.5).train()
    run = passes(method, small_batch(8))
    worst_gradients(run, method, "train", gamma=0.005)
    assert (len(made), len(asked)) == (1, 1)
    run()
    assert (len(made), len(asked)) == (2, 2), "a later step remembers an earlier one"


@pytest.mark.parametrize(
    "make",
    [
        lambda s, t: CRD(s, t, negatives="all", samples=16),
        lambda s, t: GACD(s, t, negatives="all", samples=16, symmetric=True, eps=0.1, steps=1),
        lambda s, t: GACD(s, t, eps=0.1, steps=1),
    ],
    ids=["crd", "gacd", "gacd-batch"],
)
def test_both_passes_see_the_same_memory(make: Any) -> None:
    """With weights that do not move nothing rises: the second pass does not know the batch already."""
    student = small_model(0).train()
    method = make(student, small_model(1).eval()).train()
    for number in range(2):
        torch.manual_seed(number)
        output = worst_gradients(passes(method, small_batch(16)), method, "train", gamma=1e-12)
        assert abs(float(output.logs["awp rise"])) < 1e-5
    plain = make(copy.deepcopy(student), small_model(1).eval()).train()
    plain.load_state_dict(method.state_dict())
    torch.manual_seed(5)
    passes(plain, small_batch(16))()
    torch.manual_seed(5)
    worst_gradients(passes(method, small_batch(16)), method, "train", gamma=1e-12)
    for (name, one), two in zip(plain.named_buffers(), method.buffers(), strict=True):
        assert torch.equal(one, two), name


def test_a_memory_never_passes_off_other_images() -> None:
    memory = objective.Memory()
    first, second = torch.zeros(2, 3), torch.ones(2, 3)
    assert memory.recall("attack", first, lambda: first + 1) is not first
    memory.rewind()
    assert torch.equal(memory.recall("attack", second, lambda: second + 5), second + 5)
    assert torch.equal(memory.recall("teacher", first, lambda: first + 7), first + 7)
    assert torch.equal(memory.recall("attack", first, lambda: first + 9), first + 1)


def test_statistics_and_dropout_are_those_of_one_pass() -> None:
    """With nothing moved the second pass repeats the first to the bit, and buffers are written once."""
    plain, double = small_model(0).train(), small_model(0).train()
    batch = small_batch(8)
    for student, run in ((plain, lambda m: passes(m, batch)()), (double, None)):
        method = CE(student)
        torch.manual_seed(5)
        if run is not None:
            run(method)
        else:
            worst_gradients(passes(method, batch), method, "train", gamma=0.0)
    for (name, a), b in zip(plain.named_parameters(), double.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), b in zip(plain.named_buffers(), double.buffers(), strict=True):
        assert torch.equal(a, b), name
    method = CE(double)
    torch.manual_seed(5)
    worst_gradients(passes(method, batch), method, "train", gamma=0.5)
    assert int(double[1].num_batches_tracked) == 2
    twice = passes(CE(plain), batch)
    torch.manual_seed(5)
    twice()
    assert torch.equal(plain[1].running_mean, double[1].running_mean), "statistics of the moved weights were kept"
    assert not torch.equal(plain[0].weight.grad, double[0].weight.grad)


def test_weights_come_back_when_the_second_pass_fails() -> None:
    student, calls = small_model(0), []
    before = copy.deepcopy(student.state_dict())
    method = CE(student)
    run = passes(method, small_batch(4))

    def fails() -> Output:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return run()

    with pytest.raises(RuntimeError, match="out of memory"):
        worst_gradients(fails, method, "train", gamma=0.1)
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())
    assert method._memory is None


def test_only_kernels_and_matrices_move_and_bad_gradients_move_nothing() -> None:
    student = small_model(0)
    passes(CE(student), small_batch(4))()
    names = {id(p): name for name, p in student.named_parameters()}
    student[0].weight.grad.view(-1)[0] = float("inf")
    student[6].weight.grad.zero_()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    with moved([p for p in student.parameters() if p.dim() > 1], 0.1):
        assert all(torch.equal(p, before[names[id(p)]]) for p in student.parameters())
    method, seen = CE(student), {}
    run = passes(method, small_batch(4))

    def recorded() -> Output:
        seen.update({name: p.detach().clone() for name, p in student.named_parameters()})
        return run()

    worst_gradients(recorded, method, "train", gamma=0.1)
    changed = {name for name in before if not torch.equal(seen[name], before[name])}
    assert changed == {"0.weight", "6.weight"}
    assert float((seen["6.weight"] - before["6.weight"]).norm()) == pytest.approx(
        0.1 * float(before["6.weight"].norm()), rel=1e-5
    )


def test_borrowed_tensors_come_back_to_the_bit() -> None:
    model = small_model(0).train()
    before = copy.deepcopy(model.state_dict())
    old = model[1].running_mean
    with unchanged(model.parameters()), buffers_unchanged(model):
        model(small_batch(8).images)
        model[1].running_mean = torch.zeros(6)
        with torch.no_grad():
            model[0].weight.add_(1e-9).mul_(3)
    assert model[1].running_mean is old
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A robust run without any of the options."""
    return execute(resolve(SMALL, ROBUST), tmp_path_factory.mktemp("runs") / "plain").path


def test_without_perturbation_the_loop_is_what_it_was(tmp_path: Path, plain: Path) -> None:
    run = execute(resolve(SMALL, ROBUST, {"train": {"awp": 0.05, "awp_warmup": 2}}), tmp_path / "never")
    assert same(plain, run.path)
    assert not any("awp rise" in record["train"] for record in run.folder.metrics)
    run = execute(resolve(SMALL, ROBUST, {"train": {"awp": 0.05, "awp_warmup": 1}}), tmp_path / "later")
    assert not same(plain, run.path)
    assert ["awp rise" in record["train"] for record in run.folder.metrics] == [False, True]
    first = RunFolder(plain).metrics[0]
    assert first["train"] == run.folder.metrics[0]["train"]
    assert first["validation"] == run.folder.metrics[0]["validation"]


def test_perturbed_training_matches_a_bare_loop(tmp_path: Path) -> None:
    data = overproof.load_data("digits", limit_train=300, seed=0)
    torch.manual_seed(0)
    student = overproof.create_model("mlp", 10, 1, 8, hidden=(16,))
    twin = copy.deepcopy(student)
    overproof.train(student, data, out=tmp_path / "run", epochs=2, batch_size=32, lr=0.1, awp=0.05, seed=3)
    optimizer = torch.optim.SGD(twin.parameters(), 0.1, 0.9, weight_decay=5e-4)
    loader = make_loader(data.train, 32, shuffle=True, seed=3, drop_last=True)
    total = 2 * len(loader)

    def loss_of(batch: Batch) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin(batch.images), batch.labels).backward()

    for step, batch in enumerate(batch for epoch in range(2) for batch in loader.batches(epoch)):
        optimizer.param_groups[0]["lr"] = learning_rate(TrainConfig(lr=0.1, epochs=2), step, total)
        loss_of(batch)
        kernels = [p for p in twin.parameters() if p.dim() > 1]
        kept = [p.detach().clone() for p in kernels]
        with torch.no_grad():
            for p in kernels:
                p += 0.05 * p.norm() * p.grad / p.grad.norm()
        loss_of(batch)
        with torch.no_grad():
            for p, old in zip(kernels, kept, strict=True):
                p.copy_(old)
        optimizer.step()
    last = weights(tmp_path / "run")
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(last[name], value, atol=1e-5, rtol=1e-4)


def test_perturbed_training_with_clipping_and_half_precision_resumes_to_the_same_bits(tmp_path: Path) -> None:
    train = {"awp": 0.01, "precision": "bf16-mixed", "clip": 1.0, "averaging": "ema", "eps_warmup": 1, "epochs": 1}
    config = resolve(SMALL, ROBUST, {"train": train})
    execute(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        execute(config, tmp_path / "cut", deadline=0.0)
    resume(tmp_path / "cut")
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_images_stay_in_full_precision_under_half_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, original = set(), CE.forward

    def forward(self: CE, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        output = original(self, batch, progress, phase)
        seen.add((batch.images.dtype, torch.is_autocast_enabled("cpu")))
        return output

    monkeypatch.setattr(CE, "forward", forward)
    execute(resolve(SMALL, {"train": {"precision": "bf16-mixed", "epochs": 1}}), tmp_path / "run")
    assert seen == {(torch.float32, True)}


def test_two_processes_move_their_weights_alike(tmp_path: Path) -> None:
    """Without BatchNorm two processes with half the batch end where one with the whole ends: v is made of mean gradients."""
    table = {**SMALL, "model": {"name": "mlp", "hidden": [16]}}
    config = resolve(table, {"data": {"limit_train": 128}, "train": {"awp": 0.05, "accelerator": "cpu"}})
    execute(resolve(config.table(), {"train": {"batch_size": 64}}), tmp_path / "one")
    write_toml(tmp_path / "two.toml", resolve(config.table(), {"train": {"devices": 2}}).table())
    (tmp_path / "main.py").write_text("import sys; from overproof.cli import main; main()")
    command = [sys.executable, "main.py", "train", "--config", "two.toml", "--out", "two"]
    done = subprocess.run(command, cwd=tmp_path, env=ALONE, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=5e-6, rtol=1e-4)


# A radius that grows, and a single step


def test_values_of_a_growing_radius() -> None:
    method = PGDAT(small_model())
    assert method.share(Progress(0, 100, 0, 10)) == 1
    method.eps_warmup = 2.0
    found = [method.share(Progress(step, 100, step // 10, 10)) for step in (0, 1, 9, 18, 19, 20, 99)]
    assert found == pytest.approx([0.05, 0.1, 0.5, 0.95, 1, 1, 1])
    method.eps_warmup = 0.5
    assert method.share(Progress(0, 100, 0, 10)) == pytest.approx(0.2)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_the_inner_attack_keeps_to_the_growing_radius(norm: str, linear: nn.Sequential) -> None:
    seen: list[Tensor] = []
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    batch = Batch(torch.full((3, 1, 4, 4), 0.5, dtype=torch.float64), torch.tensor([0, 1, 0]), torch.arange(3))
    method = PGDAT(linear, norm=norm, eps=0.2, step_size=0.1, steps=8)
    method.eps_warmup = 2.0
    for step, share in ((0, 0.05), (9, 0.5), (50, 1.0)):
        method(batch, Progress(step, 100, step // 10, 10))
        sizes = method.threat.size(seen[-1] - batch.images)
        torch.testing.assert_close(sizes, torch.full_like(sizes, share * 0.2), atol=1e-9, rtol=0)
    assert method.validation_attack.eps == 0.2, "validation attacks at the full radius"


def test_every_robust_method_and_part_can_grow(tmp_path: Path) -> None:
    for name in ("pgd-at", "trades", "ard", "rslad"):
        entry = METHODS.get(name)
        method = METHODS.create(name, *[small_model(i) for i in range(len(entry.positional()))])
        warm_up(method, 3.0)
        assert method.eps_warmup == 3.0
    composed = METHODS.create("composed", small_model(0), small_model(1), methods=("kd", "rslad"), image_shape=(1, 8, 8))
    warm_up(composed, 3.0)
    assert composed.parts[1].inner.eps_warmup == 3.0
    composed.train()(small_batch(4), Progress(0, 30, 0, 10))
    assert composed.parts[1].inner._share == pytest.approx(1 / 9)
    with pytest.raises(UsageError, match="eps_warmup=3: KD attacks nothing"):
        warm_up(KD(small_model(0), small_model(1)), 3.0)
    with pytest.raises(UsageError, match="eps_warmup"):
        execute(resolve(SMALL, {"train": {"eps_warmup": 2}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_step_sizes_that_follow_from_the_radius() -> None:
    assert PGDAT(small_model()).step_size == 2 / 255
    assert PGDAT(small_model(), eps=0.2).step_size == pytest.approx(0.05)
    assert PGDAT(small_model(), steps=1).step_size == pytest.approx(10 / 255)
    assert PGDAT(small_model(), steps=1, step_size=0.02).step_size == 0.02
    assert PGDAT(small_model(), eps=0.0).step_size > 0
    for entry in METHODS.entries():
        if "step_size" in entry.options() and "eps" in entry.options():
            names = [*entry.positional()]
            method = METHODS.create(entry.name, *(small_model(k) for k in range(len(names))), eps=0.2)
            assert method.step_size == pytest.approx(0.05), entry.name
    assert METHODS.create("pgd-at", small_model(), steps=1, eps="16/255").step_size == pytest.approx(20 / 255)


def test_one_step_starts_anywhere_and_ends_in_the_ball(linear: nn.Sequential) -> None:
    """x~ = project(x0 + 1.25 eps s), x0 uniform in [-eps, eps]: between 0.25 eps and eps along s, and eps for 5/8 of all pixels."""
    seen: list[Tensor] = []
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    images = torch.full((200, 1, 4, 4), 0.5, dtype=torch.float64)
    batch = Batch(images, torch.zeros(200, dtype=torch.long), torch.arange(200))
    torch.manual_seed(0)
    PGDAT(linear, eps=0.1, steps=1)(batch, Progress())
    layer: Any = linear[1]
    along = (seen[-1] - images) * (layer.weight[1] - layer.weight[0]).detach().sign().view(1, 1, 4, 4)
    assert float(along.min()) >= 0.025 - 1e-12
    assert float(along.max()) == pytest.approx(0.1)
    assert float((along > 0.1 - 1e-9).double().mean()) == pytest.approx(5 / 8, abs=0.03)


def test_the_step_that_validation_watches_is_the_methods_own() -> None:
    step = PGDAT(small_model(), eps=0.1, steps=1).one_step_attack
    assert (step.steps, step.random_start, step.early_stop, step.eps) == (1, True, False, 0.1)
    assert step.step_size == pytest.approx(0.125)
    assert PGDAT(small_model(), steps=2).one_step_attack is None
    assert TRADES(small_model(), steps=1).one_step_attack.random_start is False
    assert RSLAD(small_model(), small_model(1), steps=1, norm="L2").one_step_attack.norm == "L2"


# The alarm


def told(robust: list[float], one_step: list[float], **config: Any) -> list[str]:
    selection = Selection(TrainConfig(**config), validated=True)
    pairs = zip(robust, one_step, strict=True)
    return [selection.alarm(epoch, {"robust": r, "one-step": s, "clean": 0.9}) for epoch, (r, s) in enumerate(pairs)]


def test_the_alarm_says_what_fell_and_what_stayed() -> None:
    alarms = told([0.20, 0.35, 0.41, 0.03, 0.01], [0.25, 0.40, 0.47, 0.85, 0.90])
    assert [bool(text) for text in alarms] == [False, False, False, True, False], "told once"
    assert "epoch 4" in alarms[3]
    assert "fell from 0.410 in epoch 3 to 0.030" in alarms[3]
    assert "it is 0.850 (0.470 then)" in alarms[3]
    assert "best.safetensors" in alarms[3]
    assert "checkpoint.pt" in alarms[3]
    assert "Training goes on" in alarms[3]
    assert "Training ends here" in told([0.4, 0.03], [0.5, 0.8], collapse="stop")[1]


def test_a_model_that_recovers_is_told_of_again() -> None:
    alarms = told([0.4, 0.05, 0.39, 0.05], [0.5, 0.8, 0.5, 0.8])
    assert [bool(text) for text in alarms] == [False, True, False, True]
    assert "from 0.400 in epoch 1" in alarms[3]


def test_a_collapse_in_the_first_epoch_is_seen_without_a_peak() -> None:
    alarms = told([0.02, 0.01], [0.80, 0.85])
    assert "is only 0.020" in alarms[0]
    assert not alarms[1]


@pytest.mark.parametrize(
    ("robust", "one_step"),
    [
        ([0.20, 0.30, 0.40, 0.38, 0.33, 0.28], [0.22, 0.34, 0.45, 0.46, 0.44, 0.41]),  # robust overfitting
        ([0.40, 0.10, 0.11], [0.45, 0.12, 0.14]),  # undone altogether: a learning rate too high
        ([0.05, 0.20, 0.35], [0.30, 0.34, 0.40]),  # a growing radius
        ([0.12, 0.05, 0.12], [0.14, 0.13, 0.15]),  # few images, small figures
        ([0.42, 0.22, 0.41], [0.46, 0.40, 0.47]),  # a bad epoch
    ],
)
def test_no_alarm_for_honest_courses(robust: list[float], one_step: list[float]) -> None:
    assert not any(told(robust, one_step))


def test_no_alarm_where_no_single_step_is_watched() -> None:
    assert not Selection(TrainConfig(), validated=True).alarm(0, {"robust": 0.0, "clean": 0.9})
    assert not collapsed({}, {"robust": 0.3, "one-step": 0.6})


def scripted(monkeypatch: pytest.MonkeyPatch, found: list[dict[str, float]]) -> None:
    """Validation finds these, epoch by epoch."""
    left: Iterator[dict[str, float]] = iter(found)
    monkeypatch.setattr(loop, "validate", lambda *_, **__: {"clean": 0.9, "loss": 1.0, **next(left)})


COURSE = [{"robust": r, "one-step": s} for r, s in ((0.30, 0.35), (0.40, 0.45), (0.02, 0.85), (0.01, 0.9), (0.01, 0.9))]
ONE_STEP: dict[str, Any] = {"method": {"name": "pgd-at", "eps": 0.1, "steps": 1}, "train": {"epochs": 5}}


@pytest.mark.parametrize(("collapse", "epochs"), [("warn", 5), ("stop", 3)])
def test_a_collapse_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], collapse: str, epochs: int
) -> None:
    scripted(monkeypatch, COURSE)
    run = execute(resolve(SMALL, ONE_STEP, {"train": {"collapse": collapse}}), tmp_path / "run")
    records = run.folder.metrics
    assert [record["epoch"] for record in records] == list(range(epochs))
    assert ["alarm" in record for record in records] == [epoch == 2 for epoch in range(epochs)]
    assert capsys.readouterr().err.count("catastrophic overfitting in epoch 3") == 1
    status = run.folder.status
    assert (status["state"], status["best_epoch"]) == ("done", 1)
    assert ("ended" in status) is (collapse == "stop")
    state = torch.load(run.path / "checkpoint.pt", weights_only=True)
    assert state["peak"]["collapsed"] == 2
    assert state["step"] == epochs * status["steps"] // 5
    assert not all(torch.equal(v, weights(run.path)[k]) for k, v in weights(run.path, "best").items())
    assert {"test-best", "test-last"} <= run.evaluations.keys()


def test_an_ended_run_that_is_resumed_ends_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the end of training and the evaluation: the state knows why it ended."""
    scripted(monkeypatch, COURSE)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    from overproof.run import execute as room

    monkeypatch.setattr(room, "judge_run", killed)
    with pytest.raises(KeyboardInterrupt):
        execute(resolve(SMALL, ONE_STEP, {"train": {"collapse": "stop"}}), tmp_path / "run")
    monkeypatch.undo()
    assert resume(tmp_path / "run").folder.status["state"] == "done"
    assert len(RunFolder(tmp_path / "run").metrics) == 3


def test_a_single_step_is_really_watched(tmp_path: Path) -> None:
    run = execute(resolve(SMALL, ONE_STEP, {"train": {"epochs": 1, "validation_steps": 3}}), tmp_path / "run")
    found = run.folder.metrics[0]["validation"]
    assert set(found) == {"clean", "loss", "robust", "one-step"}
    assert 0 <= found["robust"] <= 1
    assert 0 <= found["one-step"] <= 1


def test_one_step_accuracy_counts_images_that_were_wrong_before_too(linear: nn.Sequential) -> None:
    """After a collapse a model is often more accurate on its own steps than on the images themselves."""

    @dataclass(frozen=True, kw_only=True)
    class Repair(BudgetAttack):
        def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Any = None) -> Tensor:
            return labels.view(-1, 1, 1, 1).to(images).expand_as(images)

    layer: Any = linear.float()[1]
    with torch.no_grad():  # the brighter half is class 1
        layer.weight.copy_(torch.tensor([-1.0, 1.0])[:, None].expand(2, 16))
        layer.bias.copy_(torch.tensor([8.0, -8.0]))
    labels = torch.arange(6) % 2
    wrong = ImageSet(1 - labels.view(-1, 1, 1, 1).expand(6, 1, 4, 4).float(), labels)
    loader, fabric = make_loader(wrong, 4), Fabric(accelerator="cpu", devices=1)
    found = validate(linear, loader, fabric=fabric, attack=Repair(eps=1.0), one_step=Repair(eps=1.0), limit=5)
    assert {name: found[name] for name in ("clean", "robust", "one-step")} == {"clean": 0, "robust": 0, "one-step": 1}


def test_without_validation_one_step_training_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    execute(resolve(SMALL, ONE_STEP, {"data": {"validation": 0.0}, "train": {"epochs": 1}}), tmp_path / "run")
    assert "nothing would notice" in capsys.readouterr().err


# The best weights


@pytest.mark.parametrize(("select", "best"), [("auto", 1), ("robust", 1), ("clean", 2)])
def test_which_weights_are_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, select: str, best: int) -> None:
    scripted(monkeypatch, [{"robust": r, "clean": c} for r, c in ((0.3, 0.7), (0.5, 0.8), (0.4, 0.9))])
    run = execute(resolve(SMALL, ROBUST, {"train": {"select": select, "epochs": 3}}), tmp_path / "run")
    assert run.folder.status["best_epoch"] == best


def test_patience_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    scripted(monkeypatch, [{"clean": c} for c in (0.5, 0.6, 0.55, 0.6, 0.99)])
    run = execute(resolve(SMALL, {"train": {"patience": 2, "epochs": 9}}), tmp_path / "run")
    assert len(run.folder.metrics) == 4, "equal is no better"
    said = "for 2 epoch(s) no better clean accuracy on the validation split than 0.600 in epoch 2"
    assert said in capsys.readouterr().err
    assert run.folder.status["ended"] == said
    assert run.folder.status["state"] == "done"


def test_any_method_can_be_watched_under_attack(tmp_path: Path) -> None:
    train = {"validation_eps": "8/255", "select": "robust", "validation_steps": 2, "epochs": 1}
    run = execute(resolve(SMALL, {"train": train}), tmp_path / "run")
    assert set(run.folder.metrics[0]["validation"]) == {"clean", "loss", "robust"}
    assert torch.load(run.path / "checkpoint.pt", weights_only=True)["best"]["measure"] == "robust"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"train": {"select": "robust"}}, "needs an attack.*validation_eps=8/255"),
        ({"train": {"select": "clean"}, "data": {"validation": 0.0}}, "look at a validation split.*data.validation=0.1"),
        ({"train": {"patience": 3}, "data": {"validation": 0.0}}, "train.patience=3.*there is none"),
        ({"train": {"collapse": "stop"}, "data": {"validation": 0.0}}, "train.collapse='stop'"),
    ],
)
def test_choices_that_cannot_be_made_are_refused(tmp_path: Path, table: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        execute(resolve(SMALL, table), tmp_path / "run")
    assert not (tmp_path / "run" / "config.toml").exists()


def test_a_run_of_before_these_options_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        execute(resolve(SMALL), tmp_path / "run", deadline=0.0)
    table = read_toml(tmp_path / "run" / "config.toml")
    for option in ("awp", "select", "patience"):
        del table["train"][option]
    del table["data"]["extra_share"]
    write_toml(tmp_path / "run" / "config.toml", table)
    assert resume(tmp_path / "run").folder.status["state"] == "done"


# Averages


@pytest.mark.parametrize("averaging", ["ema", "swa"])
def test_statistics_of_averaged_weights_are_their_own(tmp_path: Path, averaging: str) -> None:
    """Running mean and variance of the first BatchNorm are those of the convolution with averaged weights, on a quarter of the batches."""
    table = {"train": {"averaging": averaging, "swa_start": 0.0, "lr": 0.3}, "seed": 4}
    run = execute(resolve(SMALL, table), tmp_path / "run")
    data = overproof.load_data("digits", limit_train=200, limit_test=40)
    loader = make_loader(data.train, 32, shuffle=True, seed=4, drop_last=True)
    model: Any = overproof.load(run.path, "last")
    first = model.net.layers[0]
    with torch.no_grad():
        maps = [first[0](model.normalize(batch.images)) for batch in list(loader.batches(1))[:2]]
    assert len(loader) == 6
    means = torch.stack([m.mean(dim=(0, 2, 3)) for m in maps]).mean(0)
    variances = torch.stack([m.transpose(0, 1).flatten(1).var(dim=1) for m in maps]).mean(0)
    torch.testing.assert_close(first[1].running_mean, means, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(first[1].running_var, variances, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("averaging", ["ema", "swa"])
def test_averaging_leaves_the_student_alone(tmp_path: Path, plain: Path, averaging: str) -> None:
    """Measuring statistics with the student as a stand-in must not show in its training."""
    train = {"averaging": averaging, "swa_start": 0.2, "ema_decay": 0.9}
    run = execute(resolve(SMALL, ROBUST, {"train": train}), tmp_path / "mean")
    first, second = ([record["train"] for record in folder.metrics] for folder in (RunFolder(plain), run.folder))
    assert first == second
    assert not same(plain, run.path)


def test_statistics_are_measured_where_the_features_stand_still() -> None:
    """In its second stage gacd runs the features in eval mode; the average has statistics of its own all the same."""
    fabric, batches, found = Fabric(accelerator="cpu", devices=1), [small_batch(8, seed=i) for i in range(5)], []
    for make in (lambda s: GACD(s, small_model(1).eval(), head_share=0.5, eps=0.1, steps=1), CE):
        student = small_model(0)
        method = make(student).train()
        averaged = make_averaged(student, TrainConfig(averaging="swa"))
        averaged.update_parameters(student)
        measure_statistics(averaged, method, batches, progress=Progress(step=90, total=100), fabric=fabric)
        found.append(averaged.module[1].running_var.clone())
    assert not torch.equal(found[0], torch.ones(6))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("name", ["pgd-at", "trades", "ard", "rslad"])
def test_measuring_statistics_changes_nothing_else(name: str) -> None:
    entry = METHODS.get(name)
    method = METHODS.create(name, *[small_model(i) for i in range(len(entry.positional()))], steps=2).train()
    student = method.student
    averaged = make_averaged(student, TrainConfig(averaging="swa"))
    fabric = Fabric(accelerator="cpu", devices=1)
    measure_statistics(averaged, method, [small_batch(8)], progress=Progress(), fabric=fabric)
    assert torch.equal(averaged.module[1].running_mean, torch.zeros(6)), "nothing is averaged yet"
    averaged.update_parameters(student)
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1.5)
    before, mean = copy.deepcopy(method.state_dict()), copy.deepcopy(averaged.module.state_dict())
    batches = [small_batch(8, seed=i) for i in range(30)]
    torch.manual_seed(0)
    measure_statistics(averaged, method, batches, progress=Progress(), fabric=fabric)
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    assert (student[1].momentum, student.training) == (0.1, True)
    changed = {key for key, value in averaged.module.state_dict().items() if not torch.equal(value, mean[key])}
    assert changed == {"1.running_mean", "1.running_var"}


# A generator's images


def generated(count: int = 60, size: int = 8, channels: int = 1, classes: Any = 10) -> ImageSet:
    noise = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=noise)
    return ImageSet(images, torch.arange(count) % 10, classes=classes, name="generated")


def write_folder(place: Path, count: int = 60, size: int = 8, classes: int = 10, channels: int = 1) -> str:
    """A folder of PNG images in a Parquet file, as a generator might leave it."""
    noise, rows = np.random.default_rng(0), []
    for _ in range(count):
        buffer = io.BytesIO()
        shape = (size, size, 3) if channels == 3 else (size, size)
        Image.fromarray(noise.integers(0, 256, shape, dtype=np.uint8)).save(buffer, "png")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    place.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, kind), "label": pa.array([k % classes for k in range(count)])})
    pq.write_table(table, place / "train-0.parquet")
    return f"parquet:{place}"


def own(count: int = 100) -> ImageSet:
    return ImageSet(torch.zeros(count, 1, 8, 8), torch.zeros(count, dtype=torch.long), classes=10)


def test_the_share_is_exact_in_every_batch() -> None:
    extra = load_extra(generated(), shape=(1, 8, 8), classes=tuple("0123456789"), first=100)
    loader = make_mixed(own(), extra, 20, share=0.7, seed=1)
    assert len(loader) == 100 // 6
    for epoch in range(3):
        batches = list(loader.batches(epoch))
        assert len(batches) == len(loader)
        for batch in batches:
            assert len(batch) == 20
            assert (batch.index < 100).tolist() == [True] * 6 + [False] * 14
            assert batch.images.dtype == torch.float32
            assert torch.equal(batch.labels[6:], (batch.index[6:] - 100) % 10), "labels stay with their images"


def test_every_extra_image_is_seen_before_any_is_seen_again() -> None:
    """Three batches make a pass over 60 images, epochs of sixteen batches notwithstanding; passes differ in order."""
    loader = make_mixed(own(), generated(60), 25, share=0.8, seed=1)
    assert (len(loader), len(loader.extra)) == (20, 3)
    seen = [batch.index[5:] for epoch in range(3) for batch in loader.batches(epoch)]
    passes_over = [torch.cat(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert all(order.sort().values.tolist() == list(range(60)) for order in passes_over)
    assert not torch.equal(passes_over[0], passes_over[1])
    firsts = [batch.index[:5] for batch in loader.batches(0)]
    assert torch.cat(firsts).sort().values.tolist() == list(range(100)), "an epoch is one pass over the own images"


@pytest.mark.parametrize("kind", ["memory", "stream"])
def test_batches_from_the_middle_are_the_same(kind: str) -> None:
    from overproof.data import build_augment

    images = generated(60)
    extra: Any = images
    if kind == "stream":
        extra = StreamSet(TensorDataset(images.images, images.labels), labels=images.labels, classes=10)
    loader = make_mixed(own(), extra, 20, share=0.5, seed=1, augment=build_augment("crop:1,mixup", classes=10), num_workers=0)
    for epoch in (0, 1):
        whole = list(loader.batches(epoch))
        for start in (0, 4, len(loader) - 1):
            for a, b in zip(whole[start:], loader.batches(epoch, start), strict=True):
                assert torch.equal(a.images, b.images)
                assert torch.equal(a.labels, b.labels)
                assert torch.equal(a.index, b.index)


def test_processes_share_both_kinds() -> None:
    one = make_mixed(own(), generated(60), 20, share=0.5, seed=3)
    two = [make_mixed(own(), generated(60), 10, share=0.5, seed=3, rank=rank, world_size=2) for rank in (0, 1)]
    assert len(one) == len(two[0]) == len(two[1])
    for whole, *parts in zip(one.batches(0), two[0].batches(0), two[1].batches(0), strict=True):
        assert torch.equal(whole.index[:10], torch.cat([part.index[:5] for part in parts]))
        assert torch.equal(whole.index[10:], torch.cat([part.index[5:] for part in parts]))


def test_crops_differ_between_the_two_kinds() -> None:
    """The two halves must not draw the same augmentations."""
    ramp = torch.arange(64, dtype=torch.float32).view(1, 1, 8, 8).repeat(40, 1, 1, 1) / 64
    data = ImageSet(ramp, torch.zeros(40, dtype=torch.long), classes=10)
    from overproof.data import build_augment

    batch = next(make_mixed(data, data, 40, share=0.5, seed=0, augment=build_augment("crop:2", classes=10)).batches(0))
    assert not torch.equal(batch.images[:20], batch.images[20:])


def test_a_folder_trains_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    name = write_folder(tmp_path / "made")
    config = resolve(SMALL, {"data": {"extra": name, "extra_share": 0.6, "augment": ["crop:1"]}})
    run = execute(config, tmp_path / "whole")
    assert run.folder.metrics[-1]["step"] == 2 * (200 // 13)
    with pytest.raises(Interrupted):
        execute(config, tmp_path / "cut", deadline=0.0)
    resume(tmp_path / "cut")
    assert same(tmp_path / "whole", tmp_path / "cut")
    execute(resolve(SMALL, {"data": {"augment": ["crop:1"]}}), tmp_path / "without")
    assert not same(tmp_path / "whole", tmp_path / "without")


def test_stopped_in_the_second_epoch_the_folder_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolve(SMALL, {"data": {"extra": write_folder(tmp_path / "made"), "extra_share": 0.6}})
    execute(config, tmp_path / "whole")
    original = loop.Trainer._step

    def step(self: loop.Trainer, batch: Batch, epoch: int) -> None:
        original(self, batch, epoch)
        self.stopper.stop = self.step == 20

    monkeypatch.setattr(loop.Trainer, "_step", step)
    with pytest.raises(Interrupted, match="step 20"):
        execute(config, tmp_path / "cut")
    monkeypatch.undo()
    resume(tmp_path / "cut")
    assert same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    ("folder", "data", "error", "message"),
    [
        ({"count": 30}, {"extra_share": 0.97}, UsageError, r"hold 30 images, but each step takes 31 .*extra_share=0.97"),
        ({"size": 9}, {}, DataError, r"shape \(1, 9, 9\), the training set of \(1, 8, 8\).*image_size=8, channels=1"),
        ({"channels": 3}, {}, DataError, r"shape \(3, 8, 8\).*data.extra_options"),
        ({"classes": 12}, {}, DataError, r"have 12 classes \(0, 1, 2, 3, \.\.\.\), the training set 10 classes"),
        ({}, {"extra_share": 0.01}, UsageError, "extra_share=0.01 of a batch of 32 is 0 images"),
        ({}, {"extra_options": {"image_sise": 8}}, UsageError, "Did you mean 'image_size'"),
    ],
)
def test_folders_that_do_not_fit_are_refused(
    tmp_path: Path, folder: dict[str, Any], data: dict[str, Any], error: type[Exception], message: str
) -> None:
    name = write_folder(tmp_path / "made", **folder)
    with pytest.raises(error, match=message):
        execute(resolve(SMALL, {"data": {"extra": name, **data}}), tmp_path / "run")
    assert not (tmp_path / "run" / "config.toml").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("parkett:x", "Unknown data 'parkett'.*Did you mean 'parquet'"),
        ("parquet", "needs to be told where: parquet:DIRECTORY"),
    ],
)
def test_sources_that_are_not_there_are_refused(tmp_path: Path, extra: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        execute(resolve(SMALL, {"data": {"extra": extra}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_size_is_read_in_the_right_one(tmp_path: Path) -> None:
    name = write_folder(tmp_path / "made", size=9, channels=3)
    images = load_extra(name, shape=(1, 8, 8), classes=tuple("0123456789"), first=50, options={"image_size": 8, "channels": 1})
    assert images.shape == (1, 8, 8)
    assert images.index.tolist() == list(range(50, 110))


@pytest.mark.parametrize(
    ("extra", "classes", "fits"),
    [
        (10, tuple("abcdefghij"), True),  # numbers only
        (10, tuple("abcdefghijk"), True),  # none of the last class
        (10, tuple("abcdefghi"), False),
        (tuple("abcdefghij"), tuple("abcdefghij"), True),
        (tuple("abcdefghij"), tuple("jihgfedcba"), False),
        (tuple("abcdefghij"), tuple("0123456789"), True),
        (tuple("abcdefghij"), tuple(map(str, range(11))), False),
        (tuple("abcdefghij"), (), True),
    ],
)
def test_which_classes_fit(extra: Any, classes: tuple[str, ...], fits: bool) -> None:
    images = generated(classes=extra)
    if fits:
        assert len(load_extra(images, shape=(1, 8, 8), classes=classes, first=0)) == 60
    else:
        with pytest.raises(DataError, match="They must be the same"):
            load_extra(images, shape=(1, 8, 8), classes=classes, first=0)


def test_extra_images_as_objects(tmp_path: Path, digits: Splits) -> None:
    torch.manual_seed(0)
    how: dict[str, Any] = {"epochs": 1, "batch_size": 32, "lr": 0.05, "extra_share": 0.5, "workers": 0}
    images = generated(60)
    dataset = TensorDataset(images.images, images.labels)
    for number, extra in enumerate((images, (images.images, images.labels), dataset)):
        student = overproof.create_model("mlp", 10, 1, 8, hidden=(8,))
        run = overproof.train(student, digits, extra_data=extra, out=tmp_path / str(number), **how)
        assert run.folder.metrics[0]["step"] == len(digits.train) // 16
        assert run.folder.config["data"]["extra"] == "(yours)"
    named = overproof.train("mlp", "digits", extra_data=write_folder(tmp_path / "made"), out=tmp_path / "n", **how)
    assert named.folder.config["data"]["extra"].startswith("parquet:")
    with pytest.raises(UsageError, match="Extra data cannot be DataLoader"):
        overproof.train(student, digits, extra_data=DataLoader(dataset), out=tmp_path / "x", **how)
    mine = DataLoader(TensorDataset(torch.rand(64, 1, 8, 8), torch.arange(64) % 10), batch_size=16)
    with pytest.raises(UsageError, match="batches that DataLoader makes itself"):
        overproof.train(student, mine, extra_data=images, out=tmp_path / "y", epochs=1, extra_share=0.2)


def test_tables_by_index_have_room_for_extra_images(tmp_path: Path, digits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    from overproof.run.prepare import Parts, prepare

    asked: dict[str, Any] = {}
    original = METHODS.create
    monkeypatch.setattr(METHODS, "create", lambda name, *a, **options: asked.update(options) or original(name, *a, **options))
    config = resolve({"verb": "distill", "method": "crd", "teacher": {"name": "(yours)"}, "model": {"name": "(yours)"}})
    parts = Parts(student=small_cnn(), teacher=small_cnn(), data=digits, extra=generated(60))
    _, data = prepare(config, parts)
    last = int(digits.train.index.max())
    assert data.extra.index.tolist() == list(range(last + 1, last + 61))
    assert asked["samples"] == last + 61


def small_cnn() -> nn.Module:
    model: nn.Module = overproof.create_model("cnn", 10, 1, 8, widths=(4, 8))
    return model


def test_a_cache_of_the_teacher_knows_no_extra_images() -> None:
    from overproof.run.prepare import checked

    table = {"verb": "distill", "method": "kd", "teacher": {"run": "t"}, "train": {"cache_teacher": True}}
    with pytest.raises(UsageError, match="on the training images only"):
        checked(resolve(table, {"data": {"extra": "parquet:x"}}))


def test_small_shares_and_sets(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="hold 60 images, but each step takes 64 of them .*2 batch"):
        make_mixed(own(), generated(60), 64, share=0.5, world_size=2, rank=0)
    with pytest.raises(UsageError, match="10 images do not fill one batch of 15"):
        make_mixed(own(10), generated(60), 30, share=0.5)
    assert isinstance(make_mixed(own(), generated(60), 2, share=0.5).own, DeviceLoader)


# What the page says


def test_commands_of_the_page_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from overproof.cli import call
    from overproof.run import execute as room
    from overproof.run.prepare import checked

    seen = []
    monkeypatch.setattr(room, "execute", lambda config, *_, **__: seen.append(checked(config)) or sys.exit(0))
    text = (ROOT / "docs" / "robust-training.md").read_text("utf-8")
    commands = re.findall(r"^overproof (.*)$", text, flags=re.MULTILINE)
    for command in commands:
        with pytest.raises(SystemExit):
            call(command.split())
    assert len(seen) == len(commands) >= 4


def test_the_page_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "robust-training.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert 0 <= float(capsys.readouterr().out) <= 1
    record = json.loads(Path("runs/robust/metrics.jsonl").read_text().splitlines()[-1])
    assert record["train"]["awp rise"] > 0
