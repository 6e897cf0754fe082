"""Gradient attacks: known optima, their contract, and that each part does what it is there for."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from overproof.attacks.apgd import APGD
from overproof.attacks.apgd_climb import Found, climb
from overproof.attacks.apgd_steps import LinfPace, SparsePace
from overproof.attacks.base import BudgetAttack, predictions
from overproof.attacks.bim import BIM
from overproof.attacks.mifgsm import MIFGSM
from overproof.attacks.objectives import attack_value
from overproof.attacks.pgd import PGD
from overproof.attacks.randomness import Streams
from overproof.attacks.threats import L1, make_threat, project_l1
from overproof.errors import UsageError
from overproof.losses.margins import dlr, margin, targeted_dlr
from overproof.testing import check_attack, small_batch, small_model

EPS = {"Linf": 0.1, "L2": 0.5, "L1": 2.0}
ATTACKS: dict[str, BudgetAttack] = {}
for norm, targeted in product(EPS, (False, True)):
    common = {"norm": norm, "eps": EPS[norm], "targeted": targeted}
    tail = f"{norm}-{'targeted' if targeted else 'untargeted'}"
    for loss in ("ce", "margin", "dlr"):
        ATTACKS[f"pgd-{loss}-{tail}"] = PGD(loss=loss, steps=2, **common)
        ATTACKS[f"apgd-{loss}-{tail}"] = APGD(loss=loss, steps=4, **common)
    ATTACKS[f"apgd-dlr-targeted-{tail}"] = APGD(loss="dlr-targeted", steps=4, **common)
    ATTACKS[f"apgd-all-steps-{tail}"] = APGD(steps=3, restarts=2, early_stop=False, **common)
    ATTACKS[f"bim-{tail}"] = BIM(steps=3, **common)
    ATTACKS[f"mifgsm-{tail}"] = MIFGSM(steps=3, **common)
ATTACKS["apgd-screen"] = APGD(loss="dlr-targeted", screen=((2, 2), (3, 1)), eps=0.05)
ATTACKS["apgd-zero"] = APGD(eps=0.0, steps=3)
ATTACKS["apgd-zero-l1"] = APGD(eps=0.0, steps=3, norm="L1")


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_contract(attack: BudgetAttack) -> None:
    check_attack(attack)


def linear_model(classes: int, pixels: int = 36, scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes)).double()
    nn.init.normal_(model[1].weight, std=scale)
    return model


def grey(count: int = 3, side: int = 6) -> Tensor:
    return torch.full((count, 1, side, side), 0.5, dtype=torch.float64)


OPTIMISERS = {
    "pgd-margin": lambda **o: PGD(loss="margin", steps=25, early_stop=False, **o),
    "bim": lambda **o: BIM(steps=25, early_stop=False, **o),
    "mifgsm": lambda **o: MIFGSM(steps=25, early_stop=False, **o),
    "apgd-ce": lambda **o: APGD(steps=60, early_stop=False, **o),
    "apgd-dlr": lambda **o: APGD(steps=60, loss="dlr", early_stop=False, **o),
    "apgd-dlr-targeted": lambda **o: APGD(steps=60, loss="dlr-targeted", early_stop=False, **o),
}


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("build", OPTIMISERS.values(), ids=OPTIMISERS)
def test_linear_model_optimum(build, norm: str) -> None:
    """Two classes, far from the box: the best margin is m + eps * ||w||_dual."""
    model, x = linear_model(2), grey()
    weight = (model[1].weight[1] - model[1].weight[0]).detach()
    eps = {"Linf": 0.05, "L2": 0.2, "L1": 0.3}[norm]
    labels = torch.zeros(3, dtype=torch.long)
    found = build(norm=norm, eps=eps)(model, x, labels, torch.Generator().manual_seed(0))
    gain = margin(model(found), labels) - margin(model(x), labels)
    best = eps * torch.linalg.vector_norm(weight, {"Linf": 1, "L2": 2, "L1": math.inf}[norm])
    torch.testing.assert_close(gain, best.expand(3), rtol=2e-2 if norm == "L1" else 2e-3, atol=0)


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "dlr-targeted"])
def test_verdicts_on_linear_models(loss: str) -> None:
    """Five classes: an image can fall just if one of the distances m_k / ||w_k - w_y||_1 is below eps.

    Trying every class must find them all; the untargeted losses may follow the wrong class.
    """
    model = linear_model(5, scale=0.3)
    torch.manual_seed(0)
    x = 0.5 + 0.1 * torch.rand(64, 1, 6, 6, dtype=torch.float64)
    logits, weight = model(x).detach(), model[1].weight.detach()
    labels = logits.argmax(dim=1)
    gaps = logits.gather(1, labels[:, None]) - logits
    lengths = (weight[labels][:, None] - weight).abs().sum(dim=2)
    distances = torch.where(lengths > 0, gaps / lengths, math.inf).amin(dim=1)
    eps = float(distances.median())
    decided = (distances / eps - 1).abs() > 0.02
    found = APGD(eps=eps, loss=loss, steps=40)(model, x, labels, torch.Generator().manual_seed(0))
    fallen = predictions(model, found) != labels
    assert not (fallen & (distances > eps * (1 + 1e-9))).any()
    assert int(fallen.sum()) > 10
    if loss == "dlr-targeted":
        assert torch.equal(fallen[decided], (distances < eps)[decided])


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("loss", ["dlr", "dlr-targeted"])
def test_few_classes_have_a_gradient(loss: str, classes: int) -> None:
    model, x = linear_model(classes), grey(1)
    labels = model(x).argmax(dim=1)
    found = APGD(eps=0.3, loss=loss, steps=10)(model, x, labels, torch.Generator().manual_seed(0))
    assert predictions(model, found) != labels
    for goal in range(classes):
        z = torch.tensor([[3.0, 2.0, 1.0, 0.0][:classes]], requires_grad=True)
        aim, own = torch.tensor([goal]), torch.zeros(1, dtype=torch.long)
        value = dlr(z, own) if goal == 0 else targeted_dlr(z, own, aim)
        assert torch.autograd.grad(value.sum(), z)[0].abs().sum() > 0


def test_losses_by_hand() -> None:
    z, label, target = torch.tensor([[4.0, 1.0, 3.0, 0.0]]), torch.tensor([0]), torch.tensor([1])
    assert attack_value("margin", z, label).item() == -1
    assert attack_value("margin", z, target, label).item() == -3
    assert attack_value("dlr", z, label).item() == pytest.approx(-1 / 3)
    assert attack_value("dlr", z, target).item() == pytest.approx(3 / 3)
    assert attack_value("dlr", z, target, label).item() == pytest.approx(-3 / 3.5)
    assert attack_value("ce", z, label).item() == pytest.approx(float(z.logsumexp(1)) - 4)
    assert attack_value("ce", z, target, label).item() == pytest.approx(1 - float(z.logsumexp(1)))


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("loss", ["ce", "dlr-targeted"])
def test_batch_equals_singles(norm: str, loss: str) -> None:
    torch.manual_seed(1)
    model, batch = small_model().double().eval(), small_batch(4)
    x = batch.images.double()
    labels = predictions(model, x)
    attack = APGD(norm=norm, eps=0.3 * EPS[norm], loss=loss, steps=8)
    streams = Streams.named(torch.arange(4), "test")
    together = attack(model, x, labels, streams)
    alone = [attack(model, x[i : i + 1], labels[i : i + 1], streams.rows(torch.tensor([i]))) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def hard() -> tuple[nn.Module, Tensor, Tensor]:
    """A small nonlinear network and images it gets right."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 6))
    for layer in (1, 3, 5):
        nn.init.normal_(model[layer].weight, std=0.35)
    x = torch.rand(160, 1, 8, 8)
    return model, x, predictions(model, x)


