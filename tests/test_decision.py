"""Attacks that ask only for decisions: the floor of random noise, and HopSkipJump."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from overproof.attacks.hop_skip_jump import HopSkipJump
from overproof.attacks.noise import Noise
from overproof.attacks.pgd import PGD
from overproof.attacks.threats import make_threat
from overproof.errors import UsageError
from overproof.evaluation import verdict
from overproof.testing import check_attack

ATTACKS = {
    "noise": Noise(eps=0.2),
    "noise-l2": Noise(eps=1.0, norm="L2", samples=3),
    "noise-l1": Noise(eps=5.0, norm="L1", samples=3),
    "noise-targeted": Noise(eps=0.2, targeted=True, samples=3),
    "hop": HopSkipJump(queries=300, probes=20),
    "hop-linf": HopSkipJump(queries=300, probes=20, norm="Linf"),
    "hop-eps": HopSkipJump(queries=300, probes=20, eps=0.3),
    "hop-targeted": HopSkipJump(queries=300, probes=20, targeted=True),
}


class Counting(nn.Module):
    """Counts the images it is asked about and passes on nothing but the decision."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.asked = model, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked += len(x)
        return nn.functional.one_hot(self.model(x).argmax(1), 2).to(x.dtype)


@pytest.fixture
def planes() -> nn.Module:
    """Three classes, linear in 2x4x4 pixels, all met near the middle of the box."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3)).double()
    with torch.no_grad():
        model[1].bias -= model(torch.full((1, 2, 4, 4), 0.5, dtype=torch.float64))[0]
    return model


def middle(planes: nn.Module, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = 0.5 + 0.1 * (torch.rand(count, 2, 4, 4, generator=generator, dtype=torch.float64) - 0.5)
    return images, planes(images).argmax(1)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_contract(attack: Noise | HopSkipJump) -> None:
    check_attack(attack)


@pytest.mark.parametrize(("norm", "dual", "tolerance"), [("L2", 2, 1.05), ("Linf", 1, 1.08)])
def test_hop_skip_jump_reaches_the_linear_optimum(linear: nn.Module, norm: str, dual: int, tolerance: float) -> None:
    """2,000 decisions come within a few percent of |margin| / ||w_1 - w_0||_dual, and never below it."""
    generator = torch.Generator().manual_seed(2)
    images = 0.5 + 0.1 * (torch.rand(12, 1, 4, 4, generator=generator, dtype=torch.float64) - 0.5)
    with torch.no_grad():
        linear[1].bias -= linear(torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64))[0]
        logits = linear(images)
    labels = logits.argmax(1)
    model = Counting(linear)
    found = HopSkipJump(queries=2000, norm=norm)(model, images, labels, torch.Generator().manual_seed(0))
    assert model.asked <= 2000 * len(images)
    assert (linear(found).argmax(1) != labels).all()
    weight = linear[1].weight.detach()
    best = (logits[:, 1] - logits[:, 0]).abs() / torch.linalg.vector_norm(weight[1] - weight[0], dual)
    sizes = make_threat(norm, 1.0).size(found - images)
    assert (sizes >= best * (1 - 1e-9)).all()
    assert (sizes / best).max() < tolerance


def test_hop_skip_jump_reaches_a_target(planes: nn.Module) -> None:
    images, labels = middle(planes, 6)
    targets = (labels + 1) % 3
    found = HopSkipJump(queries=1000, targeted=True)(planes, images, targets, torch.Generator().manual_seed(0))
    assert (planes(found).argmax(1) == targets).all()


def test_hop_skip_jump_keeps_to_its_radius(planes: nn.Module) -> None:
    images, labels = middle(planes, 8)
    sizes = (HopSkipJump(queries=600)(planes, images, labels, torch.Generator().manual_seed(0)) - images).flatten(1).norm(dim=1)
    eps = float(sizes.median())
    found = HopSkipJump(queries=600, eps=eps)(planes, images, labels, torch.Generator().manual_seed(0))
    kept = (found - images).flatten(1).norm(dim=1)
    torch.testing.assert_close(kept, torch.where(sizes <= eps, sizes, torch.zeros_like(sizes)))
    assert 0 < (kept > 0).sum() < 8


def test_misclassified_images_stay(planes: nn.Module) -> None:
    images, labels = middle(planes, 4)
    for attack in (HopSkipJump(queries=200), Noise(eps=0.3)):
        assert torch.equal(attack(planes, images, (labels + 1) % 3), images)


def test_hop_skip_jump_gives_up_where_no_start_succeeds() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    nn.init.zeros_(model[1].weight)
    model[1].bias.data = torch.tensor([1.0, 0.0])
    images, counting = torch.rand(2, 1, 4, 4), Counting(model)
    found = HopSkipJump(queries=200, trials=7)(counting, images, torch.zeros(2, dtype=torch.long))
    assert torch.equal(found, images)
    assert counting.asked == 2 * (1 + 7)


def test_coarse_starts_find_what_fine_noise_misses() -> None:
    """A class that needs the whole image dark is never met by noise of single pixels."""

    class Dark(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x.flatten(1).mean(1) - 0.2, torch.zeros(len(x))], 1)

    images = torch.full((2, 1, 16, 16), 0.6)
    found = HopSkipJump(queries=400)(Dark(), images, torch.zeros(2, dtype=torch.long), torch.Generator().manual_seed(0))
    assert (found.flatten(1).mean(1) < 0.2).all()


@pytest.mark.parametrize("attack", [HopSkipJump(queries=400), HopSkipJump(queries=400, norm="Linf"), Noise(eps=0.1)], ids=repr)
def test_batch_equals_singles(planes: nn.Module, attack: Noise | HopSkipJump) -> None:
    from overproof.attacks.randomness import Streams

    images, labels = middle(planes, 5)
    streams = Streams.named(torch.arange(5), "test")
    together = attack(planes, images, labels, streams)
    alone = torch.cat([attack(planes, images[i : i + 1], labels[i : i + 1], streams.rows(torch.tensor([i]))) for i in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.05), ("L2", 0.3), ("L1", 1.0)])
def test_noise_is_a_floor(conv: nn.Module, norm: str, eps: float) -> None:
    """It breaks something that stands near the boundary, more with more samples, and less than PGD."""
    images = torch.rand(128, 1, 8, 8)
    conv.eval()
    labels = conv(images).argmax(1)
    broken = {}
    for name, attack in {
        "one": Noise(eps=eps, norm=norm, samples=1),
        "many": Noise(eps=eps, norm=norm, samples=30),
        "pgd": PGD(eps=eps, norm=norm),
    }.items():
        result = verdict(attack, conv, images, labels, torch.Generator().manual_seed(0))
        assert not result.invalid.any()
        broken[name] = int((result.predictions != labels).sum())
    assert broken["one"] < broken["many"] < broken["pgd"]


def test_noise_leaves_broken_images_alone(conv: nn.Module) -> None:
    images = torch.rand(64, 1, 8, 8)
    conv.eval()
    labels = conv(images).argmax(1)
    asked: list[int] = []
    conv.register_forward_hook(lambda module, inputs, output: asked.append(len(output)))
    Noise(eps=0.3, samples=5)(conv, images, labels, torch.Generator().manual_seed(0))
    assert asked[:2] == [64, 64]
    assert asked[-1] < 64
    assert asked == sorted(asked, reverse=True)


def test_noise_keeps_the_worst_sample() -> None:
    """Without a success the sample with the greatest margin is returned."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).double()
    model[1].weight.data = torch.tensor([[10.0] * 4, [-1.0] * 4], dtype=torch.float64)
    images, labels = torch.full((3, 1, 2, 2), 0.5, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    margins = [
        float((Noise(eps=0.1, samples=n)(model, images, labels, torch.Generator().manual_seed(0)) - images).sum())
        for n in (1, 20)
    ]
    assert margins[1] < margins[0]


def test_bad_options() -> None:
    with pytest.raises(UsageError, match="samples=0"):
        Noise(samples=0)
    with pytest.raises(UsageError, match="queries=5"):
        HopSkipJump(queries=5)
    with pytest.raises(UsageError, match="not 'L1'"):
        HopSkipJump(norm="L1")
    with pytest.raises(UsageError, match="radius"):
        Noise(eps=float("inf"))
