"""Feature losses against closed forms, straightforward formulas, and numbers frozen from independent public code."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from overproof.errors import UsageError
from overproof.losses.contrast import info_nce, noise_contrast
from overproof.losses.decoupled import rest_divergence, standardised, target_divergence
from overproof.losses.divergences import kl_divergence
from overproof.losses.feature_distances import (
    attention_distance,
    attention_map,
    gaussian_nll,
    hierarchical_distance,
    squared_distance,
)
from overproof.losses.relations import angle_relation, correlation_gap, distance_relation, similarity_gap


def wave(*shape: int, k: float = 1.0) -> Tensor:
    """The same numbers in every version of every library."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * k + 0.3).view(*shape)


MAPS = wave(3, 4, 8, 8, k=0.71), wave(3, 4, 8, 8, k=0.37)
VECTORS = wave(4, 6, k=1.7), wave(4, 9, k=0.9)
LOGITS = wave(5, 7, k=2.3) * 3, wave(5, 7, k=1.3) * 4
LABELS = torch.tensor([0, 6, 3, 3, 5])


def test_values_of_independent_public_code() -> None:
    """torchdistill 1.1.5 on the same tensors; VID against torch's own Gaussian likelihood."""
    distance, angle = distance_relation(*VECTORS).mean(), angle_relation(*VECTORS).mean()
    assert float(25 * distance + 50 * angle) == pytest.approx(4.387639316503243, abs=1e-12)
    assert float(attention_distance(*MAPS).mean()) == pytest.approx(0.00019555375062581173, rel=1e-12)
    assert float(hierarchical_distance(*MAPS).mean()) == pytest.approx(0.6629627644490375, abs=1e-12)
    ours, theirs = ((z / 4).softmax(1) for z in LOGITS)
    both = correlation_gap(ours, theirs).mean() + correlation_gap(ours.T, theirs.T).mean()
    assert float(16 * both) == pytest.approx(34.25090082753006, rel=1e-6)
    variance = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    spread = variance.view(1, 4, 1, 1).expand_as(MAPS[0])
    torch.testing.assert_close(gaussian_nll(*MAPS, variance).mean(), F.gaussian_nll_loss(*MAPS, spread))


def test_squared_distance_is_the_mean_and_weighs_cells() -> None:
    torch.testing.assert_close(squared_distance(*MAPS).mean(), F.mse_loss(*MAPS))
    half = torch.zeros(3, 1, 8, 8, dtype=torch.float64)
    half[..., :4] = 2
    expected = 2 * (MAPS[0] - MAPS[1])[..., :4].square().flatten(1).sum(1) / (4 * 8 * 8)
    torch.testing.assert_close(squared_distance(*MAPS, weights=half), expected)
    with pytest.raises(UsageError, match=r"\(3, 4, 8, 8\) and \(3, 4, 1, 1\).*image_shape"):
        squared_distance(MAPS[0], MAPS[1][:, :, :1, :1])


def test_attention_does_not_see_scale() -> None:
    torch.testing.assert_close(attention_map(MAPS[0]), attention_map(7.3 * MAPS[0]), atol=1e-15, rtol=0)
    assert float(attention_distance(MAPS[0], 1e-6 * MAPS[0]).max()) < 1e-24
    torch.testing.assert_close(attention_map(MAPS[0]).norm(dim=1), torch.ones(3, dtype=torch.float64))
    naive = F.normalize(MAPS[0].abs().mean(1).flatten(1), dim=1)
    torch.testing.assert_close(attention_map(MAPS[0], power=1), naive)
    dead = torch.zeros(1, 2, 4, 4, requires_grad=True)
    attention_distance(dead, torch.rand(1, 2, 4, 4)).sum().backward()
    assert bool(dead.grad.isfinite().all())