def fallen(attack: BudgetAttack, seed: int = 0) -> int:
    model, x, labels = hard()
    return int((predictions(model, attack(model, x, labels, torch.Generator().manual_seed(seed))) != labels).sum())


@pytest.mark.parametrize("norm", EPS)
def test_apgd_is_stronger_than_bim(norm: str) -> None:
    eps = {"Linf": 0.02, "L2": 0.1, "L1": 0.5}[norm]
    weak, strong = fallen(BIM(norm=norm, eps=eps)), fallen(APGD(norm=norm, eps=eps, loss="dlr-targeted", steps=40))
    assert 20 < weak <= strong < 160


def test_each_target_is_tried() -> None:
    """The runner-up hardly moves; only the third class can be reached."""

    class Walled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            level = x.flatten(1).mean(dim=1)
            return torch.stack([0 * level + 1, 0.01 * level + 0.95, 2 * level - 0.8, level - 3, level - 4], dim=1)

    x, labels = torch.full((2, 1, 4, 4), 0.8), torch.zeros(2, dtype=torch.long)
    for targets, predicted in ((1, 0), (2, 2)):
        attack = APGD(eps=0.2, loss="dlr-targeted", targets=targets, steps=5)
        found = attack(Walled(), x, labels, torch.Generator().manual_seed(0))
        assert predictions(Walled(), found).tolist() == [predicted] * 2


