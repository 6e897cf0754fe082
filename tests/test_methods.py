"""Methods against their formulas, and the contract over every registered one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof.attacks import PGD
from overproof.errors import UsageError
from overproof.losses.divergences import cross_entropy, kl_divergence
from overproof.methods import METHODS
from overproof.methods.ard import ARD
from overproof.methods.ce import CE
from overproof.methods.composed import Composed
from overproof.methods.kd import KD
from overproof.methods.pgd_at import PGDAT
from overproof.methods.robust_objective import RobustObjective
from overproof.methods.rslad import RSLAD
from overproof.methods.trades import TRADES
from overproof.models import create_model
from overproof.models.autoencoder import Pretext
from overproof.networks import in_mode
from overproof.testing import check_method, small_batch, small_model
from overproof.types import Batch, Progress

NOW = Progress()


def network_for(name: str) -> Callable[[int], nn.Module]:
    """What the contract is asked with: methods for autoencoders take no other network."""
    return small_autoencoder if "autoencoder" in METHODS.get(name).tags else small_model


def small_autoencoder(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = create_model("vit-ae-digits", 3, 1, 8, mean=0.5, std=0.25, embed_dim=16, decoder_dim=16)
    made.net.learns(Pretext("noise", True, 30.0, 120.0))
    return made


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_keeps_the_contract(name: str) -> None:
    entry = METHODS.get(name)
    others = [small_model(5).eval() for _ in entry.positional()[2:]]  # a second teacher
    known: dict[str, Any] = {"image_shape": (1, 8, 8)} if "data-free" in entry.tags else {}  # else larger images would be made
    if name == "fast-dfkd":
        known["momentum"] = 0.0  # statistics of earlier batches do not fall, whatever is learned
    build = lambda *networks: entry.load()(*networks, *others, **known)  # noqa: E731
    check_method(build, teacher="teacher" in entry.positional(), network=network_for(name))


@pytest.mark.parametrize("name", METHODS.names())
def test_every_parameter_learns_under_autocast(name: str) -> None:
    """A cached half-precision copy made without gradients must not stand in for the weight afterwards."""
    entry = METHODS.get(name)
    networks = [network_for(name)(seed) for seed in range(len(entry.positional()))]
    known = {"image_shape": (1, 8, 8)} if "data-free" in entry.tags else {}
    objective = METHODS.create(name, *networks, **known).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = objective(small_batch(8), NOW)
    sum(output.losses.values()).backward()
    trained = {id(p) for p in objective.trainable()}
    learning = [p for p in networks[0].parameters() if id(p) in trained]
    assert all(p.grad is not None for p in learning)
    assert float(learning[0].grad.norm()) > 1e-4


def test_kl_direction_and_gradient() -> None:
    torch.manual_seed(0)
    target, logits = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    p, q = target.softmax(1), logits.softmax(1)
    torch.testing.assert_close(kl_divergence(target, logits), (p * (p.log() - q.log())).sum(1))
    kl_divergence(target, logits).mean().backward()
    torch.testing.assert_close(logits.grad, ((q - p) / 5).detach(), atol=1e-12, rtol=0)


def test_kd_gradient_and_high_temperature_limit() -> None:
    """d/dz = w tau/N (p_S - p_T); tau^2 KL -> ||centred difference||^2 / 2K as tau grows."""
    torch.manual_seed(1)
    teacher, student = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    tau = 3.0
    (0.9 * tau**2 * kl_divergence(teacher, student, temperature=tau).mean()).backward()
    expected = 0.9 * tau / 4 * ((student / tau).softmax(1) - (teacher / tau).softmax(1))
    torch.testing.assert_close(student.grad, expected.detach(), atol=1e-12, rtol=0)
    hot = 1e4**2 * kl_divergence(teacher, student.detach(), temperature=1e4)
    gap = (teacher - teacher.mean(1, keepdim=True)) - (student - student.mean(1, keepdim=True)).detach()
    torch.testing.assert_close(hot, gap.square().sum(1) / 12, rtol=1e-3, atol=0)


def test_kd_terms_are_the_formula() -> None:
    student, teacher, batch = small_model(0).eval(), small_model(1).eval(), small_batch()
    losses = KD(student, teacher, temperature=2.0, ce_weight=0.3, kd_weight=0.7)(batch, NOW).losses
    with torch.no_grad():
        z, t = student(batch.images), teacher(batch.images)
    torch.testing.assert_close(losses["ce"].detach(), 0.3 * F.cross_entropy(z, batch.labels))
    p, q = (t / 2).softmax(1), (z / 2).log_softmax(1)
    torch.testing.assert_close(losses["kd"].detach(), 0.7 * 4 * (p * (p.log() - q)).sum(1).mean())


def test_student_equal_to_teacher_has_no_distance() -> None:
    student = small_model(0).eval()
    teacher = copy.deepcopy(student)
    batch = small_batch()
    objective = KD(student, teacher, ce_weight=0.0)
    objective.eval()
    loss = objective(batch, NOW).losses["kd"]
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert max(float(p.grad.abs().max()) for p in student.parameters()) < 1e-5


def test_known_teacher_logits_are_looked_up() -> None:
    student, teacher, batch = small_model(0).eval(), small_model(1).eval(), small_batch()
    objective = KD(student, teacher)
    objective.eval()
    live = objective(batch, NOW).losses["kd"]
    table = teacher(batch.images).detach()
    shuffled = Batch(batch.images.flip(0), batch.labels.flip(0), batch.index.flip(0))
    objective.remember_teacher(table)
    torch.testing.assert_close(objective(shuffled, NOW).losses["kd"], live)


def test_robust_methods_on_a_linear_student() -> None:
    """All inner maxima of a linear two-class student are the corner x -+ eps sign(w)."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    batch = Batch(torch.full((3, 1, 4, 4), 0.5), torch.tensor([0, 1, 0]), torch.arange(3))
    attack = {"eps": 0.1, "step_size": 0.03, "steps": 10}
    weight = student[1].weight.detach()
    direction = (weight[1] - weight[0]).sign().view(1, 1, 4, 4)
    towards = torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1, 1)
    corner = batch.images + 0.1 * towards * direction
    torch.testing.assert_close(
        PGDAT(student, **attack)(batch, NOW).losses["adversarial"],
        F.cross_entropy(student(corner), batch.labels),
        atol=1e-6,
        rtol=0,
    )
    with torch.no_grad():
        target = teacher(batch.images)
    ard = ARD(student, teacher, **attack)(batch, NOW).losses["ard"]
    torch.testing.assert_close(ard, kl_divergence(target, student(corner)).mean(), atol=1e-6, rtol=0)


