"""Probes: closed forms, identities, controls, and what is said of bad input."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import overproof
from overproof.attacks.randomness import Streams
from overproof.data import ImageSet
from overproof.errors import DataError, UnknownNameError, UsageError
from overproof.evaluation import boundary_similarity
from overproof.evaluation.counting import Passes
from overproof.features import Tap
from overproof.losses.divergences import cross_entropy
from overproof.networks import digest
from overproof.probes import (
    PROBES,
    Cues,
    Groups,
    Lab,
    Material,
    Planes,
    Probe,
    Store,
    Table,
    explain,
    grad_cam,
    linear_cka,
    read_groups,
)
from overproof.probes.base import FEWER, SEEDS
from overproof.probes.boundaries import BoundarySimilarity
from overproof.probes.cam import closed_head, spatial_layer
from overproof.probes.cka import CKA, counterparts, grid, jackknife
from overproof.probes.domains import Corruptions, Domains
from overproof.probes.group_bias import GroupBias
from overproof.probes.invariance import Colour, Shift
from overproof.probes.localisation import Localisation, similarity, wins
from overproof.probes.planes import DecisionPlanes
from overproof.probes.shape_bias import ShapeBias, decisions, read_cues, shape_or_texture
from overproof.probes.transfer import AdversarialTransfer
from overproof.probes.views import colour_views, crop_views, shift_views, turned
from overproof.testing import small_model

CLASSES = 3
BRIEF: dict[str, dict[str, Any]] = {
    "adversarial-transfer": {"eps": 0.3},
    "corruptions": {"severities": (5,), "kinds": ("noise", "contrast")},
    "decision-planes": {"planes": 4, "side": 6},
    "boundary-similarity": {"images": 6, "targets": 1},
    "cka": {"images": 12},
    **{name: {"strengths": (0.5,)} for name in ("colour", "crop")},
    "shift": {"strengths": (16,)},
}


def images(count: int = 24, channels: int = 1, side: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def net(seed: int, channels: int = 1) -> nn.Module:
    """A network whose head averages a map; its logits are centred on the images above, so that it uses all its classes."""
    torch.manual_seed(seed)
    model = overproof.create_model("cnn", CLASSES, channels, 8, widths=(4, 6)).eval()
    with torch.no_grad():
        model.net.fc.weight *= 30
        model.net.fc.bias -= model(images(24, channels)).mean(dim=0)
    return model


def relative(seed: int, much: float = 0.15) -> nn.Module:
    """The network number 0 with weights a little different."""
    model, draw = net(0), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.net.parameters():
            weight += much * weight.abs().mean() * torch.randn(weight.shape, generator=draw)
        model.net.fc.bias -= model(images()).mean(dim=0)
    return model


class Scripted(nn.Module):
    """Says of image number i what is written in place i; the number is in the first pixel, as a share of 1000."""

    def __init__(self, said: list[int], classes: int = CLASSES) -> None:
        super().__init__()
        self.register_buffer("said", torch.tensor(said))
        self.classes = classes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        numbers = (x[:, 0, 0, 0] * 1000).round().long()
        return nn.functional.one_hot(self.said[numbers], self.classes).to(x.dtype)


def numbered(count: int, first: int = 0) -> torch.Tensor:
    x = torch.zeros(count, 1, 2, 2)
    x[:, 0, 0, 0] = (first + torch.arange(count)) / 1000
    return x


@pytest.fixture(scope="module")
def cast() -> dict[str, nn.Module]:
    names = ("teacher", "student:a", "independent:0", "independent:1")
    return {name: relative(seed) for seed, name in enumerate(names)}


@pytest.fixture(scope="module")
def material(cast: dict[str, nn.Module]) -> Material:
    x = images()
    with torch.no_grad():
        labels = cast["teacher"](x).argmax(dim=1)
    dark = (images(24, seed=1).flip(3), labels.roll(1))
    return Material(
        x, labels, domains={"dark": dark}, cues=Cues(images(20, seed=2), torch.arange(20) % 3, torch.arange(20) % 2)
    )


# ---- the theorem, and identities ------------------------------------------------------------------------------------


def linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(weight.shape[1], weight.shape[0])).double()
    with torch.no_grad():
        model[1].weight.copy_(weight)
        model[1].bias.copy_(bias)
    return model


def imitated(teacher: nn.Module, points: torch.Tensor) -> tuple[nn.Module, float]:
    """The student of least squares with the teacher's logits on the points, and its largest error in a weight."""
    with torch.no_grad():
        target = teacher(points)
    design = torch.cat([points.flatten(1), torch.ones(len(points), 1, dtype=points.dtype)], dim=1)
    found = torch.linalg.lstsq(design, target, driver="gelsd").solution
    student = linear(found[:-1].T, found[-1])
    return student, float((found[:-1].T - teacher[1].weight).abs().max().detach())


def test_a_linear_student_that_imitates_enough_points_becomes_the_teacher() -> None:
    torch.manual_seed(0)
    teacher = linear(torch.randn(CLASSES, 20).double(), torch.randn(CLASSES).double())
    points = torch.rand(40, 1, 4, 5, dtype=torch.float64)
    (enough, small), (short, large) = (imitated(teacher, points[:count]) for count in (21, 20))
    assert small < 1e-10
    assert large > 1e-3
    data = Material(points, teacher(points).argmax(dim=1))
    scores = {}
    for name, student in (("enough", enough), ("short", short)):
        probe = DecisionPlanes(planes=5, side=12)
        scores[name] = probe.run({"teacher": teacher, "student": student}, data).rows[0].scores["student"].value
    assert scores["enough"] == 1
    assert scores["short"] < 1


def test_a_student_that_is_the_teacher_is_like_it_in_every_respect(cast: dict[str, nn.Module], material: Material) -> None:
    models = {**cast, "student:a": copy.deepcopy(cast["teacher"])}
    found = explain(models, material, options=BRIEF)
    assert not found.skipped

    def score(probe: str, name: str = "student:a", row: int = 0) -> float:
        return found[probe].rows[row].scores[name].value

    assert score("adversarial-transfer") == 1
    for probe in ("domains", "corruptions", "decision-planes"):
        assert score(probe) == 1, probe
    assert score("boundary-similarity") == pytest.approx(1, abs=1e-6)
    assert score("boundary-similarity", row=1) == pytest.approx(1, abs=1e-6)
    assert score("cka") == pytest.approx(1, abs=1e-9)
    for probe in ("colour", "crop", "shift", "shape-bias"):
        assert score(probe) == score(probe, "teacher"), probe
    assert found["localisation"].rows[0].scores["student:a over independent:0"].value == 1
    assert found["group-bias"].rows[1].scores["student:a"] == found["group-bias"].rows[1].scores["teacher"]
    others = [score(probe, "independent:0") for probe in ("adversarial-transfer", "domains", "decision-planes", "cka")]
    assert max(others) < 1


def test_two_independent_students_win_as_often_as_they_lose(cast: dict[str, nn.Module], material: Material) -> None:
    flipped = {"teacher": cast["teacher"], "student:a": cast["independent:0"], "independent:0": cast["student:a"]}
    there = Localisation().run({k: cast[k] for k in ("teacher", "student:a", "independent:0")}, material).number
    back = Localisation().run(flipped, material).number
    assert there is not None
    assert back is not None
    assert there.value + back.value == pytest.approx(1)


