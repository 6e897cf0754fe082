"""Numbers that belong to the image: the same alone, in a batch, in any order."""

from __future__ import annotations

import pytest
import torch

from overproof.attacks import L1, L2, Linf
from overproof.attacks.randomness import Streams, integers, normal, uniform


def test_rows_have_the_numbers_of_the_whole() -> None:
    whole, part = Streams(torch.arange(9)), Streams(torch.arange(9)).rows(torch.tensor([7, 2]))
    for draw in (uniform, normal):
        assert torch.equal(draw(torch.empty(9, 2, 3), whole)[[7, 2]], draw(torch.empty(2, 2, 3), part))


def test_draws_images_and_forks_differ() -> None:
    streams, like = Streams(torch.arange(4)), torch.empty(4, 50)
    first, second = uniform(like, streams), uniform(like, streams)
    fork = uniform(like, Streams(torch.arange(4)).fork(0))
    other = uniform(like, Streams(torch.arange(4)).fork(1))
    seen = torch.cat([first, second, fork, other])
    assert len({tuple(row.tolist()) for row in seen}) == 16
    assert torch.corrcoef(seen).fill_diagonal_(0).abs().max() < 0.6


def test_distributions() -> None:
    like = torch.empty(400, 100)
    flat = uniform(like, Streams(torch.arange(400)), -1.0, 3.0)
    assert flat.min() >= -1
    assert flat.max() < 3
    assert float(flat.mean()) == pytest.approx(1.0, abs=0.03)
    assert float(flat.var()) == pytest.approx(16 / 12, rel=0.03)
    bell = normal(like, Streams(torch.arange(400)), 0.5)
    assert float(bell.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(bell.std()) == pytest.approx(0.5, rel=0.02)
    dice = integers(6, (100,), Streams(torch.arange(400)), torch.device("cpu"))
    assert torch.bincount(dice.flatten(), minlength=6).float().div(40_000 / 6).sub(1).abs().max() < 0.05


def test_a_generator_serves_a_batch_as_it_serves_single_images() -> None:
    together = Streams.of(torch.Generator().manual_seed(3), torch.empty(20, 1, 2, 2))
    one_by_one = torch.Generator().manual_seed(3)
    alone = torch.cat([Streams.of(one_by_one, torch.empty(1, 1, 2, 2)).keys for _ in range(20)])
    assert torch.equal(together.keys, alone)
    assert Streams.of(together, torch.empty(20, 1, 2, 2)) is together
    with pytest.raises(ValueError, match="20 random streams for 3 images"):
        Streams.of(together, torch.empty(3, 1, 2, 2))


def test_named_streams_depend_on_index_and_purpose_only() -> None:
    index = torch.tensor([5, 9, 1])
    assert torch.equal(Streams.named(index, 0, "pgd").keys[1:], Streams.named(index[1:], 0, "pgd").keys)
    assert not torch.equal(Streams.named(index, 0, "pgd").keys, Streams.named(index, 1, "pgd").keys)


def test_code_that_wants_a_plain_generator_gets_one() -> None:
    draw = [torch.rand(3, generator=Streams(torch.tensor([4, 2]))) for _ in range(2)]
    assert torch.equal(*draw)
    assert not torch.equal(draw[0], torch.rand(3, generator=Streams(torch.tensor([4, 3]))))


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5), L1(2.0)], ids=repr)
def test_random_starts_do_not_depend_on_the_batch(threat: Linf) -> None:
    images = torch.rand(6, 2, 3, 3, dtype=torch.float64)
    whole = threat.random(images, Streams(torch.arange(6)))
    parts = [threat.random(images[i : i + 1], Streams(torch.arange(6)[i : i + 1])) for i in range(6)]
    torch.testing.assert_close(whole, torch.cat(parts), atol=1e-12, rtol=0)
    assert threat.size(whole - images).max() <= threat.eps + 1e-12
