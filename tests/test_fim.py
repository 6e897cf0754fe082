"""The method fim against its formula, its promises about cost and state, and the watch that evaluation keeps on it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import overproof
from overproof import console, fisher
from overproof.attacks import FGSM, OSSA, PGD, DeepFool, Transfer
from overproof.attacks.base import Attack
from overproof.config import resolve
from overproof.data import ImageSet, Splits, load_data
from overproof.errors import DerivativeError, UnknownNameError, UsageError
from overproof.evaluation import evaluate
from overproof.evaluation.watch import with_margin
from overproof.folder import RunFolder
from overproof.losses.divergences import cross_entropy
from overproof.losses.fisher_eigen import MANY
from overproof.methods import METHODS
from overproof.methods.ce import CE
from overproof.methods.composed import Composed
from overproof.methods.fim import FIM
from overproof.methods.fim_serving import see_what_serves
from overproof.report import write_report
from overproof.report.flatness import flatness_lines
from overproof.report.words import evaluation_text
from overproof.run.judging import evaluate_run
from overproof.run.robust import watched
from overproof.run.seeds import figure_of, figures
from overproof.testing import check_method, small_batch, small_model
from overproof.testing.doubles import Quantised, Saturated
from overproof.types import Batch, Progress

LATE = Progress(step=9, total=10)


def plain(seed: int = 0, classes: int = 3) -> nn.Sequential:
    """A network whose mode changes nothing."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, classes))


def calls(model: nn.Module) -> list[int]:
    """Fills with the batch size of every forward pass."""
    seen: list[int] = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    return seen


# The loss


@pytest.mark.parametrize(
    "options",
    [
        *({"estimator": name} for name in ("exact", "rademacher", "label", "hutchinson", "fd-kl")),
        *({"target": "lambda_max", "estimator": name} for name in ("exact", "power")),
        {"share": 0.4},
        {"every": 3, "detach_p": True},
        {"penalty_mode": "train", "ramp": 0.0},
        {"target": "lambda_max", "penalty_mode": "train", "power_steps": 2},
        {"mu": 0.0},
    ],
    ids=str,
)
def test_contract(options: dict[str, Any]) -> None:
    check_method(lambda student: FIM(student, **options), teacher=False)


def test_the_loss_is_the_formula() -> None:
    student, batch = plain().double(), small_batch(6)
    batch = Batch(batch.images.double(), batch.labels, batch.index)
    expected = {"trace": fisher.trace(student, batch.images), "lambda_max": fisher.lambda_max(student, batch.images)}
    for target, values in expected.items():
        output = FIM(student, mu=0.7, target=target, estimator="exact")(batch, LATE)
        assert set(output.losses) == {"ce", "fim"}
        torch.testing.assert_close(output.losses["fim"].detach(), 0.7 * values.mean())
        torch.testing.assert_close(
            output.losses["ce"].detach(), cross_entropy(student(batch.images), batch.labels).mean().detach()
        )
        torch.testing.assert_close(output.logs[target], values.mean())
        torch.testing.assert_close(output.logits.detach(), student(batch.images).detach())
        assert float(output.logs["max probability"]) == pytest.approx(
            float(student(batch.images).softmax(1).amax(1).mean().detach()), abs=1e-6
        )


def test_the_penalty_is_lowered_by_training() -> None:
    """Cross-entropy switched off by equal labels: what is left lowers the exact trace, whatever the estimator."""
    batch = small_batch(32)
    for estimator in ("exact", "rademacher", "label", "hutchinson", "fd-kl"):
        student = plain(2)
        with torch.no_grad():
            student[-1].weight.mul_(5)
        before = float(fisher.trace(student, batch.images).mean())
        objective, optimizer = (
            FIM(student, mu=1.0, estimator=estimator, ramp=0.0),
            torch.optim.SGD(student.parameters(), lr=0.05),
        )
        torch.manual_seed(0)
        for _ in range(30):
            optimizer.zero_grad()
            objective(batch, LATE).losses["fim"].backward()
            optimizer.step()
        assert float(fisher.trace(student, batch.images).mean()) < 0.6 * before, estimator