# ---- intervals ------------------------------------------------------------------------------------------------------


def test_bootstrap_of_a_share_is_the_binomial() -> None:
    column = (torch.arange(400) % 4 == 0).double()
    number = Table({"a": column}, resamples=4000).mean("a")
    error = math.sqrt(0.25 * 0.75 / 400)
    assert (number.value, number.count) == (0.25, 400)
    assert number.low == pytest.approx(0.25 - 1.96 * error, abs=0.004)
    assert number.high == pytest.approx(0.25 + 1.96 * error, abs=0.004)


def test_differences_are_paired_and_missing_values_do_not_count() -> None:
    a = torch.rand(60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = a - 0.5
    b[:10] = torch.nan
    table = Table({"a": a, "b": b, "c": a.clone(), "none": torch.full((60,), torch.nan)})
    same = table.difference(["a"], minus=["c"])
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert table.mean("b").value == pytest.approx(float(b[10:].mean()))
    assert table.mean("b").count == 50
    assert table.mean("a", "b").value == pytest.approx(float((a.mean() + b[10:].mean()) / 2))
    assert math.isnan(table.mean("none").value)
    assert math.isnan(table.mean("none").low)
    shared = Table({"a": a[10:], "b": b[10:]}).difference(["a"], minus=["b"])
    assert shared.high - shared.low < 1e-12


def test_same_seed_same_draws_and_large_tables_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    column = torch.rand(30, generator=torch.Generator().manual_seed(0))
    first = Table({"a": column}, seed=3).mean("a")
    monkeypatch.setattr("overproof.probes.intervals.FEW", 0)
    assert Table({"a": column}, seed=3).mean("a") == first
    assert Table({"a": column}, seed=4).mean("a") != first


# ---- where it looks -------------------------------------------------------------------------------------------------


def test_closed_form_is_the_gradient() -> None:
    model, x, labels = net(0).double(), images().double(), torch.arange(24) % CLASSES
    layer = spatial_layer(model, x[:1])
    weight = closed_head(model, layer, x[:2])
    assert weight is not None
    assert torch.equal(weight, model.net.fc.weight)
    closed, open_ = grad_cam(model, x, labels), grad_cam(model, x, labels, closed=False)
    torch.testing.assert_close(closed, open_, atol=1e-12, rtol=1e-9)
    assert closed.shape == (24, 4, 4)
    assert (closed > 0).any()
    with torch.no_grad():
        _, found = Tap(model, (layer,))(x)
    expected = torch.einsum("nc,nchw->nhw", model.net.fc.weight[labels] / 16, found[layer]).relu()
    torch.testing.assert_close(closed, expected.detach())


def test_gradients_from_the_map_on_where_layers_work_in_place() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True))
    model = nn.Sequential(
        body, nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU(inplace=True)), nn.Flatten(), nn.Linear(5 * 16, 3)
    ).eval()
    x, labels = images(), torch.arange(24) % 3
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # a frozen network has maps too
    layer = spatial_layer(model, x[:1])
    assert layer == "1"
    assert closed_head(model, layer, x[:2]) is None
    found = grad_cam(model, x, labels)
    with torch.no_grad():
        maps = model[1](model[0](x))
    slope = model[3].weight[labels].view(24, 5, 4, 4).mean(dim=(2, 3))
    torch.testing.assert_close(found, torch.einsum("nc,nchw->nhw", slope, maps).relu())
    early = grad_cam(model, x, labels, layer="0")  # the gradient passes through layers that work in place
    assert early.shape == (24, 6, 6)
    assert all(p.grad is None for p in model.parameters())


def test_leaves_of_an_input() -> None:
    model = net(1)
    logits, found = Tap(model, ("net.fc:input",), leaves=True)(images(4))
    (slope,) = torch.autograd.grad(logits[:, 0].sum(), found["net.fc:input"])
    torch.testing.assert_close(slope, model.net.fc.weight[0].expand(4, -1))


def test_networks_without_maps_are_refused() -> None:
    mlp = overproof.create_model("mlp", 3, 1, 8, hidden=(4,))
    with pytest.raises(UsageError, match="no stage with a spatial layout"):
        grad_cam(mlp, images(2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(UsageError, match="no map to look at"):
        grad_cam(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), images(2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(UsageError, match=r"no map \(C, h, w\)"):
        grad_cam(net(0), images(2), torch.zeros(2, dtype=torch.long), layer="net.fc", closed=False)


def test_similarity_and_wins_of_maps() -> None:
    first = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]], [[0.0, 0.0]]])
    second = torch.tensor([[[0.0, 2.0]], [[3.0, 0.0]], [[1.0, 0.0]]])
    found = similarity(first, second)
    torch.testing.assert_close(found[:2], torch.tensor([0.0, 0.5**0.5]))
    assert found[2].isnan()
    assert wins(torch.tensor([0.2, 0.5, 0.1, torch.nan]), torch.tensor([0.1, 0.5, 0.3, 0.0])).tolist()[:3] == [1, 0.5, 0]


def test_maps_of_unlike_size_and_empty_maps(material: Material, cast: dict[str, nn.Module]) -> None:
    torch.manual_seed(7)
    fine = overproof.create_model("cnn", CLASSES, 1, 8, widths=(5,)).eval()  # maps of 8 x 8, the teacher's 4 x 4
    blind = net(1)
    with torch.no_grad():
        blind.net.fc.weight[0] = -1.0  # no evidence for class 0 anywhere
    found = Localisation().run({"teacher": cast["teacher"], "student:f": fine, "independent:0": blind}, material)
    empty = int((material.labels == 0).sum())
    assert empty > 0
    assert f"{empty} of 24 images left out of one pair at least: a map of the true class is empty everywhere." in found.notes
    assert found.number is not None
    assert found.number.count == 24 - empty
    beside = {"teacher": cast["teacher"], "student:f": fine, "independent:0": cast["independent:0"], "control:blind": blind}
    alone = {name: model for name, model in beside.items() if name != "control:blind"}
    told, without = (Localisation().measure(Lab(models, material)).notes for models in (beside, alone))
    assert told == without != found.notes  # what is empty for a control alone is not left out of the headline
    assert found.pictures["cam/student:f"].shape == (6, 8, 8)
    assert found.pictures["images"].shape == (6, 1, 8, 8)


# ---- what fools it --------------------------------------------------------------------------------------------------


def test_images_against_the_teacher_keep_to_the_rules(cast: dict[str, nn.Module], material: Material) -> None:
    lab, probe = Lab(cast, material), AdversarialTransfer(eps=0.02)
    attacked = probe._attacked(lab, "teacher", 0.02)
    assert float((attacked - material.images).abs().max()) <= 0.02 + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    with torch.no_grad():
        before, after = (cross_entropy(cast["teacher"](x), material.labels).mean() for x in (material.images, attacked))
    assert after > before
    columns = probe.columns(lab, "teacher", 0.02)
    with torch.no_grad():
        teacher, student = (
            (cast[n](attacked).argmax(1) != cast[n](material.images).argmax(1)) for n in ("teacher", "student:a")
        )
    assert 0 < teacher.sum() < 24
    assert torch.equal(columns["teacher"], teacher)
    assert columns["student:a"][teacher].tolist() == student[teacher].double().tolist()
    assert columns["student:a"][~teacher].isnan().all()
    row = probe.run(cast, material).rows[0]
    assert row.scores["student:a"].value == pytest.approx(float(student[teacher].double().mean()))
    assert row.scores["teacher"].value == pytest.approx(float(teacher.double().mean()))
    assert row.scores["student:a"].count == int(teacher.sum())


