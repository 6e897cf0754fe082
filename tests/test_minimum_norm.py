"""DeepFool, Carlini-Wagner, DDN and FMN find the known nearest points, and return nothing that does not count."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from overproof.attacks.base import MinimumNormAttack
from overproof.attacks.boundary import crossed
from overproof.attacks.carlini_wagner import CarliniWagner
from overproof.attacks.ddn import DDN
from overproof.attacks.deepfool import DeepFool
from overproof.attacks.fmn import FMN, project
from overproof.attacks.pgd import PGD
from overproof.attacks.threats import L2
from overproof.errors import NoGradientError, UsageError
from overproof.evaluation import verdict
from overproof.testing import check_attack

DUAL = {"Linf": 1.0, "L2": 2.0, "L1": math.inf}
FAST = {
    "deepfool-l2": DeepFool(steps=10),
    "deepfool-linf": DeepFool(steps=10, norm="Linf"),
    "cw": CarliniWagner(searches=3, steps=12, weight=0.3, learning_rate=0.1),
    "ddn": DDN(steps=20),
    "ddn-8bit": DDN(steps=20, levels=256),
    "fmn-l0": FMN(steps=20, norm="L0"),
    "fmn-l1": FMN(steps=20, norm="L1"),
    "fmn-l2": FMN(steps=20, norm="L2"),
    "fmn-linf": FMN(steps=20, norm="Linf"),
}
# With the relative error that is allowed on linear models.
EXACT = {
    "deepfool-l2": (DeepFool(), 0.025),
    "deepfool-linf": (DeepFool(norm="Linf"), 0.025),
    "cw": (CarliniWagner(steps=100, weight=0.1, searches=6, learning_rate=0.005), 0.05),
    "ddn": (DDN(), 0.05),
    "fmn-l1": (FMN(norm="L1"), 0.05),
    "fmn-l2": (FMN(norm="L2"), 0.05),
    "fmn-linf": (FMN(norm="Linf"), 0.05),
}


def planes(shape: tuple[int, int, int], classes: int, dtype: torch.dtype) -> nn.Sequential:
    """Linear logits, all equal at the centre of the box."""
    torch.manual_seed(1)
    size = math.prod(shape)
    model = nn.Sequential(nn.Flatten(), nn.Linear(size, classes)).to(dtype)
    with torch.no_grad():
        model[1].bias -= model(torch.full((1, *shape), 0.5, dtype=dtype))[0]
    return model


def near_centre(model: nn.Module, count: int, shape: tuple[int, int, int], dtype: torch.dtype):
    """Images and predictions; of twice as many those with the largest margins, for none shall lie on a boundary itself."""
    generator = torch.Generator().manual_seed(2)
    images = 0.5 + 0.1 * (torch.rand(2 * count, *shape, generator=generator, dtype=torch.float64) - 0.5).to(dtype)
    top = model(images).topk(2, dim=1).values
    images = images[(top[:, 0] - top[:, 1]).argsort(descending=True)[:count]]
    return images, model(images).argmax(1)


def others(labels: torch.Tensor, classes: int) -> torch.Tensor:
    return (labels + 1) % classes


def optimum(model: nn.Sequential, images: torch.Tensor, labels: torch.Tensor, norm: str) -> torch.Tensor:
    """Distance |margin| / ||w_k - w_y||_dual to the nearest other class, far from the box."""
    weight, logits = model[1].weight.detach(), model(images).detach()
    gaps = logits.gather(1, labels[:, None]) - logits
    slopes = torch.linalg.vector_norm(weight[None] - weight[labels][:, None], DUAL[norm], dim=2)
    return (gaps / slopes).scatter(1, labels[:, None], math.inf).amin(1)


@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("attack", FAST.values(), ids=FAST)
def test_contract(attack: MinimumNormAttack, targeted: bool) -> None:
    radius = 3.0 if attack.norm == "L0" else 0.05
    check_attack(dataclasses.replace(attack, targeted=targeted, steps=8, eps=math.inf if targeted else radius))


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 4, 4)), (3, (3, 5, 7)), (8, (2, 3, 1))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize(("attack", "slack"), EXACT.values(), ids=EXACT)
def test_linear_optimum(attack: MinimumNormAttack, slack: float, dtype: torch.dtype, count: int, shape: tuple) -> None:
    # Only DeepFool compares classes; the others follow the largest other logit, though another class may be nearer.
    model = planes(shape, 4 if isinstance(attack, DeepFool) else 2, dtype)
    images, labels = near_centre(model, count, shape, dtype)
    found = attack(model, images, labels)
    assert found.dtype == dtype
    ratio = attack.threat.size(found - images) / optimum(model, images, labels, attack.norm)
    assert (model(found).argmax(1) != labels).all()
    assert (ratio > 1 - 1e-4).all()
    assert (ratio < 1 + slack).all(), ratio


@pytest.mark.parametrize(("attack", "slack"), EXACT.values(), ids=EXACT)
def test_linear_optimum_towards_a_target(attack: MinimumNormAttack, slack: float) -> None:
    """With two classes the way to the target is the way out of the label."""
    model = planes((1, 4, 4), 2, torch.float64)
    images, labels = near_centre(model, 3, (1, 4, 4), torch.float64)
    found = dataclasses.replace(attack, targeted=True)(model, images, 1 - labels)
    ratio = attack.threat.size(found - images) / optimum(model, images, labels, attack.norm)
    assert (model(found).argmax(1) == 1 - labels).all()
    assert ((ratio > 1 - 1e-4) & (ratio < 1 + slack)).all(), ratio


@pytest.mark.parametrize("attack", FAST.values(), ids=FAST)
def test_targets_of_many_classes_are_reached(attack: MinimumNormAttack) -> None:
    model = planes((1, 4, 4), 5, torch.float64)
    images, labels = near_centre(model, 8, (1, 4, 4), torch.float64)
    wanted = others(labels, 5)
    found = dataclasses.replace(attack, targeted=True, **({"steps": 200} if attack.norm in ("L0", "L1") else {}))(
        model, images, wanted
    )
    assert (model(found).argmax(1) == wanted).all()


BOXED = EXACT | {
    "cw": (CarliniWagner(steps=150, weight=0.3, searches=4, learning_rate=0.08), 0.05),
    "fmn-l0": (FMN(norm="L0"), 0.0),
}


@pytest.mark.parametrize(("attack", "slack"), BOXED.values(), ids=BOXED)
def test_linear_optimum_at_the_box(attack: MinimumNormAttack, slack: float) -> None:
    """z_1 - z_0 = 4 a + 3 b + 2 c + 1 d - 3 at x = (0.9, 0, 0, 1): a has 0.1 of room, d none, so 4 * 0.1 + 3 b + 2 c = m."""
    weight = torch.tensor([[0.0, 0, 0, 0], [4, 3, 2, 1]], dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(weight)
        model[1].bias.copy_(torch.tensor([0.0, -(3.6 + 1 + 1.7)], dtype=torch.float64))  # the margin is -1.7
    image = torch.tensor([[[[0.9, 0.0], [0.0, 1.0]]]], dtype=torch.float64)
    found = attack(model, image, torch.zeros(1, dtype=torch.long))
    # Left for b and c: 1.7 - 0.4 = 1.3. L2: b, c = 1.3 / 13 * (3, 2) = (0.3, 0.2). Linf: 1.3 / 5. L1: b = 1.3 / 3 after a.
    # L0: b alone has 3 * 1.
    best = {"L2": math.sqrt(0.01 + 0.09 + 0.04), "Linf": 0.26, "L1": 0.1 + 1.3 / 3, "L0": 1.0}[attack.norm]
    ratio = float(attack.threat.size(found - image)) / best
    assert int(model(found).argmax(1)) == 1
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert 1 - 1e-6 < ratio <= 1 + slack + 1e-9, ratio


@pytest.mark.parametrize(
    "attack", [a for a, _ in EXACT.values() if not isinstance(a, CarliniWagner)], ids=lambda a: f"{a.norm}"
)
def test_black_and_white_images(attack: MinimumNormAttack) -> None:
    """Only values that can move count: the distance is the gap over the dual norm of their weights."""
    torch.manual_seed(11)
    model = nn.Sequential(nn.Flatten(), nn.Linear(100, 2)).double()
    images = torch.randint(0, 2, (8, 1, 10, 10)).double()
    labels = torch.zeros(8, dtype=torch.long)
    weight = (model[1].weight[1] - model[1].weight[0]).detach()
    gaps = 0.05 + 0.01 * torch.arange(8, dtype=torch.float64)
    x, slope = images.flatten(1), weight.expand(8, 100)
    inward = slope.masked_fill(((x == 0) & (slope < 0)) | ((x == 1) & (slope > 0)), 0)

    offsets = x @ weight + gaps
    best = gaps / torch.linalg.vector_norm(inward, DUAL[attack.norm], dim=1)
    for image, label, offset, size in zip(images.split(1), labels.split(1), offsets, best, strict=True):
        with torch.no_grad():
            model[1].bias.copy_(torch.stack([model[1].bias[0], model[1].bias[0] - offset]))
        found = attack(model, image, label)
        assert int(model(found).argmax(1)) == 1
        assert float(attack.threat.size(found - image)) <= 1.05 * float(size)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_l0_changes_as_few_values_as_possible(count: int) -> None:
    """Grey images can move each value by 0.5: the k largest weights must outweigh the margin."""
    model = planes((2, 4, 4), 2, torch.float64)
    images = torch.full((count, 2, 4, 4), 0.5, dtype=torch.float64)
    with torch.no_grad():
        model[1].bias += torch.tensor([0.4, 0.0], dtype=torch.float64)
    gains = 0.5 * (model[1].weight[1] - model[1].weight[0]).abs().sort(descending=True).values
    best = int((gains.cumsum(0) <= 0.4).sum()) + 1
    attack = FMN(norm="L0")
    found = attack(model, images, torch.zeros(count, dtype=torch.long))
    assert best > 2
    assert attack.threat.size(found - images).tolist() == [best] * count


@pytest.mark.parametrize("attack", FAST.values(), ids=FAST)
def test_what_is_returned_counts(conv: nn.Module, attack: MinimumNormAttack) -> None:
    """Judged again, in a batch and alone, in single precision; a fooled image costs nothing; nothing else is touched."""
    conv.eval()
    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    y = conv(x).argmax(1)
    y[::4] = others(y[::4], 3)
    found = attack(conv, x, y)
    changed = (found != x).flatten(1).any(1)
    assert torch.equal(found[::4], x[::4])
    assert changed.sum() >= 9
    assert (conv(found)[changed].argmax(1) != y[changed]).all()
    assert all(int(conv(found[i : i + 1]).argmax(1)) != int(y[i]) for i in changed.nonzero().flatten().tolist())
    result = verdict(attack, conv, x, y, torch.Generator().manual_seed(0))
    assert not result.invalid.any()
    limit = float(result.sizes[changed].median())
    near = dataclasses.replace(attack, eps=limit)(conv, x, y)
    kept = attack.threat.size(near - x)
    assert torch.equal(near, torch.where((result.sizes <= limit).view(-1, 1, 1, 1), found, x))
    assert kept.max() <= limit


@pytest.mark.parametrize("attack", FAST.values(), ids=FAST)
def test_batch_equals_singles(conv: nn.Module, attack: MinimumNormAttack) -> None:
    model = conv.double().eval()
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    y = torch.tensor([0, 1, 2, 0, 1])
    together = attack(model, x, y)
    alone = torch.cat([attack(model, x[i : i + 1], y[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(attack(model, x.clone(), y.clone()), together, atol=1e-5, rtol=0)


def test_nearer_than_pgd_of_any_radius(conv: nn.Module) -> None:
    """No radius at which PGD succeeds is smaller than what the searches find, by more than 5 %."""
    conv.eval()
    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    y = conv(x).argmax(1)
    sizes = {}
    for name, attack in (
        ("cw", CarliniWagner(steps=100, weight=0.3, searches=5)),
        ("ddn", DDN()),
        ("fmn", FMN()),
    ):
        sizes[name] = attack.threat.size(attack(conv, x, y) - x)
    loose = L2(math.inf).size(DeepFool()(conv, x, y) - x)
    for name, size in sizes.items():
        assert size.median() <= 1.02 * loose.median(), name
        radius = 0.95 * float(size.median())
        held = conv(PGD(eps=radius, norm="L2", steps=50, step_size=radius / 10)(conv, x, y)).argmax(1) == y
        assert held[size >= size.median()].all(), name


def test_finished_images_cost_nothing(conv: nn.Module) -> None:
    """DeepFool looks no more at an image it has fooled; nobody looks at one that was misclassified."""
    seen: list[int] = []
    conv.eval().register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(6))
    y = conv(x).argmax(1)
    wrong = others(y, 3)
    seen.clear()
    DeepFool()(conv, x, y)
    # The look at the start, then a linearisation and a check for those that hold.
    assert seen[:3] == [12, 12, 12]
    assert seen[1::2] == seen[2::2]
    assert seen[3] < 12
    for attack in FAST.values():
        seen.clear()
        attack(conv, x, wrong)
        assert seen == [12]
    DDN(steps=3)(conv, x, torch.cat([wrong[:10], y[10:]]))
    assert seen[-3:] == [2, 2, 2]


def test_early_abort_saves_steps_and_loses_nothing(conv: nn.Module) -> None:
    calls: list[int] = []
    conv.eval().register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    y, cost, size = conv(x).argmax(1), {}, {}
    for early in (True, False):
        attack, before = CarliniWagner(steps=150, searches=4, weight=0.03, abort_early=early), sum(calls)
        size[early] = attack.threat.size(attack(conv, x, y) - x)
        cost[early] = sum(calls) - before
    assert cost[True] < 0.8 * cost[False]
    assert (size[True] <= 1.02 * size[False]).all()


def test_confidence_is_a_margin(conv: nn.Module) -> None:
    conv.eval()
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(8))
    y = conv(x).argmax(1)
    attack = CarliniWagner(confidence=0.02, steps=40, searches=5, weight=0.1, learning_rate=0.03)
    logits = conv(attack(conv, x, y)).detach()
    own = logits.gather(1, y[:, None]).squeeze(1)
    assert (logits.scatter(1, y[:, None], -math.inf).amax(1) - own > 0.02 - 1e-5).all()


def test_levels_are_kept(conv: nn.Module) -> None:
    conv.eval()
    x = torch.randint(0, 16, (8, 1, 8, 8), generator=torch.Generator().manual_seed(9)) / 15
    y = conv(x).argmax(1)
    found = DDN(levels=16)(conv, x, y)
    torch.testing.assert_close(found * 15, (found * 15).round(), atol=1e-5, rtol=0)
    assert (conv(found).argmax(1) != y).all()


def test_deepfool_asks_only_its_candidates() -> None:
    """The nearest class stands third: two candidates miss it and go farther."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.diag(torch.tensor([0.0, 0.2, 0.2, 5.0], dtype=torch.float64)))
        model[1].bias.copy_(torch.tensor([1.0, 0.9, 0.9, -1.6], dtype=torch.float64))
    image, label = torch.full((1, 1, 2, 2), 0.4, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    # Logits 1, 0.98, 0.98, 0.4: distances 0.1, 0.1 and 0.12; then the last class is made the nearest.
    size = {}
    for slope in (5.0, 50.0):
        with torch.no_grad():
            model[1].weight[3, 3], model[1].bias[3] = slope, 0.4 - slope * 0.4
        for count in (2, 3):
            attack = DeepFool(candidates=count)
            size[slope, count] = float(attack.threat.size(attack(model, image, label) - image))
    assert size[5.0, 2] == pytest.approx(0.102)
    assert size[5.0, 3] == pytest.approx(0.102)
    assert size[50.0, 2] == pytest.approx(0.102)
    assert size[50.0, 3] == pytest.approx(1.02 * 0.6 / 50)


def test_confident_models_have_gradients() -> None:
    """Where the cross-entropy's gradient is 0 in single precision, the way is still found."""
    model = planes((1, 4, 4), 3, torch.float32)
    images, labels = near_centre(model, 3, (1, 4, 4), torch.float32)
    with torch.no_grad():
        model[1].weight *= 1e6
        model[1].bias *= 1e6
    x = images.clone().requires_grad_()
    (lost,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), labels), x)
    assert lost.abs().sum() == 0
    for attack in (DDN(), FMN(), DeepFool()):
        ratio = L2(math.inf).size(attack(model, images, labels) - images) / optimum(model, images, labels, "L2")
        assert ((ratio > 0.999) & (ratio < 1.05)).all(), (attack, ratio)


