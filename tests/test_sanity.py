"""The sanity panel flags every defence that is broken on purpose, and no honest model. All on real digits."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from overproof.attacks.base import predictions
from overproof.attacks.threats import L0, L1, L2, Linf
from overproof.data import ImageSet, Splits
from overproof.errors import UsageError
from overproof.evaluation.sanity import Panel, panel
from overproof.evaluation.surface import loss_surface
from overproof.evaluation.trial import Trial
from overproof.evaluation.unmasking import Scaled, Smoothed
from overproof.losses.margins import margin
from overproof.methods.ce import CE
from overproof.methods.kd import KD
from overproof.methods.objective import Objective
from overproof.methods.pgd_at import PGDAT
from overproof.models.factory import create_model
from overproof.testing import NoisyInput, Quantised, Saturated, Thermometer, small_batch, small_model
from overproof.testing.conformance import _assert_same, _state
from overproof.types import Batch, Progress

THREAT = Linf(0.15)
HONEST = ("ordinary", "adversarially trained", "distilled")
BROKEN = {  # and the checks that must be among those that find it out
    "quantised": {"gradients", "growing radius", "black box"},
    "saturated": {"saturation"},
    "noisy": {"determinism"},
    "thermometer": {"gradients", "black box"},
}
BITS = 10


def pixels(data: ImageSet) -> Tensor:
    """The images of a set as a network sees them."""
    return data.images.float() / 255


def fit(objective: Objective, data: ImageSet, steps: int = 120) -> None:
    """The student of `objective`, trained in a second or two."""
    generator, images, phase = torch.Generator().manual_seed(0), pixels(data), objective.phases[0]
    optimizer = torch.optim.SGD(list(objective.trainable(phase)), lr=0.1, momentum=0.9)
    objective.train()
    for step in range(steps):
        rows = torch.randint(len(images), (64,), generator=generator)
        optimizer.zero_grad()
        output = objective(Batch(images[rows], data.labels[rows], rows), Progress(step, steps), phase)
        sum(output.losses.values()).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def models(digits: Splits) -> dict[str, nn.Module]:
    """Three honest students and four broken defences."""
    torch.manual_seed(0)
    ordinary, hardened, student, coder = (create_model("cnn", 10, c, 8, widths=(16, 32)) for c in (1, 1, 1, BITS))
    coded = Thermometer(coder, BITS)
    fit(CE(ordinary), digits.train)
    fit(PGDAT(hardened, eps=0.15, step_size=0.06, steps=3), digits.train)
    fit(KD(student, ordinary), digits.train)
    fit(CE(coded), digits.train)
    found = dict(zip(HONEST, (ordinary, hardened, student), strict=True))
    found |= {"quantised": Quantised(ordinary), "saturated": Saturated(ordinary), "noisy": NoisyInput(ordinary)}
    return {name: model.eval() for name, model in {**found, "thermometer": coded}.items()}


@pytest.fixture(scope="module")
def images(digits: Splits) -> tuple[Tensor, Tensor]:
    return pixels(digits.test), digits.test.labels


def right(model: nn.Module, images: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    chosen = predictions(model, images[0]) == images[1]
    return images[0][chosen][:count], images[1][chosen][:count]


@pytest.fixture(scope="module")
def panels(models: dict[str, nn.Module], images: tuple[Tensor, Tensor]) -> dict[str, Panel]:
    return {name: panel(model, *right(model, images, 100), THREAT) for name, model in models.items()}


def failed(found: Panel) -> set[str]:
    return {check["name"] for check in found.summary["checks"] if not check["passed"]}


@pytest.mark.parametrize("name", HONEST)
def test_honest_models_pass(panels: dict[str, Panel], name: str) -> None:
    found = panels[name]
    assert not found.suspected, failed(found)
    assert len(found.summary["checks"]) == 8
    for check in found.summary["checks"]:
        assert 2 * check["value"] <= max(check["limit"], 1) + 2 or check["name"] == "losses", check["text"]
    radii = found.summary["radii"]
    assert radii["eps"] == [0.15, 0.3, 0.6, 1.0]
    assert radii["robust"] == sorted(radii["robust"], reverse=True)
    assert radii["robust"][-1] == 0


@pytest.mark.parametrize("name", BROKEN)
def test_broken_defences_are_found_out(panels: dict[str, Panel], name: str) -> None:
    found = panels[name]
    assert found.suspected
    assert BROKEN[name] <= failed(found)
    for check in found.summary["checks"]:
        if check["name"] in BROKEN[name]:
            assert check["value"] > 2 * check["limit"], check["text"]
            assert f"{check['value']} of {found.summary['samples']} images" in check["text"]
    json.dumps(found.summary, allow_nan=False)


def test_what_the_panel_says(panels: dict[str, Panel], models: dict[str, nn.Module], images: tuple[Tensor, Tensor]) -> None:
    quantised, coded, noisy = (panels[name].summary for name in ("quantised", "thermometer", "noisy"))
    assert quantised["gradients"]["zero_images"] == quantised["samples"]
    assert quantised["radii"]["robust"][-1] > 0.5
    assert not coded["gradients"]  # nothing to measure
    assert "give no gradient at all" in coded["checks"][1]["text"]
    assert "(EOT)" in noisy["checks"][0]["text"]
    # Within a radius that leaves something to be broken.
    small = panel(models["noisy"], *right(models["noisy"], images, 100), Linf(0.07)).summary
    assert small["broken"]["pgd on the average"] > 0
    saturated = panels["saturated"].summary
    assert saturated["broken"]["pgd on scaled logits"] > 0.5 * saturated["samples"]
    norms = panels["ordinary"].summary["gradients"]["norms"]
    assert 0 < norms["5%"] <= norms["50%"] <= norms["95%"]


@pytest.mark.parametrize("name", ["adversarially trained", "quantised", "saturated", "noisy"])
def test_eight_images_are_enough(models: dict[str, nn.Module], images: tuple[Tensor, Tensor], name: str) -> None:
    assert panel(models[name], *right(models[name], images, 8), THREAT).suspected == (name in BROKEN)


@pytest.mark.parametrize("threat", [L2(0.7), L1(3.0)], ids=repr)
def test_other_norms(models: dict[str, nn.Module], images: tuple[Tensor, Tensor], threat: L2 | L1) -> None:
    for name in ("ordinary", "quantised"):
        found = panel(models[name], *right(models[name], images, 24), threat)
        assert found.suspected == (name in BROKEN), failed(found)
        assert found.summary["radii"]["eps"][-1] == (8.0 if isinstance(threat, L2) else 64.0)


def test_a_transfer_unmasks_what_it_was_made_for(models: dict[str, nn.Module], images: tuple[Tensor, Tensor]) -> None:
    chosen, labels = right(models["quantised"], images, 32)
    found = panel(models["quantised"], chosen, labels, THREAT, source=models["ordinary"])
    assert found.summary["broken"]["transfer"] > 16


def test_the_panel_repeats_itself_and_leaves_no_trace(models: dict[str, nn.Module], images: tuple[Tensor, Tensor]) -> None:
    model, (chosen, labels) = models["noisy"], right(models["noisy"], images, 8)
    torch.manual_seed(5)
    one, after = panel(model, chosen, labels, THREAT, seed=3), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after), "the global generator moved"
    assert one.summary == panel(model, chosen, labels, THREAT, seed=3).summary
    fragile, batch = small_model(), small_batch(6)
    fragile.train()
    before = _state(fragile)
    panel(fragile, batch.images, predictions(fragile, batch.images), Linf(0.1))
    _assert_same(before, fragile, "the panel")


def test_whatever_the_caller_switched_off(linear: nn.Sequential) -> None:
    images = torch.rand(5, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = predictions(linear, images)
    plain = panel(linear, images, labels, Linf(0.05))
    with torch.inference_mode():
        assert panel(linear, images.clone(), labels.clone(), Linf(0.05)).summary == plain.summary
    assert not plain.suspected


def test_nothing_to_test_is_nothing_suspected() -> None:
    model, batch = small_model(), small_batch(6)
    found = panel(model, batch.images, (predictions(model, batch.images) + 1) % 3, THREAT)
    assert (found.summary["samples"], found.summary["checks"], found.suspected, found.arrays) == (0, [], False, {})


@pytest.mark.parametrize("threat", [L2(float("inf")), L0(5), Linf(0.0)], ids=repr)
def test_a_panel_needs_a_ball(threat: L2 | L0 | Linf) -> None:
    with pytest.raises(UsageError, match="needs a ball such as"):
        panel(small_model(), *(small_batch(2).images, small_batch(2).labels), threat)


def test_a_fixed_number_of_images_is_tolerated() -> None:
    batch = small_batch(50)
    trial = Trial(small_model(), batch.images, batch.labels, THREAT, 0)
    limits = [trial.judge("x", 0, share, "", good="", bad="").limit for share in (None, 0.02, 0.1)]
    assert limits == [0, 2, 6]
    assert trial.judge("x", 2, 0.02, "", good="good", bad="bad").passed
    assert trial.judge("x", 3, 0.02, "fell", good="good", bad="bad").text == "3 of 50 images fell (tolerated: 2). bad"


def test_a_blur_sees_the_slope_of_a_staircase(models: dict[str, nn.Module], images: tuple[Tensor, Tensor]) -> None:
    model = models["quantised"]
    chosen, labels = right(model, images, 24)
    attack = Smoothed(threat=THREAT)
    found = attack(model, chosen, labels, torch.Generator().manual_seed(0))
    assert bool((THREAT.size(found - chosen) <= 0.15 + 1e-6).all())
    assert int((predictions(model, found) != labels).sum()) >= 12
    torch.testing.assert_close(Scaled(model, 0.5)(chosen), model(chosen) / 2)


def test_the_surface_of_a_linear_model_is_a_plane(linear: nn.Sequential) -> None:
    images = torch.full((2, 1, 4, 4), 0.5, dtype=torch.float64)
    labels = linear(images).argmax(dim=1)
    found = loss_surface(linear, images, labels, Linf(0.1), points=9)
    surface, steps = torch.from_numpy(found["surface"]), torch.from_numpy(found["surface_radius"])
    assert surface.shape == (2, 9, 9)
    torch.testing.assert_close(steps, torch.linspace(-0.2, 0.2, 9))
    weight = linear[1].weight
    slope = (weight[0] - weight[1]).abs().sum().float()
    middle = margin(linear(images), labels).float()[:, None]
    torch.testing.assert_close(surface[:, 4], (middle + steps * slope).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.from_numpy(found["surface_size"])[:, 4], steps.abs().expand(2, 9), atol=1e-6, rtol=0)
    assert found["surface_label"].tolist() == labels.tolist()


def test_a_surface_without_gradient_is_still_drawn(panels: dict[str, Panel]) -> None:
    for name in ("thermometer", "quantised"):
        arrays = panels[name].arrays
        assert arrays["surface"].shape == arrays["surface_size"].shape == (4, 25, 25)
        assert arrays["surface"].std(axis=(1, 2)).min() > 0
        assert (arrays["surface"][:, 12, 12] < 0).all()  # the image itself is classified correctly


def test_doubles_say_what_they_cannot_do() -> None:
    for build in (Quantised, Thermometer):
        with pytest.raises(UsageError, match="levels=0"):
            build(small_model(), 0)


def test_a_thermometer_counts_levels() -> None:
    codes = Thermometer(nn.Identity(), 4)(torch.tensor([0.0, 0.3, 0.5, 1.0]).view(1, 1, 2, 2))
    assert codes.shape == (1, 4, 2, 2)
    assert codes.sum(dim=1).flatten().tolist() == [0, 1, 2, 4]
