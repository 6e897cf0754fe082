"""Feature distillers: formulas, places and adapters, errors, and their sum."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import overproof
from overproof.data import ImageSet, Splits
from overproof.errors import UnknownNameError, UsageError
from overproof.features import Tap
from overproof.losses.contrast import noise_contrast
from overproof.losses.divergences import kl_divergence
from overproof.methods import METHODS
from overproof.methods.attention_transfer import AttentionTransfer
from overproof.methods.composed import Composed
from overproof.methods.crd import CRD
from overproof.methods.dkd import DKD
from overproof.methods.feature_adapters import Regressor
from overproof.methods.feature_bank import Bank
from overproof.methods.feature_probe import Place, as_map, as_vector, pair_up, pooled_map
from overproof.methods.fitnet import FitNet
from overproof.methods.kd import KD
from overproof.methods.logit_standard import LogitStandard
from overproof.methods.reviewkd import ReviewKD
from overproof.methods.rkd import RKD
from overproof.methods.similarity import SimilarityPreserving
from overproof.methods.vid import VID
from overproof.models import create_model
from overproof.run.numbering import check_numbers
from overproof.testing import check_method, small_batch, small_model
from overproof.types import Batch, Progress

NOW = Progress()
MAP_METHODS = ("fitnet", "at", "sp", "vid", "reviewkd")
ALL = (*MAP_METHODS, "crd", "rkd", "dkd", "dist", "logit-standard")


def pair(student: str = "resnet8", teacher: str = "resnet14", size: int = 16) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return create_model(student, 5, 3, size), create_model(teacher, 5, 3, size)


def images(count: int = 4, size: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 5
    return Batch(torch.rand(count, 3, size, size, generator=generator), labels, torch.arange(count))


@pytest.mark.parametrize("name", ALL)
def test_contract(name: str) -> None:
    check_method(METHODS.get(name).load())


@pytest.mark.parametrize("options", [{"negatives": "all"}, {"negatives": "batch"}, {"positive": "relax"}, {"samples": 8}])
def test_contract_of_crd_forms(options: dict[str, object]) -> None:
    check_method(lambda student, teacher: CRD(student, teacher, **options))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("resnet8", "vit-tiny"),
        ("vit-tiny", "resnet8"),
        ("mobilenetv2", "vgg8"),
        ("resnet8", "resnet18"),
        ("shufflenetv1", "wrn-16-1"),
    ],
)
@pytest.mark.parametrize("name", ["at", "sp", "vid", "reviewkd", "crd", "rkd"])
def test_any_two_networks(name: str, student: str, teacher: str) -> None:
    objective = METHODS.create(name, *pair(student, teacher)).train()
    output = objective(images(), NOW)
    sum(output.losses.values()).backward()
    assert all(bool(value.isfinite()) for value in output.losses.values())
    trained = {id(p) for p in objective.student.parameters()}
    assert all(p.grad is not None for p in objective.parameters() if id(p) not in trained and p.requires_grad)


def test_places_are_the_middle_and_all_stages() -> None:
    student, teacher = pair()
    assert [(p.student, p.teacher) for p in FitNet(student, teacher).places] == [("net.layer2", "net.layer2")]
    assert [p.teacher for p in AttentionTransfer(student, teacher).places] == ["net.layer1", "net.layer2", "net.layer3"]
    review = ReviewKD(student, teacher)
    assert [p.teacher for p in review.places][:2] == ["net.layer1.1.relu2:input", "net.layer2.1.relu2:input"]
    assert review.places[-1].student == "net.fc:input"
    assert SimilarityPreserving(student, teacher).places[0].student == "net.layer3"
    assert RKD(student, teacher).places[0].teacher_shape == (64,)


def test_stages_are_paired_by_size() -> None:
    sizes = {name: torch.zeros(1, 2, side, side) for name, side in (("a", 32), ("b", 16), ("c", 8))}
    more = {name: torch.zeros(1, 2, side, side) for name, side in (("1", 64), ("2", 32), ("3", 16), ("4", 8))}
    assert pair_up(sizes, more) == [("a", "2"), ("b", "3"), ("c", "4")]
    assert pair_up(more, sizes) == [("2", "a"), ("3", "b"), ("4", "c")]


def test_tokens_become_maps_and_vectors() -> None:
    tokens = torch.arange(2 * 10 * 3.0).view(2, 10, 3)
    square = as_map(tokens, "blocks.0")
    assert square.shape == (2, 3, 3, 3)
    torch.testing.assert_close(square[0, :, 0, 1], tokens[0, 2])  # the first token is the class token
    torch.testing.assert_close(as_vector(tokens), tokens.mean(1))


def test_the_map_behind_the_vector_is_found() -> None:
    for name in ("resnet8", "wrn-16-1", "vgg8", "mobilenetv2", "shufflenetv1"):
        model, batch = pair(name)[0].eval(), images()
        layer = pooled_map(model, batch.images)
        assert layer is not None, name
        _, features = Tap(model, [layer, "net.fc:input"])(batch.images)
        torch.testing.assert_close(features[layer].mean((2, 3)), features["net.fc:input"])
    assert pooled_map(pair("vit-tiny")[0], images().images) is None


def test_fitnet_is_its_formula_and_vanishes_for_an_identity_regressor() -> None:
    student, teacher = pair("resnet8", "resnet8")
    student.load_state_dict(teacher.state_dict())
    objective = FitNet(student, teacher).eval()
    objective.regressors[0] = nn.Identity()
    assert float(objective(images(), NOW).losses["fitnet"].detach()) == 0
    fresh = FitNet(*pair(), weight=3.0).eval()
    _, ours = Tap(fresh.student, ["net.layer2"])(images().images)
    _, theirs = Tap(fresh.teacher, ["net.layer2"])(images().images)
    expected = 3 * F.mse_loss(fresh.regressors[0](ours["net.layer2"]), theirs["net.layer2"])
    torch.testing.assert_close(fresh(images(), NOW).losses["fitnet"], expected)


@pytest.mark.parametrize(
    ("ours", "theirs", "kind"), [(16, 8, nn.Conv2d), (8, 16, nn.ConvTranspose2d), (9, 7, nn.Conv2d), (8, 8, nn.Conv2d)]
)
def test_regressor_brings_any_fitting_size(ours: int, theirs: int, kind: type[nn.Module]) -> None:
    place = Place("a", "b", (5, ours, ours), (7, theirs, theirs), False, True)
    regressor = Regressor(place)
    assert isinstance(regressor[0], kind)
    assert regressor(torch.rand(2, 5, ours, ours)).shape == (2, 7, theirs, theirs)


def test_regressor_ends_as_the_teacher_does() -> None:
    """A ReLU could never reach the negative values of a feature before its activation."""
    behind = Regressor(Place("a", "b", (2, 4, 4), (3, 4, 4), False, True), depth=3)
    before = Regressor(Place("a", "b", (2, 4, 4), (3, 4, 4), True, True), depth=3)
    assert isinstance(behind[-1], nn.ReLU)
    assert isinstance(before[-1], nn.BatchNorm2d)
    assert len(behind) == 9
    student, teacher = pair()
    assert not FitNet(student, teacher).places[0].signed
    assert (
        FitNet(student, teacher, teacher_layers=("net.layer2.1.relu2:input",), student_layers=("net.layer2",)).places[0].signed
    )


def test_adapters_are_saved_counted_and_no_part_of_the_student() -> None:
    student, teacher = pair()
    before = sum(p.numel() for p in student.parameters())
    objective = FitNet(student, teacher)
    names = [name for name in objective.trained_state() if not name.startswith("student.")]
    assert names
    assert all(name.startswith("regressors.") for name in names)
    assert objective.adapter_parameters == 32 * 32 + 32 + 2 * 32
    assert sum(p.numel() for p in student.parameters()) == before
    assert DKD(*pair()).adapter_parameters == 0


def test_hooks_leave_with_the_objective() -> None:
    student, teacher = pair()
    objective = AttentionTransfer(student, teacher)
    assert sum(len(m._forward_hooks) for m in student.modules()) == 3
    objective.release()
    assert sum(len(m._forward_hooks) for net in (student, teacher) for m in net.modules()) == 0


def test_attention_transfer_without_gradient_to_the_teacher_and_scale() -> None:
    student, teacher = pair("resnet8", "resnet8")
    student.load_state_dict(teacher.state_dict())
    losses = AttentionTransfer(student, teacher).eval()(images(), NOW).losses
    assert float(losses["at"].detach()) == pytest.approx(0, abs=1e-10)


def test_vid_begins_at_the_variance_asked_for() -> None:
    objective = VID(*pair(), variance=3.0)
    _, variance = objective.predictors[0](torch.rand(1, 16, 4, 4))
    torch.testing.assert_close(variance, torch.full((16,), 3.0))


def test_dkd_warm_up_counts_from_one_and_kd_is_recovered() -> None:
    student, teacher = (net.eval() for net in pair())
    values = [DKD(student, teacher).eval()(images(), Progress(epoch=e)).losses["dkd-rest"].detach() for e in (0, 9, 19, 60)]
    torch.testing.assert_close(torch.stack(values) / values[2], torch.tensor([0.05, 0.5, 1.0, 1.0]))
    batch, tau = images(1), 4.0
    with torch.no_grad():
        beta = 1 - (teacher(batch.images) / tau).softmax(1)[0, batch.labels[0]]
    parts = DKD(student, teacher, beta=float(beta), warmup=0, ce_weight=0).eval()(batch, NOW).losses
    kd = KD(student, teacher, kd_weight=1.0, temperature=tau)(batch, NOW).losses["kd"]
    torch.testing.assert_close(sum(parts.values()), kd, atol=1e-6, rtol=1e-4)


def test_reviewkd_warm_up_and_order() -> None:
    student, teacher = pair()
    objective = ReviewKD(student, teacher).eval()
    first, full = (objective(images(), Progress(epoch=e)).losses["reviewkd"].detach() for e in (0, 19))
    torch.testing.assert_close(first, full / 20)
    assert [fusion.attend is None for fusion in objective.fusions] == [False, False, False, True]
    assert objective.fusions[0].reduce[0].out_channels == 64


def test_logit_standard_does_not_see_scale() -> None:
    student, teacher = pair("resnet8", "resnet8")
    student.load_state_dict(teacher.state_dict())
    student.net.fc.weight.data *= 3
    student.net.fc.bias.data *= 3
    term = LogitStandard(student, teacher).eval()(images(), NOW).losses["logit-standard"]
    assert float(term.detach()) == pytest.approx(0, abs=1e-5)
    assert float(KD(student, teacher)(images(), NOW).losses["kd"].detach()) > 1e-4


# Contrastive distillation


def bank_of(labels: list[int], dim: int = 4) -> Bank:
    torch.manual_seed(0)
    bank = Bank(dim, len(labels), momentum=0.5)
    bank.open(torch.arange(len(labels)), torch.tensor(labels))
    return bank


def test_bank_draws_other_classes_uniformly_and_same_ones() -> None:
    labels = torch.tensor([0, 1, 1, 2, 0, 2, 2])
    bank = bank_of(labels.tolist())
    drawn = bank.draw_others(torch.tensor([1, 2]), 20_000)
    for row, label in zip(drawn, (1, 2), strict=True):
        counts = torch.bincount(row, minlength=7)
        assert bool((counts[labels == label] == 0).all())
        expected = 20_000 / int((labels != label).sum())
        assert bool(((counts[labels != label] - expected).abs() < 5 * math.sqrt(expected)).all())
    same = bank.draw_same(torch.tensor([2] * 3_000))
    assert set(same.tolist()) == {3, 5, 6}


def test_rows_that_no_image_has_filled_are_no_negatives() -> None:
    bank = Bank(4, 1000, momentum=0.5)
    bank.open(torch.tensor([3, 500, 7]), torch.tensor([0, 1, 1]))
    drawn = bank.draw_others(torch.tensor([0, 1]), 200)
    assert set(drawn[0].tolist()) == {500, 7}
    assert set(drawn[1].tolist()) == {3}
    alone = Bank(4, 10, momentum=0.5)  # nobody else is known yet: any row that is
    alone.open(torch.tensor([2, 5]), torch.tensor([4, 4]))
    assert set(alone.draw_others(torch.tensor([4]), 100).flatten().tolist()) == {2, 5}


@pytest.mark.parametrize("negatives", ["all", 64])
def test_a_larger_bank_teaches_the_same(negatives: int | str) -> None:
    """Rows of images that are not trained on change nothing; neither does their number."""
    found = []
    for samples in (12, 5000):
        torch.manual_seed(0)
        objective = CRD(small_model(0), small_model(1).eval(), dim=8, samples=samples, negatives=negatives).train()
        objective.student.eval()
        rows = torch.nn.functional.normalize(torch.randn(12, 8, generator=torch.Generator().manual_seed(1)), dim=1)
        objective.bank.student[:12], objective.bank.teacher[:12] = rows, rows.flip(0)
        for name in ("student_head", "teacher_head"):
            nn.init.eye_(getattr(objective, name).weight)
        if negatives != "all":
            objective.negatives = 12
            objective.bank.draw_others = lambda labels, count: torch.arange(count).expand(len(labels), count)  # type: ignore[method-assign]
        losses = objective(small_batch(12), NOW).losses
        found.append(torch.stack([losses["crd-student"], losses["crd-teacher"]]).detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_bank_updates_only_its_rows_to_unit_length() -> None:
    bank = bank_of([0, 1, 2, 3])
    before, held = bank.student.clone(), bank.student
    new = F.normalize(torch.rand(2, 4), dim=1)
    bank.remember(torch.tensor([1, 3]), new, new)
    assert torch.equal(held, before), "the rows of the present graph were changed in place"
    torch.testing.assert_close(bank.student[[0, 2]], before[[0, 2]])
    torch.testing.assert_close(bank.student[[1, 3]], F.normalize(before[[1, 3]] + new, dim=1))
    torch.testing.assert_close(bank.student[[1, 3]].norm(dim=1), torch.ones(2))


def crd(**options: object) -> tuple[CRD, Batch]:
    torch.manual_seed(0)
    objective = CRD(small_model(0), small_model(1).eval(), dim=8, samples=12, **options).train()
    return objective, small_batch(12)


def test_crd_is_the_raw_formula_with_stale_positives_and_a_frozen_scale() -> None:
    """P = e^{s/tau} / Z with Z = M mean e^{s/tau} of the first batch; all rows of other classes as negatives."""
    objective, batch = crd(negatives="all")
    objective.student.eval()
    student_bank, teacher_bank = objective.bank.student.clone(), objective.bank.teacher.clone()
    losses = objective(batch, NOW).losses
    view = objective.view(objective.look(batch, objective.teach(batch)))
    ours = F.normalize(objective.student_head(view.features[0]), dim=1)
    theirs = F.normalize(objective.teacher_head(view.teacher_features[0]), dim=1)
    for name, vectors, rows in (("crd-student", ours, teacher_bank), ("crd-teacher", theirs, student_bank)):
        raw = (vectors @ rows.T / 0.07).exp()
        others = batch.labels[:, None] != batch.labels
        p = raw / (raw[others | torch.eye(12, dtype=torch.bool)].mean() * 12)
        noise = others.sum(1) / 12
        value = -(p.diagonal() / (p.diagonal() + noise)).log() - ((noise[:, None] / (p + noise[:, None])).log() * others).sum(1)
        torch.testing.assert_close(losses[name].detach(), 0.8 * value.mean().detach(), rtol=1e-4, atol=0)
    scale = objective.bank.log_z.clone()
    objective(batch, NOW)
    assert torch.equal(scale, objective.bank.log_z)
    assert "bank.log_z" in objective.trained_state()


def test_only_the_teachers_bank_teaches_the_student() -> None:
    objective, batch = crd()
    losses = objective(batch, NOW).losses
    parameters = list(objective.student.parameters())[:2]
    student = torch.autograd.grad(losses["crd-student"], parameters, retain_graph=True)
    assert all(float(g.abs().sum()) > 0 for g in student)
    nothing = torch.autograd.grad(losses["crd-teacher"], parameters, allow_unused=True)
    assert all(g is None for g in nothing)
    assert not objective.bank.student.requires_grad


def test_picking_scores_equals_gathering_rows() -> None:
    objective, batch = crd(negatives=5)
    objective.student.eval()
    objective(batch, NOW)
    rows, scale = objective.bank.teacher.clone(), objective.bank.log_z[0].clone()
    torch.manual_seed(7)
    ours = objective(batch, NOW).losses["crd-student"]
    torch.manual_seed(7)
    drawn = objective.bank.draw_others(batch.labels, 5)
    view = objective.view(objective.look(batch, objective.teach(batch)))
    vectors = F.normalize(objective.student_head(view.features[0]), dim=1)
    gathered = torch.bmm(rows[torch.cat([batch.index[:, None], drawn], 1)], vectors[:, :, None]).squeeze(2) / 0.07 - scale
    expected = noise_contrast(gathered[:, 0], gathered[:, 1:], math.log(5 / 12)).mean()
    torch.testing.assert_close(ours, 0.8 * expected)


def test_bank_and_data_must_agree() -> None:
    objective, batch = crd()
    with pytest.raises(UsageError, match=r"index 40 has no row in the bank of 12.*samples=41"):
        objective(Batch(batch.images, batch.labels, batch.index + 29), NOW)
    state = objective.trained_state()
    other = CRD(small_model(0), small_model(1), dim=8, samples=20)
    with pytest.raises(UsageError, match="holds 12 images, the training set 20"):
        other.load_trained_state(state)
    growing = CRD(small_model(0), small_model(1), dim=8)
    growing.load_trained_state(state)
    assert len(growing.bank) == 12


def test_in_batch_negatives_need_a_batch() -> None:
    objective = CRD(small_model(0), small_model(1), negatives="batch").eval()
    with pytest.raises(UsageError, match="at least two"):
        objective(small_batch(1), NOW)
    with pytest.raises(UsageError, match="at least two"):
        RKD(small_model(0), small_model(1)).eval()(small_batch(1), NOW)


# Errors


def test_unknown_layers_offer_near_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"'net.layr2'.*Did you mean .*'net.layer2'"):
        FitNet(*pair(), student_layers=("net.layr2",), teacher_layers=("net.layer2",))


def test_impossible_pairs_say_what_would_work() -> None:
    with pytest.raises(UsageError, match=r"gives vectors of shape \(256,\).*crd, rkd"):
        AttentionTransfer(*pair("resnet8", "mlp"))
    with pytest.raises(UsageError, match=r"'net.layer3' \(64, 4, 4\).*'net.layer1' \(16, 16, 16\).*at and reviewkd"):
        FitNet(*pair(), student_layers=("net.layer3",), teacher_layers=("net.layer1",))
    with pytest.raises(UsageError, match=r"2 student_layers .* 1 teacher_layers"):
        VID(*pair(), student_layers=("net.layer1", "net.layer2"), teacher_layers=("net.layer1",))
    with pytest.raises(UsageError, match="image_shape"):
        FitNet(*pair(), image_shape=(1, 16, 16))


def test_built_for_another_size_is_noticed() -> None:
    objective = FitNet(*pair(), student_layers=("net.layer1",), teacher_layers=("net.layer3",)).eval()
    with pytest.raises(UsageError, match="image_shape"):
        objective(images(size=24), NOW)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fitnet", {"weight": -1}),
        ("fitnet", {"regressor_depth": 0}),
        ("at", {"power": 0}),
        ("crd", {"temperature": 0}),
        ("crd", {"negatives": 0}),
        ("dkd", {"temperature": 0}),
        ("dist", {"beta": -1}),
        ("vid", {"variance": 0}),
        ("reviewkd", {"warmup": -1}),
        ("rkd", {"angle_weight": -1}),
        ("sp", {"weight": -1}),
        ("logit-standard", {"temperature": -1}),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        METHODS.create(name, small_model(0), small_model(1), **options)


# Composition


def test_a_sum_of_methods_runs_each_network_once() -> None:
    student, teacher = small_model(0).eval(), small_model(1).eval()
    calls = {"student": 0, "teacher": 0}
    student.register_forward_hook(lambda *_: calls.__setitem__("student", calls["student"] + 1))
    teacher.register_forward_hook(lambda *_: calls.__setitem__("teacher", calls["teacher"] + 1))
    objective = Composed(student, teacher, methods=("kd", "at", "dkd"), weights=(0.5, 2.0, 1.0)).eval()
    calls.update(student=0, teacher=0)
    losses = objective(small_batch(), NOW).losses
    assert calls == {"student": 1, "teacher": 1}
    alone = {name: METHODS.create(name, student, teacher).eval()(small_batch(), NOW).losses for name in ("kd", "at", "dkd")}
    torch.testing.assert_close(losses["kd"], 0.5 * alone["kd"]["kd"])
    torch.testing.assert_close(losses["at"], 2 * alone["at"]["at"])
    torch.testing.assert_close(losses["dkd-rest"], alone["dkd"]["dkd-rest"])
    torch.testing.assert_close(losses["ce"], F.cross_entropy(student(small_batch().images), small_batch().labels))
    assert set(losses) == {"ce", "kd", "at", "dkd-target", "dkd-rest"}


def test_a_sum_keeps_one_student_in_its_checkpoint() -> None:
    objective = Composed(small_model(0), small_model(1), methods=("kd", "fitnet", "crd"))
    state = objective.trained_state()
    outside = {name for name in state if not name.startswith("student.")}
    assert all(
        name.startswith(("parts.1.regressors", "parts.2.bank", "parts.2.student_head", "parts.2.teacher_head"))
        for name in outside
    )
    other = Composed(small_model(3), small_model(1), methods=("kd", "fitnet", "crd"))
    other.load_trained_state(copy.deepcopy(state))
    assert all(torch.equal(value, state[name]) for name, value in other.trained_state().items())
    with pytest.raises(UsageError, match="not of the same methods"):
        Composed(small_model(0), small_model(1), methods=("kd", "at")).load_trained_state(state)


def test_any_method_can_be_a_part() -> None:
    check_method(lambda student, teacher: Composed(student, teacher, methods=("rslad", "at"), weights=(1.0, 0.1)))
    objective = Composed(small_model(0), small_model(1), methods=("ard", "sp"))
    assert objective.validation_attack is not None
    assert Composed(small_model(0), small_model(1)).validation_attack is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ()}, "at least one"),
        ({"methods": ("kd", "kd")}, "only once"),
        ({"methods": ("kd", "at"), "weights": (1.0,)}, "one weight"),
        ({"methods": ("kd",), "options": {"at": {}}}, "not among"),
        ({"methods": ("kd", "composed")}, "consists of other methods"),
        ({"methods": ("kd", "sokd")}, "consists of other methods"),
        ({"methods": ("kd",), "options": {"kd": {"temprature": 3}}}, "Did you mean 'temperature'"),
    ],
)
def test_bad_sums_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Composed(small_model(0), small_model(1), **options)


def test_logit_parts_share_logits_with_kd() -> None:
    student, teacher = small_model(0).eval(), small_model(1).eval()
    losses = Composed(student, teacher, methods=("kd", "dist"), options={"kd": {"temperature": 2.0, "kd_weight": 1.0}}).eval()
    with torch.no_grad():
        z, t = student(small_batch().images), teacher(small_batch().images)
    torch.testing.assert_close(
        losses(small_batch(), NOW).losses["kd"].detach(), 4 * kl_divergence(t, z, temperature=2.0).mean()
    )


def test_run_tells_methods_about_the_data(tmp_path: Path) -> None:
    """A bank has a row for every index of the whole set, not of the part that is trained on; lists of methods are composed."""
    from overproof import create_model, distill
    from overproof.data import load_data

    data = load_data("digits", seed=0, limit_train=64)
    networks = [create_model("cnn", 10, 1, 8, widths=(4, 8)) for _ in range(2)]
    run = distill(*networks, data, method=["kd", "crd"], epochs=1, batch_size=32, out=tmp_path / "run")
    assert run.folder.config["method"]["methods"] == ["kd", "crd"]
    assert run.folder.status["state"] == "done"


class Numbered:
    """Batches that bring their images' numbers."""

    def __init__(self, part: ImageSet) -> None:
        self.part = part

    def __iter__(self) -> Iterator[Batch]:
        for rows in torch.randperm(len(self.part)).split(16):
            yield Batch(self.part.images[rows].float() / 255, self.part.labels[rows], rows)


