"""GACD: closed forms, the raw formulas in every mode, who learns from what, banks, two stages."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import overproof
from overproof.data import Splits
from overproof.errors import UsageError
from overproof.features import Tap
from overproof.losses.contrast import candidates_in, info_nce, noise_contrast, weighted
from overproof.losses.decoupled import rest_divergence, target_divergence
from overproof.methods.composed import Composed
from overproof.methods.feature_bank import UNKNOWN, Bank, draw, log_mean
from overproof.methods.gacd import GACD
from overproof.testing import check_method, small_batch, small_model
from overproof.types import Batch, Progress

NOW = Progress()
QUICK: dict[str, Any] = {"eps": 0.1, "step_size": 0.05, "steps": 2, "dim": 8}
COUNT = 12
LAST = "6"  # the last layer of `small_model`
BATCH_MODES: list[dict[str, Any]] = [
    {},
    {"mask_same_class": False},
    {"anchor": "adv"},
    {"pairs": "adv"},
    {"anchor": "adv", "pairs": "adv", "weight_on": "adv"},
    {"labels_on": "clean"},
    {"labels_on": "clean", "pairs": "adv"},
    {"sample_weight": "correct01"},
    {"sample_weight": "correct01", "weight_on": "adv"},
    {"sample_weight": "none", "temperature": 0.1},
    {"weight_on": "adv", "pairs": "adv"},
    {"normalise_weight": False},
]
BANK_MODES: list[dict[str, Any]] = [
    {"negatives": "all"},
    {"negatives": 5},
    {"negatives": "all", "mask_same_class": False},
    {"negatives": 5, "mask_same_class": False, "pairs": "adv"},
    {"negatives": "all", "symmetric": True},
    {"negatives": 5, "symmetric": True, "pairs": "adv", "temperature": 0.07},
]


def name_of(options: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in options.items()) or "default"


def built(**options: Any) -> tuple[GACD, Batch]:
    """In double precision and eval mode, over a bank of as many rows as there are images."""
    torch.manual_seed(0)
    objective = GACD(small_model(0), small_model(1).eval(), **{"samples": COUNT, **QUICK, **options})
    batch = small_batch(COUNT)
    return objective.double().eval(), Batch(batch.images.double(), batch.labels, batch.index)


def vectors(model: nn.Module, images: Tensor) -> Tensor:
    tap = Tap(model, [f"{LAST}:input"])
    try:
        return tap(images)[1][f"{LAST}:input"]
    finally:
        tap.close()


def unit(head: nn.Module, vector: Tensor) -> Tensor:
    made = head(vector)
    return made / made.square().sum(1, keepdim=True).sqrt()


def embedded(objective: GACD, batch: Batch) -> tuple[Tensor, list[Tensor], Tensor]:
    """(teacher's embedding, the student's for each positive, sample weights), written out; adversarial images by seed 5."""
    torch.manual_seed(5)
    images = {"clean": batch.images, "adv": objective._harden(batch).images}
    theirs = unit(objective.contrast.teacher_head, vectors(objective.teacher, images[objective.anchor]))
    positives = ["adv", "clean"] if objective.pairs == "both" else ["adv"]
    ours = [unit(objective.contrast.student_head, vectors(objective.student, images[name])) for name in positives]
    p = objective.teacher(images[objective.weight_on]).softmax(1)
    own = p[torch.arange(COUNT), batch.labels]
    kinds = {"prob": own, "correct01": (own == p.max(1).values).double(), "none": torch.ones(COUNT).double()}
    weights = kinds[objective.sample_weight]
    return theirs, ours, weights / weights.sum().clamp_min(1e-300) if objective.normalise_weight else weights / COUNT


def rivals(objective: GACD, labels: Tensor) -> Tensor:
    """Who is a negative of whom, (N, N)."""
    others = ~torch.eye(COUNT, dtype=torch.bool)
    return others & (labels[:, None] != labels) if objective.contrast.mask_same_class else others


# The losses


def test_info_nce_in_closed_form() -> None:
    equal = F.normalize(torch.ones(6, 4, dtype=torch.float64), dim=1)
    torch.testing.assert_close(info_nce(equal, equal, temperature=0.3), torch.full((6,), math.log(6), dtype=torch.float64))
    basis = torch.eye(6, dtype=torch.float64)
    expected = math.log(1 + 5 * math.exp(-1 / 0.3))
    torch.testing.assert_close(info_nce(basis, basis, temperature=0.3), torch.full((6,), expected, dtype=torch.float64))
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    masked = info_nce(basis, basis, temperature=0.3, keep=candidates_in(labels))
    counts = torch.tensor([3, 3, 3, 4, 4, 5], dtype=torch.float64)
    torch.testing.assert_close(masked, (1 + counts * math.exp(-1 / 0.3)).log())


def test_candidates() -> None:
    labels = torch.tensor([0, 1, 0])
    assert candidates_in(labels).tolist() == [[True, True, False], [True, True, True], [False, True, True]]
    assert bool(candidates_in(labels, same_class=True).all())


@pytest.mark.parametrize(("count", "value"), [(4096, 9.31789), (1, 2 * math.log(2))])
def test_noise_contrast_in_closed_form(count: int, value: float) -> None:
    u = torch.full((2,), -math.log(50_000), dtype=torch.float64)
    found = noise_contrast(u, u[:, None].expand(2, count), math.log(count / 50_000))
    torch.testing.assert_close(found, torch.full((2,), value, dtype=torch.float64), atol=1e-5, rtol=0)


def test_weights() -> None:
    values = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.0, 0.25], dtype=torch.float64)
    assert float(weighted(values, weights).mean()) == pytest.approx((0.5 + 1.25) / 0.75, abs=1e-15)
    assert float(weighted(values, weights, normalise=False).mean()) == pytest.approx((0.5 + 1.25) / 3, abs=1e-15)
    torch.testing.assert_close(weighted(values, torch.full_like(values, 0.3)), values)
    assert weighted(values, torch.zeros_like(values)).tolist() == [0, 0, 0]


def test_no_weight_no_gradient_from_ones_own_row() -> None:
    """The image goes on being a negative of the others."""
    torch.manual_seed(0)
    anchors, candidates = (F.normalize(torch.randn(5, 4, dtype=torch.float64), dim=1).requires_grad_() for _ in range(2))
    weights = torch.tensor([0.0, 1, 1, 1, 1], dtype=torch.float64)
    weighted(info_nce(anchors, candidates, temperature=0.3), weights).sum().backward()
    assert not anchors.grad[0].any()
    assert bool(anchors.grad[1:].any(dim=1).all())
    assert bool(candidates.grad[0].any())


def test_losses_of_the_classics_do_not_depend_on_the_order() -> None:
    torch.manual_seed(0)
    order = torch.tensor([3, 0, 4, 1, 2])
    anchors, candidates = (F.normalize(torch.randn(5, 4, dtype=torch.float64), dim=1) for _ in range(2))
    keep, labels = candidates_in(torch.tensor([0, 1, 0, 2, 1])), torch.tensor([0, 3, 2, 1, 1])
    moved = info_nce(anchors[order], candidates[order], temperature=0.3, keep=keep[order][:, order])
    torch.testing.assert_close(moved, info_nce(anchors, candidates, temperature=0.3, keep=keep)[order])
    scores = torch.randn(5, 7, dtype=torch.float64)
    moved = noise_contrast(scores[order, 0], scores[order, 1:], -1.0)
    torch.testing.assert_close(moved, noise_contrast(scores[:, 0], scores[:, 1:], -1.0)[order])
    for loss in (target_divergence, rest_divergence):
        moved = loss(anchors[order], candidates[order], labels[order], temperature=4.0)
        torch.testing.assert_close(moved, loss(anchors, candidates, labels, temperature=4.0)[order])


# The objective against the formulas


@pytest.mark.parametrize("options", BATCH_MODES, ids=name_of)
def test_batch_form_is_the_formula(options: dict[str, Any]) -> None:
    objective, batch = built(**options)
    theirs, ours, weights = embedded(objective, batch)
    keep = rivals(objective, batch.labels) | torch.eye(COUNT, dtype=torch.bool)
    total = torch.zeros(COUNT, dtype=torch.float64)
    for mine in ours:
        raw = (theirs @ mine.T / objective.contrast.temperature).exp()
        total = total - (raw.diagonal() / (raw * keep).sum(1)).log() / len(ours)
    torch.manual_seed(5)
    found = objective(batch, NOW).losses["gacd"]
    torch.testing.assert_close(found, objective.weight * (weights * total).sum(), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("options", BANK_MODES, ids=name_of)
def test_bank_form_is_the_formula(options: dict[str, Any]) -> None:
    """h = P / (P + m / M) with P = e^{s / tau} / Z; Z = M mean e^{s / tau} of the first batch, for each side."""
    objective, batch = built(**options)
    bank, tau = objective.contrast.bank, objective.contrast.temperature
    students = bank.student.clone()
    theirs, ours, weights = embedded(objective, batch)
    keep = rivals(objective, batch.labels)
    columns = torch.arange(COUNT).expand(COUNT, COUNT)
    if isinstance(objective.contrast.negatives, int):
        columns = draw(keep, objective.contrast.negatives)
        keep = keep.gather(1, columns)
    torch.manual_seed(5)
    found = objective(batch, NOW).losses["gacd"]

    def nce(own: Tensor, all_: Tensor, z: Tensor) -> Tensor:
        p, others = (own / tau).exp() / z, (all_ / tau).exp().gather(1, columns) / z
        noise = keep.sum(1).double() / COUNT
        critic = others / (others + noise[:, None])
        return -(p / (p + noise)).log() - ((1 - critic).log() * keep).sum(1)

    def scale(own: Tensor, all_: Tensor) -> Tensor:
        return COUNT * torch.cat([(own / tau).exp(), (all_ / tau).exp().gather(1, columns)[keep]]).mean()

    pairs = [((mine * theirs).sum(1), mine @ theirs.T) for mine in ours]
    total = torch.stack([nce(*pair, scale(*pairs[0])) for pair in pairs]).mean(0)
    if objective.contrast.symmetric:
        pair = (theirs * students).sum(1), theirs @ students.T
        total = total + nce(*pair, scale(*pair))
    torch.testing.assert_close(found, objective.weight * (weights * total).sum(), atol=1e-12, rtol=1e-9)


def test_the_labels_term() -> None:
    for labels_on in ("adv", "clean"):
        objective, batch = built(labels_on=labels_on, ce_weight=0.7)
        torch.manual_seed(5)
        images = batch.images if labels_on == "clean" else objective._harden(batch).images
        torch.manual_seed(5)
        output = objective(batch, NOW)
        torch.testing.assert_close(output.losses["ce"], 0.7 * F.cross_entropy(objective.student(images), batch.labels))
        torch.testing.assert_close(output.logits, objective.student(images))
    objective, batch = built(ce_weight=0.0)
    assert set(objective(batch, NOW).losses) == {"gacd"}


def test_adversarial_images_stay_in_the_ball_and_hurt() -> None:
    objective, batch = built(steps=5)
    hard = objective._harden(batch)
    assert float((hard.images - batch.images).abs().max()) <= 0.1 + 1e-12
    losses = [F.cross_entropy(objective.student(images), batch.labels) for images in (batch.images, hard.images)]
    assert losses[1] > losses[0]


def test_a_perfect_teacher_needs_no_weights() -> None:
    values = []
    for sample_weight in ("correct01", "none"):
        objective, batch = built(sample_weight=sample_weight)
        sure = Batch(batch.images, objective.teacher(batch.images).argmax(1), batch.index)
        torch.manual_seed(5)
        values.append(objective(sure, NOW).losses["gacd"])
    assert torch.equal(*values)


@pytest.mark.parametrize("options", [{}, {"negatives": "all"}, {"negatives": "all", "symmetric": True}], ids=name_of)
def test_order_of_the_batch_is_irrelevant(options: dict[str, Any]) -> None:
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
    values = []
    for rows in (torch.arange(COUNT), order):
        objective, batch = built(**{**options, "eps": 0.0})  # random starts belong to places in the batch
        values.append(objective(Batch(batch.images[rows], batch.labels[rows], batch.index[rows]), NOW).losses["gacd"])
    torch.testing.assert_close(*values, atol=1e-12, rtol=1e-12)


def test_soft_labels_count_as_hard_ones_where_they_are() -> None:
    values = []
    for soft in (False, True):
        objective, batch = built()
        labels = F.one_hot(batch.labels, 3).double() if soft else batch.labels
        torch.manual_seed(5)
        values.append(objective(Batch(batch.images, labels, batch.index), NOW).losses)
    for name in values[0]:
        torch.testing.assert_close(values[0][name], values[1][name])


# Who learns from what


@pytest.mark.parametrize("options", [*BATCH_MODES, *BANK_MODES], ids=name_of)
def test_features_alone_reach_the_student_in_every_mode(options: dict[str, Any]) -> None:
    """Labels off: a bank of the student's own features with the teacher as anchor would teach it nothing, in silence."""
    torch.manual_seed(0)
    teacher = small_model(1).eval()
    objective = GACD(small_model(0), teacher, **{**QUICK, **options, "ce_weight": 0.0}).train()
    # Labels that the teacher agrees with here and there: "correct01" must have something to follow.
    batch = small_batch(COUNT)
    labels = torch.where(torch.arange(COUNT) % 2 == 0, teacher(batch.images).argmax(1), torch.arange(COUNT) % 3)
    for _ in range(2):  # an empty bank, and a full one
        objective.zero_grad()
        sum(objective(Batch(batch.images, labels, batch.index), NOW).losses.values()).backward()
        for name, parameter in objective.student.named_parameters():
            if name.startswith(LAST):
                assert parameter.grad is None
            elif name != "0.bias":  # BatchNorm takes it away again
                assert float(parameter.grad.abs().sum()) > 0, name
        heads = [p for p in objective.contrast.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in heads)
        assert float(objective.contrast.teacher_head.weight.grad.abs().sum()) > 0
        assert all(p.grad is None for p in teacher.parameters())
    if objective.contrast.bank is not None:
        assert not any(buffer.requires_grad for buffer in objective.contrast.bank.buffers())


