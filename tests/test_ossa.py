"""The spectral attack: where it goes on a linear network, that no other direction moves the answer more, and its contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from overproof import fisher
from overproof.attacks import ATTACKS, FGSM, OSSA, predictions
from overproof.data import Splits
from overproof.errors import UsageError
from overproof.evaluation import evaluate, verdict
from overproof.losses.divergences import cross_entropy, kl_divergence
from overproof.losses.margins import margin
from overproof.testing import check_attack, small_batch, small_model
from overproof.testing.doubles import Saturated


def smooth(seed: int = 0, classes: int = 5, pixels: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 24), nn.Tanh(), nn.Linear(24, classes)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    return net


def middle(count: int = 12, seed: int = 1) -> Tensor:
    """Images far from the ends of the box: nothing is clipped."""
    generator = torch.Generator().manual_seed(seed)
    return 0.3 + 0.4 * torch.rand(count, 1, 4, 4, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(
    "options", [{"steps": 2}, {"steps": 2, "first_share": 0.3}, {"estimator": "power"}, {"targeted": True, "steps": 2}]
)
def test_contract(options: dict[str, Any]) -> None:
    check_attack(OSSA(eps=0.6, **options))


def test_a_linear_network_is_crossed_along_its_normal(linear: nn.Sequential) -> None:
    """Two classes: u is W_0 - W_1, and an image falls exactly if its distance to the boundary is below eps."""
    images = middle(40)
    with torch.no_grad():  # the boundary among the images: nothing is clipped
        linear[1].bias[0] -= (linear(images) @ torch.tensor([1.0, -1.0], dtype=torch.float64)).median()
    labels = linear(images).argmax(dim=1)
    normal = (linear[1].weight[0] - linear[1].weight[1]).detach()
    distance = (linear(images) @ torch.tensor([1.0, -1.0], dtype=torch.float64)).abs().detach() / normal.norm()
    eps = 1.01 * float(distance.median())
    found = OSSA(eps=eps)(linear, images, labels)
    assert torch.equal(predictions(linear, found) != labels, distance < eps)
    change = (found - images).flatten(1)
    torch.testing.assert_close(change.norm(dim=1), torch.full((40,), eps, dtype=torch.float64))
    torch.testing.assert_close((change @ normal).abs() / normal.norm(), change.norm(dim=1))


def test_no_direction_moves_the_answer_more() -> None:
    """Small steps: the eigenvector against random directions and the gradient of the cross-entropy."""
    model, images, eps = smooth(), middle(), 0.01
    here = model(images).detach()

    def moved(directions: Tensor) -> Tensor:
        lengths = directions.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return kl_divergence(here, model(images + eps * directions / lengths)).detach()

    ours = moved(fisher.leading(model, images)[1])
    generator = torch.Generator().manual_seed(2)
    for _ in range(50):
        other = moved(torch.randn(images.shape, dtype=torch.float64, generator=generator))
        assert bool((ours > other).all())
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(model(x), here.argmax(dim=1)).sum(), x)
    assert bool((ours >= moved(gradient) * (1 - 0.01)).all())
    assert float(ours.mean()) > float(moved(gradient).mean())


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("targeted", [False, True])
def test_never_worse_than_the_image(steps: int, targeted: bool) -> None:
    model, images = smooth(3), middle(60)
    labels = (model(images).argmax(dim=1) + targeted) % 5
    sign = -1 if targeted else 1
    found = OSSA(eps=0.8, steps=steps, targeted=targeted)(model, images, labels)
    before, after = (sign * margin(model(x).detach(), labels) for x in (images, found))
    assert bool((after >= before - 1e-12).all())
    assert float((after - before).mean()) > 0.1


def test_both_ends_are_tried() -> None:
    """Where one end is misclassified, the attack returns one that is."""
    model, images = smooth(4), middle(80, seed=5)
    labels = model(images).argmax(dim=1)
    step = 0.7 * fisher.leading(model, images)[1]
    ends = [(images + sign * step).clamp(0, 1) for sign in (1, -1)]
    either = (predictions(model, ends[0]) != labels) | (predictions(model, ends[1]) != labels)
    broken = predictions(model, OSSA(eps=0.7)(model, images, labels)) != labels
    assert torch.equal(broken, either)
    assert 5 < int(broken.sum()) < 75


def test_the_second_step_goes_on() -> None:
    model, images = smooth(6), middle(40)
    labels = model(images).argmax(dim=1)
    one, two = (OSSA(eps=0.5, steps=steps)(model, images, labels) - images for steps in (1, 2))
    sizes = two.flatten(1).norm(dim=1)
    assert float(sizes.max()) <= 0.5 + 1e-12
    whole = sizes > 0.31  # both steps were kept
    assert int(whole.sum()) > 20
    first = 0.3 * fisher.leading(model, images)[1]
    along = (two * first).flatten(1).sum(dim=1).abs() / 0.3
    assert bool((along[whole] >= 0.3 - 1e-9).all()), "turned back"
    assert not torch.allclose(one[whole], two[whole])
    straight = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    labels = straight(images).argmax(dim=1)
    one, two = (OSSA(eps=0.5, steps=steps)(straight, images, labels) for steps in (1, 2))
    torch.testing.assert_close(one, two)


def test_what_is_wrong_already_is_left_alone() -> None:
    model, images = smooth(), middle()
    labels = model(images).argmax(dim=1)
    labels[::2] = (labels[::2] + 1) % 5
    found = OSSA(eps=0.5)(model, images, labels)
    assert torch.equal(found[::2], images[::2])
    assert bool((found[1::2] != images[1::2]).flatten(1).any(dim=1).all())
    reached = OSSA(eps=0.5, targeted=True)(model, images, model(images).argmax(dim=1))
    assert torch.equal(reached, images)


def test_clipping_shortens_and_the_size_says_so() -> None:
    torch.manual_seed(0)
    model, images = smooth(), torch.rand(30, 1, 4, 4, dtype=torch.float64).round()  # every pixel at an end
    labels = model(images).argmax(dim=1)
    judged = verdict(OSSA(eps=0.5), model, images, labels)
    assert not bool(judged.invalid.any())
    kept = judged.sizes[judged.sizes > 0]
    assert len(kept) > 10
    assert float(kept.max()) < 0.499


def test_iteration_and_matrix_find_the_same_images() -> None:
    model, images = smooth(), middle()
    labels = model(images).argmax(dim=1)
    exact, power = (OSSA(eps=0.5, estimator=how, iterations=400)(model, images, labels) for how in ("exact", "power"))
    torch.testing.assert_close(exact, power, atol=5e-3, rtol=0)
    one = OSSA(eps=0.5, estimator="power", iterations=1)(model, images, labels)
    assert not torch.allclose(one, exact, atol=5e-3)


def test_a_saturated_softmax_does_not_hide_the_direction() -> None:
    """The gradient of the cross-entropy is exactly zero there; the eigenvector does not depend on the scale of the logits."""
    model, images = smooth(7).float(), middle(60, seed=3).float()
    hidden = Saturated(model, 10_000.0)
    labels = model(images).argmax(dim=1)
    fooled = {name: int((predictions(hidden, attack(hidden, images, labels)) != labels).sum())
              for name, attack in (("fgsm", FGSM(eps=0.8, norm="L2")), ("ossa", OSSA(eps=0.8)))}  # fmt: skip
    assert fooled["fgsm"] < 0.2 * fooled["ossa"]
    assert fooled["ossa"] > 20


def test_it_is_registered_and_judged(digits: Splits) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    data = digits.test.subset(range(60))
    result = evaluate(
        model, data, attacks={"o": {"attack": "ossa", "eps": 0.5, "steps": 2}, "w": {"attack": "ossa", "eps": 1.0}}, sanity=0
    )
    assert result.summary["attacks"]["o"]["threat"] == "L2"
    assert result.summary["attacks"]["o"]["invalid"] == 0
    assert result.robust["w"] <= result.robust["o"] <= result.clean
    assert ATTACKS.get("ossa").load() is OSSA
    batch = small_batch(6)
    assert OSSA()(small_model().eval(), batch.images, batch.labels).shape == batch.images.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "Linf"}, "norm='L2'"),
        ({"steps": 3}, "steps must be 1 or 2"),
        ({"first_share": 1.0}, "first_share in"),
        ({"iterations": 0}, "iterations at least 1"),
        ({"eps": -1.0}, "at least 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        OSSA(**options)


def test_the_sign_of_the_eigenvector_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = smooth(4), middle(40)
    labels = model(images).argmax(dim=1)
    expected = [OSSA(eps=0.5, steps=steps)(model, images, labels) for steps in (1, 2)]
    generator = torch.Generator().manual_seed(0)

    def turned(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        values, directions = fisher.leading(*arguments, **options)
        signs = 2 * torch.randint(0, 2, (len(values), 1, 1, 1), generator=generator) - 1
        return values, signs * directions

    monkeypatch.setattr("overproof.attacks.ossa.leading", turned)
    for steps, found in zip((1, 2), expected, strict=True):
        torch.testing.assert_close(OSSA(eps=0.5, steps=steps)(model, images, labels), found)


def test_an_image_in_a_hollow_is_better_left() -> None:
    """Both ends are further from the boundary than the image itself."""

    class Valley(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            height = (x[:, 0, 0, 0] - 0.5).square()
            return torch.stack([1 + 10 * height, torch.zeros_like(height)], dim=1)

    images = middle(3)
    images[:, 0, 0, 0] = torch.tensor([0.51, 0.48, 0.6], dtype=torch.float64)
    found = OSSA(eps=0.1)(Valley(), images, torch.zeros(3, dtype=torch.long))
    assert torch.equal(found[:2], images[:2])
    assert float(found[2, 0, 0, 0]) == pytest.approx(0.5)
