"""Robust students of robust teachers: ARD, RSLAD, AKD2, IAD-I and -II, AdaAD, AdaIAD, and how far the teacher is trusted."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import overproof
from overproof.config import resolve
from overproof.data import Splits
from overproof.errors import UnknownNameError, UsageError
from overproof.folder import RunFolder
from overproof.losses.reliability import introspection, log_probability, teacher_case, trust
from overproof.methods import METHODS
from overproof.methods.adaad import AdaAD, AdaIAD
from overproof.methods.akd2 import AKD2
from overproof.methods.ard import ARD
from overproof.methods.iad import IAD1, IAD2
from overproof.methods.objective import Objective
from overproof.methods.pgd_at import PGDAT
from overproof.methods.rslad import RSLAD
from overproof.report import write_report
from overproof.run.execute import execute, resume
from overproof.run.recipes import read_recipe
from overproof.testing import check_method, small_batch, small_model
from overproof.types import Batch, Progress

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("ard", "rslad", "akd2", "iad-1", "iad-2", "adaad", "adaiad")
DOUBTING = {"iad-1": {"begin": 0}, "iad-2": {"begin": 0}, "adaiad": {"begin": 0}}
ATTACK = {"eps": 0.1, "step_size": 0.04, "steps": 3}
NOW, LATER = Progress(), Progress(epoch=99)


def linear(seed: int, classes: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, classes)).double()


def doubles(count: int = 5, classes: int = 3) -> tuple[Batch, Tensor]:
    """A batch in float64, and images a little way off."""
    generator = torch.Generator().manual_seed(4)
    images = torch.rand(count, 1, 4, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (count,), generator=generator)
    other = (images + 0.4 * torch.rand(images.shape, generator=generator, dtype=torch.float64) - 0.2).clamp(0, 1)
    return Batch(images, labels, torch.arange(count)), other


def given(objective: Objective, adversarial: Tensor) -> Objective:
    """The method with its attack replaced by a known answer."""
    objective.perturb = lambda loss, images: adversarial
    return objective


def make(name: str, *, student: nn.Module | None = None, teacher: nn.Module | None = None, **options: Any) -> Objective:
    """The method over small networks, its teacher doubted from the beginning."""
    networks = [student or small_model(0), teacher or small_model(1)]
    networks += [small_model(2) for _ in METHODS.get(name).positional()[2:]]
    return METHODS.create(name, *networks, **{**DOUBTING.get(name, {}), **ATTACK, **options})


def kl(target: Tensor, logits: Tensor, tau: float = 1.0) -> Tensor:
    p, log_q = (target / tau).softmax(1), (logits / tau).log_softmax(1)
    return (p * ((target / tau).log_softmax(1) - log_q)).sum(1)


def total(objective: Objective, batch: Batch, progress: Progress = LATER) -> Tensor:
    return sum(objective(batch, progress).losses.values())


class Constant(nn.Module):
    """A teacher that says the same about every image."""

    def __init__(self, *row: float) -> None:
        super().__init__()
        self.register_buffer("row", torch.tensor(row, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        return self.row.expand(len(images), -1)


# Trust, introspection and the three cases


def test_alpha_of_known_probabilities() -> None:
    p = torch.tensor([0.9, 0.5, 0.1, 0.01, 0.001], dtype=torch.float64)
    logits = torch.stack([p, 1 - p], dim=1).log()
    labels = torch.zeros(5, dtype=torch.long)
    alpha = trust(logits, labels, beta=0.1)
    torch.testing.assert_close(alpha, p**0.1, rtol=1e-12, atol=0)
    expected = torch.tensor([0.9895, 0.933, 0.794, 0.631, 0.501], dtype=torch.float64)
    torch.testing.assert_close(alpha, expected, atol=5e-4, rtol=0)
    assert torch.equal(trust(logits, labels, beta=0), torch.ones(5, dtype=torch.float64))
    assert bool((alpha.diff() < 0).all())
    assert bool((trust(logits, labels, beta=0.5) < alpha).all())


def test_alpha_at_the_ends_carries_no_gradient() -> None:
    logits = torch.tensor([[1e4, 0.0], [-1e4, 0.0], [0.0, 0.0]], requires_grad=True)
    labels = torch.zeros(3, dtype=torch.long)
    alpha = trust(logits, labels, beta=0.1)
    assert not alpha.requires_grad
    torch.testing.assert_close(alpha, torch.tensor([1.0, 0.0, 0.5**0.1]))
    assert torch.equal(trust(logits, labels, beta=0), torch.ones(3))


def test_hard_cases_are_not_trusted_at_all() -> None:
    attacked = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    clean = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    labels = torch.zeros(3, dtype=torch.long)
    soft, hard = trust(attacked, labels, beta=0.3), trust(attacked, labels, beta=0.3, clean=clean)
    assert torch.equal(hard, soft * torch.tensor([1.0, 0.0, 1.0]))
    mixed = F.one_hot(labels, 2).float() * 0.8 + 0.1
    assert torch.equal(trust(attacked, mixed, beta=0.0, clean=clean), torch.tensor([1.0, 0.0, 1.0]))


def test_probability_of_soft_labels_and_in_half_precision() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    one_hot = F.one_hot(labels, 4).double()
    torch.testing.assert_close(log_probability(logits, one_hot), log_probability(logits, labels), rtol=1e-12, atol=1e-14)
    smooth = 0.7 * one_hot + 0.3 / 4
    torch.testing.assert_close(log_probability(logits, smooth), (smooth * logits.softmax(1)).sum(1).log())
    assert log_probability(logits.bfloat16(), labels).dtype == torch.float32
    assert float(log_probability(torch.tensor([[-500.0, 0.0]]), torch.tensor([0]))) == -500.0


def test_introspection_and_what_detaching_changes() -> None:
    torch.manual_seed(0)
    clean, adversarial = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    alpha = torch.rand(5, dtype=torch.float64)
    values = introspection(clean, adversarial, alpha)
    torch.testing.assert_close(values, (1 - alpha) * kl(clean, adversarial), rtol=1e-12, atol=0)
    assert torch.equal(values, introspection(clean, adversarial, alpha, detach=True))
    through = torch.autograd.grad(values.sum(), (clean, adversarial))
    (beside,) = torch.autograd.grad(introspection(clean, adversarial, alpha, detach=True).sum(), adversarial)
    assert float(through[0].abs().sum()) > 0.1
    torch.testing.assert_close(through[1], beside)
    expected = (1 - alpha)[:, None] * (adversarial.softmax(1) - clean.softmax(1))
    torch.testing.assert_close(beside, expected.detach(), rtol=1e-10, atol=1e-14)


def test_the_three_cases() -> None:
    right, wrong = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    clean, adversarial = torch.stack([right, right, wrong, wrong]), torch.stack([right, wrong, wrong, right])
    labels = torch.zeros(4, dtype=torch.long)
    assert teacher_case(clean, adversarial, labels).tolist() == [0, 1, 2, 0]
    assert teacher_case(clean, adversarial, F.one_hot(labels, 2).float()).tolist() == [0, 1, 2, 0]


# The formulas


@pytest.mark.parametrize(
    "options",
    [{}, {"kd_weight": 0.6, "temperature": 3.0}, {"weight_teacher": True}, {"detach_self": True}, {"hard_cases": True}],
    ids=str,
)
@pytest.mark.parametrize("kind", [IAD1, AdaIAD])
def test_iad_1_and_adaiad_are_their_formulas(kind: type, options: dict[str, Any]) -> None:
    student, teacher, (batch, other) = linear(0), linear(1), doubles()
    value = total(given(kind(student, teacher, begin=0, beta=0.4, **options), other), batch)
    s, t = (lambda x: student(x)), (lambda x: teacher(x).detach())
    c, tau = options.get("kd_weight", 1.0), options.get("temperature", 1.0)
    alpha = t(other).softmax(1).gather(1, batch.labels[:, None]).squeeze(1) ** 0.4
    if options.get("hard_cases"):
        alpha = alpha * (t(batch.images).argmax(1) == batch.labels)
        assert 0 < int((alpha == 0).sum()) < len(alpha), "the example must have both"
    gap = kl(t(batch.images if kind is IAD1 else other), s(other), tau)
    own = s(batch.images).detach() if options.get("detach_self") else s(batch.images)
    expected = c * tau**2 * ((alpha * gap) if options.get("weight_teacher") else gap).mean()
    expected = expected + c * ((1 - alpha) * kl(own, s(other))).mean()
    expected = expected + (1 - c) * F.cross_entropy(s(batch.images), batch.labels)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    found, wanted = (torch.autograd.grad(loss, list(student.parameters())) for loss in (value, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"weight_teacher": False}, {"hard_cases": True}], ids=str)
def test_iad_2_is_its_formula(options: dict[str, Any]) -> None:
    student, teacher, standard, (batch, other) = linear(0), linear(1), linear(2), doubles()
    value = total(given(IAD2(student, teacher, standard, begin=0, beta=0.4, **options), other), batch)
    s, t, tau = student(other), teacher(other).detach(), options.get("temperature", 1.0)
    alpha = t.softmax(1).gather(1, batch.labels[:, None]).squeeze(1) ** 0.4
    if options.get("hard_cases"):
        alpha = alpha * (teacher(batch.images).argmax(1) == batch.labels)
    middle = (alpha if options.get("weight_teacher", True) else 1) * kl(t, s, tau) + (1 - alpha) * kl(student(batch.images), s)
    expected = 0.25 * F.cross_entropy(s, batch.labels) + 0.5 * tau**2 * middle.mean()
    expected = expected + 0.25 * tau**2 * kl(standard(other).detach(), s, tau).mean()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    found, wanted = (torch.autograd.grad(loss, list(student.parameters())) for loss in (value, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-13)


def test_akd2_is_its_formula_and_without_teachers_adversarial_training() -> None:
    student, teacher, standard, (batch, other) = linear(0), linear(1), linear(2), doubles()
    losses = given(AKD2(student, teacher, standard), other)(batch, NOW).losses
    s = student(other)
    torch.testing.assert_close(losses["adversarial"], 0.3 * F.cross_entropy(s, batch.labels), rtol=1e-12, atol=0)
    torch.testing.assert_close(losses["teacher"], 0.6 * 4 * kl(teacher(other), s, 2.0).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(losses["standard"], 0.1 * 4 * kl(standard(other), s, 2.0).mean(), rtol=1e-12, atol=0)
    # The cross-entropy of soft labels differs by their entropy, and has the same gradient.
    soft = 0.6 * 4 * F.cross_entropy(s / 2, (teacher(other) / 2).softmax(1).detach())
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, student[1].weight, retain_graph=True)[0] for loss in (losses["teacher"], soft))
    )
    seen = []
    for objective in (
        PGDAT(copy.deepcopy(student), **ATTACK),
        AKD2(copy.deepcopy(student), teacher, standard, teacher_weight=0, standard_weight=0, **ATTACK),
        IAD2(copy.deepcopy(student), teacher, standard, teacher_weight=0, standard_weight=0, begin=0, **ATTACK),
    ):
        torch.manual_seed(0)
        value = total(objective, batch)
        seen.append((value, *torch.autograd.grad(value, list(objective.student.parameters()))))
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(seen[2], seen[0], rtol=1e-12, atol=1e-15)


def test_adaad_is_its_formula() -> None:
    student, teacher, (batch, other) = linear(0), linear(1), doubles()
    both = given(AdaAD(student, teacher, adversarial_weight=0.7), other)(batch, NOW).losses
    torch.testing.assert_close(both["adversarial"], 0.7 * kl(teacher(other), student(other)).mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(both["clean"], 0.3 * kl(teacher(batch.images), student(batch.images)).mean(), rtol=1e-12, atol=0)
    assert set(given(AdaAD(student, teacher), other)(batch, NOW).losses) == {"adversarial"}


@pytest.mark.parametrize(
    ("kind", "term"), [(ARD, "ard"), (RSLAD, "adversarial"), (RSLAD, "clean"), (AdaAD, "adversarial"), (AdaAD, "clean")]
)
def test_class_mean_divides_by_the_number_of_classes(kind: type, term: str) -> None:
    (batch, other), options = doubles(), {} if kind is ARD else {"adversarial_weight": 0.5}
    whole, part = (
        given(kind(linear(0), linear(1), class_mean=mean, **options), other)(batch, NOW).losses[term] for mean in (False, True)
    )
    torch.testing.assert_close(part, whole / 3, rtol=1e-12, atol=0)


def test_rslad_crafted_against_the_labels_is_ard() -> None:
    """Two classes, a linear student: both attacks end in the same corner, whatever their start."""
    student, teacher, (batch, _) = linear(0, 2), linear(1, 2), doubles(classes=2)
    attack = {"eps": 0.05, "step_size": 0.02, "steps": 10}
    rslad = RSLAD(student, teacher, adversarial_weight=1.0, crafted_against="labels", **attack)(batch, NOW).losses
    ard = ARD(student, teacher, **attack)(batch, NOW).losses
    torch.testing.assert_close(rslad["adversarial"], ard["ard"], rtol=1e-12, atol=0)


# Limits


def run(objective: Objective, progress: Progress) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Loss, gradients and the student's tensors after one step's forward and backward pass."""
    objective.train()
    torch.manual_seed(7)
    value = total(objective, small_batch(8), progress)
    value.backward()
    gradients = [p.grad for p in objective.student.parameters()]
    return value.detach(), gradients, objective.student.state_dict()