def test_the_symmetric_term_trains_the_teachers_head_alone() -> None:
    gradients = []
    for symmetric in (False, True):
        objective, batch = built(negatives="all", symmetric=symmetric)
        for head in (objective.contrast.student_head, objective.contrast.teacher_head):
            nn.init.constant_(head.bias, 0.1)
            head.weight.data = torch.sin(torch.arange(head.weight.numel()).double()).view_as(head.weight)
        torch.manual_seed(5)
        loss = objective(batch, NOW).losses["gacd"]
        sought = [objective.student[0].weight, objective.contrast.student_head.weight, objective.contrast.teacher_head.weight]
        gradients.append(torch.autograd.grad(loss, sought))
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    torch.testing.assert_close(gradients[0][1], gradients[1][1])
    assert float((gradients[0][2] - gradients[1][2]).abs().max()) > 1e-6


@pytest.mark.parametrize(("negatives", "steps"), [("batch", 40), ("all", 200)])
def test_the_bound_rises_in_training_and_stays_below_its_limit(negatives: str, steps: int) -> None:
    objective, batch = built(negatives=negatives, ce_weight=0.0, temperature=0.2, eps=0.0, steps=1)
    optimizer = torch.optim.Adam(list(objective.trainable()), lr=1e-2)
    told = []
    for _ in range(steps):
        output = objective(batch, NOW)
        told.append(float(output.logs["information"]))
        optimizer.zero_grad()
        output.losses["gacd"].backward()
        optimizer.step()
    assert max(told) <= math.log(COUNT)
    assert told[-1] > told[0] + 0.1