@pytest.mark.parametrize("radius", [1e-4, 4.0])
def test_any_first_radius_will_do(radius: float) -> None:
    model = planes((1, 4, 4), 2, torch.float64)
    images, labels = near_centre(model, 3, (1, 4, 4), torch.float64)
    found = DDN(radius=radius, steps=200)(model, images, labels)
    ratio = L2(math.inf).size(found - images) / optimum(model, images, labels, "L2")
    assert ((ratio > 0.999) & (ratio < 1.05)).all(), ratio


def test_a_tie_is_no_success() -> None:
    label = torch.zeros(3, dtype=torch.long)
    logits = torch.tensor([[1.0, 1.0 + 1e-6], [1.0, 1.001], [1.0, math.nan]])
    assert crossed(logits, label, False).tolist() == [False, True, False]
    assert crossed(logits, label + 1, True).tolist() == [False, True, False]


@pytest.mark.parametrize("norm", ["L0", "L1", "L2", "Linf"])
def test_projection_is_the_nearest_point(norm: str) -> None:
    """Inside the ball it is the identity; outside no random point of the ball is nearer."""
    generator = torch.Generator().manual_seed(10)
    delta = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    order = {"L0": 0.0, "L1": 1.0, "L2": 2.0, "Linf": math.inf}[norm]
    radii = torch.tensor([[1.0], [2.0], [0.5 if norm != "L0" else 3.0], [100.0]], dtype=torch.float64)
    nearest = project(delta, radii, norm)  # type: ignore[arg-type]
    assert (torch.linalg.vector_norm(nearest, order, dim=1) <= radii.squeeze(1) + 1e-9).all()
    assert torch.equal(nearest[3], delta[3])
    for _ in range(300):
        other = nearest + 0.1 * torch.randn(4, 6, generator=generator, dtype=torch.float64)
        other = other * (radii / torch.linalg.vector_norm(other, order, dim=1, keepdim=True)).clamp(max=1) if order else other
        inside = torch.linalg.vector_norm(other, order, dim=1) <= radii.squeeze(1) + 1e-9
        closer = (other - delta).norm(dim=1) < (nearest - delta).norm(dim=1) - 1e-9
        assert not (inside & closer).any()


