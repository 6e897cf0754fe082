"""Attacks made of attacks, and models seen from another side."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from overproof.attacks.base import predictions
from overproof.attacks.bpda import BPDA
from overproof.attacks.combined import Combined, WorstCase, is_patient
from overproof.attacks.eot import EOT
from overproof.attacks.fgsm import FGSM
from overproof.attacks.pgd import PGD
from overproof.attacks.randomness import Streams
from overproof.attacks.transfer import Transfer
from overproof.errors import NoGradientError, UsageError
from overproof.folding import Folded, Follower, folded
from overproof.models import create_model
from overproof.networks import in_mode
from overproof.testing import check_attack, small_model


class Rounding(nn.Module):
    """A part without a gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 8).round() / 8


def balanced() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network whose classes share the images, and 80 images with its own predictions as labels."""
    model = small_model(3).eval()
    x = torch.rand(80, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(x)
        model[-1].bias -= logits.mean(0)
    return model, x, predictions(model, x)


@pytest.mark.parametrize(
    "attack",
    [
        WorstCase(eps=0.1),
        WorstCase(attacks=(FGSM(eps=0.1), {"attack": "pgd", "eps": 0.1, "steps": 3})),
        EOT(inner={"attack": "pgd", "steps": 2}, eps=0.1, samples=2),
        BPDA(inner={"attack": "pgd", "steps": 2}, eps=0.1, parts=("2",)),
        Transfer(inner={"attack": "pgd", "steps": 2}, eps=0.1, source=small_model(7)),
    ],
    ids=["worst-case", "worst-case-values", "eot", "bpda", "transfer"],
)
def test_contract(attack: WorstCase) -> None:
    if isinstance(attack, Transfer):  # its source fits images of one channel only
        x, y = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])
        found = attack(small_model(0), x, y, torch.Generator().manual_seed(0))
        assert attack.threat.size(found - x).max() <= 0.1 + 1e-6
        return
    check_attack(attack)


def test_worst_case_is_the_union_of_its_members() -> None:
    model, x, y = balanced()
    worst = WorstCase(attacks=(FGSM(eps=0.01), PGD(eps=0.01, steps=10, random_start=False)))
    assert isinstance(worst, Combined)
    assert not isinstance(FGSM(), Combined)
    broken = predictions(model, worst(model, x, y)) != y
    each = [predictions(model, attack(model, x, y)) != y for attack in worst.members.values()]
    assert torch.equal(broken, each[0] | each[1])
    assert 0 < broken.sum() < 80


def test_where_the_model_is_no_judge_every_image_is_attacked() -> None:
    model, x, y = balanced()
    dice = iter([False, True, True, True, True, True])

    class Lucky(nn.Module):
        """Wrong at the first look, right ever after."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = model(images)
            if images.requires_grad or not next(dice, True):
                return logits if images.requires_grad else -logits
            return torch.nn.functional.one_hot(y[: len(images)], logits.shape[1]).to(logits)

    attacks = tuple(PGD(eps=0.05, steps=2, early_stop=False, loss=loss) for loss in ("ce", "margin"))
    found = WorstCase(attacks=attacks)(Lucky(), x, y)
    assert bool(((found - x).abs().flatten(1).amax(1) > 0.01).all()), "neither bad luck nor survival makes it the clean image"
    assert is_patient(EOT(inner=attacks[0], samples=2))
    assert not is_patient(PGD())
    assert not is_patient(FGSM())


def test_worst_case_needs_one_threat() -> None:
    with pytest.raises(UsageError, match="one threat"):
        WorstCase(attacks=(FGSM(eps=0.1), PGD(eps=0.2)))
    with pytest.raises(UsageError, match="none"):
        WorstCase(attacks=())
    assert WorstCase(attacks=(FGSM(eps=0.1), PGD(eps=0.2)), eps=0.3).threat.eps == 0.3
    assert WorstCase(attacks=("pgd",), targeted=True).members["pgd"].targeted
    assert WorstCase(attacks=(PGD(targeted=True),)).targeted