def test_what_is_logged() -> None:
    objective, batch = built()
    logs = objective(batch, NOW).logs
    p = objective.teacher(batch.images).softmax(1)
    torch.testing.assert_close(logs["sample weight"], p[torch.arange(COUNT), batch.labels].mean())
    assert not any(value.requires_grad for value in logs.values())


@pytest.mark.parametrize(("options", "passes"), [({}, 2), ({"pairs": "adv"}, 1), ({"attack_mode": "train"}, 4)])
def test_running_statistics_see_the_training_passes_alone(options: dict[str, Any], passes: int) -> None:
    student = small_model(0)
    GACD(student, small_model(1), **{**QUICK, **options}).train()(small_batch(8), NOW)
    assert int(student[1].num_batches_tracked) == passes
    assert student.training


def test_the_teacher_is_asked_only_about_what_is_needed() -> None:
    for options, passes in (({}, 1), ({"anchor": "adv"}, 2), ({"anchor": "adv", "sample_weight": "none"}, 1)):
        objective, batch = built(**options)
        calls = []
        handle = objective.teacher.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        objective(batch, NOW)
        handle.remove()
        assert len(calls) == passes, options


@pytest.mark.parametrize(
    "options",
    [*BATCH_MODES[1:], *BANK_MODES, {"head_share": 0.5}, {"head_share": 0.8}, {"norm": "L2", "eps": 0.5}, {"ce_weight": 0.0}],
    ids=name_of,
)
def test_contract(options: dict[str, Any]) -> None:
    check_method(lambda student, teacher: GACD(student, teacher, **{**QUICK, **options}))