def assert_same_bits(first: Any, second: Any) -> None:
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])


PAIRS: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("ard", {}, "iad-1", {}),
    ("ard", {"kd_weight": 0.5, "temperature": 2.0}, "iad-1", {"kd_weight": 0.5, "temperature": 2.0}),
    ("akd2", {"teacher_weight": 0.5, "standard_weight": 0.25, "temperature": 1.0}, "iad-2", {}),
    ("adaad", {}, "adaiad", {}),
]


@pytest.mark.parametrize(("base", "base_options", "name", "options"), PAIRS)
def test_undoubted_it_is_its_base_bit_for_bit(
    base: str, base_options: dict[str, Any], name: str, options: dict[str, Any]
) -> None:
    expected = run(make(base, **base_options), LATER)
    assert_same_bits(run(make(name, beta=0, **options), LATER), expected)
    assert_same_bits(run(make(name, begin=100, **options), LATER), expected)
    doubted = run(make(name, begin=99, **options), LATER)
    assert not torch.equal(doubted[0], expected[0]), "epoch 99 is the first with begin=99"


def test_hard_cases_are_doubted_even_without_beta() -> None:
    assert make("iad-1", beta=0, hard_cases=True).doubting(LATER)
    assert not make("iad-1", beta=0).doubting(LATER)