def test_weight_ramp_and_interval() -> None:
    batch = small_batch(6)
    student = plain()
    trace = float(fisher.trace(student, batch.images).mean())

    def weight(step: int, **options: Any) -> float:
        output = FIM(student, mu=0.5, estimator="exact", **options)(batch, Progress(step=step, total=100))
        return float(output.losses["fim"].detach()) / trace

    found = [weight(step, ramp=0.2) for step in (0, 5, 10, 20, 99)]
    assert found == pytest.approx([0.0, 0.125, 0.25, 0.5, 0.5], abs=1e-6)
    assert weight(0, ramp=0.0) == pytest.approx(0.5, rel=1e-5)
    assert [weight(step, ramp=0.0, every=4) for step in (40, 41, 42, 43, 44)] == pytest.approx([2.0, 0, 0, 0, 2.0], rel=1e-5)


def test_weight_zero_is_plain_training_to_the_bit() -> None:
    """Dropout draws the same masks, and not a bit of the weights differs."""
    data = load_data("digits", limit_train=200)

    def trained(method: str, **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(144, 10)
        )
        objective = METHODS.create(method, model, **options).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        images = data.train.images.float() / 255
        for step in range(6):
            rows = slice(20 * step, 20 * step + 20)
            torch.manual_seed(step)
            optimizer.zero_grad()
            batch = Batch(images[rows], data.train.labels[rows], torch.arange(20))
            sum(objective(batch, Progress(step=step, total=6)).losses.values()).backward()
            optimizer.step()
        return model.state_dict()

    expected = trained("ce")
    same = (trained("fim", mu=0.0), trained("fim", mu=1.0, every=1000, ramp=1.0))  # at step 0 the weight is still 0
    for found in same:
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert not torch.equal(trained("fim", mu=1.0, ramp=0.0)["5.weight"], expected["5.weight"])


# What it costs, and in which mode


def test_one_forward_pass_serves_both_where_it_can() -> None:
    batch = small_batch(8)
    student = plain().train()
    seen = calls(student)
    FIM(student)(batch, LATE)
    assert seen == [2, 2, 2, 8]  # two images to see whether the operators serve, and whether the mode matters
    still = nn.Sequential(plain(), nn.Dropout(0.0)).train()  # a layer that could, and does nothing
    seen = calls(still)
    for options, expected in (({}, [8]), ({"share": 0.3}, [8, 3]), ({"estimator": "fd-kl"}, [8, 8]), ({"mu": 0.0}, [8])):
        objective = FIM(still, **options)
        objective(batch, LATE)
        seen.clear()
        objective(batch, LATE)
        assert seen == expected, options