# The bank


def test_rows_that_count() -> None:
    bank = Bank(0, 5, momentum=0.5, teacher_dim=3)
    bank.open(torch.tensor([0, 1, 3]), torch.tensor([0, 1, 1]))
    index, labels = torch.tensor([1, 0]), torch.tensor([1, 0])
    assert bank.others(index, labels).tolist() == [[True, False, False, False, False], [False, True, False, True, False]]
    wide = bank.others(index, labels, same_class=True)
    assert wide.tolist() == [[True, False, False, True, False], [False, True, False, True, False]]
    assert bank.labels.tolist() == [0, 1, UNKNOWN, 1, UNKNOWN]
    assert bank.student.shape == (5, 0)


def test_teachers_vectors_are_kept_as_they_are() -> None:
    bank = Bank(4, 5, momentum=0.5, teacher_dim=3)
    before, held = bank.teacher.clone(), bank.teacher
    new = torch.arange(6.0).view(2, 3)
    bank.store(torch.tensor([4, 1]), new)
    assert torch.equal(held, before), "the rows of the present graph were changed in place"
    assert torch.equal(bank.teacher[[4, 1]], new)
    assert torch.equal(bank.teacher[[0, 2, 3]], before[[0, 2, 3]])
    rows = bank.student.clone()
    bank.remember(torch.tensor([2]), torch.tensor([[2.0, 0, 0, 0]]))
    torch.testing.assert_close(bank.student.norm(dim=1)[2], torch.tensor(1.0))
    assert torch.equal(bank.student[[0, 1, 3, 4]], rows[[0, 1, 3, 4]])
    assert torch.equal(bank.teacher[[4, 1]], new)