def test_screen_spends_less_and_keeps_the_verdict() -> None:
    model, x, labels = hard()
    seen = [0]
    model.register_forward_hook(lambda m, i, o: seen.__setitem__(0, seen[0] + len(o)))
    results = []
    for screen in ((), ((4, 5), (12, 2), (30, 1))):
        seen[0] = 0
        attack = APGD(eps=0.015, loss="dlr-targeted", steps=30, targets=5, screen=screen)
        found = attack(model, x, labels, torch.Generator().manual_seed(0))
        results.append((seen[0], int((predictions(model, found) != labels).sum())))
    assert results[1][0] < 0.75 * results[0][0]
    assert abs(results[1][1] - results[0][1]) <= 2


def test_one_pass_per_step_and_fallen_images_cost_nothing() -> None:
    model, x, labels = hard()
    sizes: list[int] = []
    model.register_forward_hook(lambda m, i, o: sizes.append(len(o)))
    APGD(eps=0.02, steps=10)(model, x, labels, torch.Generator().manual_seed(0))
    assert len(sizes) == 12  # the untouched images, the start, ten steps
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[1]


@pytest.mark.parametrize("norm", EPS)
def test_early_stop_never_weakens(norm: str) -> None:
    eps = {"Linf": 0.02, "L2": 0.1, "L1": 0.5}[norm]
    counts = [fallen(APGD(norm=norm, eps=eps, steps=20, early_stop=stop)) for stop in (True, False)]
    assert counts[0] == counts[1] > 20


@pytest.mark.parametrize("attack", [PGD(loss="dlr"), APGD(), APGD(loss="dlr-targeted", steps=5), BIM(), MIFGSM()])
def test_fallen_images_stay_as_they_are(attack: BudgetAttack) -> None:
    model, x, labels = hard()
    found = attack(model, x, (labels + 1) % 6)
    assert torch.equal(found, x)


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "dlr-targeted"])
def test_target_is_reached(loss: str) -> None:
    model, x, labels = hard()
    goals = (labels + 2) % 6
    found = APGD(eps=0.3, loss=loss, targeted=True, steps=30)(model, x, goals, torch.Generator().manual_seed(0))
    assert (predictions(model, found) == goals).float().mean() > 0.95
    if loss != "dlr-targeted":
        found = PGD(eps=0.3, loss=loss, targeted=True, steps=30)(model, x, goals, torch.Generator().manual_seed(0))
        assert (predictions(model, found) == goals).float().mean() > 0.9


