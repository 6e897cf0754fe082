"""Other people's attacks behind our contract: strangers that misbehave, and the real libraries where they are installed."""

from __future__ import annotations

import copy
import math
import random
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from overproof.attacks.adapters import HOMES, ForeignAttack, ForeignMinimumNorm, foreign_attack, is_foreign
from overproof.attacks.pgd import PGD
from overproof.errors import DataError, OverproofError, UnknownNameError, UsageError
from overproof.evaluation import verdict
from overproof.testing import check_attack

PACKAGES = {"foolbox": "foolbox", "torchattacks": "torchattacks", "art": "art", "advlib": "adv_lib", "secml": "secmlt"}

REAL = {
    "foolbox:LinfPGD": {"eps": "0.1", "steps": 5},
    "foolbox:L2PGD": {"eps": 0.5, "steps": 5},
    "foolbox:L1FMNAttack": {"steps": 8},
    "foolbox:L2DeepFoolAttack": {"steps": 5},
    "foolbox:LinfPGD targeted": {"eps": 0.1, "steps": 5, "targeted": True},
    "foolbox:LinearSearchContrastReductionAttack": {"norm": "L2"},
    "torchattacks:PGD": {"eps": 0.1, "steps": 5},
    "torchattacks:PGD targeted": {"eps": 0.1, "steps": 5, "targeted": True},
    "torchattacks:PGDL2": {"eps": 0.5, "steps": 5},
    "torchattacks:CW": {"steps": 5, "c": 1},
    "torchattacks:Square": {"eps": 0.1, "n_queries": 20},
    "torchattacks:APGD": {"eps": 0.5, "norm": "L2", "steps": 5},
    "art:ProjectedGradientDescent": {"eps": 0.1, "max_iter": 5, "num_random_init": 1},
    "art:ProjectedGradientDescentPyTorch": {"eps": 0.1, "max_iter": 5, "num_random_init": 1},
    "art:ProjectedGradientDescent targeted": {"eps": 0.1, "max_iter": 5, "targeted": True},
    "art:DeepFool": {"max_iter": 3, "nb_grads": 3},
    "art:CarliniL2Method": {"max_iter": 2, "binary_search_steps": 2},
    "art:SquareAttack": {"eps": 0.1, "max_iter": 5},
    "advlib:pgd_linf": {"eps": 0.1, "steps": 5},
    "advlib:apgd": {"eps": 1.0, "norm": "L1", "n_iter": 5},
    "advlib:fmn": {"norm": "Linf", "steps": 8},
    "advlib:fmn targeted": {"norm": "L2", "steps": 8, "targeted": True},
    "advlib:ddn": {"steps": 8},
    "advlib:alma": {"num_steps": 8},
    "secml:PGD": {"eps": 0.1, "num_steps": 5, "step_size": 0.03, "random_start": True},
    "secml:PGD targeted": {"eps": 0.1, "num_steps": 5, "step_size": 0.03, "targeted": True},
    "secml:DDN": {"num_steps": 8},
    "secml:FMN": {"num_steps": 8, "step_size": 1.0, "norm": "L2"},
}  # fmt: skip