def test_a_sure_teacher_and_one_that_is_wrong() -> None:
    """Probability 1: introspection is off. Probability 0: only the student's consistency with itself is left."""
    batch, other = doubles()
    batch = Batch(batch.images, torch.zeros(5, dtype=torch.long), batch.index)
    student, standard = linear(0), linear(2)
    sure = given(IAD2(student, Constant(1e4, 0, 0), standard, begin=0), other)(batch, LATER)
    assert float(sure.losses["introspection"].detach()) == 0
    assert float(sure.logs["teacher reliability/mean alpha"]) == 1
    wrong = given(IAD2(student, Constant(-1e4, 0, 0), standard, begin=0), other)(batch, LATER)
    assert float(wrong.losses["teacher"].detach()) == 0
    own = 0.5 * kl(student(batch.images), student(other)).mean()
    torch.testing.assert_close(wrong.losses["introspection"], own, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["ard", "rslad", "iad-1", "adaad", "adaiad"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name: str) -> None:
    student = small_model(0).eval()
    objective = make(name, student=student, teacher=copy.deepcopy(student), eps=0.0).eval()
    value = total(objective, small_batch(8))
    value.backward()
    assert float(value.detach()) == pytest.approx(0, abs=1e-6)
    assert max(float(p.grad.abs().max()) for p in student.parameters()) < 1e-6


# Attacks


@pytest.mark.parametrize("start", ["uniform", "gaussian"])
def test_cross_entropy_drives_a_linear_student_to_the_corner(start: str) -> None:
    """After ceil(2 eps / step) steps from any start; the margin shrinks by eps times the L1 norm of the weights."""
    student, (batch, _) = linear(0, 2), doubles(classes=2)
    batch = Batch(0.4 + 0.2 * batch.images, batch.labels, batch.index)  # no pixel meets the box
    objective = ARD(student, linear(1, 2), eps=0.1, step_size=0.03, steps=math.ceil(0.2 / 0.03))
    objective.start = start
    sign = 1.0 - 2 * batch.labels.double()
    weight = (student[1].weight[0] - student[1].weight[1]).detach()
    margins = [sign * (z[:, 0] - z[:, 1]) for z in (student(batch.images), student(objective.against_labels(batch)))]
    torch.testing.assert_close(margins[1], margins[0] - 0.1 * weight.abs().sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [AdaAD, AdaIAD])
def test_adaad_climbs_with_the_gradient_of_both_networks(kind: type) -> None:
    """Two classes: d KL / dx = (s_S - s_T) w_S + s_T (1 - s_T) (m_T - m_S) w_T, with margins m = w.x + b and s = sigmoid(m)."""
    student, teacher, (batch, _) = linear(0, 2), linear(1, 2), doubles(6, classes=2)
    x = batch.images
    line = [(net[1].weight[0] - net[1].weight[1], net[1].bias[0] - net[1].bias[1]) for net in (student, teacher)]
    torch.manual_seed(3)
    at = (x + 0.001 * torch.randn(x.shape, dtype=x.dtype)).clamp(0, 1)
    frozen = at.clone()
    margin_of_images = (x.flatten(1) @ line[1][0] + line[1][1]).detach()

    def step(here: Tensor, *, both: bool) -> Tensor:
        m_s, m_t = (here.flatten(1) @ w + b for w, b in line)
        m_t = m_t if both else margin_of_images
        s_s, s_t = m_s.sigmoid(), m_t.sigmoid()
        slope = (s_s - s_t)[:, None] * line[0][0]
        if both:
            slope = slope + (s_t * (1 - s_t) * (m_t - m_s))[:, None] * line[1][0]
        moved = here + 0.03 * slope.view_as(here).sign()
        return torch.min(torch.max(moved, x - 0.1), x + 0.1).clamp(0, 1).detach()

    for _ in range(4):
        at, frozen = step(at, both=True), step(frozen, both=False)
    seen: list[Tensor] = []
    objective = kind(student, teacher, eps=0.1, step_size=0.03, steps=4)
    student.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach().clone()))
    torch.manual_seed(3)
    objective(batch, NOW)
    torch.testing.assert_close(seen[4], at, rtol=0, atol=1e-12)
    assert not torch.allclose(at, frozen), "the example must tell both attacks apart"


