"""Attacks reach known optima, keep their contract, and leave the model alone."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from overproof.attacks import FGSM, PGD, Linf, ascend
from overproof.errors import OverproofError, UsageError
from overproof.evaluation import verdict
from overproof.losses.margins import margin
from overproof.testing import check_attack

ATTACKS = {
    "fgsm": FGSM(eps=0.1),
    "fgsm-random": FGSM(eps=0.1, random_start=True),
    "pgd": PGD(eps=0.1, steps=5),
    "pgd-last": PGD(eps=0.1, steps=5, early_stop=False, restarts=2),
    "pgd-l2": PGD(eps=0.5, steps=5, norm="L2"),
    "pgd-l1": PGD(eps=1.0, steps=5, norm="L1"),
    "pgd-targeted": PGD(eps=0.1, steps=5, targeted=True),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_contract(attack: PGD) -> None:
    check_attack(attack)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_linear_model_optimum(linear: nn.Module, norm: str, batch: int) -> None:
    """On a linear model far from the box the best margin is m - eps * ||w||_dual."""
    weight = linear[1].weight.detach()
    direction = (weight[1] - weight[0]).double()
    x = torch.full((batch, 1, 4, 4), 0.5, dtype=torch.float64)
    labels = torch.zeros(batch, dtype=torch.long)
    eps = {"Linf": 0.05, "L2": 0.2, "L1": 0.3}[norm]
    attack = PGD(eps=eps, norm=norm, steps=40, early_stop=False)
    found = attack(linear, x, labels, torch.Generator().manual_seed(0))
    margin = (linear(found) - linear(x)) @ torch.tensor([-1.0, 1.0], dtype=torch.float64)
    dual = {"Linf": 1, "L2": 2, "L1": torch.inf}[norm]
    best = eps * torch.linalg.vector_norm(direction, dual)
    torch.testing.assert_close(margin, best.expand(batch), rtol=1e-3 if norm != "L1" else 5e-2, atol=0)


def test_linf_corner_is_exact_from_any_start(linear: nn.Module) -> None:
    """ceil(2 eps / step) steps reach x - eps sign(w) from every start of the ball."""
    x = torch.full((5, 1, 4, 4), 0.5, dtype=torch.float64)
    w = (linear[1].weight[1] - linear[1].weight[0]).detach().view(1, 1, 4, 4)

    def loss(z: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        logits = linear(z)
        return logits[:, 1] - logits[:, 0]

    found = ascend(loss, x, Linf(0.1), steps=7, step_size=0.03, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, (x + 0.1 * w.sign()).expand_as(x), atol=1e-12, rtol=0)


def test_finished_images_leave_the_active_set() -> None:
    seen: list[int] = []

    def loss(z: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(rows))
        return z.flatten(1).sum(1), rows < len(seen)

    x = torch.full((4, 1, 2, 2), 0.5)
    found = ascend(loss, x, Linf(0.4), steps=9, step_size=0.05, start="image")
    assert seen == [4, 3, 2, 1]
    assert found.flatten(1).mean(1).tolist() == pytest.approx([0.5, 0.55, 0.6, 0.65], abs=1e-6)


def test_early_stop_never_weakens(conv: nn.Module) -> None:
    x, y = torch.rand(64, 1, 8, 8), torch.randint(0, 3, (64,))
    hits = {}
    for stop in (True, False):
        attack = PGD(eps=0.08, steps=6, early_stop=stop)
        result = verdict(attack, conv, x, y, torch.Generator().manual_seed(0))
        hits[stop] = result.predictions != y
        assert not result.invalid.any()
    assert (hits[True] | ~hits[False]).all()


def test_batch_equals_singles(conv: nn.Module) -> None:
    x, y = torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    attack = PGD(eps=0.1, steps=4, random_start=False)
    together = attack(conv, x, y)
    alone = torch.cat([attack(conv, x[i : i + 1], y[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_restarts_only_help(conv: nn.Module) -> None:
    x, y = torch.rand(64, 1, 8, 8), torch.randint(0, 3, (64,))
    counts = []
    for restarts in (1, 4):
        attack = PGD(eps=0.05, steps=2, restarts=restarts)
        counts.append(int((verdict(attack, conv, x, y, torch.Generator().manual_seed(0)).predictions != y).sum()))
    assert counts[1] >= counts[0]


def test_without_early_stop_the_start_with_the_largest_margin_is_kept(conv: nn.Module) -> None:
    conv.eval()
    x, y = torch.rand(64, 1, 8, 8), torch.randint(0, 3, (64,))
    for targeted in (False, True):
        margins = []
        for restarts in (1, 2, 4):
            attack = PGD(eps=0.05, steps=1, restarts=restarts, early_stop=False, targeted=targeted)
            with torch.no_grad():
                value = margin(conv(attack(conv, x, y, torch.Generator().manual_seed(0))), y)
            margins.append(-value if targeted else value)
        for less, more in itertools.pairwise(margins):
            assert (more >= less - 1e-6).all()
            assert (more > less + 1e-6).any()
        # Images that the first start had broken already go on too.
        assert ((margins[2] > margins[0] + 1e-6) & (margins[0] > 0)).any()


def test_gradient_free_model_is_named() -> None:
    class Rounded(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x.flatten(1).sum(1).detach()] * 2, 1)

    with pytest.raises(OverproofError, match="does not depend differentiably"):
        PGD(eps=0.1)(Rounded(), torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.long))


def test_under_no_grad_and_inference_mode(linear: nn.Module) -> None:
    x, y = torch.rand(2, 1, 4, 4, dtype=torch.float64), torch.zeros(2, dtype=torch.long)
    attack = PGD(eps=0.1, random_start=False)
    expected = attack(linear, x, y)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            torch.testing.assert_close(attack(linear, x.clone(), y.clone()), expected)


def test_bad_options() -> None:
    with pytest.raises(UsageError, match="steps=0"):
        PGD(steps=0)
    with pytest.raises(UsageError, match="radius"):
        FGSM(eps=-1.0)


def test_cheating_attack_is_caught(conv: nn.Module) -> None:
    class Cheat:
        threat = Linf(0.01)
        targeted = False

        def __call__(self, model, images, labels, generator=None):
            return (images + 0.5).clamp(0, 1)

    x = torch.rand(8, 1, 8, 8)
    result = verdict(Cheat(), conv, x, torch.zeros(8, dtype=torch.long))
    assert result.invalid.all()
    assert torch.equal(result.images, x)


def test_attack_leaves_everything_as_it_was(conv: nn.Module) -> None:
    conv.train()
    conv[1].eval()
    before = copy.deepcopy(conv.state_dict())
    conv[0].weight.grad = torch.ones_like(conv[0].weight)
    PGD(eps=0.1, steps=3)(conv, torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))
    assert conv.training
    assert not conv[1].training
    assert all(torch.equal(v, before[k]) for k, v in conv.state_dict().items())
    assert torch.equal(conv[0].weight.grad, torch.ones_like(conv[0].weight))
    assert conv[0].bias.grad is None