def test_no_radius_no_fooling(cast: dict[str, nn.Module], material: Material) -> None:
    probe = AdversarialTransfer(eps=0)
    assert not probe.columns(Lab(cast, material), "teacher", 0.0)["teacher"].any()
    assert "No image fools the teacher at eps=0" in probe.run(cast, material).skipped


def test_the_radius_is_found_at_which_the_teacher_is_fooled_as_often_as_wanted(
    cast: dict[str, nn.Module], material: Material
) -> None:
    found = AdversarialTransfer(target=0.5).run(cast, material)
    assert found.facts["teacher_fooled"] >= 0.5
    smaller = AdversarialTransfer(eps=found.facts["eps"] / 1.3).run(cast, material)
    assert smaller.facts["teacher_fooled"] < 0.5 + 2 / 24
    stubborn = Scripted([0] * 24)
    with torch.no_grad():
        weak = copy.deepcopy(cast["teacher"])
        weak.net.fc.weight *= 0
        weak.net.fc.bias.copy_(torch.tensor([1.0, 0, 0]))
    assert AdversarialTransfer().run({"teacher": weak, "student": weak}, material).skipped
    flat = AdversarialTransfer(eps=0.1).run(
        {"teacher": stubborn, "student": stubborn}, Material(numbered(24), torch.zeros(24).long())
    )
    assert "gradient" in flat.skipped


def test_foreign_attack_and_controls(cast: dict[str, nn.Module], material: Material) -> None:
    lab, probe = Lab({**cast, "control:c": net(8)}, material), AdversarialTransfer(eps=0.3)
    row = probe.measure(lab).rows[0]
    assert set(row.controls) == {SEEDS, "control:c", "foreign attack"}
    columns = probe.columns(lab, "teacher", 0.3)

    def share(source: str, name: str) -> float:
        return float(probe.columns(lab, source, 0.3)[name].nanmean())

    assert row.controls[SEEDS].value == pytest.approx(share("teacher", "independent:0") - share("teacher", "independent:1"))
    mean = float(torch.stack([columns[f"independent:{i}"].nanmean() for i in (0, 1)]).mean())
    assert row.controls["control:c"].value == pytest.approx(share("teacher", "control:c") - mean)
    gaps = [share(f"independent:{i}", "student:a") - share(f"independent:{i}", f"independent:{1 - i}") for i in (0, 1)]
    assert row.controls["foreign attack"].value == pytest.approx(sum(gaps) / 2)
    named = AdversarialTransfer(eps=0.3).measure(Lab({**cast, "foreign": net(9)}, material)).rows[0].controls["foreign attack"]
    foreign = Lab({**cast, "foreign": net(9)}, material)
    parts = probe.columns(foreign, "foreign", 0.3)
    expected = parts["student:a"].nanmean() - (parts["independent:0"].nanmean() + parts["independent:1"].nanmean()) / 2
    assert named.value == pytest.approx(float(expected))


# ---- what it ignores ------------------------------------------------------------------------------------------------


def streams(count: int = 4, seed: int = 0) -> Streams:
    return Streams.named(torch.arange(count), seed, "test")


@pytest.mark.parametrize("views", [colour_views, crop_views, shift_views])
def test_views_of_a_batch_are_those_of_its_images(views: Any) -> None:
    x = images(4, 3)
    strength = 16.0 if views is shift_views else 0.5
    whole = views(x, streams(), strength)
    single = [views(x[i : i + 1], Streams.named(torch.tensor([i]), 0, "test"), strength) for i in range(4)]
    for side in (0, 1):
        torch.testing.assert_close(whole[side], torch.cat([pair[side] for pair in single]), atol=1e-6, rtol=0)
        assert whole[side].shape == x.shape
        assert 0 <= whole[side].min() <= whole[side].max() <= 1
    assert (whole[0] - whole[1]).abs().max() > 1e-3


def test_colours_change_as_torchvision_changes_them() -> None:
    from torchvision.transforms.v2 import functional as change

    x = images(6, 3)
    _, found = colour_views(x, streams(6), 0.5)
    options = [(b, c, s, h) for b in (0.5, 1.5) for c in (0.5, 1.5) for s in (0.5, 1.5) for h in (-0.25, 0.25)]
    for image, seen in zip(x, found, strict=True):
        ways = []
        for b, c, s, h in options:
            made = change.adjust_contrast(change.adjust_brightness(image, b), c)
            ways.append(change.adjust_hue(change.adjust_saturation(made, s), h))
        assert min(float((way - seen).abs().max()) for way in ways) < 1e-5
    torch.testing.assert_close(turned(x, torch.full((6, 1, 1, 1), 1.0)), x, atol=1e-5, rtol=0)
    mild = colour_views(x, streams(6))[1]
    assert (mild - x).abs().max() < (found - x).abs().max()


def test_crops_have_their_share_of_the_area_and_a_whole_crop_is_the_image() -> None:
    x = images(4, 3)
    for view in crop_views(x, streams(), 1.0):
        torch.testing.assert_close(view, x, atol=1e-5, rtol=0)
    ramp = torch.stack(torch.meshgrid(torch.linspace(0.5, 63.5, 64) / 64, torch.linspace(0.5, 63.5, 64) / 64, indexing="ij"))
    ramp = torch.cat([ramp, ramp[:1]])[None].expand(50, -1, -1, -1)
    first, second = crop_views(ramp, streams(50), 0.4)
    for view in (first, second):
        height, width = ((view[:, axis].amax((1, 2)) - view[:, axis].amin((1, 2))) * 64 / 63 for axis in (0, 1))
        torch.testing.assert_close(height * width, torch.full((50,), 0.4), atol=2e-3, rtol=0)
        assert float((width / height).min()) > 0.74
        assert float((width / height).max()) < 1.35
        assert float((width / height).std()) > 0.05


def test_shifts_are_windows_of_one_enlarged_image() -> None:
    x = images(3, 1, 28)
    first, second = shift_views(x, streams(3), 32.0)
    big = nn.functional.interpolate(x, (32, 32), mode="bilinear", align_corners=False)
    windows = big.unfold(2, 28, 1).unfold(3, 28, 1)[:, 0]  # 5 x 5 places, of which four pixels of room
    for view in (first, second):
        for image, own in zip(view, windows, strict=True):
            assert (own - image).abs().flatten(2).amax(2).min() == 0