def test_draws_are_uniform_over_what_is_allowed() -> None:
    allowed = torch.tensor([[True, False, True, True], [False, False, False, False]])
    torch.manual_seed(0)
    drawn = draw(allowed, 30_000)
    counts = torch.bincount(drawn[0], minlength=4)
    assert int(counts[1]) == 0
    assert bool(((counts[[0, 2, 3]] - 10_000).abs() < 5 * 100).all())
    assert set(drawn[1].tolist()) == {0, 1, 2, 3}


def test_mean_score() -> None:
    positive, negatives = torch.tensor([0.0, 1.0]), torch.tensor([[2.0, 9.0], [-1.0, 0.5]])
    keep = torch.tensor([[True, False], [True, True]])
    expected = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5]).exp().mean().log()
    torch.testing.assert_close(log_mean(positive, negatives, keep), expected)
    torch.testing.assert_close(log_mean(positive, negatives), torch.cat([positive, negatives.flatten()]).exp().mean().log())


def test_bank_is_filled_by_index_and_its_scale_is_kept() -> None:
    objective, batch = built(negatives="all", symmetric=True)
    first, second = slice(0, 6), slice(6, COUNT)

    def part(rows: slice) -> Batch:
        return Batch(batch.images[rows], batch.labels[rows], batch.index[rows])

    bank = objective.contrast.bank
    students = bank.student.clone()
    objective(part(first), NOW)
    assert torch.equal(bank.student, students), "nothing is learned about the student while it is not trained"
    scale, untouched = bank.log_z.clone(), bank.teacher[second].clone()
    assert bank.labels[second].tolist() == [UNKNOWN] * 6
    torch.testing.assert_close(bank.teacher[first], vectors(objective.teacher, batch.images[first]))
    objective.train()
    objective(part(second), NOW)
    assert torch.equal(bank.log_z, scale)
    assert not torch.equal(bank.teacher[second], untouched)
    torch.testing.assert_close(bank.teacher, vectors(objective.teacher, batch.images))
    torch.testing.assert_close(bank.student.norm(dim=1)[second], torch.ones(6, dtype=torch.float64))


def test_anchors_on_adversarial_images_are_what_the_bank_holds() -> None:
    objective, batch = built(negatives="all", anchor="adv")
    torch.manual_seed(5)
    hard = objective._harden(batch).images
    torch.manual_seed(5)
    objective(batch, NOW)
    torch.testing.assert_close(objective.contrast.bank.teacher, vectors(objective.teacher, hard))