@pytest.mark.parametrize("name", NAMES)
def test_the_student_sees_nothing_outside_the_threat(name: str) -> None:
    objective, batch, seen = make(name), small_batch(8), []
    objective.student.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].detach()))
    objective.train()(batch, LATER)
    assert len(seen) >= ATTACK["steps"] + 1
    for images in seen:
        assert float((images - batch.images).abs().max()) <= ATTACK["eps"] + 1e-6
        assert 0 <= float(images.min()) <= float(images.max()) <= 1


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", NAMES)
def test_attack_mode_decides_on_the_running_statistics(name: str, mode: str) -> None:
    """IAD runs the student on adversarial and clean images, RSLAD too; train mode adds one update for each inner step."""
    objective = make(name, attack_mode=mode).train()
    before = copy.deepcopy(list(objective.student.parameters()))
    objective(small_batch(8), LATER)
    passes = 2 if name in DOUBTING or name == "rslad" else 1
    assert int(objective.student[1].num_batches_tracked) == passes + (ATTACK["steps"] if mode == "train" else 0)
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(objective.student.parameters(), before, strict=True))
    assert objective.student.training


# The teachers


COUNTS: list[tuple[str, dict[str, Any], list[int]]] = [
    ("ard", {}, [16]), ("ard", {"watch": False}, [8]), ("rslad", {}, [8, 8]), ("rslad", {"watch": False}, [8]),
    ("akd2", {}, [16]), ("akd2", {"watch": False}, [8]),
    ("iad-1", {}, [16]), ("iad-1", {"watch": False}, [16]), ("iad-1", {"watch": False, "begin": 100}, [8]),
    ("iad-2", {}, [16]), ("iad-2", {"watch": False}, [8]), ("iad-2", {"watch": False, "hard_cases": True}, [16]),
    ("adaad", {}, [8, 8, 8, 16]), ("adaad", {"watch": False}, [8, 8, 8, 8]),
    ("adaad", {"watch": False, "adversarial_weight": 0.5}, [8, 8, 8, 16]),
    ("adaiad", {"watch": False}, [8, 8, 8, 8]), ("adaiad", {"watch": False, "hard_cases": True}, [8, 8, 8, 16]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "expected"), COUNTS, ids=str)
