"""Balls, projections and steps against closed forms."""

from __future__ import annotations

import pytest
import torch

from overproof.attacks import L1, L2, PGD, Linf, make_threat
from overproof.errors import UsageError

NORMS = {"Linf": torch.inf, "L2": 2, "L1": 1}


def images(count: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [0.0, 0.05, 0.7])
def test_projection_is_inside_and_idempotent(norm: str, eps: float) -> None:
    threat, x = make_threat(norm, eps), images()
    y = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    once = threat.project(y, x)
    assert once.min() >= 0
    assert once.max() <= 1
    assert (torch.linalg.vector_norm((once - x).flatten(1), NORMS[norm], dim=1) <= eps + 1e-9).all()
    torch.testing.assert_close(threat.project(once, x), once, atol=1e-9, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_inside_points_stay(norm: str) -> None:
    x = images()
    near = (x + 1e-3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)).clamp(0, 1)
    torch.testing.assert_close(make_threat(norm, 0.9).project(near, x), near, atol=1e-12, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_random_start_fills_the_ball(norm: str) -> None:
    x = torch.full((500, 1, 2, 2), 0.5)
    threat = make_threat(norm, 0.2)
    start = threat.random(x, torch.Generator().manual_seed(0))
    size = threat.size(start - x)
    assert size.max() <= 0.2 + 1e-6
    # Uniform in a ball of dimension 4: P(size <= 0.1) = 1/16.
    assert 0.03 < (size <= 0.1).float().mean() < 0.1
    assert (start - x).flatten(1).mean(0).abs().max() < 0.02


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_is_the_dual_direction(norm: str) -> None:
    at = torch.full((4, 2, 3, 5), 0.5, dtype=torch.float64)
    gradient = torch.randn(at.shape, generator=torch.Generator().manual_seed(3), dtype=at.dtype)
    step = make_threat(norm, 0.1).steepest(gradient, at)
    dual = {"Linf": 1, "L2": 2, "L1": torch.inf}[norm]
    inner = (step * gradient).flatten(1).sum(1)
    torch.testing.assert_close(inner, torch.linalg.vector_norm(gradient.flatten(1), dual, dim=1))
    torch.testing.assert_close(make_threat(norm, 1.0).size(step), torch.ones(4, dtype=at.dtype))


def test_l1_projection_is_the_nearest_point() -> None:
    threat, x = L1(0.8), images(3)
    y = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    nearest = threat.project(y, x)
    distance = (nearest - y).flatten(1).norm(dim=1)
    others = torch.Generator().manual_seed(6)
    for _ in range(200):
        trial = threat.project(nearest + 0.05 * torch.randn(x.shape, generator=others, dtype=x.dtype), x)
        assert ((trial - y).flatten(1).norm(dim=1) >= distance - 1e-7).all()


def test_saturated_pixels_do_not_take_l2_or_l1_steps() -> None:
    at = torch.tensor([[[[1.0, 0.5]]]])
    gradient = torch.tensor([[[[10.0, 1.0]]]])
    for threat in (L2(1.0), L1(1.0)):
        assert threat.steepest(gradient, at).flatten().tolist() == [0.0, 1.0]


def test_bad_radius_is_refused() -> None:
    for make in (lambda: Linf(-0.1), lambda: L2(float("nan")), lambda: L1(-1.0), lambda: Linf(8.0)):
        with pytest.raises(UsageError, match="eps="):
            make()
    with pytest.raises(UsageError, match="known: Linf"):
        make_threat("L3", 0.1)


def test_attacks_and_methods_with_a_radius_want_a_finite_ball() -> None:
    """Infinite radii and L0 are for measuring: nothing that walks in a ball takes them."""
    from overproof.methods.pgd_at import PGDAT

    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    for norm, eps in (("Linf", float("inf")), ("L2", float("inf")), ("L0", 3.0)):
        for make in (lambda n, e: PGD(norm=n, eps=e), lambda n, e: PGDAT(network, norm=n, eps=e)):
            with pytest.raises(UsageError, match="radius"):
                make(norm, eps)
