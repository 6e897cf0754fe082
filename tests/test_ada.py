"""AdaAlpha and AdaMargin: closed forms, what is measured and on what, and who is protected."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import overproof
from overproof.data import Attribute, ImageSet, Splits, load_data, make_loader
from overproof.errors import DataError, UsageError
from overproof.losses.divergences import cross_entropy, kl_divergence
from overproof.losses.group_reliability import (
    Reliability,
    credit,
    estimate_reliability,
    label_margin,
    margin_cross_entropy,
    mixed_target,
    shrunk,
)
from overproof.methods import METHODS
from overproof.methods.ada_alpha import AdaAlpha
from overproof.methods.ada_margin import AdaMargin
from overproof.report.learned import method_text
from overproof.testing import small_batch, small_model
from overproof.types import Batch, Progress

NOW = Progress()
K = 5


class Table(nn.Module):
    """Free logits for each image, whose number its first pixel tells."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[(images[:, 0, 0, 0] * 255).round().long()]


def numbered(labels: Tensor) -> Batch:
    """Images for `Table`, one for each label."""
    index = torch.arange(len(labels))
    return Batch((index / 255).view(-1, 1, 1, 1), labels, index)


def drawn(count: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A teacher's probabilities, a student's logits, labels."""
    generator = torch.Generator().manual_seed(seed)
    target = (2 * torch.randn(count, K, generator=generator, dtype=torch.float64)).softmax(1)
    logits = torch.randn(count, K, generator=generator, dtype=torch.float64)
    return target, logits, torch.arange(count) % K


def studied(method: Any, batch: Batch) -> Any:
    """The method, having measured its teacher on `batch`."""
    method.study([batch], names=tuple("abcde")[: method.teacher.logits.shape[1]] if isinstance(method.teacher, Table) else ())
    return method


# What the teacher earns


def test_margin_of_an_answer() -> None:
    p = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0, 0, 0], [0, 0.5, 0.5, 0]], dtype=torch.float64)
    torch.testing.assert_close(label_margin(p, torch.zeros(3, dtype=torch.long)), torch.tensor([0, 1, -1 / 3]).double())
    target, _, labels = drawn()
    by_hand = torch.stack([p[y] - (p.sum() - p[y]) / (K - 1) for p, y in zip(target, labels, strict=True)])
    torch.testing.assert_close(label_margin(target, labels), by_hand, atol=1e-12, rtol=0)


def test_kinds_of_credit() -> None:
    p, y = torch.tensor([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1]]), torch.tensor([0, 1])
    assert credit(p, y, kind="accuracy").tolist() == [1, 0]
    torch.testing.assert_close(credit(p, y, kind="hard_margin"), torch.tensor([0.3, -0.3]))
    torch.testing.assert_close(credit(p, y), label_margin(p, y))


def test_reliability_is_the_mean_by_class_whatever_the_batches() -> None:
    torch.manual_seed(0)
    teacher, batch = small_model(1).train(), small_batch(30)
    modes = [module.training for module in teacher.modules()]
    batches = [Batch(*(part[i : i + 7] for part in (batch.images, batch.labels, batch.index))) for i in range(0, 30, 7)]
    found, whole = estimate_reliability(teacher, batches), estimate_reliability(teacher, [batch])
    assert [module.training for module in teacher.modules()] == modes
    torch.testing.assert_close(found.values, whole.values, atol=1e-6, rtol=0)
    assert found.counts.tolist() == torch.bincount(batch.labels, minlength=3).tolist()
    with torch.no_grad():
        margins = label_margin(teacher.eval()(batch.images).double().softmax(1), batch.labels)
    for c in range(3):
        assert float(whole.values[c]) == pytest.approx(float(margins[batch.labels == c].mean()), abs=1e-9)


def test_reliability_by_subgroup_and_without_images() -> None:
    teacher, batch = small_model(1).eval(), small_batch(9)
    groups = torch.tensor([7, 7, 0, 1, 1, 1, 0, 0, 0, 1, 1]) % 7  # by index; position 0 and 1 belong to group 0 too
    found = estimate_reliability(teacher, [batch], groups=groups, count=3)
    assert found.counts.tolist() == torch.bincount(groups[:9], minlength=3).tolist()
    assert found.values[2].isnan()
    with pytest.raises(DataError, match="no held-out images"):
        estimate_reliability(teacher, [])


def test_shrinkage() -> None:
    found = Reliability(torch.tensor([0.9, 0.5, 0.1, float("nan")], dtype=torch.float64), torch.tensor([40, 5, 2, 0]))
    middle = (0.9 + 0.5 + 0.1) / 3
    expected = torch.tensor([0.9, 0.5, (2 * 0.1 + 5 * middle) / 7, middle], dtype=torch.float64)
    torch.testing.assert_close(shrunk(found), expected)
    torch.testing.assert_close(shrunk(found, few=0)[:3], found.values[:3])
    torch.testing.assert_close(shrunk(found, strength=0.0)[:3], found.values[:3])


# AdaAlpha


def test_adaalpha_is_the_mixture_of_two_losses() -> None:
    target, logits, labels = drawn()
    alpha = torch.linspace(0, 1, len(labels), dtype=torch.float64)
    ours = cross_entropy(logits, mixed_target(target, labels, alpha))
    soft = -(target * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(
        ours, (1 - alpha) * F.cross_entropy(logits, labels, reduction="none") + alpha * soft, atol=1e-12, rtol=0
    )
    assert float(ours[0]) == pytest.approx(float(F.cross_entropy(logits[:1], labels[:1])), abs=1e-12)
    assert float(ours[-1]) == pytest.approx(float(soft[-1]), abs=1e-12)
    mixed = mixed_target(target, F.one_hot(labels, K).double(), alpha)  # labels as class weights say the same
    torch.testing.assert_close(mixed, mixed_target(target, labels, alpha), atol=0, rtol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_constant_alpha_is_plain_distillation(alpha: float) -> None:
    student, teacher, batch = small_model(0).eval(), small_model(1).eval(), small_batch()
    method = AdaAlpha(student, teacher, power=0.0, max_alpha=alpha, temperature=3.0).eval()
    method.study([small_batch(40)])
    loss = method(batch, NOW).losses["ada-alpha"]
    with torch.no_grad():
        z, p = student(batch.images), (teacher(batch.images) / 3).softmax(1)
    expected = (1 - alpha) * F.cross_entropy(z, batch.labels) + alpha * F.cross_entropy(z, p)
    torch.testing.assert_close(loss.detach(), expected)


def test_adaalpha_gradient_and_class_of_the_label() -> None:
    target, logits, labels = drawn(10)
    teacher = Table(target.log() * 2)
    student, batch = Table(logits), numbered(labels)
    method = studied(AdaAlpha(student, teacher, max_alpha=0.8, power=2.0, temperature=2.0, few=0), batch)
    g = torch.stack([label_margin((target.log() * 2).softmax(1), labels)[labels == c].mean() for c in range(K)])
    torch.testing.assert_close(method.measured, g.float())
    alpha = 0.8 * g.clamp(0, 1) ** 2
    torch.testing.assert_close(method.weights()["alpha"], alpha.float())
    method(batch, NOW).losses["ada-alpha"].backward()
    mixed = (1 - alpha[labels])[:, None] * F.one_hot(labels, K) + alpha[labels][:, None] * target
    torch.testing.assert_close(student.logits.grad, (logits.softmax(1) - mixed) / 10, atol=1e-7, rtol=0)


def test_tabular_student_ends_at_the_mixture_and_flips_where_it_must() -> None:
    """q = (1 - alpha) y + alpha p; against a teacher that prefers j by d = p_j - p_y, the label loses if alpha > 1 / (1 + d)."""
    p = torch.tensor([[0.2, 0.7, 0.1]], dtype=torch.float64)
    limit, label = 1 / (1 + 0.5), torch.tensor([0])
    for alpha, wins in ((0.5, 0), (limit - 0.01, 0), (limit + 0.01, 1), (1.0, 1)):
        mixed = mixed_target(p, label, torch.tensor([alpha], dtype=torch.float64))
        logits = mixed.log().requires_grad_()
        cross_entropy(logits, mixed).sum().backward()
        assert float(logits.grad.abs().max()) < 1e-12
        assert int(logits.argmax()) == wins
        elsewhere = cross_entropy(logits + torch.tensor([[0.1, -0.1, 0.0]]), mixed)
        assert float(elsewhere.detach()) > float(cross_entropy(logits, mixed).detach())


def fitted(method: Any, batch: Batch, steps: int = 60) -> Tensor:
    """What a method's free student predicts after training."""
    optimizer = torch.optim.SGD(list(method.trainable()), lr=5.0)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(method(batch, NOW).losses.values()).backward()
        optimizer.step()
    return method.student(batch.images).argmax(1)


def test_a_teachers_bias_is_handed_on_by_distillation_and_not_by_adaalpha() -> None:
    labels = torch.arange(12) % 4
    believed = torch.where(labels == 2, 3, labels)  # always wrong about class 2
    teacher, batch = Table(20 * F.one_hot(believed, 4).double()), numbered(labels)
    blank = torch.zeros(12, 4, dtype=torch.float64)
    plain = studied(AdaAlpha(Table(blank), teacher, power=0.0), batch)
    careful = studied(AdaAlpha(Table(blank), teacher, few=0), batch)
    assert careful.weights()["alpha"].tolist() == pytest.approx([1, 1, 0, 1], abs=1e-6)
    torch.testing.assert_close(fitted(plain, batch), believed)
    torch.testing.assert_close(fitted(careful, batch), labels)
    own = labels == 2  # images of class 2 have learned exactly what their labels say
    alone = studied(AdaAlpha(Table(blank), teacher, max_alpha=0.0), batch)
    fitted(alone, batch)
    torch.testing.assert_close(careful.student.logits[own], alone.student.logits[own], atol=1e-6, rtol=0)


# AdaMargin


def naive(target: Tensor, logits: Tensor, delta: Tensor) -> Tensor:
    """The definition, over all pairs (N, K, K); delta[k, j]."""
    gaps = logits[:, None, :] - logits[:, :, None] + delta
    gaps = gaps.masked_fill(torch.eye(logits.shape[1], dtype=torch.bool), -torch.inf)
    return (target * torch.log1p(gaps.exp().sum(2))).sum(1)


@pytest.mark.parametrize("form", ["pairwise", "target"])
def test_margin_forms_are_their_definition(form: str) -> None:
    target, logits, _ = drawn()
    rho = torch.tensor([0.9, 0.4, 0.0, -0.2, 0.7], dtype=torch.float64)
    delta = rho[None, :] - rho[:, None] if form == "pairwise" else rho[:, None].expand(K, K)
    torch.testing.assert_close(
        margin_cross_entropy(target, logits, rho, form=form), naive(target, logits, delta), atol=1e-12, rtol=0
    )
    plain = -(target * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(margin_cross_entropy(target, logits, 0 * rho, form=form), plain, atol=1e-12, rtol=0)


def test_margins_by_class_and_by_image() -> None:
    target, logits, _ = drawn()
    rho = torch.linspace(-0.2, 0.9, K, dtype=torch.float64)
    moved = margin_cross_entropy(target, logits, rho + 3.0)
    torch.testing.assert_close(moved, margin_cross_entropy(target, logits, rho), atol=1e-12, rtol=0)
    by_image = torch.linspace(0, 1, len(logits), dtype=torch.float64)[:, None]
    ours = margin_cross_entropy(target, logits, by_image, form="target")
    apart = [
        margin_cross_entropy(t[None], z[None], m.expand(K), form="target")
        for t, z, m in zip(target, logits, by_image, strict=True)
    ]
    torch.testing.assert_close(ours, torch.cat(apart), atol=1e-12, rtol=0)


def test_pairwise_optimum_lifts_what_the_teacher_is_unsure_of() -> None:
    """q_k is proportional to p_k exp(-rho_k)."""
    target, _, _ = drawn(4)
    rho = torch.tensor([1.0, 0.5, 0.0, -0.2, 0.8], dtype=torch.float64)
    logits = (target.log() - rho).requires_grad_()
    margin_cross_entropy(target, logits, rho).sum().backward()
    assert float(logits.grad.abs().max()) < 1e-12


@pytest.mark.parametrize("form", ["pairwise", "target"])
def test_certain_students_get_finite_gradients(form: str) -> None:
    logits = torch.tensor([[300.0, 0.0, -300.0], [0.0, 0.0, 0.0]], requires_grad=True)
    target = torch.tensor([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    loss = margin_cross_entropy(target, logits, torch.tensor([0.9, 0.1, -0.3]), form=form)
    loss.sum().backward()
    assert bool(loss.isfinite().all() and logits.grad.isfinite().all())
    assert float(loss[0].detach()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("form", ["pairwise", "target"])
def test_adamargin_terms(form: str) -> None:
    target, logits, labels = drawn(10)
    teacher, batch = Table(target.log()), numbered(labels)
    method = studied(AdaMargin(Table(logits), teacher, teacher_weight=0.3, scale=2.0, margin_form=form), batch)
    losses = method(batch, NOW).losses
    rho = 2 * method.measured.double()
    soft = margin_cross_entropy(target, logits, rho, form=form).mean()
    torch.testing.assert_close(losses["ada-margin"].detach(), 0.3 * soft, atol=1e-7, rtol=0)
    torch.testing.assert_close(losses["ce"].detach(), 0.7 * F.cross_entropy(logits, labels), atol=1e-12, rtol=0)
    assert set(AdaMargin(Table(logits), teacher, teacher_weight=1.0)(batch, NOW).losses) == {"ada-margin"}
    plain = studied(AdaMargin(Table(logits), teacher, scale=0.0, margin_form=form), batch)(batch, NOW).losses
    kd = 0.5 * (kl_divergence(target.log(), logits) - (target * target.log()).sum(1)).mean()
    torch.testing.assert_close(plain["ada-margin"].detach(), kd, atol=1e-12, rtol=0)


# The objective


def test_unstudied_methods_trust_all_classes_alike_and_say_so() -> None:
    target, logits, labels = drawn(10)
    batch = numbered(labels)
    alpha, margin = AdaAlpha(Table(logits), Table(target.log()), max_alpha=0.4), AdaMargin(Table(logits), Table(target.log()))
    soft = -(target * logits.log_softmax(1)).sum(1).mean()
    expected = 0.6 * F.cross_entropy(logits, labels) + 0.4 * soft
    torch.testing.assert_close(alpha(batch, NOW).losses["ada-alpha"].detach(), expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(margin(batch, NOW).losses["ada-margin"].detach(), 0.5 * soft, atol=1e-7, rtol=0)
    for method in (alpha, margin):
        assert method.describe() == {}
        assert "nobody has measured" in method.concerns({})["reliability"]
        studied(method, batch)
        assert method.concerns({}) == {}
        facts = json.loads(json.dumps(method.describe()))
        assert facts["names"] == list("abcde")
        assert facts["counts"] == [2] * 5
        assert {"alpha", "rho"} & facts.keys()
        assert "the least first" in method_text(facts)


def test_mixed_labels_get_their_share_of_both_classes() -> None:
    target, logits, labels = drawn(10)
    batch = numbered(labels)
    method = studied(AdaAlpha(Table(logits), Table(target.log())), batch)
    alpha = method.weights()["alpha"]
    weights = 0.7 * F.one_hot(labels, K).float() + 0.3 * F.one_hot(labels.roll(1), K).float()
    mixed = Batch(batch.images, weights, batch.index)
    torch.testing.assert_close(method.by_image(alpha, mixed), 0.7 * alpha[labels] + 0.3 * alpha[labels.roll(1)])
    assert method(mixed, NOW).losses["ada-alpha"].isfinite()


def test_subgroups_take_the_place_of_classes() -> None:
    target, logits, labels = drawn(10)
    held, batch = numbered(labels), numbered(labels)
    groups = torch.tensor([0, 1] * 5)
    known = {"names": ("a", "b"), "held_groups": groups, "train_groups": 1 - groups}
    method = AdaAlpha(Table(logits), Table(target.log()), group="attribute", few=0)
    with pytest.raises(UsageError, match="subgroups of the training images are not known"):
        studied(AdaAlpha(Table(logits), Table(target.log()), group="attribute"), held)(batch, NOW)
    method.study([held], **known)
    margins = label_margin(target, labels)
    torch.testing.assert_close(method.measured, torch.stack([margins[groups == g].mean() for g in (0, 1)]).float())
    alpha = method.weights()["alpha"]
    assert method.by_image(alpha, batch).tolist() == alpha[1 - groups].tolist()
    with pytest.raises(UsageError, match="two subgroups at once"):
        method(Batch(batch.images, F.one_hot(labels, K).float(), batch.index), NOW)
    margin = AdaMargin(Table(logits), Table(target.log()), group="attribute", margin_form="target", teacher_weight=1.0, few=0)
    margin.study([held], **known)
    rho = margin.measured.double()[1 - groups][:, None]
    ours = margin(batch, NOW).losses["ada-margin"].detach()
    torch.testing.assert_close(ours, margin_cross_entropy(target, logits, rho, form="target").mean(), atol=1e-7, rtol=0)


def test_a_class_without_held_out_images() -> None:
    target, logits, labels = drawn(10)
    few = numbered(labels)
    kept = labels != 3
    few = Batch(few.images[kept], few.labels[kept], few.index[kept])
    with pytest.raises(DataError, match=r"classes 'd': there is no held-out image.*among 8.*absent=\"mean\""):
        studied(AdaAlpha(Table(logits), Table(target.log())), few)
    method = studied(AdaAlpha(Table(logits), Table(target.log()), absent="mean", few=0), few)
    others = torch.tensor([0, 1, 2, 4])
    assert float(method.measured[3]) == pytest.approx(float(method.measured[others].mean()), abs=1e-6)


def test_what_was_measured_travels_with_the_state() -> None:
    target, logits, labels = drawn(10)
    batch = numbered(labels)
    first = studied(AdaAlpha(Table(logits), Table(target.log())), batch)
    second = AdaAlpha(Table(logits + 1), Table(target.log()))
    second.load_trained_state(copy.deepcopy(first.trained_state()))
    torch.testing.assert_close(second.measured, first.measured, atol=0, rtol=0)
    assert second.counts.tolist() == first.counts.tolist()
    torch.testing.assert_close(second(batch, NOW).losses["ada-alpha"], first(batch, NOW).losses["ada-alpha"])
    second.measured.zero_()
    assert float(first.measured.abs().sum()) > 0  # a copy


def test_as_a_part_of_others() -> None:
    student, teacher, batch = small_model(0), small_model(1).eval(), small_batch(12)
    both = METHODS.create("composed", student, teacher, methods=("ada-alpha", "sp"))
    inner = next(part for part in both.modules() if isinstance(part, AdaAlpha))
    inner.study([small_batch(40)])
    assert "ada-alpha" in both(batch, NOW).losses
    assert any(name.endswith("measured") for name in both.trained_state())
    assert both.describe()["reliability"] == inner.measured.tolist()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ada-alpha", {"temperature": 0.0}, "temperature > 0"),
        ("ada-alpha", {"few": -1}, "few >= 0"),
        ("ada-alpha", {"shrinkage": -1.0}, "shrinkage >= 0"),
        ("ada-alpha", {"max_alpha": 1.1}, r"max_alpha in \[0, 1\]"),
        ("ada-alpha", {"power": -1.0}, "power >= 0"),
        ("ada-alpha", {"reliability": "luck"}, "reliability"),
        ("ada-margin", {"teacher_weight": -0.1}, "teacher_weight"),
        ("ada-margin", {"scale": -1.0}, "scale >= 0"),
        ("ada-margin", {"margin_form": "both"}, "margin_form"),
        ("ada-margin", {"group": "attribute"}, 'margin_form="target"'),
    ],
)
def test_bad_options_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        METHODS.create(name, small_model(), small_model(1), **options)


# In a run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that holds out a fifth, and one that holds out nothing."""
    place = tmp_path_factory.mktemp("ada")
    for name, share in (("teacher", 0.2), ("greedy", 0.0)):
        overproof.train("mlp", "digits", epochs=2, batch_size=64, lr=0.1, validation=share, out=place / name)
    return place


BRIEF = {"epochs": 1, "batch_size": 64, "lr": 0.05, "validation": 0.2}


def test_a_run_measures_before_it_trains_and_keeps_what_it_found(runs: Path, tmp_path: Path) -> None:
    run = overproof.distill("mlp", runs / "teacher", "digits", method="ada-alpha", out=tmp_path / "a", **BRIEF)
    kept = run.folder.method
    data = load_data("digits", validation=0.2)
    teacher = overproof.load(runs / "teacher")
    found = estimate_reliability(teacher, make_loader(data.validation, 50).batches(0))
    assert kept["reliability"] == pytest.approx(found.values.tolist(), abs=1e-6)
    assert kept["counts"] == torch.bincount(data.validation.labels, minlength=10).tolist()
    assert kept["names"] == list("0123456789")
    assert kept["alpha"] == pytest.approx([max(g, 0) for g in kept["reliability"]], abs=1e-6)
    assert run.folder.data["counts"]["train"] == torch.bincount(data.train.labels, minlength=10).tolist()
    from safetensors.torch import load_file

    assert not [
        name for name in load_file(run.path / "weights" / "best.safetensors") if "measured" in name
    ]  # the student alone
    assert overproof.resume(run.path).path == run.path


def test_reliability_from_training_images_is_refused(runs: Path, tmp_path: Path) -> None:
    def go(**more: Any) -> Any:
        teacher = more.pop("teacher", "teacher")
        return overproof.distill("mlp", runs / teacher, "digits", method="ada-margin", out=tmp_path / "r", **{**BRIEF, **more})

    with pytest.raises(UsageError, match="may know by heart.*allow_training_images=true"):
        go(held_out="train")
    with pytest.raises(UsageError, match="no validation part.*data.validation=0.1"):
        go(validation=0.0)
    with pytest.raises(UsageError, match="trained on 269 of the held-out images.*Hold out the same"):
        go(teacher="greedy")
    with pytest.raises(UsageError, match=r"trained on \d+ of the held-out images"):
        go(split_seed=1)
    assert not (tmp_path / "r").exists()
    assert go(teacher="greedy", allow_training_images=True).folder.method["held_out"] == "validation"
    forced = overproof.distill(
        "mlp",
        runs / "teacher",
        "digits",
        method="ada-margin",
        out=tmp_path / "t",
        held_out="train",
        allow_training_images=True,
        **BRIEF,
    )
    assert sum(forced.folder.method["counts"]) == 1078
    honest = overproof.distill(
        "mlp",
        runs / "greedy",
        "digits",
        method="ada-alpha",
        out=tmp_path / "h",
        **{**BRIEF, "validation": 0.5},
        validation_from="test",
    )
    assert sum(honest.folder.method["counts"]) == 223  # half of the 450 test images, rounded by class


def test_a_teacher_that_learned_less_has_seen_less(runs: Path, tmp_path: Path) -> None:
    """Images that a limit or a long tail kept from the teacher may be held out of the student's set: only real overlaps count."""
    overproof.train("mlp", "digits", epochs=1, validation=0.0, limit_train=200, out=tmp_path / "small")
    with pytest.raises(UsageError, match=r"trained on (\d+) of the held-out") as caught:
        overproof.distill("mlp", tmp_path / "small", "digits", method="ada-alpha", out=tmp_path / "s", **BRIEF)
    kept = load_data("digits", validation=0.0, limit_train=200).train.index
    held = load_data("digits", validation=0.2).validation.index
    assert f"trained on {int(torch.isin(held, kept).sum())} of" in str(caught.value)


def test_objects_of_the_caller(tmp_path: Path) -> None:
    teacher, batch = small_model(1).eval(), small_batch(24, shape=(1, 8, 8))
    pair, other = (batch.images, batch.labels), (batch.images.flip(0), batch.labels.flip(0))
    brief = {"epochs": 1, "batch_size": 8, "method": "ada-alpha"}
    run = overproof.distill(small_model(0), teacher, pair, validation_data=other, out=tmp_path / "a", **brief)
    assert sum(run.folder.method["counts"]) == 24
    same = ImageSet(*pair)
    with pytest.raises(UsageError, match="trained on 24 of the held-out images"):
        overproof.distill(small_model(0), teacher, same, validation_data=same, out=tmp_path / "b", **brief)
    with pytest.raises(UsageError, match="needs the subgroup of every image"):
        overproof.distill(small_model(0), teacher, pair, validation_data=other, group="attribute", out=tmp_path / "c", **brief)
    with pytest.raises(UsageError, match=r"long_tail belongs to data with a name"):
        overproof.distill(small_model(0), teacher, pair, validation_data=other, long_tail=10, out=tmp_path / "c", **brief)


def test_a_run_by_subgroup(tmp_path: Path) -> None:
    batch = small_batch(24)
    numbers = torch.arange(24) % 2
    whole = ImageSet(batch.images, batch.labels, classes=3).with_attribute(Attribute("camera", ("old", "new"), numbers))
    parts = [whole.subset(range(a, a + 8)) for a in (0, 8, 16)]
    data = Splits(train=parts[0], validation=parts[1], test=parts[2])
    brief = {"epochs": 1, "batch_size": 8, "group": "attribute", "few": 0}
    teacher = small_model(1).eval()
    run = overproof.distill(small_model(0), teacher, data, method="ada-alpha", out=tmp_path / "a", **brief)
    found = estimate_reliability(teacher, make_loader(parts[1], 8).batches(0), groups=numbers, count=2)
    assert run.folder.method["reliability"] == pytest.approx(found.values.tolist(), abs=1e-6)
    assert run.folder.method["names"] == ["old", "new"]
    assert run.folder.data["attribute"]["counts"]["train"] == [4, 4]
    summary = run.evaluations["test-best"]["attribute"]
    assert (summary["name"], summary["names"], summary["count"]) == ("camera", ["old", "new"], [4, 4])
    assert run.folder.arrays("test-best")["group"].tolist() == numbers[16:24].tolist()
    wrong = parts[1].with_attribute(Attribute("camera", ("new", "old"), numbers))
    data = Splits(train=parts[0], validation=wrong, test=parts[2])
    with pytest.raises(UsageError, match="they must be the same, in the same order"):
        overproof.distill(small_model(0), teacher, data, method="ada-alpha", out=tmp_path / "b", **brief)


# On real digits


def _student_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))


def _trained(objective: Any, data: Splits, seed: int, epochs: int = 30) -> Tensor:
    optimizer = torch.optim.SGD(list(objective.trainable()), lr=0.05, momentum=0.9)
    loader = make_loader(data.train, 32, shuffle=True, seed=seed)
    for epoch in range(epochs):
        for batch in loader.batches(epoch):
            optimizer.zero_grad()
            sum(objective(batch, NOW).losses.values()).backward()
            optimizer.step()
    test = next(iter(make_loader(data.test, 1000).batches(0)))
    with torch.no_grad():
        right = (objective.student(test.images).argmax(1) == test.labels).double()
    recalls = torch.stack([right[test.labels == c].mean() for c in range(10)])
    return recalls.sort().values[:3].mean()


def test_long_tailed_digits_pay_for_distillation_and_less_for_careful_ones() -> None:
    """The four signs of the paired differences in the worst three classes, mean over two seeds (each has them too)."""
    from overproof.methods.ce import CE

    data = load_data("digits", validation=0.3, long_tail=30)
    held = list(make_loader(data.validation, 400).batches(0))
    gains = {"kd": [], "alpha": [], "alpha-1": [], "pairwise": []}
    for seed in range(2):
        torch.manual_seed(100 + seed)
        teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        _trained(CE(teacher), data, seed)

        def score(build: Any, seed: int = seed, **options: Any) -> float:
            objective = build(_student_of(seed), *options.pop("networks"), **options)
            if hasattr(objective, "study"):
                objective.study(held)
            return float(_trained(objective, data, seed))

        pair = (teacher,)
        alone = score(CE, networks=())
        kd = score(AdaAlpha, networks=pair, power=0.0, max_alpha=0.5, temperature=3.0)
        gains["kd"].append(kd - alone)
        gains["alpha"].append(score(AdaAlpha, networks=pair, temperature=3.0) - kd)
        plain = score(AdaAlpha, networks=pair, power=0.0, max_alpha=0.5)
        gains["alpha-1"].append(score(AdaAlpha, networks=pair) - plain)
        gains["pairwise"].append(score(AdaMargin, networks=pair, temperature=3.0) - kd)
    means = {name: sum(values) / 2 for name, values in gains.items()}
    assert means["kd"] < 0, gains
    assert means["alpha"] > 0, gains
    assert means["alpha-1"] > 0, gains
    assert means["pairwise"] > 0, gains