def test_attention_pools_the_larger_map_before_squaring() -> None:
    small = F.adaptive_avg_pool2d(MAPS[0], 4)
    torch.testing.assert_close(
        attention_distance(MAPS[0], MAPS[1][:, :, :4, :4]), attention_distance(small, MAPS[1][:, :, :4, :4])
    )
    assert float(attention_distance(MAPS[0], small).max()) == pytest.approx(0, abs=1e-20)


def test_hierarchical_distance_of_equal_maps_and_skipped_levels() -> None:
    assert float(hierarchical_distance(MAPS[0], MAPS[0]).max()) == 0
    cell = MAPS[0][:, :, :1, :1], MAPS[1][:, :, :1, :1]
    torch.testing.assert_close(hierarchical_distance(*cell), squared_distance(*cell))
    two = MAPS[0][:, :, :2, :2], MAPS[1][:, :, :2, :2]
    means = squared_distance(two[0].mean((2, 3)), two[1].mean((2, 3)))
    torch.testing.assert_close(hierarchical_distance(*two), (squared_distance(*two) + means / 2) / 1.5)


def test_decoupled_parts_make_up_the_divergence() -> None:
    """KD = TCKD + (1 - p_y) NCKD, sample by sample."""
    student, teacher = LOGITS
    probability = (teacher / 4).softmax(1).gather(1, LABELS[:, None]).squeeze(1)
    own = target_divergence(teacher, student, LABELS, temperature=4.0)
    rest = rest_divergence(teacher, student, LABELS, temperature=4.0)
    torch.testing.assert_close(
        own + (1 - probability) * rest, kl_divergence(teacher, student, temperature=4.0), atol=1e-15, rtol=0
    )


def test_decoupled_parts_are_safe_where_probabilities_vanish() -> None:
    teacher, student = torch.tensor([[400.0, 0.0, 0.0]]), torch.tensor([[0.0, 300.0, 0.0]], requires_grad=True)
    loss = target_divergence(teacher, student, torch.tensor([0])) + rest_divergence(teacher, student, torch.tensor([0]))
    loss.sum().backward()
    assert bool(loss.isfinite().all())
    assert bool(student.grad.isfinite().all())
    assert float(target_divergence(teacher, student.detach(), torch.tensor([0]))) == pytest.approx(300, abs=1e-3)
    two = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, 3.0]])
    assert float(rest_divergence(*two, torch.tensor([1]))) == 0