def test_rslad_reduces_to_ard_like_term() -> None:
    student, teacher, batch = small_model(0).eval(), small_model(1).eval(), small_batch()
    objective = RSLAD(student, teacher, adversarial_weight=1.0)
    objective.eval()
    assert set(objective(batch, NOW).losses) == {"adversarial"}
    both = RSLAD(student, teacher).eval()(batch, NOW).losses
    clean = kl_divergence(teacher(batch.images), student(batch.images)).mean() / 6
    torch.testing.assert_close(both["clean"], clean)
    assert float(both["adversarial"]) / 5 >= float(both["clean"])


def test_trades_without_beta_is_cross_entropy() -> None:
    student, batch = small_model(0).eval(), small_batch()
    objective = TRADES(student, beta=0.0)
    objective.eval()
    losses = objective(batch, NOW).losses
    torch.testing.assert_close(losses["ce"], CE(student)(batch, NOW).losses["ce"])
    assert float(losses["trades"]) == 0


def watched(objective: RobustObjective, adversarial: Tensor) -> list[Tensor]:
    """The method with a known answer in place of its attack; what it would have maximised at that answer is written down."""
    inner: list[Tensor] = []

    def perturb(loss: Any, images: Tensor) -> Tensor:
        with in_mode(objective.student):
            inner.append(loss(adversarial, torch.arange(len(images))).detach())
        return adversarial

    objective.perturb = perturb  # type: ignore[method-assign]
    return inner