def test_dead_and_broken_models() -> None:
    class Detached(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x.flatten(1).sum(1).detach()] * 2, 1)

    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = x.flatten(1).mean(1)
            return torch.stack([torch.ones_like(total), torch.where(total == 0.5, total, total * math.nan)], 1)

    x, y = torch.full((2, 1, 4, 4), 0.5), torch.zeros(2, dtype=torch.long)
    for attack in FAST.values():
        with pytest.raises(NoGradientError, match="does not depend differentiably"):
            attack(Detached(), x, y)
        assert torch.equal(attack(Broken(), x, y), x)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DeepFool(norm="L1"), "DeepFool knows the norms L2, Linf, not 'L1'"),
        (lambda: DDN(norm="Linf"), "DDN knows"),
        (lambda: CarliniWagner(norm="L0"), "CarliniWagner knows"),
        (lambda: DeepFool(overshoot=0.0), "overshoot=0.0"),
        (lambda: DDN(gamma=1.0), "gamma=1.0"),
        (lambda: DDN(levels=1), "levels=1"),
        (lambda: FMN(alpha=0.0), "alpha=0.0"),
        (lambda: CarliniWagner(searches=0), "searches=0"),
        (lambda: CarliniWagner(weight=math.nan), "weight=nan"),
    ],
)
def test_bad_options(build, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build()