class Rolling(nn.Module):
    """Dropout that no layer tells of."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("options", [{}, {"share": 0.5}, {"estimator": "fd-kl"}, {"penalty_mode": "train"}], ids=str)
def test_the_penalty_leaves_the_mode_of_the_cross_entropy(options: dict[str, Any]) -> None:
    """However a network drops units, the labels are learned as without the penalty."""
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), Rolling(), nn.Linear(12, 3)).train()
    batch = small_batch(8)
    objective = FIM(student, **options)
    objective(batch, LATE)
    torch.manual_seed(1)
    found = objective(batch, LATE)
    modes = [torch.equal(found.logits, student.eval()(batch.images))]
    assert not any(modes)
    torch.manual_seed(1)
    torch.testing.assert_close(found.losses["ce"], CE(student.train())(batch, LATE).losses["ce"])


@pytest.mark.parametrize(
    "options",
    [{}, {"share": 0.5}, {"estimator": "fd-kl", "draws": 3}, {"estimator": "hutchinson", "draws": 3}, {"estimator": "exact"}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_running_statistics_are_those_of_the_cross_entropy(mode: Any, options: dict[str, Any]) -> None:
    student = small_model().train()
    student[3].p = 0.0
    alone, batch = copy.deepcopy(student), small_batch(8)
    objective = FIM(student, mu=1.0, penalty_mode=mode, **options)
    for _ in range(2):
        sum(objective(batch, LATE).losses.values()).backward()
        CE(alone)(batch, LATE)
    for (name, one), other in zip(student.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"estimator": "exact", "draws": 2}, "draws"),
        ({"step": 0.1}, "step"),
        ({"power_steps": 3}, "power_steps"),
        ({"target": "lambda_max", "draws": 4, "step": 0.1}, "draws, step"),
        ({"target": "lambda_max", "estimator": "exact", "power_steps": 2}, "power_steps"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: dict[str, Any], names: str) -> None:
    with pytest.raises(UsageError, match=f"fim: {names} would do nothing"):
        FIM(plain(), **options)


@pytest.mark.parametrize(
    "options", [{"estimator": "fd-kl"}, {"target": "lambda_max"}, {"target": "lambda_max", "estimator": "exact"}, {}], ids=str
)
def test_weights_of_the_classes_may_carry_no_gradient(options: dict[str, Any]) -> None:
    """The value is the same, the gradient another one: with p held fixed it is that of sum_k p_k ||s_k||^2."""
    found = []
    for detach in (False, True):
        student = plain().double()
        batch = small_batch(8)
        objective = FIM(student, mu=1.0, detach_p=detach, **options)
        batch = Batch(batch.images.double(), batch.labels, batch.index)
        torch.manual_seed(2)
        loss = objective(batch, LATE).losses["fim"]
        found.append((float(loss), torch.autograd.grad(loss, student[-1].weight)[0]))
    assert found[0][0] == pytest.approx(found[1][0])
    assert not torch.allclose(found[0][1], found[1][1])


def test_the_penalty_sees_batchnorm_as_evaluation_does() -> None:
    student, batch = small_model().train(), small_batch(8)
    objective = FIM(student, mu=1.0, estimator="exact").train()
    objective(batch, LATE)
    before = copy.deepcopy(student)
    seen = calls(student)
    output = objective(batch, LATE)
    assert seen == [8, 8]
    assert int(student[1].num_batches_tracked) == int(before[1].num_batches_tracked) + 1
    assert student.training
    assert student[1].training
    values = fisher.trace(student.eval(), batch.images)  # with the statistics after the pass of the cross-entropy
    torch.testing.assert_close(output.losses["fim"].detach(), values.mean())


def test_the_batch_coupled_penalty_on_request() -> None:
    student, batch = (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).train(),
        small_batch(8),
    )
    objective = FIM(student, mu=1.0, estimator="exact", penalty_mode="train").train()
    objective(batch, LATE)
    reference = copy.deepcopy(student)
    seen = calls(student)
    output = objective(batch, LATE)
    assert seen == [8]
    torch.testing.assert_close(
        output.losses["fim"].detach(), fisher.trace(reference, batch.images, batch_statistics=True).mean()
    )


def test_the_share_is_drawn_anew_and_right_on_average() -> None:
    student, batch = plain().double(), small_batch(20)
    batch = Batch(batch.images.double(), batch.labels, batch.index)
    objective = FIM(student, mu=1.0, estimator="exact", share=0.5)
    torch.manual_seed(0)
    found = torch.stack([objective(batch, LATE).losses["fim"].detach() for _ in range(200)])
    assert float(found.std()) > 0
    exact = fisher.trace(student, batch.images).mean()
    assert float((found.mean() - exact).abs()) < 4 * float(found.std()) / 200**0.5


@pytest.mark.parametrize("estimator", ["exact", "rademacher", "hutchinson"])
def test_half_precision_does_not_touch_the_penalty(estimator: Any) -> None:
    student, batch = plain(), small_batch(8)
    objective = FIM(student, mu=1.0, estimator=estimator)
    torch.manual_seed(0)
    expected = objective(batch, LATE).losses["fim"].detach()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = objective(batch, LATE)
    torch.testing.assert_close(output.losses["fim"].detach(), expected)
    assert output.logits.dtype == torch.bfloat16
    sum(output.losses.values()).backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in student.parameters())


def test_finite_differences_stay_in_half_precision() -> None:
    student, batch = plain(), small_batch(8)
    dtypes: list[torch.dtype] = []
    student.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    objective = FIM(student, mu=1.0, estimator="fd-kl", step=0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective(batch, LATE)
        dtypes.clear()
        found = objective(batch, LATE).losses["fim"].detach()
    assert set(dtypes) == {torch.bfloat16}
    assert 0.1 < float(found / fisher.trace(student, batch.images).mean()) < 10


# The warm start


def test_the_iteration_goes_on_where_it_ended() -> None:
    student, batch = plain(3).double(), small_batch(6)
    batch = Batch(batch.images.double(), batch.labels, torch.tensor([4, 0, 9, 2, 7, 5]))
    exact = fisher.lambda_max(student, batch.images).mean()
    objective = FIM(student, mu=1.0, target="lambda_max")
    gaps = [float(exact - objective(batch, LATE).losses["fim"].detach()) / float(exact) for _ in range(60)]
    assert gaps[0] > 1e-5
    assert abs(gaps[-1]) < 0.01 * gaps[0]
    assert objective.memory.rows.shape == (10, 3)
    assert not objective.memory.rows[[1, 3, 6, 8]].any()
    torch.testing.assert_close(objective.memory.rows[batch.index].norm(dim=1), torch.ones(6))
    one = Batch(batch.images[2:3], batch.labels[2:3], batch.index[2:3])  # found again by its index
    alone = objective(one, LATE).losses["fim"].detach()
    torch.testing.assert_close(alone, fisher.lambda_max(student, one.images).mean(), rtol=1e-3, atol=0)


def test_the_memory_is_kept_in_checkpoints() -> None:
    student, batch = plain(), small_batch(6)
    objective = FIM(student, target="lambda_max")
    objective(batch, LATE)
    state = copy.deepcopy(objective.trained_state())
    other = FIM(plain(5), target="lambda_max")
    other.load_trained_state(state)
    assert torch.equal(other.memory.rows, objective.memory.rows)
    first, second = (part(batch, LATE).losses["fim"] for part in (objective, other))
    assert torch.equal(first, second)
    assert FIM(student).memory is None
    assert FIM(student, target="lambda_max", estimator="exact").memory is None


def test_the_gradient_of_the_largest_eigenvalue() -> None:
    """With q held fixed at the eigenvector it is the exact one: the same as through the exact eigenvalue's own estimator."""
    student, batch = plain(3).double(), small_batch(4)
    batch = Batch(batch.images.double(), batch.labels, batch.index)
    found = []
    for options in ({"estimator": "exact"}, {"estimator": "power", "power_steps": 500}):
        loss = FIM(student, mu=1.0, target="lambda_max", **options)(batch, LATE).losses["fim"]
        found.append(torch.autograd.grad(loss, list(student.parameters())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=1e-4)


# What is refused, and what is said


KERNEL = "_scaled_dot_product_flash_attention_for_cpu"


class Attention(nn.Module):
    """Its fast kernel has no forward-mode derivative, and no derivative of the derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(len(x), 1, 8, 8)
        return self.net(nn.functional.scaled_dot_product_attention(rows, rows, rows).flatten(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, rf"estimator='rademacher' does not work through {KERNEL}_backward.*Use estimator='fd-kl'"),
        ({"estimator": "exact"}, rf"estimator='exact' does not work through {KERNEL}_backward.*Use estimator='fd-kl'"),
        ({"estimator": "hutchinson"}, rf"estimator='hutchinson' does not work through {KERNEL}.*Use estimator='fd-kl'"),
        ({"target": "lambda_max"}, r"estimator='power'.*Use target='trace' and estimator='fd-kl'"),
    ],
)
def test_an_operator_that_does_not_serve_is_named_before_the_first_step(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DerivativeError, match=message):
        FIM(Attention(), **options)(small_batch(4), LATE)


def test_what_the_message_offers_works() -> None:
    student = Attention()
    loss = FIM(student, estimator="fd-kl")(small_batch(4), LATE).losses["fim"]
    loss.backward()
    assert bool(student.net.weight.grad.isfinite().all())

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2 * gradient

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = plain()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(Once.apply(x))

    with pytest.raises(DerivativeError, match="custom autograd.Function.*Use estimator='rademacher'"):
        FIM(Own(), estimator="hutchinson")(small_batch(4), LATE)
    FIM(Own())(small_batch(4), LATE).losses["fim"].backward()


def test_only_what_works_is_offered() -> None:
    """Forward mode fails in a way of its own: that does not hide the message."""

    class Stubborn(Attention):
        def forward(self, x: Tensor) -> Tensor:
            if torch.autograd.forward_ad._current_level >= 0:
                raise RuntimeError("something else")
            return super().forward(x)

    with pytest.raises(DerivativeError, match="Use estimator='fd-kl'"):
        FIM(Stubborn())(small_batch(4), LATE)
    with pytest.raises(RuntimeError, match="something else"):
        FIM(Stubborn(), estimator="hutchinson")(small_batch(4), LATE)


def test_the_look_at_the_operators_leaves_no_trace() -> None:
    student, batch = small_model().train(), small_batch(8)
    before = copy.deepcopy(student.state_dict())
    objective = FIM(student)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    see_what_serves(student, objective.measure, batch.images[:2])
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


def test_batchnorm_without_statistics_is_refused() -> None:
    student = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(UsageError, match=r"layer '0'.*penalty_mode='train'"):
        FIM(student)(small_batch(4), LATE)
    FIM(student, penalty_mode="train").train()(small_batch(4), LATE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mu": -0.1}, "mu >= 0"),
        ({"share": 0.0}, "share in"),
        ({"every": 0}, "every >= 1"),
        ({"ramp": 1.5}, "ramp in"),
        ({"target": "determinant"}, "target trace or lambda_max"),
        ({"penalty_mode": "off"}, "penalty_mode eval or train"),
        ({"estimator": "power"}, "cannot serve target='trace'"),
        ({"target": "lambda_max", "estimator": "label"}, "known are exact, power"),
        ({"draws": 0}, "draws >= 1"),
        ({"target": "lambda_max", "power_steps": 0}, "steps >= 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FIM(plain(), **options)


def test_a_flattened_network_is_a_concern() -> None:
    student, batch = plain(), small_batch(8)
    objective = FIM(student, mu=1e6)
    assert objective.concerns({}) == {}
    nn.init.zeros_(student[-1].weight)
    nn.init.zeros_(student[-1].bias)
    objective(batch, Progress(step=0, total=10))
    assert objective.concerns({}) == {}, "the ramp is not over"
    objective(batch, LATE)
    assert "mu=1e+06 flattens it. Lower method.mu" in objective.concerns({"max probability": 0.34})["fim"]
    slow = FIM(objective.student, mu=1e6, ramp=1.0)
    slow(batch, Progress(step=8, total=10))
    assert slow.concerns({"max probability": 0.34}) == {}
    slow(batch, Progress(step=9, total=10))
    assert "flattens" in slow.concerns({"max probability": 0.34})["fim"]
    sure = FIM(plain(), mu=1.0)
    with torch.no_grad():
        sure.student[-1].weight.mul_(30)
    sure(batch, LATE)
    assert sure.concerns({"max probability": 0.99}) == {}


def test_a_weight_that_flattens_is_told_during_training(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = load_data("digits", limit_train=120, limit_test=60)
    with console.quiet_unless(True):
        console.set_quiet(False)
        run = overproof.train(
            "lenet5", data, method="fim", mu=1e4, epochs=2, batch_size=30, lr=0.05, clip=1.0, out=tmp_path / "flat"
        )
    assert "flattens it" in capsys.readouterr().err
    assert any("almost alike" in text for text in run.evaluations["test-best"]["warnings"])


# As a part of other methods


def test_as_a_term_beside_distillation() -> None:
    student, teacher, batch = plain(), plain(7), small_batch(8)
    options = {"fim": {"mu": 0.3, "estimator": "exact"}}
    objective = Composed(student, teacher, methods=("kd", "fim"), weights=(1.0, 2.0), options=options)
    losses = objective(batch, LATE).losses
    assert set(losses) == {"ce", "kd", "fim"}
    torch.testing.assert_close(losses["fim"].detach(), 2 * 0.3 * fisher.trace(student, batch.images).mean())
    alone = METHODS.create("kd", student, teacher)(batch, LATE).losses["kd"]
    torch.testing.assert_close(losses["kd"], alone)
    sum(losses.values()).backward()
    assert all(float(parameter.grad.norm()) > 0 for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    check_method(lambda student, teacher: Composed(student, teacher, methods=("kd", "fim"), options=options))
    with torch.no_grad():
        for parameter in student[-1].parameters():
            parameter.zero_()
    objective(batch, LATE)
    assert "flattens" in objective.concerns({"max probability": 0.34})["fim"]


def test_a_part_remembers_too() -> None:
    options = {"fim": {"target": "lambda_max"}}
    objective = Composed(plain(), plain(7), methods=("at", "fim"), options=options)
    objective(small_batch(8), LATE)
    state = copy.deepcopy(objective.trained_state())
    (name,) = (name for name in state if name.endswith("memory.rows"))
    assert state[name].shape == (8, 3)
    other = Composed(plain(2), plain(7), methods=("at", "fim"), options=options)
    other.load_trained_state(state)
    assert torch.equal(other.trained_state()[name], state[name])


# The watch


@pytest.fixture(scope="module")
def set_of(digits: Splits) -> tuple[nn.Module, ImageSet]:
    torch.manual_seed(0)
    model = overproof.create_model("lenet5", 10, 1, 8)
    objective, optimizer = CE(model), torch.optim.Adam(model.parameters(), lr=3e-3)
    images = digits.train.images.float() / 255
    for step in range(150):
        rows = torch.arange(64 * step, 64 * step + 64) % len(images)
        optimizer.zero_grad()
        objective(Batch(images[rows], digits.train.labels[rows], rows), Progress()).losses["ce"].backward()
        optimizer.step()
    return model.eval(), digits.test.subset(range(80))


def test_every_image_has_its_scores(set_of: tuple[nn.Module, ImageSet]) -> None:
    model, data = set_of
    result = evaluate(model, data, fisher=True, batch_size=32)
    images = data.images.float() / 255
    for name, tool in (("trace", fisher.trace), ("lambda_max", fisher.lambda_max)):
        expected = tool(model, images).numpy()
        np.testing.assert_allclose(result.samples[f"fisher/{name}"], expected, rtol=2e-3, atol=1e-5)
        middle = result.summary["fisher"][name]
        assert middle["mean"] == pytest.approx(float(expected.mean()), rel=1e-3)
        assert middle["median"] == pytest.approx(float(np.median(expected)), rel=1e-2, abs=1e-5)
    assert result.summary["fisher"]["max_probability"]["mean"] == pytest.approx(float(result.samples["confidence"].mean()))
    assert result.summary["fisher"]["samples"] == 80
    assert result.summary["fisher"]["pairs"] == {}
    without = evaluate(model, data)
    assert without.summary["fisher"] is None
    assert not any(name.startswith("fisher/") for name in without.samples)


def test_attacks_on_the_margin_stand_beside_those_on_the_cross_entropy(set_of: tuple[nn.Module, ImageSet]) -> None:
    made = with_margin({"pgd": PGD(eps=0.1, steps=7), "fgsm": FGSM(eps=0.1), "dlr": PGD(loss="dlr")})
    assert list(made) == ["pgd", "pgd-margin", "fgsm", "dlr"]
    assert made["pgd-margin"] == PGD(eps=0.1, steps=7, loss="margin")
    assert with_margin({"ossa": OSSA(eps=0.3)})["pgd-margin"] == PGD(eps=0.3, norm="L2", steps=20, loss="margin")
    own: dict[str, Attack] = {"pgd": PGD(), "pgd-margin": PGD(loss="margin", steps=3)}
    assert with_margin(own) == own
    assert with_margin({}) == {}
    several = with_margin({"a": FGSM(eps=0.1), "b": FGSM(eps=0.2), "c": FGSM(eps=0.1), "pgd-margin": PGD(loss="dlr")})
    assert several == {
        "a": FGSM(eps=0.1),
        "b": FGSM(eps=0.2),
        "c": FGSM(eps=0.1),
        "pgd-margin": PGD(loss="dlr"),
        "pgd-margin-2": PGD(eps=0.1, steps=20, loss="margin"),
        "pgd-margin-3": PGD(eps=0.2, steps=20, loss="margin"),
    }
    model, data = set_of
    attacks = {"pgd": PGD(eps=0.05), "transfer": Transfer(inner=PGD(eps=0.05), source=plain(1, 10))}
    result = evaluate(model, data, attacks=attacks, fisher=True, sanity=0, curve=[0.0, 0.05])
    found = result.summary["fisher"]
    assert found["pairs"]["pgd"] == {"ce": result.robust["pgd"], "margin": result.robust["pgd-margin"]}
    own_best = min(result.robust["pgd"], result.robust["pgd-margin"])
    assert found["transfer"]["transfer"] == {"robust": result.robust["transfer"], "own": own_best}
    assert result.summary["curve"]["attack"] == "pgd"
    text = evaluation_text(result.summary)
    assert "Fisher information at 80 images: trace mean" in text
    assert "robust under cross-entropy and margin: pgd" in text
    assert "robust against images crafted elsewhere: transfer" in text
    assert f"of {int(80 * result.clean + 0.5)}" in text


def test_a_saturated_model_is_found_out(set_of: tuple[nn.Module, ImageSet]) -> None:
    model, data = set_of
    hidden = Saturated(model, 1000.0)
    result = evaluate(
        hidden,
        data,
        attacks={"pgd": PGD(eps=0.2), "transfer": Transfer(inner=PGD(eps=0.2), source=model)},
        fisher=True,
        sanity=0,
    )
    assert result.summary["fisher"]["trace"]["median"] < 1e-6
    assert any("the softmax is saturated" in text for text in result.summary["warnings"])
    pair = result.summary["fisher"]["pairs"]["pgd"]
    assert pair["ce"] - pair["margin"] > 0.05
    only = evaluate(
        hidden, data, attacks={"fgsm": FGSM(eps=0.2), "transfer": Transfer(inner=PGD(eps=0.2), source=model)}, sanity=0
    )
    assert only.robust["transfer"] < only.robust["fgsm"], "the test above would say nothing"


def test_gradients_that_mislead_are_found_out(set_of: tuple[nn.Module, ImageSet]) -> None:
    model, data = set_of
    attacks = {"pgd": PGD(eps=0.2), "transfer": Transfer(inner=PGD(eps=0.2), source=model)}
    result = evaluate(Quantised(model, 64), data, attacks=attacks, fisher=True, sanity=0)
    assert result.summary["fisher"]["trace"]["mean"] == 0  # rounding has a gradient, and it is zero
    assert any("its own gradients mislead" in text for text in result.summary["warnings"])


def test_a_flat_model_is_no_robust_model(set_of: tuple[nn.Module, ImageSet]) -> None:
    model, data = set_of
    warnings = evaluate(Saturated(model, 0.001), data, fisher=True).summary["warnings"]
    assert any("almost alike" in text and "method.mu" in text for text in warnings)
    assert not any("almost alike" in text for text in evaluate(model, data, fisher=True).summary["warnings"])


def test_where_it_cannot_be_measured_the_evaluation_says_so() -> None:
    torch.manual_seed(0)
    data = ImageSet(torch.rand(6, 1, 4, 4), torch.zeros(6, dtype=torch.long))

    class Blind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach().flatten(1)

    wide = nn.Sequential(nn.Flatten(), nn.Linear(16, MANY + 1))
    mixing = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(16, 3))
    for model in (Blind(), wide, mixing):
        result = evaluate(model, data, fisher=True)
        assert result.summary["fisher"]["trace"] is None
        assert np.isnan(result.samples["fisher/trace"]).all()
        assert any("was not measured" in text for text in result.summary["warnings"])
        assert "not measured" in evaluation_text(result.summary)


def test_an_interrupted_evaluation_belongs_to_its_question(set_of: tuple[nn.Module, ImageSet], tmp_path: Path) -> None:
    model, data = set_of
    partial = tmp_path / "partial.npz"
    evaluate(model, data, resume=partial)
    first = evaluate(model, data, fisher=True, resume=partial)
    second = evaluate(model, data, fisher=True, resume=partial)
    np.testing.assert_array_equal(first.samples["fisher/trace"], second.samples["fisher/trace"])
    assert np.isfinite(first.samples["fisher/trace"]).all()


def test_runs_with_a_penalty_are_watched(tmp_path: Path) -> None:
    data = load_data("digits", limit_train=100, limit_test=20)
    attacks = {"pgd": PGD(eps=0.05, steps=2)}
    options: dict[str, Any] = {"epochs": 1, "batch_size": 25, "attacks": attacks}
    run = overproof.train("lenet5", data, method="fim", mu=0.01, out=tmp_path / "fim", **options)
    summary = run.evaluations["test-best"]
    assert {"pgd", "pgd-margin"} == set(summary["attacks"])
    found = figures(run.folder)
    assert {"trace", "trace median", "lambda_max", "lambda_max median", "max_probability", "pgd fooling"} <= set(found)
    assert found["pgd fooling"] == summary["attacks"]["pgd"]["success_rate"]
    record = run.folder.metrics[-1]["train"]
    assert math.isfinite(record["max probability"])
    plain_run = overproof.train("lenet5", data, method="ce", out=tmp_path / "ce", epochs=1, batch_size=25)
    assert plain_run.evaluations["test-best"]["fisher"] is None
    page = write_report([run.path, plain_run.path], tmp_path / "report.html").read_text("utf-8")
    assert "Fisher information at 20 images: trace mean" in page
    composed = overproof.distill(
        "lenet5", plain_run.path, "digits", method=["kd", "fim"], out=tmp_path / "both", epochs=1, batch_size=25,
        data_options={"limit_train": 50, "limit_test": 20},
    )  # fmt: skip
    assert composed.evaluations["test-best"]["fisher"] is not None
    again = evaluate_run(composed.path, attacks={}, limit=10)
    assert again.summary["fisher"]["samples"] == 10
    assert again.summary["protocol"]["fisher"] is True
    assert evaluate_run(composed.path, attacks={}, limit=10, fisher=False).summary["fisher"] is None


def test_one_search_for_the_smallest_change_serves_every_radius(set_of: tuple[nn.Module, ImageSet], tmp_path: Path) -> None:
    model, data = set_of
    whole = evaluate(model, data, attacks={"deepfool": DeepFool()}, sanity=0)
    whole.save(tmp_path, "test-best")
    folder = RunFolder(tmp_path)
    sizes = whole.samples["deepfool/size"][whole.samples["prediction"] == whole.samples["label"]]
    for eps in (0.0, float(np.quantile(sizes, 0.3)) + 1e-4, float(np.quantile(sizes, 0.7)) + 1e-4):
        bounded = evaluate(model, data, attacks={"deepfool": DeepFool(eps=eps)}, sanity=0) if eps else None
        expected = bounded.summary["attacks"]["deepfool"]["success_rate"] if bounded else 0.0
        assert figure_of(folder, f"deepfool fooling within {eps}") == expected
    assert figure_of(folder, "clean") == whole.clean
    with pytest.raises(UnknownNameError, match="Did you mean 'deepfool'"):
        figure_of(folder, "deepfol fooling within 1")
    with pytest.raises(UnknownNameError, match="Did you mean 'clean'"):
        figure_of(folder, "cleam")


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"method": "fim"}, True),
        ({"method": "kd,fim"}, True),
        ({"method": "kd,at"}, False),
        ({"method": "ce"}, False),
        ({"method": "ce", "evaluation": {"fisher": True}}, True),
        ({"method": "fim", "evaluation": {"fisher": False}}, False),
    ],
)
def test_who_is_watched(table: dict[str, Any], expected: bool) -> None:
    assert watched(resolve(table)) is expected


def test_old_records_have_no_flatness() -> None:
    assert flatness_lines(None) == []
    assert flatness_lines({"trace": {"mean": "?"}, "pairs": {"pgd": 3}})[0].count("not measured") == 3


# Real images


def test_digits_become_flatter_and_harder_to_fool() -> None:
    """scikit-learn's digits, LeNet, a short training: the margins hold over three seeds. The recipe fim-digits measures the rest."""
    data, steps = load_data("digits", validation=0), 450
    train, test = data.train.images.float() / 255, (data.test.images.float() / 255, data.test.labels)
    found = {}
    for name, options in (("ce", {}), ("fim", {"mu": 0.05})):
        torch.manual_seed(0)
        model = overproof.create_model("lenet5", 10, 1, 8)
        method, optimizer = METHODS.create(name, model, **options), torch.optim.Adam(model.parameters(), lr=2e-3)
        for step in range(steps):
            rows = torch.arange(32 * step, 32 * step + 32) % len(train)
            optimizer.zero_grad()
            batch = Batch(train[rows], data.train.labels[rows], rows)
            sum(method(batch, Progress(step=step, total=steps)).losses.values()).backward()
            optimizer.step()
        found[name] = evaluate(model, test, attacks={"fgsm": FGSM(eps=0.1), "ossa": OSSA(eps=0.5)}, fisher=True, sanity=0)
    ce, fim = found["ce"], found["fim"]
    assert fim.clean > 0.8
    assert fim.summary["fisher"]["lambda_max"]["mean"] < 0.65 * ce.summary["fisher"]["lambda_max"]["mean"]
    for name in ("fgsm", "ossa"):
        assert fim.summary["attacks"][name]["success_rate"] < ce.summary["attacks"][name]["success_rate"] - 0.07, name