def test_standardised_logits() -> None:
    z = standardised(LOGITS[0])
    torch.testing.assert_close(z.mean(1), torch.zeros(5, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(z, standardised(5 * LOGITS[0] - 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(z.std(1), torch.ones(5, dtype=torch.float64), atol=1e-6, rtol=0)
    assert bool(standardised(torch.ones(2, 3)).isfinite().all())


@pytest.mark.parametrize("count", [1, 64, 4096])
def test_noise_contrast_constants(count: int) -> None:
    """All scores at 1 / M: log(1 + m) + m log(1 + 1/m); 9.31789 for 4096."""
    rows = 50_000
    u = torch.full((2,), -math.log(rows), dtype=torch.float64)
    value = noise_contrast(u, u[:, None].expand(2, count), math.log(count / rows))
    expected = math.log(1 + count) + count * math.log(1 + 1 / count)
    torch.testing.assert_close(value, torch.full((2,), expected, dtype=torch.float64))
    assert count != 4096 or expected == pytest.approx(9.31789, abs=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_noise_contrast_is_the_raw_formula(dtype: torch.dtype, tolerance: float) -> None:
    scores, count, rows, z = (wave(3, 9, k=0.8) / 0.07).to(dtype), 8, 100, 37.0
    p, noise = (scores / 1).exp() / z, count / rows
    raw = -(p[:, 0] / (p[:, 0] + noise)).log() - (noise / (p[:, 1:] + noise)).log().sum(1)
    u = scores - math.log(z)
    torch.testing.assert_close(noise_contrast(u[:, 0], u[:, 1:], math.log(noise)), raw, rtol=tolerance, atol=0)
    huge = noise_contrast(u[:, 0] * 1e3, u[:, 1:] * 1e3, math.log(noise))
    assert bool(huge.isfinite().all())


def test_info_nce_constants() -> None:
    equal = F.normalize(torch.ones(6, 4, dtype=torch.float64), dim=1)
    torch.testing.assert_close(info_nce(equal, equal, temperature=0.1), torch.full((6,), math.log(6), dtype=torch.float64))
    basis, tau = torch.eye(6, dtype=torch.float64), 0.5
    expected = math.log(1 + 5 * math.exp(-1 / tau))
    torch.testing.assert_close(info_nce(basis, basis, temperature=tau), torch.full((6,), expected, dtype=torch.float64))
    alone = info_nce(basis, basis, temperature=tau, keep=torch.eye(6, dtype=torch.bool))
    assert float(alone.abs().max()) == 0


def test_relations_do_not_see_what_they_should_not() -> None:
    student, teacher = VECTORS
    turn = torch.linalg.qr(wave(6, 6, k=3.1)).Q
    for loss in (distance_relation, angle_relation):
        torch.testing.assert_close(loss(2.5 * student @ turn + 1, teacher), loss(student, teacher), atol=1e-12, rtol=0)
        assert float(loss(student, student).max()) == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(similarity_gap(student @ turn, teacher), similarity_gap(student, teacher))
    torch.testing.assert_close(
        correlation_gap(3 * LOGITS[0] + 2, LOGITS[0]), torch.zeros(5, dtype=torch.float64), atol=1e-7, rtol=0
    )
    torch.testing.assert_close(
        correlation_gap(-LOGITS[0], LOGITS[0]), torch.full((5,), 2, dtype=torch.float64), atol=1e-7, rtol=0
    )


def test_relations_by_loops() -> None:
    student, teacher = VECTORS
    count = len(student)

    def relative(v: Tensor) -> Tensor:
        d = torch.cdist(v, v)
        return d / (d.sum() / (count * (count - 1)))

    torch.testing.assert_close(
        distance_relation(student, teacher).mean(), F.smooth_l1_loss(relative(student), relative(teacher)), atol=1e-9, rtol=0
    )

    def cosines(v: Tensor, i: int) -> Tensor:
        unit = F.normalize(v - v[i], dim=1)
        return unit @ unit.T

    rows = torch.stack([F.smooth_l1_loss(cosines(student, i), cosines(teacher, i)) for i in range(count)])
    torch.testing.assert_close(angle_relation(student, teacher), rows)
    gram = [v @ v.T for v in VECTORS]
    unit = [g / g.norm(dim=1, keepdim=True) for g in gram]
    torch.testing.assert_close(similarity_gap(student, teacher).mean(), (unit[0] - unit[1]).square().sum() / count**2)


def test_equal_samples_give_finite_gradients() -> None:
    same = torch.ones(3, 4, requires_grad=True)
    (distance_relation(same, VECTORS[0][:3].float()).sum() + angle_relation(same, VECTORS[0][:3].float()).sum()).backward()
    assert bool(same.grad.isfinite().all())


def test_order_of_the_batch_is_irrelevant() -> None:
    order = torch.tensor([2, 0, 1])
    vectors = MAPS[0].flatten(1), MAPS[1].flatten(1)
    for loss, pair in [
        (squared_distance, MAPS),
        (attention_distance, MAPS),
        (hierarchical_distance, MAPS),
        (similarity_gap, MAPS),
        (distance_relation, vectors),
        (angle_relation, vectors),
    ]:
        torch.testing.assert_close(loss(pair[0][order], pair[1][order]), loss(*pair)[order])


def test_half_precision_is_widened() -> None:
    big = torch.full((2, 3, 4, 4), 300.0, dtype=torch.float16)
    for loss in (squared_distance, attention_distance, hierarchical_distance, similarity_gap):
        value = loss(big, torch.zeros_like(big) + 1)
        assert value.dtype == torch.float32
        assert bool(value.isfinite().all())