def test_agreement_counts_pairs() -> None:
    class Corner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x[:, 0, 0, 0], 0.5 * torch.ones(len(x))], dim=1)

    x = images(200)
    probe = Shift(strengths=(32,))
    lab = Lab({"teacher": Corner(), "student": Corner()}, Material(x, torch.zeros(200, dtype=torch.long)))
    first, second = shift_views(x, lab.streams("shift 32", 0), 32.0)
    expected = ((first[:, 0, 0, 0] >= 0.5) == (second[:, 0, 0, 0] >= 0.5)).double().mean()
    row = probe.measure(lab).rows[1]
    assert row.condition == "32"
    assert row.scores["student"].value == pytest.approx(float(expected))
    assert 0.2 < float(expected) < 0.95


def test_shifts_by_equally_many_pixels_count_once(cast: dict[str, nn.Module], material: Material) -> None:
    found = Shift().run(cast, material)
    assert [row.condition for row in found.rows] == ["", "8"]
    assert found.rows[0].scores == found.rows[1].scores
    assert "On images of this size an earlier strength makes the same views, so left out: 16, 24, 32." in found.notes
    large = Material(images(24, side=16), material.labels)  # 8: 1 pixel, 16: 1, 24: 2, 32: 2
    assert [row.condition for row in Shift().run(cast, large).rows] == ["", "8", "24"]


def test_grey_images_are_told_apart_from_coloured_ones(cast: dict[str, nn.Module], material: Material) -> None:
    assert any("neither saturation nor hue" in note for note in Colour(strengths=()).run(cast, material).notes)
    coloured = {name: net(seed, 3) for seed, name in enumerate(cast)}
    found = Colour(strengths=(0.3,)).run(coloured, Material(images(24, 3), material.labels))
    assert found.notes == ()
    assert [row.condition for row in found.rows] == ["", "0.3"]


# ---- domains, shape, groups: tables made by hand --------------------------------------------------------------------


def test_consensus_and_accuracy_by_hand() -> None:
    labels = torch.tensor([0, 1, 2, 0])
    models = {
        "teacher": Scripted([0, 1, 2, 0, 1, 1, 1, 1]),
        "student": Scripted([0, 1, 2, 1, 1, 1, 1, 0]),
        "independent:0": Scripted([0, 1, 0, 1, 0, 0, 1, 0]),
        "independent:1": Scripted([0, 0, 0, 0, 0, 1, 1, 0]),
    }
    found = Domains().run(models, Material(numbered(4), labels, domains={"other": (numbered(4, 4), labels)}))
    rows = {(row.quantity, row.condition): row for row in found.rows}
    same, right = "same answer as the teacher", "accuracy"
    assert {k: v.value for k, v in rows[same, "other"].scores.items()} == {
        "student": 0.75,
        "independent:0": 0.25,
        "independent:1": 0.5,
    }
    assert rows[same, "other"].gap.value == pytest.approx(0.75 - 0.375)
    assert rows[same, "other"].controls[SEEDS].value == pytest.approx(-0.25)
    assert {k: v.value for k, v in rows[right, "other"].scores.items()} == {
        "teacher": 0.25,
        "student": 0.5,
        "independent:0": 0.5,
        "independent:1": 0.75,
    }
    assert rows[same, "seen"].scores["student"].value == 0.75
    assert found.number == rows[same, "other"].gap
    assert found.accuracy["teacher"].value == 1
    assert found.accuracy["independent:1"].value == 0.5
    assert found.controlled


def test_several_domains_count_alike_and_their_images_are_drawn_together() -> None:
    labels = torch.zeros(6, dtype=torch.long)
    said = [0] * 6 + [0] * 6 + [1] * 6
    models = {"teacher": Scripted([0] * 18), "student": Scripted(said), "independent": Scripted([0] * 18)}
    domains = {"one": (numbered(6, 6), labels), "two": (numbered(6, 12), labels)}
    found = Domains().run(models, Material(numbered(6), labels, domains=domains))
    assert found.rows[0].scores["student"].value == 0.5
    assert found.rows[0].scores["student"].high == 0.5  # no image differs from another
    domains["two"] = (numbered(3, 12), labels[:3])
    unequal = Domains().run(models, Material(numbered(6), labels, domains=domains))
    assert unequal.rows[0].scores["student"].value == pytest.approx(6 / 9)


def test_corruptions_keep_to_their_options(cast: dict[str, nn.Module], material: Material) -> None:
    found = Corruptions(kinds=("contrast", "noise"), severities=(1, 5), images=10).run(cast, material)
    assert [row.condition for row in found.rows[2::2]] == ["contrast 1", "contrast 5", "noise 1", "noise 5"]
    assert found.number.count == 10
    mild, strong = (found.rows[place].scores["independent:0"].value for place in (2, 4))
    mean = sum(row.scores["independent:0"].value for row in found.rows[2::2]) / 4
    assert found.rows[0].scores["independent:0"].value == pytest.approx(mean)
    assert (mild, strong) != (None, None)


def test_shape_bias_by_hand() -> None:
    shape, texture = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([1, 1, 0, 0, 2, 1])
    decided = torch.tensor([0, 1, 1, 2, 2, 2])
    column = shape_or_texture(decided, shape, texture)
    assert column.nan_to_num(-1).tolist() == [1, 0, 1, -1, -1, 1]
    said = decided.tolist()
    cues = Cues(numbered(6), shape, texture)
    models = {"teacher": Scripted(said), "student": Scripted([2, 2, 2, 2, 0, 0]), "independent": Scripted([1, 1, 1, 1, 1, 1])}
    found = ShapeBias().run(models, Material(numbered(6), shape, cues=cues))
    assert found.rows[0].scores["teacher"].value == 0.75
    assert found.rows[0].scores["independent"].value == pytest.approx(2 / 5)
    assert math.isnan(found.rows[0].scores["student"].value)
    assert any("student never decides for shape or texture" in note for note in found.notes)
    assert found.facts["decided"] == {"teacher": 4, "student": 0, "independent": 5}


def test_merged_classes_decide_by_their_mean_probability() -> None:
    logits = torch.tensor([[3.0, 0.0, 2.9, 2.9], [0.0, 9.0, 0.0, 1.0]])
    merged = torch.tensor([0, -1, 1, 1])
    assert decisions(logits, None).tolist() == [0, 1]
    assert decisions(logits, merged).tolist() == [0, 1]  # class 1 belongs to no cue, and is not chosen
    assert decisions(torch.tensor([[3.0, 0.0, 2.9, 3.3]]), merged).tolist() == [1]


def test_cues_are_read_from_names(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("cat1-dog2", "Dog-cat"):
        Image.new("RGB", (20, 20), (255, 0, 0)).save(tmp_path / f"{name}.png")
    found = read_cues(tmp_path, ("cat", "dog"), channels=3, side=8)
    assert found.images.shape == (2, 3, 8, 8)
    assert sorted(zip(found.shape.tolist(), found.texture.tolist(), strict=True)) == [(0, 1), (1, 0)]
    Image.new("L", (8, 8)).save(tmp_path / "cat-bird.png")
    with pytest.raises(DataError, match="cat-bird.png should be called SHAPE-TEXTURE"):
        read_cues(tmp_path, ("cat", "dog"), channels=3, side=8)
    with pytest.raises(DataError, match="give one each"):
        Cues(numbered(3), torch.zeros(2), torch.zeros(3))
    for name, pair in (("14-3", (2, 0)), ("1-14", (1, 2))):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / f"{name}.png")
        numbered_cues = read_cues(tmp_path / name, ("3", "1", "14"), channels=1, side=8)
        assert (int(numbered_cues.shape), int(numbered_cues.texture)) == pair, name