def test_a_growing_bank_has_the_scale_of_a_fixed_one() -> None:
    """What is still to come takes no part: as long as the same images were seen the losses are the same."""
    values = []
    for samples in (None, 40):
        objective, batch = built(negatives="all", samples=samples)
        torch.manual_seed(5)
        objective(batch, NOW)
        values.append(objective(batch, NOW).losses["gacd"])
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("options", [{"negatives": "all", "symmetric": True}, {"negatives": 5}, {}], ids=name_of)
def test_resumes_to_the_same_step(options: dict[str, Any]) -> None:
    objective, batch = built(**options)
    objective.train()
    objective(batch, NOW)
    state = copy.deepcopy(objective.trained_state())
    assert not any(name.startswith("teacher.") for name in state)
    other, _ = built(**{**options, "samples": None})
    other.train()
    other.load_trained_state(state)
    losses = []
    for each in (objective, other):
        torch.manual_seed(5)
        losses.append(each(batch, NOW).losses["gacd"])
    assert torch.equal(*losses)


# Two stages


def test_in_the_first_stage_labels_reach_the_last_layer_alone() -> None:
    objective, batch = built(head_share=0.25)
    losses = objective(batch, Progress(step=0, total=8)).losses
    named = dict(objective.student.named_parameters())
    for term, learns in (("ce", lambda name: name.startswith(LAST)), ("gacd", lambda name: not name.startswith(LAST))):
        found = torch.autograd.grad(losses[term], list(named.values()), retain_graph=True, allow_unused=True)
        for name, gradient in zip(named, found, strict=True):
            assert (gradient is not None and float(gradient.abs().sum()) > 0) == learns(name), (term, name)


@pytest.mark.parametrize("labels_on", ["clean", "adv"])
def test_in_the_second_stage_features_are_frozen(labels_on: str) -> None:
    """Weight decay, momentum and running statistics included."""
    torch.manual_seed(0)
    objective = GACD(small_model(0), small_model(1), head_share=0.25, labels_on=labels_on, **QUICK).train()
    optimizer = torch.optim.SGD(list(objective.trainable()), lr=0.1, momentum=0.9, weight_decay=0.1)
    batch, frozen = small_batch(8), {}
    for step in range(8):
        losses = objective(batch, Progress(step=step, total=8)).losses
        if step == 6:
            frozen = copy.deepcopy(objective.trained_state())
        assert set(losses) == ({"ce"} if step >= 6 else {"ce", "gacd"})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    for name, value in objective.trained_state().items():
        assert torch.equal(value, frozen[name]) != name.startswith(f"student.{LAST}"), name
    objective.eval()
    logits = objective(batch, Progress(step=7, total=8)).logits
    if labels_on == "clean":
        torch.testing.assert_close(logits, objective.student(batch.images))


# Beside others


def test_as_a_part_of_a_sum() -> None:
    alone, batch = built(labels_on="clean")
    how = {"gacd": {**QUICK, "labels_on": "clean"}}
    both = Composed(small_model(0), small_model(1).eval(), methods=("kd", "gacd"), options=how).double().eval()
    both.parts[1].contrast.load_state_dict(alone.contrast.state_dict())
    losses = []
    for objective in (alone, both):
        torch.manual_seed(5)
        losses.append(objective(batch, NOW).losses)
    torch.testing.assert_close(losses[0]["gacd"], losses[1]["gacd"])
    torch.testing.assert_close(losses[0]["ce"], losses[1]["ce"])
    assert set(losses[1]) == {"ce", "kd", "gacd"}
    assert both.validation_attack.eps == 0.1
    both.parts[1].eps_warmup = 10
    both(batch, Progress(step=0, total=100, epochs=10))
    assert both.parts[1]._share == 0.01


