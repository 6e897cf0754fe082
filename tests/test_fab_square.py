"""FAB and Square reach known optima, keep their contract, and spend no pass in vain."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from torch import Tensor, nn

from overproof.attacks.base import predictions
from overproof.attacks.fab import FAB
from overproof.attacks.fab_projection import to_hyperplane
from overproof.attacks.square import Square
from overproof.attacks.threats import make_threat
from overproof.errors import UsageError
from overproof.testing import check_attack

ATTACKS = {
    "fab": FAB(steps=4),
    "fab-l2": FAB(steps=4, norm="L2", eps=0.5, restarts=2),
    "fab-l1": FAB(steps=4, norm="L1", restarts=2),
    "fab-t": FAB(steps=4, eps=0.1, targets=9),
    "fab-t-l1": FAB(steps=4, norm="L1", targets=1),
    "fab-targeted": FAB(steps=4, norm="L2", targeted=True),
    "fab-classes": FAB(steps=4, classes=1),
    "square": Square(eps=0.1, queries=70),
    "square-l2": Square(eps=0.5, norm="L2", queries=70, restarts=2),
    "square-targeted": Square(eps=0.1, queries=20, targeted=True),
    "square-l2-targeted": Square(eps=0.5, norm="L2", queries=20, targeted=True),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_contract(attack: FAB | Square) -> None:
    check_attack(attack)


class Counted(nn.Module):
    """Remembers how many images each forward pass saw, and whether it was recorded for gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.passes: list[tuple[int, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        self.passes.append((len(x), logits.requires_grad))
        return logits


def hyperplanes(count: int, classes: int = 2, seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A linear model, images in the middle of the box, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, classes)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(classes, 36, generator=generator))
        model[1].bias.copy_(-0.5 * model[1].weight.sum(dim=1))
    images = 0.5 + 0.02 * torch.randn(count, 1, 6, 6, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return model, images, model(images).argmax(dim=1)


def distances(model: nn.Sequential, images: Tensor, labels: Tensor, norm: str) -> Tensor:
    """Distance (N, K) to the hyperplane with each class, without the box."""
    weight, logits = model[1].weight.detach(), model(images).detach()
    dual = {"Linf": 1, "L2": 2, "L1": math.inf}[norm]
    sizes = torch.linalg.vector_norm(weight[None] - weight[labels][:, None], dual, dim=2)
    gaps = logits.gather(1, labels[:, None]) - logits
    return (gaps / sizes).scatter(1, labels[:, None], math.inf)


# Projections


@pytest.mark.parametrize("norm", ["Linf", "L1", "L2"])
@pytest.mark.parametrize("seed", range(12))
def test_projection_is_the_shortest(norm: str, seed: int) -> None:
    """Against linear programming (Linf, L1) and sequential quadratic programming (L2), the box mostly active."""
    rng = np.random.default_rng(seed)
    size = 7
    x, w = rng.uniform(-0.3, 1.3, size).clip(0, 1), rng.normal(size=size) * rng.uniform(size=size) ** 2
    w[seed % size] = 0
    ends = np.where(w > 0, 1 - x, -x) @ w, np.where(w > 0, -x, 1 - x) @ w
    gap = ends[seed % 2] * rng.uniform(0.05, 0.98)
    d = _project(x, w, gap, norm)
    assert d @ w == pytest.approx(gap, abs=1e-9)
    assert ((x + d > -1e-12) & (x + d < 1 + 1e-12)).all()
    best = _shortest(x, w, gap, norm)
    assert {"Linf": abs(d).max(), "L1": abs(d).sum(), "L2": (d**2).sum() ** 0.5}[norm] == pytest.approx(best, rel=1e-5)


def _project(x: np.ndarray, w: np.ndarray, gap: float, norm: str) -> np.ndarray:
    points, normals = torch.tensor(x).view(1, 1, -1), torch.tensor(w)[None]
    return to_hyperplane(points, normals, torch.tensor([[gap]], dtype=torch.float64), norm).numpy()[0, 0]


def _shortest(x: np.ndarray, w: np.ndarray, gap: float, norm: str) -> float:
    bounds, n = list(zip(-x, 1 - x, strict=True)), len(x)
    if norm == "L2":
        start = np.zeros(n)
        constraint = {"type": "eq", "fun": lambda d: d @ w - gap, "jac": lambda d: w}
        options = {"ftol": 1e-14, "maxiter": 500}
        found = minimize(lambda d: d @ d, start, jac=lambda d: 2 * d, bounds=bounds, constraints=[constraint], options=options)
        return float(found.fun) ** 0.5
    extra = 1 if norm == "Linf" else n
    limits = np.ones((n, 1)) if norm == "Linf" else np.eye(n)
    above = np.block([[np.eye(n), -limits], [-np.eye(n), -limits]])
    cost = np.r_[np.zeros(n), np.ones(extra)]
    plane = np.r_[w, np.zeros(extra)][None]
    found = linprog(cost, above, np.zeros(2 * n), plane, [gap], bounds + [(0, None)] * extra)
    return float(found.fun)


@pytest.mark.parametrize("norm", ["Linf", "L1", "L2"])
def test_projection_out_of_reach_goes_as_far_as_the_box_allows(norm: str) -> None:
    x, w = np.array([0.2, 0.7, 0.0, 1.0, 0.4]), np.array([1.0, -2.0, -1.0, 3.0, 0.0])
    d = _project(x, w, 50.0, norm)
    assert (x + d)[:4] == pytest.approx([1, 0, 0, 1])
    assert d[4] == 0


@pytest.mark.parametrize("norm", ["Linf", "L1", "L2"])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_projection_of_tiny_zero_and_huge_gradients(norm: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.rand(2, 8, 50, generator=generator), torch.randn(8, 50, generator=generator)
    w[3] = 0
    gaps = torch.full((2, 8), -0.7)
    plain, scaled = to_hyperplane(x, w, gaps, norm), to_hyperplane(x, w * scale, gaps * scale, norm)
    torch.testing.assert_close(scaled, plain, rtol=1e-3, atol=1e-5)
    assert torch.equal(plain[:, 3], torch.zeros(2, 50))
    torch.testing.assert_close(torch.linalg.vecdot(plain, w)[:, :3], gaps[:, :3], rtol=1e-5, atol=0)


# FAB


@pytest.mark.parametrize("targets", [None, 3])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_fab_reaches_the_smallest_norm(norm: str, targets: int | None) -> None:
    model, images, labels = hyperplanes(8, classes=4)
    found = FAB(norm=norm, targets=targets, steps=20)(model, images, labels)
    assert (predictions(model, found) != labels).all()
    ratio = make_threat(norm, 1).size(found - images) / distances(model, images, labels, norm).amin(dim=1)
    assert ratio.min() >= 1 - 1e-9
    assert ratio.max() < 1.01


def test_fab_targeted_reaches_the_class() -> None:
    model, images, labels = hyperplanes(8, classes=2)
    found = FAB(norm="L2", steps=20, targeted=True)(model, images, 1 - labels)
    assert torch.equal(predictions(model, found), 1 - labels)
    ratio = make_threat("L2", 1).size(found - images) / distances(model, images, labels, "L2").amin(dim=1)
    assert 1 - 1e-9 <= ratio.min() <= ratio.max() < 1.01


@pytest.mark.parametrize(("norm", "best"), [("Linf", 0.4), ("L2", 0.4 * 2**0.5), ("L1", 0.8)])
def test_fab_in_a_corner_of_the_box(norm: str, best: float) -> None:
    """Four pixels of weight 1, two at the ceiling: the other two must bring 0.8 between them."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0] * 4, [1.0] * 4]))
        model[1].bias.copy_(torch.tensor([3.6, 0.0]))
    image = torch.tensor([1.0, 1.0, 0.4, 0.4], dtype=torch.float64).view(1, 1, 2, 2)
    found = FAB(norm=norm, steps=30)(model, image, torch.tensor([0]))
    assert predictions(model, found).item() == 1
    assert make_threat(norm, 1).size(found - image).item() == pytest.approx(best, rel=0.01)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_fab_radius_decides(norm: str) -> None:
    """Just inside the radius an image is broken, just outside it comes back untouched."""
    model, images, labels = hyperplanes(6)
    need = distances(model, images, labels, norm).amin(dim=1)
    for row in range(6):
        one, label = images[row : row + 1], labels[row : row + 1]
        wide = FAB(norm=norm, eps=1.02 * need[row].item(), targets=1)(model, one, label)
        tight = FAB(norm=norm, eps=0.98 * need[row].item(), targets=1, steps=20)(model, one, label)
        assert predictions(model, wide) != label
        assert torch.equal(tight, one)


def test_fab_needs_one_pass_per_step_and_lets_go() -> None:
    model, images, labels = hyperplanes(6)
    need = distances(model, images, labels, "Linf").amin(dim=1)
    counted, eps = Counted(model), need.sort().values[2].item() * 1.02
    FAB(eps=eps, targets=1, steps=30)(counted, images, labels)
    recorded = [count for count, graph in counted.passes if graph]
    assert len(recorded) == 30
    assert recorded[0] == 6
    assert recorded[-1] == 3
    # Besides: the clean images, the last points, and the final search.
    assert len(counted.passes) - len(recorded) == 1 + 1 + 4


def test_fab_gets_nearer_with_more_steps(conv: nn.Module) -> None:
    x = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = predictions(conv, x)
    few, many = (make_threat("L2", 1).size(FAB(norm="L2", steps=n)(conv, x, y) - x) for n in (1, 30))
    both = (few > 0) & (many > 0)
    assert both.sum() > 10
    assert many[both].median() < few[both].median()


def test_fab_final_search_lands_on_the_boundary() -> None:
    """One step overshoots by eta - 1; the search takes that back."""
    model, images, labels = hyperplanes(8)
    found = FAB(norm="L2", steps=1, eta=1.5, alpha_max=0.0)(model, images, labels)
    ratio = make_threat("L2", 1).size(found - images) / distances(model, images, labels, "L2").amin(dim=1)
    assert 1 < ratio.min() <= ratio.max() < 1.01


def test_fab_leaves_misclassified_images() -> None:
    model, images, labels = hyperplanes(3)
    assert torch.equal(FAB()(model, images, 1 - labels), images)


def test_fab_survives_a_model_that_returns_nan() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.flatten(1).sum(1) * math.nan, x.flatten(1).mean(1)], dim=1)

    found = FAB(steps=3)(Broken(), torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.long))
    assert found.isfinite().all()


# Square


@pytest.mark.parametrize(("norm", "share"), [("Linf", 0.99), ("L2", 0.7)])
def test_square_reaches_a_linear_optimum(norm: str, share: float) -> None:
    """The margin cannot grow by more than eps ||w||_dual; the radius is half of what would win."""
    model, images, labels = hyperplanes(6)
    eps = 0.5 * distances(model, images, labels, norm).amin().item()
    found = Square(eps=eps, norm=norm, queries=3000)(model, images, labels, torch.Generator().manual_seed(0))
    weight = model[1].weight.detach()
    other = torch.stack([weight[1 - k] - weight[k] for k in labels.tolist()])
    gain = torch.linalg.vecdot((found - images).flatten(1), other)
    best = eps * torch.linalg.vector_norm(other, 1 if norm == "Linf" else 2, dim=1)
    assert (gain >= share * best).all()
    assert (gain <= best * (1 + 1e-9)).all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_square_budget_is_used_up(norm: str) -> None:
    model, images, labels = hyperplanes(6)
    found = Square(eps=0.01, norm=norm, queries=200)(model, images, labels, torch.Generator().manual_seed(0))
    sizes = make_threat(norm, 1).size(found - images)
    torch.testing.assert_close(sizes, torch.full_like(sizes, 0.01), rtol=1e-6, atol=0)


def test_square_asks_once_per_query_and_lets_go() -> None:
    model, images, labels = hyperplanes(6)
    counted, need = Counted(model), distances(model, images, labels, "Linf").amin(dim=1).sort().values
    eps = (need[2] * need[3]).sqrt().item()
    found = Square(eps=eps, queries=500)(counted, images, labels, torch.Generator().manual_seed(0))
    counts = [count for count, _ in counted.passes]
    assert len(counts) == 1 + 500
    assert counts[:2] == [6, 6]
    assert counts[-1] == 3
    assert counts == sorted(counts, reverse=True)
    assert not any(graph for _, graph in counted.passes)
    assert (predictions(model, found) != labels).sum() == 3


def test_square_beats_noise_of_the_same_size(conv: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(64, 1, 8, 8, generator=generator)
    y = predictions(conv, x)
    eps = FAB(steps=10)(conv, x, y).sub(x).flatten(1).abs().amax(dim=1).median().item() * 1.3
    noise = torch.stack([predictions(conv, (x + eps * torch.randn_like(x).sign()).clamp(0, 1)) != y for _ in range(10)])
    broken = predictions(conv, Square(eps=eps, queries=300)(conv, x, y, generator)) != y
    assert broken.sum() > noise.any(dim=0).sum()


def test_square_schedule() -> None:
    """Halved after 10, 50, 200, ... of 10,000 queries; stretched unless told otherwise."""
    assert [Square()._share(q) for q in (0, 5, 6, 100, 101, 4999)] == pytest.approx([0.8, 0.8, 0.4, 0.2, 0.1, 0.8 / 512])
    assert Square(rescale=False)._share(4999) == pytest.approx(0.8 / 128)


# Both


@pytest.mark.parametrize(
    "attack",
    [
        FAB(steps=5, restarts=2),
        FAB(steps=5, norm="L2", targets=2, eps=0.3),
        FAB(steps=5, norm="L1"),
        Square(eps=0.05, queries=150),
        Square(eps=0.4, norm="L2", queries=150, restarts=2),
    ],
    ids=repr,
)
def test_batch_equals_singles(conv: nn.Module, attack: FAB | Square) -> None:
    from overproof.attacks.randomness import Streams

    model = conv.double()
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = predictions(model, x)
    streams: Callable[[], Streams] = lambda: Streams.named(torch.arange(5), "test")  # noqa: E731
    together = attack(model, x, y, streams())
    alone = torch.cat([attack(model, x[i : i + 1], y[i : i + 1], streams().rows(torch.tensor([i]))) for i in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attack", [FAB(steps=3), FAB(steps=3, norm="L1", targets=1), Square(eps=0.05, queries=30)], ids=repr)
def test_whatever_the_caller_switched_off(linear: nn.Module, attack: FAB | Square) -> None:
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = predictions(linear, x)
    expected = attack(linear, x, y, torch.Generator().manual_seed(0))
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = attack(linear, x.clone(), y.clone(), torch.Generator().manual_seed(0))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: FAB(norm="L0"), "norms Linf, L2, L1"),
        (lambda: FAB(steps=0), "steps=0"),
        (lambda: FAB(eta=0.5), "eta=0.5"),
        (lambda: FAB(beta=0.0), "beta=0.0"),
        (lambda: FAB(targeted=True, targets=3), "leave `targets` out"),
        (lambda: Square(norm="L1"), "Linf and L2"),
        (lambda: Square(queries=0), "queries=0"),
        (lambda: Square(p_init=1.5), "p_init=1.5"),
    ],
)
def test_bad_options(build: Callable[[], object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build()