def test_under_inference_mode() -> None:
    model, x, labels = hard()
    for attack in (APGD(eps=0.02, steps=5, loss="dlr-targeted"), MIFGSM(eps=0.02, early_stop=False), PGD(loss="dlr", eps=0.02)):
        expected = attack(model, x, labels, torch.Generator().manual_seed(0))
        with torch.inference_mode():
            again = attack(model, x.clone(), labels.clone(), torch.Generator().manual_seed(0))
        torch.testing.assert_close(again, expected)


def test_nan_gradients_do_not_spread() -> None:
    model, x, labels = hard()

    class Cracked(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return model(images) + 0 * (images - images.detach()).abs().sqrt().sum(dim=(1, 2, 3))[:, None]

    for attack in (APGD(eps=0.02, steps=5), APGD(eps=0.1, steps=5, norm="L2"), MIFGSM(eps=0.02)):
        assert bool(attack(Cracked(), x, labels).isfinite().all())


def test_bim_makes_the_papers_steps() -> None:
    model, x = linear_model(2), grey(1)
    labels = model(x).argmax(dim=1)
    one = BIM(steps=10, eps=8 / 255, early_stop=False)
    lengths = []
    for steps in (1, 3, 10):
        found = BIM(steps=steps, step_size=1.25 * (8 / 255) / 10, eps=8 / 255, early_stop=False)(model, x, labels)
        lengths.append(float((found - x).abs().max()) * 255)
    assert lengths == pytest.approx([1, 3, 8])
    assert torch.equal(one(model, x, labels), found)


def test_momentum_remembers() -> None:
    """The gradient turns round after the first step: the sum of normalised gradients is then zero, I-FGSM turns back."""

    class Bend(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            value = -4 * (x.flatten(1).mean(dim=1) - 0.52).abs()
            return torch.stack([0 * value, value - 1], dim=1)

    x, labels = grey(1, 4), torch.zeros(1, dtype=torch.long)
    made = {d: MIFGSM(eps=0.09, steps=2, step_size=0.03, decay=d)(Bend(), x, labels).mean().item() for d in (0.0, 1.0, 2.0)}
    assert made == pytest.approx({0.0: 0.5, 1.0: 0.53, 2.0: 0.56})


def test_step_halves_where_a_window_brings_too_little() -> None:
    x = torch.full((3, 1, 1, 1), 0.5)
    pace = LinfPace(x, x, torch.zeros(3), eps=0.1, steps=100, alpha=0.75, rho=0.75)
    assert pace.window == 22
    for step in range(1, 23):  # rising always; rising in 16 of 22 steps; never
        pace.see(torch.tensor([float(step), float(min(step, 16)), 0.0]))
    back = pace.judge(x, torch.tensor([22.0, 16.0, 0.0]))
    assert back.tolist() == [False, True, True]
    assert pace.step.flatten().tolist() == pytest.approx([0.2, 0.1, 0.1])
    assert pace.window == 19
    for step in range(19):  # all rise at every step, but the first never passes its best
        pace.see(torch.tensor([1.0 + step, 20.0 + step, 1.0 + step]))
    back = pace.judge(x, torch.tensor([22.0, 38.0, 19.0]))
    assert back.tolist() == [True, False, False]
    windows = []
    for _ in range(5):
        pace.judge(x, torch.zeros(3))
        windows.append(pace.window)
    assert windows == [13, 10, 7, 6, 6]


def test_sparse_steps_follow_the_best_point() -> None:
    x = torch.full((2, 1, 5, 6), 0.5)
    start = x.clone()
    start[:, :, :, :3] += 0.1  # 15 values changed
    pace = SparsePace(x, start, eps=1.5, steps=100)
    gradient = torch.arange(1.0, 31.0).view(1, 1, 5, 6).expand(2, 1, 5, 6)
    assert int((pace.move(x, gradient) != x).sum()) == 2 * 10
    best = start.clone()
    best[0, 0, 0] = 0.5  # the first now changes 12
    assert pace.judge(best, torch.zeros(2)).tolist() == [True, False]
    assert pace.step.flatten().tolist() == pytest.approx([1.5, 1.0])
    assert pace.moving.flatten().tolist() == [8, 10]


@pytest.mark.parametrize("eps", [0.0, 0.5, 5.0, 50.0])
def test_projection_is_the_nearest_point(eps: float) -> None:
    torch.manual_seed(0)
    x = (torch.rand(40, 1, 12, 12, dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1)
    spread = torch.logspace(-3, 1, 40, dtype=torch.float64).view(-1, 1, 1, 1)
    points = x + spread * torch.randn_like(x) * (torch.rand_like(x) < 0.5)
    low, high = torch.zeros(40, dtype=torch.float64), (points - x).flatten(1).abs().amax(dim=1)

    def shrunk(threshold: torch.Tensor) -> torch.Tensor:
        change = (points - x).sign() * ((points - x).abs() - threshold.view(-1, 1, 1, 1)).clamp(min=0)
        return (x + change).clamp(0, 1)

    for _ in range(60):  # the soft threshold by plain bisection
        middle = (low + high) / 2
        over = L1(eps).size(shrunk(middle) - x) > eps
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    inside = L1(eps).size(points.clamp(0, 1) - x) <= eps
    expected = torch.where(inside.view(-1, 1, 1, 1), points.clamp(0, 1), shrunk(high))
    torch.testing.assert_close(project_l1(points, x, eps), expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(L1(eps).project(points, x), expected, atol=1e-9, rtol=0)


def test_run_returns_its_best_point() -> None:
    """A start at the top of a hill cannot be improved; the run must not come back from lower down."""
    x = torch.full((2, 1, 2, 2), 0.5)

    def look(points: Tensor, rows: Tensor, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
        values = -(points - x[rows]).flatten(1).square().sum(dim=1)
        return values, torch.zeros_like(rows, dtype=torch.bool), torch.ones_like(points)

    found = climb(look, x, lambda v: LinfPace(x, x, v, eps=0.1, steps=8, alpha=0.75, rho=0.75), 8, stop=True)
    assert torch.equal(found.images, x)
    assert not found.won.any()


def test_success_counts_more_than_value() -> None:
    x, rows = torch.zeros(2, 1, 1, 1), torch.arange(2)
    found = Found.nothing(x, torch.zeros(2))
    found.take(rows, x + 1, torch.tensor([5.0, 5.0]), torch.tensor([False, True]))
    found.take(rows, x + 2, torch.tensor([1.0, 9.0]), torch.tensor([True, False]))
    found.take(rows, x + 3, torch.tensor([0.5, 9.0]), torch.tensor([True, True]))
    assert found.images.flatten().tolist() == [2, 3]


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "mse"},
        {"steps": 0},
        {"restarts": 0},
        {"targets": 0},
        {"rho": 1.0},
        {"alpha": 0.0},
        {"screen": ((10, 9),)},
        {"screen": ((10, 3), (10, 9)), "loss": "dlr-targeted"},
        {"screen": ((10, 3),), "loss": "dlr-targeted", "targeted": True},
        {"eps": math.inf},
    ],
)
def test_bad_options(options: dict) -> None:
    with pytest.raises(UsageError, match=r"APGD\(|eps=inf"):
        APGD(**options)


def test_bad_options_of_the_others() -> None:
    for build in (lambda: PGD(loss="hinge"), lambda: BIM(steps=0), lambda: MIFGSM(decay=-1.0), lambda: MIFGSM(steps=0)):
        with pytest.raises(UsageError, match="PGD|BIM|MIFGSM"):
            build()


def test_threats_of_the_phases() -> None:
    assert APGD(norm="L1", eps=2.0)._phases(100) == [(6.0, 30), (4.0, 30), (2.0, 40)]
    assert APGD(norm="L1", eps=2.0)._phases(2) == [(2.0, 2)]
    assert APGD(norm="L2", eps=2.0)._phases(100) == [(2.0, 100)]
    assert make_threat("L1", 6.0).eps == 6.0