def test_what_is_remembered_by_number_needs_numbers_that_stay(digits: Splits, tmp_path: Path) -> None:
    part = digits.train.subset(range(48))
    pairs = TensorDataset(part.images, part.labels)
    batches = [(part.images[rows], part.labels[rows]) for rows in torch.arange(48).split(16)]
    loaders = {
        "shuffled": DataLoader(pairs, batch_size=16, shuffle=True),
        "own order": DataLoader(pairs, batch_sampler=[[1, 2], [3, 4]]),
        "in order": DataLoader(pairs, batch_size=16),
        "a list": batches,
        "numbered": Numbered(part),
        "unknown": (batch for batch in batches),
    }
    networks = [overproof.create_model("cnn", 10, 1, 8) for _ in range(2)]
    remembering, forgetting = (METHODS.create(name, *networks, image_shape=(1, 8, 8)) for name in ("crd", "fitnet"))
    for name, loader in loaders.items():
        check_numbers(forgetting, loader)
        if name in ("shuffled", "own order", "unknown"):
            with pytest.raises(UsageError, match="Hand over the Dataset itself"):
                check_numbers(remembering, loader)
        else:
            check_numbers(remembering, loader)
    with pytest.raises(UsageError, match="remembers each image by its number"):
        overproof.distill(*networks, loaders["shuffled"], method="crd", epochs=1, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