def kl(target: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)) of each row, written out."""
    p = target.softmax(1)
    return (p * (p.log() - logits.softmax(1).log())).sum(1)


def gradients(loss: Tensor, student: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(student.parameters())))


def test_trades_in_closed_form() -> None:
    """Value, gradient through both sides, and what the attack maximises: the divergence from the answer in eval mode."""
    student, batch = small_model(0).double(), small_batch(6)
    student[3].p = 0.0  # masks of dropout are no part of a formula
    batch = Batch(batch.images.double(), batch.labels, batch.index)
    near = (batch.images + 0.05 * torch.randn_like(batch.images)).clamp(0, 1)
    student.eval()
    still = student(batch.images), student(near)
    student.train()
    objective = TRADES(student, beta=3.0)
    inner = watched(objective, near)
    losses = objective.train()(batch, NOW).losses
    torch.testing.assert_close(inner[0].mean(), kl(still[0], still[1]).mean())
    expected = 3 * kl(student(batch.images), student(near)).mean()
    torch.testing.assert_close(losses["trades"], expected)
    torch.testing.assert_close(gradients(losses["trades"], student), gradients(expected, student))


@pytest.mark.parametrize("crafted", ["teacher", "labels"])
def test_rslad_in_closed_form(crafted: Any) -> None:
    student, teacher, batch = small_model(0).double().eval(), small_model(1).double().eval(), small_batch(6)
    batch = Batch(batch.images.double(), batch.labels, batch.index)
    near = (batch.images + 0.05 * torch.randn_like(batch.images)).clamp(0, 1)
    objective = RSLAD(student, teacher, adversarial_weight=0.7, crafted_against=crafted)
    inner = watched(objective, near)
    losses = objective.eval()(batch, NOW).losses
    target = teacher(batch.images).detach()
    climbed = (
        kl(target, student(near)) if crafted == "teacher" else F.cross_entropy(student(near), batch.labels, reduction="none")
    )
    torch.testing.assert_close(inner[0].mean(), climbed.mean().detach())
    expected = 0.7 * kl(target, student(near)).mean() + 0.3 * kl(target, student(batch.images)).mean()
    torch.testing.assert_close(losses["adversarial"] + losses["clean"], expected)
    torch.testing.assert_close(gradients(losses["adversarial"] + losses["clean"], student), gradients(expected, student))


@pytest.mark.parametrize("name", ["pgd-at", "trades", "ard", "rslad", "iad-1", "adaad", "gacd"])
def test_parts_of_a_sum_attack_as_they_do_alone(name: str) -> None:
    """The attack of a part sees a folded copy in eval mode, and TRADES departs from the answer in eval mode."""
    student = small_model(0).train()
    how = {"eps": 0.1, "steps": 1} | ({"begin": 0} if name == "iad-1" else {})
    both = Composed(student, small_model(1).eval(), methods=("kd", name), options={name: how}).train()
    part = getattr(both.parts[1], "inner", both.parts[1])
    seen: list[tuple[str, bool]] = []
    original = part.perturb

    def perturb(loss: Any, images: Tensor) -> Tensor:
        def told(x: Tensor, rows: Tensor) -> Tensor:
            seen.append((type(part.victim).__name__, any(layer.training for layer in part.victim.children())))
            return cast("Tensor", loss(x, rows))

        return cast("Tensor", original(told, images))

    part.perturb = perturb
    both(small_batch(8), NOW)
    assert seen
    assert set(seen) == {("Folded", False)}


def test_trades_in_a_sum_departs_from_the_answer_in_eval_mode() -> None:
    student, batch = small_model(0).train(), small_batch(6)
    near = (batch.images + 0.05 * torch.randn_like(batch.images)).clamp(0, 1)
    still = copy.deepcopy(student).eval()
    both = Composed(student, small_model(1).eval(), methods=("kd", "trades"), options={"trades": {"eps": 0.1}}).train()
    inner = watched(both.parts[1].inner, near)  # type: ignore[union-attr, arg-type]
    both(batch, NOW)
    torch.testing.assert_close(inner[0].mean(), kl(still(batch.images), still(near)).mean().detach())


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_attack_mode_decides_on_batch_statistics(mode: str) -> None:
    """eval: one update of the running statistics a step; train: every inner step adds one."""
    student = small_model(0).train()
    PGDAT(student, attack_mode=mode, steps=4).train()(small_batch(8), NOW)
    assert int(student[1].num_batches_tracked) == (1 if mode == "eval" else 5)
    assert student.training


def test_soft_labels_reach_every_method_that_uses_labels() -> None:
    batch = small_batch()
    soft = Batch(batch.images, F.one_hot(batch.labels, 3).float(), batch.index)
    for name in ("ce", "pgd-at"):
        student = small_model(0).eval()
        values = []
        for given in (batch, soft):
            torch.manual_seed(0)
            values.append(sum(METHODS.create(name, student)(given, NOW).losses.values()))
        torch.testing.assert_close(values[0], values[1])


def test_validation_attack_follows_the_threat() -> None:
    attack = PGDAT(small_model(), eps=0.2, norm="L2").validation_attack
    assert attack == PGD(eps=0.2, norm="L2", steps=10)
    assert CE(small_model()).validation_attack is None


def test_bad_options_are_named() -> None:
    with pytest.raises(UsageError, match="temperature=0"):
        KD(small_model(), small_model(), temperature=0)
    with pytest.raises(UsageError, match="'temprature'.*Did you mean 'temperature'"):
        METHODS.create("kd", small_model(), small_model(), temprature=3)
    with pytest.raises(UsageError, match="nowhere|divides by zero"):
        METHODS.create("pgd-at", small_model(), eps="8/0")
    assert METHODS.create("pgd-at", small_model(), eps="8/255").threat.eps == 8 / 255


def test_label_smoothing_formula() -> None:
    student, batch = small_model(0).eval(), small_batch()
    ours = CE(student, label_smoothing=0.2)(batch, NOW).losses["ce"]
    torch.testing.assert_close(ours, F.cross_entropy(student(batch.images), batch.labels, label_smoothing=0.2))
    assert cross_entropy(student(batch.images), batch.labels).shape == (len(batch),)


def test_the_parts_of_a_sum_log_and_warn() -> None:
    networks = small_model(0), small_model(1).eval()
    options = {"iad-1": {"begin": 60, "eps": 0.1, "steps": 1}}
    method = METHODS.create("composed", *networks, methods=("kd", "iad-1"), options=options)
    output = method(small_batch(6), Progress(epochs=10))
    alone = METHODS.create("iad-1", *networks, **options["iad-1"])(small_batch(6), Progress(epochs=10))
    assert set(alone.logs) <= set(output.logs)
    assert set(method.concerns({})) == {"begin"}
    assert method.validation_attack.eps == 0.1
    plugged = METHODS.create("sokd", *(small_model(seed) for seed in (0, 1)), base="pgd-at", areas=2, base_options={"eps": 0.2})
    assert plugged.validation_attack.eps == 0.2


def test_methods_know_whether_answers_are_trained() -> None:
    networks = small_model(0), small_model(1).eval()
    cases: list[tuple[str, dict[str, Any], bool]] = [
        ("kd", {}, True),
        ("fitnet", {}, True),
        ("fitnet", {"ce_weight": 0.0}, False),
        ("dkd", {"ce_weight": 0.0}, True),
        ("gacd", {"ce_weight": 0.0}, False),
        ("gacd", {}, True),
        ("composed", {"methods": ("kd", "fitnet"), "ce_weight": 0.0}, True),
        ("composed", {"methods": ("fitnet",), "ce_weight": 0.0}, False),
        ("sokd", {"areas": 2, "ce_weight": 0.0}, False),
    ]
    for name, options, expected in cases:
        assert METHODS.create(name, *networks, **options).answers is expected, (name, options)