def test_group_bias_by_hand() -> None:
    labels = torch.zeros(8, dtype=torch.long)
    groups = Groups(torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]), ("north", "south", "west"), "south")
    models = {
        "teacher": Scripted([0, 0, 0, 0, 1, 1, 0, 0]),
        "student": Scripted([0, 0, 0, 1, 1, 0, 0, 0]),  # 0.75, 0.5, 1.0
        "independent:0": Scripted([0, 1, 1, 1, 1, 0, 0, 1]),  # 0.25, 0.5, 0.5
        "independent:1": Scripted([0, 0, 1, 1, 1, 0, 1, 1]),  # 0.5, 0.5, 0.0
    }
    found = GroupBias().run(models, Material(numbered(8), labels, groups=groups))
    assert found.number.value == pytest.approx(0 - ((0.75 - 0.375) + (1 - 0.25)) / 2)
    assert found.controls[SEEDS].value == pytest.approx(0 - ((0.25 - 0.5) + (0.5 - 0)) / 2)
    assert [row.condition for row in found.rows[1:]] == ["north", "south", "west"]
    assert found.rows[1].scores["student"].value == 0.75
    assert found.rows[3].gap.value == pytest.approx(0.75)
    assert found.facts == {"deprived": "south", "counts": {"north": 4, "south": 2, "west": 2}}
    unsaid = GroupBias().run(models, Material(numbered(8), labels, groups=Groups(groups.numbers, groups.names)))
    assert unsaid.number == found.number
    assert any("Nobody said which group" in note for note in unsaid.notes)


def test_groups_without_images_are_named(cast: dict[str, nn.Module], material: Material) -> None:
    half = Material(material.images, torch.where(material.labels == 2, 1, material.labels), classes=("a", "b", "c"))
    found = GroupBias().run(cast, half)
    assert "No held-out image of c: nothing is said of it." in found.notes
    assert [row.condition for row in found.rows[1:]] == ["a", "b"]
    absent = Groups(torch.zeros(24, dtype=torch.long), ("x", "y"), "y")
    assert "of the group 'y'" in GroupBias().run(cast, Material(material.images, material.labels, groups=absent)).skipped
    alone = Groups(torch.zeros(24, dtype=torch.long), ("x", "y"))
    assert "of x only" in GroupBias().run(cast, Material(material.images, material.labels, groups=alone)).skipped