def test_labels_on_adversarial_images_in_a_sum() -> None:
    """The sum has the labels of the clean images; "adv" adds those of the adversarial ones, with the method's own weight."""
    alone, batch = built(labels_on="adv", ce_weight=0.5)
    how = {"gacd": {**QUICK, "labels_on": "adv", "ce_weight": 0.5}}
    both = Composed(small_model(0), small_model(1).eval(), methods=("kd", "gacd"), options=how).double().eval()
    losses = []
    for objective in (alone, both):
        torch.manual_seed(5)
        losses.append(objective(batch, NOW).losses)
    torch.testing.assert_close(losses[0]["ce"], losses[1]["gacd-adversarial"])
    assert set(losses[1]) == {"ce", "kd", "gacd", "gacd-adversarial"}
    with pytest.raises(UsageError, match="two stages"):
        Composed(small_model(0), small_model(1).eval(), methods=("kd", "gacd"), options={"gacd": {"head_share": 0.5}})


@pytest.mark.parametrize("name", ["pairs", "anchor", "labels_on", "weight_on", "sample_weight", "negatives"])
def test_misspelt_choices_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}='advv' is unknown"):
        GACD(small_model(0), small_model(1).eval(), **{name: "advv"})


@pytest.mark.parametrize("options", [{}, {"negatives": "all"}, {"anchor": "adv"}], ids=name_of)
def test_contract_of_the_sum(options: dict[str, Any]) -> None:
    given = {"gacd": {**QUICK, **options}}
    check_method(lambda student, teacher: Composed(student, teacher, methods=("kd", "gacd"), options=given))


def test_a_teacher_of_other_classes(digits: Splits, tmp_path: Path) -> None:
    teacher = overproof.create_model("mlp", 7, 1, 8, hidden=(12,))
    options = {"method": "gacd", "epochs": 1, "limit_train": 64, "limit_test": 20, "steps": 1, "eps": 0.1}
    with pytest.raises(UsageError, match="10 classes and the teacher 7"):
        overproof.distill("mlp", teacher, "digits", out=tmp_path / "a", **options)
    run = overproof.distill("mlp", teacher, "digits", out=tmp_path / "b", sample_weight="none", **options)
    evaluation = run.evaluations["test-best"]
    assert evaluation["agreement"] is None
    assert evaluation["attacks"]["pgd-20"]["eps"] == 0.1


def test_a_run_tells_the_bank_how_long_it_has_to_be(tmp_path: Path) -> None:
    teacher = overproof.create_model("mlp", 10, 1, 8, hidden=(12,))
    run = overproof.distill(
        "mlp", teacher, "digits", method="gacd", negatives="all", epochs=1, limit_train=64, limit_test=20, steps=1,
        out=tmp_path / "r",
    )  # fmt: skip
    state = torch.load(run.path / "checkpoint.pt", weights_only=True)["objective"]
    labels = state["contrast.bank.labels"]
    assert int((labels != UNKNOWN).sum()) == 64
    assert len(labels) > 64
    assert all(name.startswith(("student.", "contrast.")) for name in state)


# Bad options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight"),
        ({"ce_weight": -1.0}, "weight"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"dim": 0}, "dim"),
        ({"negatives": 0}, "negatives >= 1"),
        ({"negatives": "all", "samples": 1}, "samples >= 2"),
        ({"symmetric": True}, "symmetric=True needs a bank"),
        ({"head_share": 1.0}, r"head_share in \[0, 1\)"),
        ({"head_share": 0.5, "ce_weight": 0.0}, "ce_weight > 0"),
        ({"head_share": 0.5, "student_layers": ("2",)}, "leave student_layers out"),
        ({"student_layers": ("2", "4")}, "must name one layer"),
        ({"steps": 0}, "steps >= 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GACD(small_model(0), small_model(1), **options)


def test_bad_batches_are_refused() -> None:
    objective, batch = built()
    with pytest.raises(UsageError, match="at least two"):
        objective(Batch(batch.images[:1], batch.labels[:1], batch.index[:1]), NOW)
    objective, batch = built(negatives="all")
    with pytest.raises(UsageError, match=r"index 20 has no row in the bank of 12.*samples=21"):
        objective(Batch(batch.images, batch.labels, batch.index + 9), NOW)
    with pytest.raises(UsageError, match="two stages and cannot be part"):
        Composed(small_model(0), small_model(1), methods=("gacd",), options={"gacd": {"head_share": 0.5}})(small_batch(), NOW)


def test_other_layers_can_be_compared() -> None:
    objective = GACD(small_model(0), small_model(1), student_layers=("2",), teacher_layers=("2",), **QUICK)
    assert objective.places[0].student_shape == (6,)
    assert float(objective(small_batch(), NOW).losses["gacd"].detach()) > 0