def needs(name: str) -> str:
    library = name.partition(":")[0]
    pytest.importorskip(PACKAGES[library])
    return name.split()[0]


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A library under the name of a real one, whose attacks do everything they should not."""
    module = types.ModuleType("torchattacks")

    class Base:
        def __init__(self, model: nn.Module, eps: float = 8 / 255, alpha: float = 2 / 255, strength: float = 1.0) -> None:
            self.model, self.eps, self.alpha, self.strength, self.targeted = model, eps, alpha, strength, False

        def set_device(self, device: torch.device) -> None:
            self.device = device

        def set_mode_targeted_by_label(self, quiet: bool = False) -> None:
            self.targeted = True

    class Vandal(Base):
        """Trains BatchNorm, leaves train mode, gradients, hooks and flags, reseeds everything, prints, exceeds the budget."""

        def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            print("I am here")
            torch.manual_seed(0)
            np.random.seed(0)
            random.seed(0)
            self.model.train()
            for parameter in self.model.parameters():
                parameter.requires_grad_(True)
            self.model.register_forward_hook(lambda *_: None)
            next(m for m in self.model.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(lambda *_: None)
            x = images.requires_grad_(True)
            self.model(x).sum().backward()
            with torch.no_grad():
                next(self.model.parameters()).add_(1.0)
            images.data.zero_()
            return images + 2 * self.eps * self.strength

    class Lost(Base):
        def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            found = (images + self.eps).clamp(0, 1).numpy()
            found[0] = np.nan
            return torch.from_numpy(found).double()

    class Broken(Base):
        def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            raise AssertionError

    class Cropped(Base):
        def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return images[..., 1:]

    class Drawing(Base):
        def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            noise = torch.rand(1) + float(np.random.rand()) + random.random()
            return images + (noise % 1) * self.eps

    class CW:
        """Looks for the smallest change; takes no radius."""

        def __init__(self, model: nn.Module, steps: int) -> None:
            self.model = model

        def set_device(self, device: torch.device) -> None: ...

        def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return 1 - images

    for kind in (Base, Vandal, Lost, Broken, Cropped, Drawing, CW):
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "torchattacks", module)
    return module


@pytest.fixture
def correct(conv: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that the model gets right."""
    images = torch.rand(6, 1, 8, 8)
    conv.eval()
    return images, conv(images).argmax(1)


@pytest.fixture
def no_libraries() -> Iterator[None]:
    """Whatever is installed, no library is found."""
    hidden = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in PACKAGES.values()}
    for name in hidden:
        del sys.modules[name]
    for name in PACKAGES.values():
        sys.modules[name] = None  # type: ignore[assignment]
    yield
    for name in PACKAGES.values():
        del sys.modules[name]
    sys.modules.update(hidden)


@pytest.mark.usefixtures("no_libraries")
@pytest.mark.parametrize("prefix", HOMES)
def test_missing_library_is_named_with_its_remedy(prefix: str) -> None:
    with pytest.raises(UsageError, match=rf"{prefix}:.*pip install .*=="):
        foreign_attack(f"{prefix}:PGD")


def test_adapters_import_no_library() -> None:
    code = "import sys, overproof.attacks.adapters, importlib as i\n"
    code += f"[i.import_module('overproof.attacks.adapters.' + n) for n in {list(HOMES)}]\n"
    code += f"print([n for n in {list(PACKAGES.values())} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_prefix() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'foolbox'"):
        foreign_attack("folbox:LinfPGD")
    assert is_foreign("foolbox:LinfPGD")
    assert not is_foreign("pgd")


@pytest.mark.usefixtures("stranger")
def test_unknown_names_and_options() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'Vandal'"):
        foreign_attack("torchattacks:Vandl")
    with pytest.raises(UnknownNameError, match="Did you mean 'strength'"):
        foreign_attack("torchattacks:Vandal", strenght=2)
    with pytest.raises(UsageError, match="needs the option steps"):
        foreign_attack("torchattacks:CW")
    with pytest.raises(UsageError, match="knows the norm Linf, not 'L2'"):
        foreign_attack("torchattacks:Vandal", norm="L2")
    with pytest.raises(UsageError, match="radius"):
        foreign_attack("torchattacks:Vandal", eps=-1)
    with pytest.raises(UsageError, match="eps"):
        foreign_attack("torchattacks:Vandal", eps="wide")


@pytest.mark.usefixtures("stranger")
def test_defaults_of_radius_and_norm() -> None:
    budget, minimum = foreign_attack("torchattacks:Vandal"), foreign_attack("torchattacks:CW", steps=3)
    assert isinstance(budget, ForeignAttack)
    assert (budget.eps, budget.norm) == (8 / 255, "Linf")
    assert isinstance(minimum, ForeignMinimumNorm)
    assert (minimum.eps, minimum.norm) == (math.inf, "L2")
    assert foreign_attack("torchattacks:Vandal", eps="16/255", alpha="4/255") == ForeignAttack(
        name="torchattacks:Vandal", eps=16 / 255, norm="Linf", options={"alpha": 4 / 255}
    )
    assert replace(budget, eps=0.5).threat.eps == 0.5
    assert hash(budget) == hash(foreign_attack("torchattacks:Vandal"))