def test_files_of_groups(tmp_path: Path) -> None:
    file, index = tmp_path / "groups.csv", torch.tensor([7, 3, 5])
    file.write_text("index,group\n3,b\n5,a\n7,a\n9,c\n")
    found = read_groups(file, index, deprived="a")
    assert (found.numbers.tolist(), found.names, found.deprived) == ([0, 1, 0], ("a", "b"), "a")
    file.write_text("\ufeffindex, group \n3, b\n5,a \n7,a\n", encoding="utf-8")  # as a spreadsheet saves it
    assert read_groups(file, index).numbers.tolist() == [0, 1, 0]
    file.write_text("group\nb\nb\na\n")
    assert read_groups(file, index).numbers.tolist() == [1, 1, 0]
    for text, words in (
        ("index,group\n3,b\n5,a\n", r"says nothing of 1 of the 3 images, such as number 7"),
        ("group\na\nb\n", r"has 2 rows, but there are 3 images"),
        ("colour\na\n", r"has no column `group` \(it has colour\)"),
        ("", "--groups: .* has no rows below its header line"),
        ("index,group\n3, \n", "line 2: the group is missing"),
        ("index,group\nx,b\n", r"line 2: the index 'x' is no whole number"),
        ("index,group\n3,b\n3,a\n", r"line 3: image 3 is in 'a' and in 'b'"),
        ("group\na\n\nb\n", "has 2 rows"),
        ("index,group\n3,b\n5\n7,a\n", "line 3: the group is missing"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=words):
            read_groups(file, index)
    with pytest.raises(DataError, match="cannot be read"):
        read_groups(tmp_path / "none.csv", index)
    with pytest.raises(DataError, match="no group called 'z'; the groups are a"):
        Groups(torch.zeros(2), ("a",), "z")


# ---- representations ------------------------------------------------------------------------------------------------


def test_cka_knows_neither_rotation_nor_scale() -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 8, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    assert float(linear_cka(x, 3 * x @ rotation + 5)) == pytest.approx(1, abs=1e-12)
    y = torch.randn(30, 2, 5, dtype=torch.float64)
    cx, cy = x - x.mean(0), (y.flatten(1) - y.flatten(1).mean(0))
    direct = (cy.T @ cx).norm() ** 2 / ((cx.T @ cx).norm() * (cy.T @ cy).norm())
    assert float(linear_cka(x, y)) == pytest.approx(float(direct), abs=1e-12)
    assert 0 < float(direct) < 0.9
    assert linear_cka(x, torch.ones(30, 4)).isnan()


def test_layers_at_the_same_share_of_the_depth() -> None:
    assert counterparts(3, 3) == [(0, 0), (1, 1), (2, 2)]
    assert counterparts(5, 3) == [(0, 0), (2, 1), (4, 2)]
    assert counterparts(1, 4) == [(0, 0)]


def test_cka_probe_compares_stages_and_head(cast: dict[str, nn.Module], material: Material) -> None:
    found = CKA(images=20).run(cast, material)
    assert found.facts["layers"] == dict.fromkeys(("teacher", "student:a", "independent:0", "independent:1"), 3)
    rows = Lab(cast, material).some(20, 0)
    features = {}
    for name in ("teacher", "student:a"):
        with torch.no_grad():
            features[name] = list(
                Tap(cast[name], ("net.layers.0", "net.layers.1", "net.fc:input"))(material.images[rows])[1].values()
            )
    expected = [float(linear_cka(a, b)) for a, b in zip(features["teacher"], features["student:a"], strict=True)]
    number = found.rows[0].scores["student:a"]
    assert number.value == pytest.approx(sum(expected) / 3, abs=1e-9)
    assert number.low < number.value < number.high
    assert found.pictures["grid/student:a"][1, 1] == pytest.approx(expected[1], abs=1e-9)
    assert "at least 4" in CKA().run(cast, Material(material.images[:3], material.labels[:3])).skipped
    assert grid(torch.eye(3)[None], torch.eye(3)[None]).item() == pytest.approx(1)


# ---- planes and boundaries ------------------------------------------------------------------------------------------


def test_planes_pass_through_their_images() -> None:
    triplets = images(12, 3).double().view(4, 3, 3, 8, 8)
    planes = Planes(triplets, 5)
    every = torch.arange(4)
    for place in range(3):
        found = planes.at(every, planes.places[:, place, 0], planes.places[:, place, 1])
        torch.testing.assert_close(found, triplets[:, place], atol=1e-12, rtol=0)
    for a, b in zip(planes.a.flatten(1), planes.b.flatten(1), strict=True):
        assert float(a @ a) == pytest.approx(1)
        assert float(b @ b) == pytest.approx(1)
        assert float(a @ b) == pytest.approx(0, abs=1e-12)
    low, high = planes.places.amin(1), planes.places.amax(1)
    torch.testing.assert_close(planes.axes[:, :, 0], low - 0.1 * (high - low))
    torch.testing.assert_close(planes.axes[:, :, -1], high + 0.1 * (high - low))
    whole = planes[slice(0, len(planes))]
    assert len(planes) == len(whole) == 4 * 25
    torch.testing.assert_close(whole[30:33], planes[slice(30, 33)])
    torch.testing.assert_close(whole[25 + 7], planes.at(torch.tensor([1]), planes.axes[1:2, 0, 2], planes.axes[1:2, 1, 1])[0])
    flat = Planes(triplets[:, [0, 0, 1]], 3)  # two equal images
    assert flat[slice(0, 9)].isfinite().all()


def test_linear_classifiers_on_planes() -> None:
    torch.manual_seed(0)
    weight = torch.randn(2, 64, dtype=torch.float64)
    x = images(30).double()
    zero = torch.zeros(2, dtype=torch.float64)
    teacher, same, opposite = linear(weight, zero), linear(2 * weight, zero), linear(-weight, zero)
    models = {"teacher": teacher, "student": same, "independent": opposite}
    row = DecisionPlanes(planes=6, side=10).run(models, Material(x, torch.zeros(30, dtype=torch.long))).rows[0]
    assert row.scores["student"].value == 1
    assert row.scores["independent"].value == 0
    assert (row.gap.value, row.gap.low, row.gap.high, row.gap.count) == (1, 1, 1, 6)


def test_planes_of_every_domain_and_their_pictures(cast: dict[str, nn.Module], material: Material) -> None:
    found = DecisionPlanes(planes=3, side=6).run(cast, material)
    assert [row.condition for row in found.rows] == ["", "dark"]
    assert found.pictures["plane/student:a"].shape == (2, 6, 6)
    assert found.pictures["places"].shape == (2, 3, 2)
    few = Material(material.images[:2], material.labels[:2])
    assert "three images; there are 2" in DecisionPlanes().run(cast, few).skipped


def test_boundary_similarity_is_that_of_two_models(cast: dict[str, nn.Module], material: Material) -> None:
    """All classes, the images that everyone gets right: the same as the comparison of two models on these images."""
    lab = Lab({name: cast[name] for name in ("teacher", "student:a")}, material)
    probe = BoundarySimilarity(images=24, targets=None)
    found = probe.measure(lab)
    both = (lab.clean("teacher") == lab.labels) & (lab.clean("student:a") == lab.labels)
    direct = boundary_similarity(cast["teacher"], cast["student:a"], material.images[both], material.labels[both])
    assert found.facts["images"] == int(both.sum()) == direct.images
    assert found.facts["crossed"]["student:a"] == pytest.approx(direct.kept)
    if direct.kept == 1:  # then means over images are means over pairs
        assert found.rows[0].scores["student:a"].value == pytest.approx(direct.ang_sim, abs=1e-6)
        assert found.rows[1].scores["student:a"].value == pytest.approx(direct.mag_sim, abs=1e-6)


def test_boundaries_of_linear_classifiers() -> None:
    """Two classes: the walk is along the difference of the weights, w; a threefold offset makes it longer."""
    torch.manual_seed(0)
    w = torch.randn(64, dtype=torch.float64)
    x = 0.5 + 0.01 * torch.randn(8, 1, 8, 8, dtype=torch.float64)

    def classifier(gap: float) -> nn.Module:
        own = torch.stack([w, -w]) / 2
        offset = gap - float((x.flatten(1) @ w).mean())
        return linear(own, torch.tensor([offset, -offset], dtype=torch.float64) / 2)

    near, far = classifier(2.0), classifier(6.0)
    labels = torch.zeros(8, dtype=torch.long)
    assert (near(x).argmax(1) == 0).all()
    row, other = BoundarySimilarity().run({"teacher": near, "student": far}, Material(x, labels)).rows
    assert row.scores["student"].value == pytest.approx(1, abs=1e-9)
    gaps = [(x.flatten(1) @ w) - (x.flatten(1) @ w).mean() + gap + 1e-4 for gap in (2.0, 6.0)]
    assert other.scores["student"].value == pytest.approx(float((gaps[0] / gaps[1]).mean()), abs=1e-6)
    wrong = Material(x, torch.ones(8, dtype=torch.long))
    assert (
        "no image that the teacher and all students get right"
        in BoundarySimilarity().run({"teacher": near, "student": far}, wrong).skipped
    )


# ---- the lab, the store, the suite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBES.names())
def test_every_probe_keeps_the_contract(name: str, cast: dict[str, nn.Module], material: Material) -> None:
    """Same seed, same figures; batches do not matter; models are left as they are; a skipped probe says why; plain values."""
    import json

    from overproof.folder import plain

    probe: Probe = PROBES.create(name, **BRIEF.get(name, {}))
    assert probe.name == name
    before = {key: digest(model) for key, model in cast.items()}
    modes = [module.training for model in cast.values() for module in model.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = probe.run(cast, material), probe.result(Lab(cast, material, batch_size=5))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.skipped == ""
    assert first.controlled
    assert first.number.low <= first.number.value <= first.number.high
    assert json.loads(json.dumps(plain(first.summary))) == json.loads(json.dumps(plain(again.summary)))
    assert {key: digest(model) for key, model in cast.items()} == before
    assert modes == [module.training for model in cast.values() for module in model.modules()]
    assert all(p.grad is None and p.requires_grad for model in cast.values() for p in model.parameters())
    assert set(first.accuracy) == set(cast)
    alone = probe.run({key: cast[key] for key in ("teacher", "student:a", "independent:0")}, material)
    assert not alone.controlled
    assert FEWER in alone.notes
    assert SEEDS not in alone.controls
    nobody = probe.run({key: cast[key] for key in ("teacher", "student:a")}, material)
    assert nobody.number is None
    assert PROBES.get(name).summary


def test_what_concerns_the_teacher_is_computed_once(tmp_path: Path, cast: dict[str, nn.Module], material: Material) -> None:
    first, second, third = Passes(), Passes(), Passes()
    with first.of(cast["teacher"]):
        explain(cast, material, options=BRIEF, store=tmp_path)
    assert first.forward > 0
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) >= 8
    student = {**cast, "student:a": relative(11)}
    with second.of(cast["teacher"]):
        found = explain(student, material, options=BRIEF, store=tmp_path)
    assert second.forward == 1  # only to see how many classes it has
    fresh = explain(student, material, options=BRIEF)
    assert {k: v for k, v in found.summary.items() if k != "seconds"} == {
        k: v for k, v in fresh.summary.items() if k != "seconds"
    }
    files[0].write_bytes(b"no tensors")
    with third.of(cast["teacher"]):
        explain(student, material, options=BRIEF, store=tmp_path)
    assert third.forward >= 1
    assert files[0].stat().st_size > 20


def test_the_store_knows_by_what_it_is_asked(tmp_path: Path) -> None:
    store, calls = Store(tmp_path / "s"), []

    def make() -> torch.Tensor:
        calls.append(1)
        return torch.arange(3)

    for _ in range(2):
        assert store.tensor(("a", 1), make, lasting=True).tolist() == [0, 1, 2]
    store.tensor(("a", 2), make)
    assert len(calls) == store.made == 2
    assert Store(tmp_path / "s").tensor(("a", 1), lambda: torch.zeros(1), lasting=True).tolist() == [0, 1, 2]
    assert len(list((tmp_path / "s").iterdir())) == 1


def test_what_is_kept_has_a_version_and_takes_up_no_more_than_its_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept() -> set[str]:
        return {path.name for path in tmp_path.iterdir()}

    def put(name: str, count: int) -> set[str]:
        before = kept()
        Store(tmp_path).tensor((name,), lambda: torch.zeros(count, dtype=torch.uint8), lasting=True)
        return kept() - before

    monkeypatch.setattr("overproof.probes.store.ROOM", 10_000)
    assert put("huge", 2501) == set()
    first, *others = [put(f"{i}", 2400) for i in range(5)]
    assert all(len(names) == 1 for names in (first, *others))
    assert kept() == set().union(*others)  # five are too many, and the oldest has gone
    monkeypatch.setattr("overproof.probes.store.FORMAT", 2)
    again = Store(tmp_path).tensor(("4",), lambda: torch.ones(1), lasting=True)
    assert again.tolist() == [1]


def test_other_data_and_other_teachers_have_other_keys(cast: dict[str, nn.Module], material: Material) -> None:
    store = Store()
    lab = Lab(cast, material, store)
    moved = Lab(cast, Material(1 - material.images, material.labels), store)
    assert not torch.equal(lab.clean("teacher"), moved.clean("teacher"))
    other = Lab({**cast, "teacher": cast["student:a"]}, material, store)
    assert torch.equal(other.clean("teacher"), lab.clean("student:a"))


def test_probes_that_cannot_answer_do_not_stop_the_others() -> None:
    models = {
        name: overproof.create_model("mlp", 3, 1, 8, hidden=(6,))
        for name in ("teacher", "student", "independent:0", "independent:1")
    }
    found = explain(
        models,
        Material(images(), torch.arange(24) % 3),
        options={"cka": {"images": 12}},
        probes=("localisation", "shape-bias", "cka", "crop"),
    )
    assert set(found.skipped) == {"localisation", "shape-bias"}
    assert "'teacher': Classifier has no stage with a spatial layout" in found.skipped["localisation"]
    assert "--cues DIR" in found.skipped["shape-bias"]
    assert found["crop"].number is not None
    lonely = Localisation().run(
        {name: models[name] for name in ("teacher", "student")}, Material(images(), torch.arange(24) % 3)
    )
    assert "without an independent student" in lonely.skipped
    assert "No unseen domains" in Domains().run(models, Material(images(), torch.arange(24) % 3)).skipped


class Roundabout(nn.Module):
    """A network whose last linear layer is never called."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, 1)
        self.fc, self.unused = nn.Linear(4, 3), nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.second(self.first(images).relu()).relu()
        logits: torch.Tensor = self.fc(maps.mean(dim=(2, 3)))
        return logits


def test_a_layer_that_is_never_called_does_not_stop_the_others() -> None:
    models = {name: Roundabout(seed) for seed, name in enumerate(("teacher", "student", "independent:0", "independent:1"))}
    found = explain(models, Material(images(), torch.arange(24) % 3), probes=("localisation", "cka", "crop"))
    assert found["crop"].number is not None
    assert found["localisation"].number is not None, "its head is not found, but gradients serve as well"
    assert "does not call the layer" in found.skipped["cka"]


def test_maps_with_channels_last() -> None:
    class Swapped(nn.Module):
        """Keeps its map as (N, h, w, C), and says so."""

        def __init__(self, output_fmt: str) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.keep, self.fc, self.output_fmt = nn.Conv2d(1, 5, 3), nn.Identity(), nn.Linear(5, 3), output_fmt

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            maps = self.conv(pixels).relu()
            last = self.output_fmt == "NHWC"
            maps = self.keep(maps.permute(0, 2, 3, 1) if last else maps)
            logits: torch.Tensor = self.fc((maps.permute(0, 3, 1, 2) if last else maps).square().mean(dim=(2, 3)))
            return logits

    labels = torch.arange(4) % 3
    first, second = (grad_cam(Swapped(kind), images(4), labels, layer="keep") for kind in ("NHWC", "NCHW"))
    assert first.shape == (4, 6, 6)
    assert torch.allclose(first, second, atol=1e-6)


def test_blocks_of_the_jackknife_lie_across_sorted_images(monkeypatch: pytest.MonkeyPatch, cast: dict[str, nn.Module]) -> None:
    seen: list[torch.Tensor] = []

    def watched(first: torch.Tensor, second: torch.Tensor, blocks: tuple[torch.Tensor, ...]) -> torch.Tensor:
        seen.extend(blocks)
        return jackknife(first, second, blocks)

    monkeypatch.setattr("overproof.probes.cka.jackknife", watched)
    CKA(images=24).run(cast, Material(images(24), torch.arange(24) // 8))
    assert torch.cat(seen[:12]).sort().values.tolist() == list(range(24))
    assert all(int(block.max() - block.min()) == 12 for block in seen[:12])


def test_models_that_cannot_be_compared(cast: dict[str, nn.Module], material: Material) -> None:
    wide = overproof.create_model("cnn", 5, 1, 8)
    with pytest.raises(UsageError, match="'teacher' has 3 classes and 'student' has 5"):
        Lab({"teacher": cast["teacher"], "student": wide}, material)
    with pytest.raises(UsageError, match="not 0 and 1"):
        Lab({"student": wide}, material)
    with pytest.raises(UsageError, match="not 1 and 0"):
        Lab({"teacher": wide}, material)
    with pytest.raises(UnknownNameError, match="independent"):
        Lab({**cast, "independant": wide}, material)
    with pytest.raises(UsageError, match="'independent:0' and 'independent:again' have the same weights"):
        Lab({**cast, "independent:again": copy.deepcopy(cast["independent:0"])}, material)
    Lab({**cast, "student:again": cast["student:a"]}, material)  # which fakes no control
    with pytest.raises(UsageError, match=r"'teacher' does not take images of shape \(1, 8, 8\)"):
        Lab({"teacher": nn.Linear(3, 3), "student": wide}, material)
    with pytest.raises(DataError, match="label 7"):
        Lab(cast, Material(material.images, material.labels + 7 - material.labels.max()))
    with pytest.raises(DataError, match="The domain 'far' has the label 5, but the models only 3 classes"):
        Lab(cast, Material(material.images, material.labels, domains={"far": (images(2), torch.tensor([0, 5]))}))


def test_material_that_does_not_fit_together() -> None:
    x, y = images(), torch.arange(24) % 3
    with pytest.raises(DataError, match="24 images, but 23 labels"):
        Material(x, y[:23])
    with pytest.raises(DataError, match="holds? no image"):
        Material(x[:0], y[:0])
    with pytest.raises(DataError, match="The groups are given for 3 images, but 24 are probed"):
        Material(x, y, groups=Groups(torch.zeros(3), ("a",)))
    with pytest.raises(DataError, match=r"domain 'big' has 2 images of shape \(1, 9, 9\)"):
        Material(x, y, domains={"big": (images(2, 1, 9), y[:2])})
    with pytest.raises(DataError, match="domain 'none' has 0 images"):
        Material(x, y, domains={"none": (x[:0], y[:0])})
    for numbers in (torch.tensor([0, 2] * 12), torch.tensor([0, -1] * 12)):
        with pytest.raises(DataError, match=r"group numbers reach from -?\d to \d, but there are 2 names \(0 to 1\)"):
            Material(x, y, groups=Groups(numbers, ("a", "b")))
    named = ImageSet(images(3), y[:3], classes=("a", "b", "c"))
    for classes in (("a", "c", "b"), ("a", "b"), ("0", "1", "2", "3")):
        other = ImageSet(images(3), y[:3].clamp(max=len(classes) - 1), classes=classes)
        with pytest.raises(
            DataError, match=rf"domain 'there' has . classes \({', '.join(classes)}\), the images have 3 classes \(a, b, c\)"
        ):
            Material.of(named, domains={"there": other})
    for classes in (("0", "1"), ("a", "b", "c"), ("0", "1", "2")):  # of which the numbers alone are known
        Material.of(named, domains={"there": ImageSet(images(2), y[:2], classes=classes)})
    Material.of(ImageSet(images(2), y[:2], classes=("0", "1")), domains={"there": named})
    colour = Material.of(ImageSet(images(4, 3), y[:4], classes=("a", "b", "c")), domains={"grey": ImageSet(images(4), y[:4])})
    assert colour.domains["grey"][0].shape == (4, 3, 8, 8)
    assert colour.classes == ("a", "b", "c")


def test_names_and_options_of_probes(cast: dict[str, nn.Module], material: Material) -> None:
    with pytest.raises(UnknownNameError, match="cka"):
        explain(cast, material, probes="cca")
    with pytest.raises(UnknownNameError, match="probe to give options to"):
        explain(cast, material, probes="cka", options={"crop": {}})
    with pytest.raises(UnknownNameError, match="images"):
        explain(cast, material, probes="cka", options={"cka": {"image": 3}})
    for name, options, words in (
        ("cka", {"images": 2}, "images=2 must be at least 4"),
        ("adversarial-transfer", {"eps": 2.0}, r"eps=2.0 must lie in \[0, 1\]"),
        ("adversarial-transfer", {"target": 1.0}, "target=1.0"),
        ("adversarial-transfer", {"steps": 0}, "steps=0"),
        ("crop", {"strengths": (1.5,)}, "must lie above 0 and up to 1"),
        ("crop", {"strengths": ()}, "strengths is empty"),
        ("shift", {"images": 0}, "images=0"),
        ("decision-planes", {"side": 1}, "side=1"),
        ("boundary-similarity", {"steps": 0}, "must be at least 1"),
        ("corruptions", {"kinds": ("fog",)}, "fog"),
        ("corruptions", {"severities": (6,)}, "must be 1 to 5"),
        ("corruptions", {"images": 0}, "images=0"),
        ("localisation", {"images": 0}, "images=0"),
        ("group-bias", {"resamples": 0}, "resamples=0"),
    ):
        with pytest.raises(UsageError, match=words):
            PROBES.create(name, **options)


def test_in_python_with_a_set_by_name(tmp_path: Path) -> None:
    models = {
        name: overproof.create_model("cnn", 10, 1, 8, widths=(4,))
        for name in ("teacher", "student", "independent:0", "independent:1")
    }
    found = overproof.explain(
        models, "digits", probes=["domains", "crop"], options={"crop": {"images": 50, "strengths": (0.5,)}}
    )
    assert set(found.skipped) == {"domains"}
    path = found.save(tmp_path)
    assert path.name == "explanation.json"
    assert "crop" in repr(found)
    assert found.summary["classes"] == [str(i) for i in range(10)]


# ---- what students are made of --------------------------------------------------------------------------------------


def test_noisy_labels() -> None:
    from overproof.methods.noisy_labels import NoisyLabels

    torch.manual_seed(0)
    method = NoisyLabels(small_model(0))
    soft = method.soften(torch.zeros(4000, dtype=torch.long), 3)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(4000))
    logs = soft.log() * 0.15  # what was added to the one-hot label, up to a constant for each image
    gaps = logs[:, 1] - logs[:, 2]
    assert float(gaps.var()) == pytest.approx(0.4, rel=0.1)  # of the difference of two such noises
    assert float((logs[:, 0] - logs[:, 1]).mean()) == pytest.approx(1, abs=0.05)
    exact = NoisyLabels(small_model(0), variance=0.0, temperature=1.0).soften(torch.tensor([1]), 3)
    torch.testing.assert_close(exact, torch.tensor([[0.0, 1.0, 0.0]]).softmax(1))
    for options in ({"variance": -1.0}, {"temperature": 0.0}):
        with pytest.raises(UsageError, match="noisy-labels"):
            NoisyLabels(small_model(0), **options)


def test_methods_as_parts_say_something_or_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from overproof.methods import METHODS
    from overproof.methods.noisy_labels import NoisyLabels
    from overproof.testing import small_batch
    from overproof.types import Progress

    def losses(*methods: str) -> dict[str, torch.Tensor]:
        made = METHODS.create("composed", small_model(0), small_model(1), methods=methods)
        return made(small_batch(), Progress()).losses

    assert set(losses("kd", "noisy-labels")) - set(losses("kd")) == {"noisy-labels"}
    with pytest.raises(UsageError, match="'ce' adds nothing but the cross-entropy"):
        losses("kd", "ce")
    monkeypatch.setattr(NoisyLabels, "groups", lambda self, phase="train": [{"params": [], "lr_scale": 2.0}])
    with pytest.raises(UsageError, match="'noisy-labels' gives its parameters optimiser options of their own"):
        losses("kd", "noisy-labels")


def test_a_plain_regressor_is_a_convolution() -> None:
    from overproof.methods.fitnet import FitNet

    hint = FitNet(small_model(0), small_model(1), plain_regressor=True)
    assert [type(layer) for layer in hint.regressors[0]] == [nn.Conv2d]
    assert len(FitNet(small_model(0), small_model(1)).regressors[0]) > 1


def test_the_mnist_net() -> None:
    model = overproof.create_model("mnist-net", 10, 1, 28)
    assert sum(p.numel() for p in model.parameters()) == 1_199_882  # PyTorch's example
    with torch.no_grad():
        _, found = Tap(model.eval(), model.stages)(torch.rand(2, 1, 28, 28))
    assert [tuple(value.shape[1:]) for value in found.values()] == [(32, 26, 26), (64, 24, 24)]
    with pytest.raises(UsageError, match="image_size=5"):
        overproof.create_model("mnist-net", 10, 1, 5)


def test_classes_without_images_are_named(cast: dict[str, nn.Module], material: Material) -> None:
    few = Material(material.images, torch.zeros_like(material.labels), classes=("a", "b", "c"))
    assert "no held-out image of b, c: no figure" in explain(cast, few, probes="cka").facts["notes"][0]
    assert explain(cast, material, probes="cka").facts["notes"] == []