def test_worst_case_passes_over_what_has_no_gradient() -> None:
    class Deaf(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = x.detach().flatten(1).sum(1)
            return torch.stack([total - 8, 8 - total], 1)

    x, y = torch.full((2, 1, 4, 4), 0.51), torch.zeros(2, dtype=torch.long)
    with pytest.raises(NoGradientError):
        WorstCase(attacks=("pgd",), eps=0.1)(Deaf(), x, y)

    class Down(FGSM):
        def __call__(self, model, images, labels, generator=None):
            return images - self.eps

    found = WorstCase(attacks=(PGD(eps=0.1), Down(eps=0.1)))(Deaf(), x, y)
    assert (predictions(Deaf(), found) == 1).all()


def test_transfer_never_asks_the_target() -> None:
    class Silent(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the target was asked")

    source, x = small_model(1).eval(), torch.rand(4, 1, 8, 8)
    y = predictions(source, x)
    attack = Transfer(inner=PGD(eps=0.2, steps=5), source=[source, small_model(2)])
    assert attack(Silent(), x, y).shape == x.shape
    own = Transfer(inner=PGD(eps=0.2, steps=5, random_start=False), source=source)(Silent(), x, y)
    assert torch.equal(own, PGD(eps=0.2, steps=5, random_start=False, early_stop=False)(source, x, y))
    with pytest.raises(UsageError, match="needs the model"):
        Transfer()


def test_bpda_sees_through_what_has_no_gradient() -> None:
    net = small_model(1).eval()
    model = nn.Sequential(Rounding(), net).eval()
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = predictions(model, x)
    plain = PGD(eps=0.15, steps=10, random_start=False)
    assert torch.equal(plain(model, x, y), x)  # the gradient of rounding is zero
    through = BPDA(inner=plain, parts=("0",))
    assert (predictions(model, through(model, x, y)) != y).float().mean() > 0.5
    with torch.no_grad():
        assert torch.equal(model(x), net((x * 8).round() / 8))
    with pytest.raises(UsageError, match="no part 'defence'"):
        BPDA(inner=plain, parts=("defence",))(model, x, y)
    with pytest.raises(UsageError, match="stand-in gives"):
        BPDA(inner=plain, parts=("0",), stand_in=lambda z: z[:, :, :4])(model, x, y)
    with pytest.raises(UsageError, match="name the submodules"):
        BPDA()


def test_eot_does_not_see_the_dice_by_which_it_is_judged() -> None:
    class Dice(nn.Module):
        rolled: list[float]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.rolled.append(float(torch.rand(())))
            score = x.flatten(1).sum(1)
            return torch.stack([score, -score], 1)

    model, x = Dice(), torch.full((2, 1, 4, 4), 0.5)
    model.rolled = []
    streams = Streams.named(torch.arange(2), "attack")
    torch.manual_seed(streams.initial_seed())  # as the evaluator does
    EOT(inner=PGD(eps=0.1, steps=2), samples=3)(model, x, torch.zeros(2, dtype=torch.long), streams)
    seen = set(model.rolled)
    predictions(model, x)
    assert len(seen) >= 6
    assert model.rolled[-1] not in seen


def test_eot_finds_the_mean_direction() -> None:
    """f(x) = s w.x with random s in {-1, 3}: a single pass points the wrong way half of the time, the mean never."""

    class Flip(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            score = x.flatten(1).sum(1) * (torch.randint(0, 2, ()) * 4.0 - 1.0) * 0.05
            return torch.stack([score, -score], 1)

    x, y = torch.full((1, 1, 4, 4), 0.5), torch.zeros(1, dtype=torch.long)
    attack = PGD(eps=0.1, steps=1, step_size=0.1, random_start=False, early_stop=False)
    averaged = EOT(inner=attack, samples=60)
    for seed in range(5):
        before = torch.random.get_rng_state()
        found = averaged(Flip(), x, y, torch.Generator().manual_seed(seed))
        assert torch.allclose(found, x - 0.1)
        assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(UsageError, match="samples=0"):
        EOT(samples=0)


@pytest.mark.parametrize("name", ["cnn", "resnet8", "wrn-16-1", "vit-tiny", "mobilenetv2"])
def test_folding_changes_cost_and_nothing_else(name: str) -> None:
    model = create_model(name, 5, 3, 16).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    before, x = copy.deepcopy(model.state_dict()), torch.rand(4, 3, 16, 16)
    copied = folded(model, x)
    assert isinstance(copied, Folded)
    assert folded(copied, x) is copied
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    model.eval()
    gradients = []
    for net in (model, copied):
        z = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(net(z).logsumexp(1).sum(), z)[0])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)
    assert gradients[1].is_contiguous()
    left = sum(isinstance(m, nn.BatchNorm2d) for m in copied.modules())
    # A pre-activation network normalises sums of two branches, where there is nothing to fold into.
    assert left == {"cnn": 0, "resnet8": 0, "wrn-16-1": 7, "vit-tiny": 0, "mobilenetv2": 0}[name]


def test_the_copy_follows_a_network_in_training() -> None:
    torch.manual_seed(0)
    model, follower, x = create_model("resnet8", 5, 3, 16), Follower(), torch.rand(16, 3, 16, 16)
    optimizer, copies = torch.optim.SGD(model.parameters(), 0.1), []
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(x).logsumexp(1).sum().backward()
        optimizer.step()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        state, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
        with in_mode(model):
            expected = model(x)
            copied = follower.now(model, x)
            torch.testing.assert_close(copied(x), expected)
        copies.append(copied)
        assert [m.training for m in model.modules()] == flags
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert isinstance(copies[0], Folded)
    assert copies[0] is copies[2], "one copy serves all steps"
    with in_mode(model.double()):
        torch.testing.assert_close(follower.now(model, x.double())(x.double()), model(x.double()))


@pytest.mark.parametrize("name", ["preact-resnet18", "wrn-16-1", "resnet8", "mobilenetv2", "vgg8"])
def test_a_copy_made_before_training_is_right_after_it(name: str) -> None:
    """Fresh normalisations hardly change what passes them: the copy must not fold one whose input is also a shortcut."""
    torch.manual_seed(0)
    model, follower, x = create_model(name, 5, 3, 32), Follower(), torch.rand(6, 3, 32, 32)
    with in_mode(model):
        follower.now(model, x)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
    with in_mode(model):
        copied = follower.now(model, x)
        assert isinstance(copied, Folded)
        torch.testing.assert_close(copied(x), model(x), atol=1e-4, rtol=1e-3)


class TwoNames(nn.Module):
    """Its first layers are known by two names; it is asked by either."""

    def __init__(self, *, bias: bool, by_stem: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3, padding=1, bias=bias), nn.BatchNorm2d(2)
        self.stem, self.by_stem, self.last = nn.Sequential(self.conv, self.norm), by_stem, nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((self.stem(x) if self.by_stem else self.norm(self.conv(x))).flatten(1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("by_stem", [False, True])
def test_the_copy_follows_layers_of_two_names_and_new_layers(*, bias: bool, by_stem: bool) -> None:
    torch.manual_seed(0)
    model, follower, x = TwoNames(bias=bias, by_stem=by_stem).eval(), Follower(), torch.rand(4, 1, 4, 4)
    follower.now(model, x)
    model.norm.running_var.fill_(4.0)
    model.norm.running_mean.fill_(0.3)
    torch.testing.assert_close(follower.now(model, x)(x), model(x))
    model.last = nn.Linear(32, 5)
    torch.testing.assert_close(follower.now(model, x)(x), model(x))
    model.norm = nn.Identity()
    torch.testing.assert_close(follower.now(model, x)(x), model(x))


def test_the_copy_follows_tied_weights_and_leaves_what_does_not_fold() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
    second.weight = first.weight
    tied = nn.Sequential(first, nn.BatchNorm2d(1), second, nn.Flatten()).eval()
    follower, x = Follower(), torch.rand(2, 1, 4, 4)
    for value in (1.0, 3.0):
        tied[1].running_var.fill_(value)
        first.weight.data.mul_(value)
        copied = follower.now(tied, x)
        assert isinstance(copied, Folded)
        torch.testing.assert_close(copied(x), tied(x))
    plain = create_model("mlp", 3, 1, 4).eval()
    assert Follower().now(plain, x) is plain


def test_folding_leaves_what_it_cannot_copy() -> None:
    class Dice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.randn(len(x), 3) + x.mean()

    class Stubborn(nn.Module):
        def __deepcopy__(self, memo: object) -> None:
            raise TypeError("not to be copied")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :3]

    for model in (Dice(), Stubborn()):
        assert folded(model, torch.rand(2, 1, 4, 4)) is model
    shared = nn.Conv2d(1, 1, 3, padding=1)
    twice = nn.Sequential(shared, nn.BatchNorm2d(1), shared, nn.BatchNorm2d(1), nn.Flatten()).eval()
    twice[1].running_var.fill_(3.0)
    x = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(folded(twice, x)(x), twice(x))