@pytest.mark.usefixtures("stranger")
def test_vandal_leaves_no_trace(
    conv: nn.Module, correct: tuple[torch.Tensor, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = correct
    conv.train()
    conv[1].eval()
    conv[0].weight.grad = torch.ones_like(conv[0].weight)
    conv[6].bias.requires_grad_(False)
    before, clean, gradient = copy.deepcopy(conv.state_dict()), images.clone(), conv[0].weight.grad
    generators = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    attack = foreign_attack("torchattacks:Vandal", eps=0.05)
    found = attack(conv, images, labels, torch.Generator().manual_seed(3))
    assert conv.training
    assert not conv[1].training
    assert all(torch.equal(value, before[name]) for name, value in conv.state_dict().items())
    assert conv[0].weight.grad is gradient
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert conv[0].bias.grad is None
    assert conv[0].weight.requires_grad
    assert not conv[6].bias.requires_grad
    assert not conv._forward_hooks
    assert not conv[0]._forward_hooks
    assert torch.equal(images, clean)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (np.random.get_state()[1] == generators[1]).all()
    assert random.getstate() == generators[2]
    assert capsys.readouterr().out == ""
    assert float((found - images).abs().max()) <= 0.05 * (1 + 1e-5)


@pytest.mark.usefixtures("stranger")
def test_vandal_is_pulled_onto_the_ball_and_judged_there(conv: nn.Module, correct: tuple[torch.Tensor, torch.Tensor]) -> None:
    check_attack(foreign_attack("torchattacks:Vandal", eps=0.05, strength=10), alone=False)
    result = verdict(foreign_attack("torchattacks:Vandal", eps=0.05, strength=10), conv, *correct)
    assert not result.invalid.any()
    torch.testing.assert_close(result.images, (correct[0] + 0.05).clamp(0, 1))


@pytest.mark.usefixtures("stranger")
def test_lost_images_and_types(conv: nn.Module, correct: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, labels = correct
    found = foreign_attack("torchattacks:Lost", eps=0.1)(conv, images, labels)
    assert found.dtype == images.dtype
    assert torch.equal(found[0], images[0])
    torch.testing.assert_close(found[1:], (images[1:] + 0.1).clamp(0, 1))


@pytest.mark.usefixtures("stranger")
def test_failures_name_the_attack(conv: nn.Module, correct: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(OverproofError, match="torchattacks:Broken failed inside the library with AssertionError"):
        foreign_attack("torchattacks:Broken")(conv, *correct)
    with pytest.raises(OverproofError, match="torchattacks:Cropped returned shape"):
        foreign_attack("torchattacks:Cropped")(conv, *correct)
    with pytest.raises(DataError, match="returns logits of shape"):
        foreign_attack("torchattacks:Lost")(nn.Identity(), *correct)


@pytest.mark.usefixtures("stranger")
def test_randomness_comes_from_our_generator(conv: nn.Module, correct: tuple[torch.Tensor, torch.Tensor]) -> None:
    attack = foreign_attack("torchattacks:Drawing", eps=0.1)
    once, again, other = (attack(conv, *correct, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_only_images_that_hold_are_handed_over(
    stranger: types.ModuleType, conv: nn.Module, correct: tuple[torch.Tensor, torch.Tensor]
) -> None:
    seen: list[int] = []

    class Count(stranger.Base):
        def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            return images + self.eps

    stranger.Count = Count
    images, labels = correct
    labels = labels.clone()
    labels[:2] = (labels[:2] + 1) % 3
    attack = foreign_attack("torchattacks:Count", eps=0.1)
    found = attack(conv, images, labels)
    assert seen == [4]
    assert torch.equal(found[:2], images[:2])
    assert not torch.equal(found[2:], images[2:])
    assert torch.equal(attack(conv, images, (labels + 1) % 3)[2:], images[2:])
    assert foreign_attack("torchattacks:Count", targeted=True, eps=0.1)(conv, images, labels).shape == images.shape


@pytest.mark.usefixtures("stranger")
def test_minimum_norm_counts_only_what_fools_within_the_radius(linear: nn.Module) -> None:
    images = torch.rand(16, 1, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        linear[1].bias -= linear(torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64))[0]
    labels = linear(images).argmax(1)  # the negative of an image lies on the other side
    found = foreign_attack("torchattacks:CW", steps=1)(linear, images, labels)
    torch.testing.assert_close(found, 1 - images)
    eps = float((1 - 2 * images).flatten(1).norm(dim=1).median())
    kept = foreign_attack("torchattacks:CW", steps=1, eps=eps)(linear, images, labels)
    near = (1 - 2 * images).flatten(1).norm(dim=1) <= eps
    assert torch.equal(kept[~near], images[~near])
    torch.testing.assert_close(kept[near], 1 - images[near])
    constant = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    nn.init.zeros_(constant[1].weight)
    assert torch.equal(foreign_attack("torchattacks:CW", steps=1)(constant, images, constant(images).argmax(1)), images)


def test_default_step_grows_with_the_ball(
    stranger: types.ModuleType, conv: nn.Module, correct: tuple[torch.Tensor, torch.Tensor]
) -> None:
    steps: list[float] = []

    class Stepping(stranger.Base):
        def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            steps.append(self.alpha)
            return images

    stranger.Stepping = Stepping
    for options in ({}, {"eps": 16 / 255}, {"eps": 16 / 255, "alpha": 1 / 255}):
        foreign_attack("torchattacks:Stepping", **options)(conv, *correct)
    assert steps == pytest.approx([2 / 255, 4 / 255, 1 / 255])


def test_under_inference_mode(stranger: types.ModuleType, linear: nn.Module) -> None:
    class Gradient(stranger.Base):
        def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            images.requires_grad = True
            loss = nn.functional.cross_entropy(self.model(images), labels)
            return images + self.eps * torch.autograd.grad(loss, images)[0].sign()

    stranger.Gradient = Gradient
    images, attack = torch.rand(4, 1, 4, 4, dtype=torch.float64), foreign_attack("torchattacks:Gradient", eps=0.1)
    labels = linear(images).argmax(1)
    expected = attack(linear, images, labels)
    assert not torch.equal(expected, images)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(attack(linear, images.clone(), labels), expected)


@pytest.mark.parametrize("name", REAL)
def test_real_attacks_keep_the_contract(name: str) -> None:
    check_attack(foreign_attack(needs(name), **REAL[name]), alone=False)


@pytest.mark.parametrize(
    ("name", "options"),
    {
        "foolbox:LinfPGD": {"steps": 20, "abs_stepsize": 0.01},
        "torchattacks:PGD": {"steps": 20, "alpha": 0.01},
        "art:ProjectedGradientDescent": {"max_iter": 20, "eps_step": 0.01, "num_random_init": 1},
        "advlib:pgd_linf": {"steps": 20, "absolute_step_size": 0.01},
        "secml:PGD": {"num_steps": 20, "step_size": 0.01},
    }.items(),
)
def test_real_attacks_agree_with_ours(name: str, options: dict[str, float], conv: nn.Module) -> None:
    """Each library's PGD breaks as many images as ours, give or take one in thirty."""
    images = torch.rand(96, 1, 8, 8)
    conv.eval()
    labels = conv(images).argmax(1)
    ours = PGD(eps=0.03, steps=20, step_size=0.01, early_stop=False)
    attacks = [ours, foreign_attack(needs(name), eps=0.03, **options)]
    results = [verdict(attack, conv, images, labels, torch.Generator().manual_seed(0)) for attack in attacks]
    broken = [float((result.predictions != labels).float().mean()) for result in results]
    assert not results[1].invalid.any()
    assert 0.1 < broken[0] < 0.95
    assert abs(broken[0] - broken[1]) < 1 / 30


def test_real_libraries_name_their_attacks() -> None:
    needs("foolbox:")
    with pytest.raises(UnknownNameError, match="LinfPGD"):
        foreign_attack("foolbox:LinfPDG")
    with pytest.raises(UnknownNameError, match="Did you mean 'steps'"):
        foreign_attack("foolbox:LinfPGD", step=3)
    assert foreign_attack("foolbox:HopSkipJumpAttack", norm="Linf").norm == "Linf"
    with pytest.raises(UsageError, match="measures no distance"):
        foreign_attack("foolbox:SpatialAttack")