def test_the_teacher_is_asked_once_and_about_no_more_than_needed(
    name: str, options: dict[str, Any], expected: list[int]
) -> None:
    teacher, asked = small_model(1), []
    teacher.register_forward_pre_hook(lambda module, arguments: asked.append(len(arguments[0])))
    output = make(name, teacher=teacher, **options).train()(small_batch(8), LATER)
    assert asked == expected
    quiet = name in ("ard", "rslad") or options.get("begin") == 100
    assert (output.logs is None) == (options.get("watch") is False and quiet)


@pytest.mark.parametrize("name", NAMES)
def test_known_answers_of_the_teacher_are_looked_up(name: str) -> None:
    batch = small_batch(8)
    results = []
    for known in (False, True):
        teacher = small_model(1).eval()
        objective = make(name, teacher=teacher).train()
        if known:
            table = torch.full((20, 3), float("nan"))
            table[batch.index + 5] = teacher(batch.images).detach()
            objective.remember_teacher(table)
        asked: list[int] = []
        teacher.register_forward_pre_hook(lambda module, arguments, asked=asked: asked.append(len(arguments[0])))
        torch.manual_seed(1)
        results.append(objective(Batch(batch.images, batch.labels, batch.index + 5), LATER).losses)
        assert not known or 16 not in asked
    for term, value in results[0].items():
        torch.testing.assert_close(results[1][term], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_teachers_stay_as_they_are_and_are_not_kept(name: str) -> None:
    objective = make(name).train()
    before = copy.deepcopy(objective.teacher.state_dict())
    total(objective, small_batch(8)).backward()
    after = objective.teacher.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(p.grad is None and not p.requires_grad for p in objective.teacher.parameters())
    assert not any(module.training for module in objective.teacher.modules())
    assert set(objective.trained_state()) == {f"student.{key}" for key in objective.student.state_dict()}


@pytest.mark.parametrize("options", [{}, {"hard_cases": True}, {"detach_self": True, "weight_teacher": True}], ids=str)
@pytest.mark.parametrize("name", list(DOUBTING))
def test_the_contract_holds_while_the_teacher_is_doubted(name: str, options: dict[str, Any]) -> None:
    check_method(lambda student, teacher: make(name, student=student, teacher=teacher, eps=0.02, **options))


def test_what_is_logged() -> None:
    student, teacher, (batch, other) = linear(0), linear(1), doubles(40)
    logs = given(IAD1(student, teacher, begin=0, beta=0.4), other)(batch, LATER).logs
    attacked, clean = teacher(other), teacher(batch.images)
    p = attacked.softmax(1).gather(1, batch.labels[:, None]).squeeze(1)
    right, before = (z.argmax(1) == batch.labels for z in (attacked, clean))
    expected = {
        "teacher reliability/probability of the label": p.mean(),
        "teacher reliability/share below 0.5": (p < 0.5).float().mean(),
        "teacher reliability/mean alpha": (p**0.4).mean(),
        "teacher cases/right under attack": right.float().mean(),
        "teacher cases/right on clean only": (before & ~right).float().mean(),
        "teacher cases/wrong": (~before & ~right).float().mean(),
    }
    assert set(logs) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(logs[name], value, check_dtype=False)
    assert all(0 < float(value) < 1 for value in expected.values()), "the example must have all cases"
    assert sum(float(value) for name, value in logs.items() if "cases" in name) == pytest.approx(1)
    early = given(IAD1(student, teacher, begin=100), other)(batch, LATER).logs
    assert float(early["teacher reliability/mean alpha"]) == 1
    assert set(ARD(student, teacher)(batch, NOW).logs) == set(expected) - {"teacher reliability/mean alpha"}


# Bad options


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda s, t: IAD1(s, t, beta=-0.1), "IAD1: beta=-0.1 .*at least 0"),
        (lambda s, t: IAD1(s, t, beta=math.inf), "beta=inf"),
        (lambda s, t: IAD1(s, t, beta=math.nan), "beta=nan"),
        (lambda s, t: AdaIAD(s, t, begin=-1), "AdaIAD: .*begin=-1"),
        (lambda s, t: IAD1(s, t, kd_weight=1.5), "kd_weight in .0, 1., not 1.0 and 1.5"),
        (lambda s, t: IAD2(s, t, t, temperature=0), "IAD2: needs temperature > 0"),
        (lambda s, t: IAD2(s, t, t, teacher_weight=0.8), "IAD2: teacher_weight=0.8 and standard_weight=0.25 .*at most 1"),
        (lambda s, t: AKD2(s, t, t, standard_weight=-0.1), "AKD2: .*standard_weight=-0.1"),
        (lambda s, t: AKD2(s, t, t, temperature=0), "akd2: temperature=0 must be positive"),
        (lambda s, t: AdaAD(s, t, adversarial_weight=2), "adaad: adversarial_weight=2 "),
        (lambda s, t: RSLAD(s, t, crafted_against="both"), "rslad: crafted_against='both' must be teacher or labels"),
        (lambda s, t: METHODS.create("iad-1", s, t, gamma=1), "'gamma'"),
        (lambda s, t: METHODS.create("composed", s, t, methods=("kd", "iad-2")), "'iad-2' learns from two teachers"),
    ],
)
def test_bad_options_are_named(build: Callable[[nn.Module, nn.Module], Objective], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(small_model(0), small_model(1))


def test_labels_may_get_nothing() -> None:
    batch, other = doubles()
    losses = given(IAD2(linear(0), linear(1), linear(2), teacher_weight=0.9, standard_weight=0.1), other)(batch, NOW).losses
    assert abs(float(losses["adversarial"].detach())) < 1e-12


# Runs


SMALL = {
    "verb": "distill",
    "data": {"name": "digits", "limit_train": 500, "limit_test": 60},
    "model": {"name": "mlp", "hidden": [16]},
    "train": {"epochs": 2, "batch_size": 64, "lr": 0.05, "validation_steps": 2},
}
WEAK_ATTACK = {"eps": 0.25, "step_size": 0.1, "steps": 3}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs: a robust teacher, and one trained without attacks."""
    place = tmp_path_factory.mktemp("teachers")
    table = {"data": {"name": "digits", "limit_test": 50}, "model": {"name": "mlp", "hidden": [128]}}
    table["train"] = {"batch_size": 64, "lr": 0.05, "validation_steps": 3}
    table["evaluation"] = {"weights": ["best"], "attacks": {"noise": {"attack": "noise", "eps": 0.0}}}
    attack = {"name": "pgd-at", "eps": 0.15, "step_size": 0.05, "steps": 5}
    execute(resolve(table, {"method": attack, "train": {"epochs": 10}}), place / "robust")
    execute(resolve(table, {"train": {"epochs": 5}}), place / "standard")
    return {name: place / name for name in ("robust", "standard")}


def test_two_teachers_from_runs(teachers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named by folder; logged each epoch; drawn in the report; continued by its folder; no teacher in the weights."""
    config = resolve(SMALL, {
        "teacher": {"run": str(teachers["robust"])}, "standard_teacher": {"run": str(teachers["standard"])},
        "method": {"name": "iad-2", "begin": 1, "eps": 0.15, "step_size": 0.05, "steps": 3},
    })  # fmt: skip
    done = execute(config, tmp_path / "iad-2")
    assert "warning: the teacher" not in capsys.readouterr().err
    records = RunFolder(tmp_path / "iad-2").metrics
    assert records[0]["train"]["teacher reliability/mean alpha"] == 1
    assert 0.5 < records[1]["train"]["teacher reliability/mean alpha"] < 1
    assert "introspection" in records[1]["train"]
    assert "introspection" not in records[0]["train"]
    page = write_report([tmp_path / "iad-2"]).read_text("utf-8")
    assert "Teacher reliability" in page
    assert "right on clean only" in page
    looked = done.folder.status["teacher"]
    assert 20 < looked["images"] < 128, "all validation images of a small set"
    assert looked["robust"] > looked["clean"] / 2 > 0.4
    overproof.load(tmp_path / "iad-2")
    assert resume(tmp_path / "iad-2").folder.status["state"] == "done"


def test_two_teachers_as_modules(digits: Splits, tmp_path: Path) -> None:
    networks = [overproof.create_model("mlp", 10, 1, 8, hidden=(8,)) for _ in range(3)]
    before = [copy.deepcopy(net.state_dict()) for net in networks[1:]]
    given_options: dict[str, Any] = {"method": "akd2", "epochs": 1, "steps": 1, "limit_train": 200, "validation_steps": 1}
    run = overproof.distill(
        networks[0], networks[1], "digits", standard_teacher=networks[2], out=tmp_path / "r", **given_options
    )
    assert run.folder.config["standard_teacher"]["name"] == "(yours)"
    for network, state in zip(networks[1:], before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
        assert all(p.requires_grad for p in network.parameters())
        assert network.training
    with pytest.raises(UsageError, match="made from Python objects"):
        overproof.resume(tmp_path / "r")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "iad-2"}, "'iad-2' learns from two teachers.*--standard-teacher RUN"),
        ({"method": "ard", "standard_teacher": 10}, "'ard' has no use for a standard teacher"),
        ({"method": "akd2", "standard_teacher": 7}, "The student has 10 classes and the standard teacher 7"),
        ({"method": "ard", "teacher": 7}, "The student has 10 classes and the teacher 7"),
    ],
)
def test_bad_teachers_write_nothing(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    def network(classes: int) -> nn.Module:
        return overproof.create_model("mlp", classes, 1, 8, hidden=(8,))

    second = {"standard_teacher": network(change["standard_teacher"])} if "standard_teacher" in change else {}
    with pytest.raises(UsageError, match=message):
        overproof.distill(
            network(10), network(change.get("teacher", 10)), "digits", method=change["method"], out=tmp_path / "r", **second
        )
    assert not (tmp_path / "r").exists()


def test_the_same_module_cannot_be_student_and_standard_teacher(tmp_path: Path) -> None:
    student, teacher = (overproof.create_model("mlp", 10, 1, 8, hidden=(8,)) for _ in range(2))
    with pytest.raises(UsageError, match="same module"):
        overproof.distill(student, teacher, "digits", method="iad-2", standard_teacher=student, out=tmp_path / "r")


def test_a_teacher_that_is_not_robust_is_named_with_its_figure(
    teachers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = resolve(SMALL, {"teacher": {"run": str(teachers["standard"])}, "method": {"name": "ard", **WEAK_ATTACK}})
    execute(config, tmp_path / "r")
    said = capsys.readouterr().err
    assert re.search(
        r"the teacher is not robust: of \d\d images it gets 9\d% right untouched and \d% under PGD-10 \(Linf, eps=0.25\)", said
    )
    assert RunFolder(tmp_path / "r").status["teacher"]["robust"] < 0.2
    # A method that wants no robust teacher says nothing about it.
    execute(resolve(SMALL, {"teacher": {"run": str(teachers["standard"])}, "method": {"name": "kd"}}), tmp_path / "kd")
    assert "teacher" not in RunFolder(tmp_path / "kd").status
    assert "not robust" not in capsys.readouterr().err


def test_a_teacher_that_only_guesses_is_named(digits: Splits, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As one does that expects other pixel values; without validation images training images are taken."""

    class Blind(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :10] * 0 + torch.arange(10.0)

    student, data = overproof.create_model("mlp", 10, 1, 8, hidden=(8,)), (digits.train.images[:200], digits.train.labels[:200])
    overproof.distill(student, Blind(), data, method="ard", epochs=1, steps=1, out=tmp_path / "r")
    assert "hardly more than guessing" in capsys.readouterr().err
    assert RunFolder(tmp_path / "r").status["teacher"]["images"] == 128


def test_references_to_the_second_teacher_in_recipes(tmp_path: Path) -> None:
    recipe = read_recipe(ROOT / "recipes" / "iad-digits.toml")
    config = recipe.config("student-iad-2", Path("out"), 0)
    assert config.teacher.run == str(Path("out/teacher-robust"))
    assert config.standard_teacher.run == str(Path("out/teacher-standard"))
    (tmp_path / "bad.toml").write_text(
        '[runs.a]\nmethod.name = "ce"\n[runs.b]\nteacher.run = "@a"\nstandard_teacher.run = "@c"\n'
    )
    with pytest.raises(UnknownNameError, match="standard teacher of run 'b'.*'c'"):
        read_recipe(tmp_path / "bad.toml")


def test_the_teacher_gets_less_reliable_as_the_student_grows(teachers: dict[str, Path], tmp_path: Path) -> None:
    """What the paper is about: on the student's own attacks the teacher's probability of the label falls."""
    config = resolve(SMALL, {
        "data": {"limit_train": None}, "model": {"hidden": [64]}, "teacher": {"run": str(teachers["robust"])},
        "method": {"name": "iad-1", "begin": 3, "eps": 0.15, "step_size": 0.04, "steps": 7}, "train": {"epochs": 8},
    })  # fmt: skip
    execute(config, tmp_path / "r")
    found = [record["train"] for record in RunFolder(tmp_path / "r").metrics]
    sure, doubtful = (
        [epoch[f"teacher reliability/{key}"] for epoch in found] for key in ("probability of the label", "share below 0.5")
    )
    assert sure[0] > sure[-1] + 0.08
    assert doubtful[0] < doubtful[-1] - 0.1


def test_a_teacher_that_is_never_doubted_is_told() -> None:
    networks = (small_model(0), small_model(1).eval())
    late = IAD1(*networks, **ATTACK)
    late(small_batch(4), Progress(epochs=10))
    (told,) = late.concerns({}).values()
    assert "from epoch 60 on, but there are 10" in told
    assert "method.begin, to 3" in told
    for options, epochs in (({"begin": 9}, 10), ({}, 61), ({"beta": 0.0}, 10)):
        method = IAD1(*networks, **options, **ATTACK)
        method(small_batch(4), Progress(epochs=epochs))
        assert method.concerns({}) == {}
