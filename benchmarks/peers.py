"""What `attack_peers.py` compares: our attacks, the same ones of every library that is installed, and the models.

All attacks get the same steps, sizes of step, starts and queries as far as the libraries let themselves be told.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import overproof
from overproof.attacks import ATTACKS
from overproof.attacks.adapters import foreign_attack
from overproof.attacks.base import Attack
from overproof.attacks.threats import Threat, make_threat
from overproof.errors import UsageError

SEARCHES, CW_STEPS, CW_WEIGHT = 5, 100, 0.01
FAB_STEPS = 20  # towards each of nine classes


class Timed:
    """An attack that keeps the time of its calls, and of nothing else."""

    def __init__(self, attack: Attack) -> None:
        self.attack, self.seconds = attack, 0.0
        self.threat, self.targeted = attack.threat, attack.targeted

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        begun = time.perf_counter()
        found = self.attack(model, images, labels, generator)
        if found.is_cuda:
            torch.cuda.synchronize(found.device)
        self.seconds += time.perf_counter() - begun
        return found


@dataclass(frozen=True)
class Reference:
    """An attack of pyautoattack, the maintained form of the reference code; it has no adapter because ours has its semantics."""

    kind: str
    eps: float
    targeted: bool = False

    def __post_init__(self) -> None:
        try:
            import pyautoattack  # noqa: F401
        except ImportError:
            raise UsageError("pyautoattack is not installed: pip install pyautoattack==0.2.0") from None

    @property
    def threat(self) -> Threat:
        """What the attacker may do."""
        return make_threat("Linf", self.eps)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        from pyautoattack.autoattack import AutoAttack
        from pyautoattack.fab_pt import FABAttack_PT
        from pyautoattack.square import SquareAttack

        seed = generator.initial_seed() % 2**31 if generator is not None else 0
        same: dict[str, Any] = {"norm": "Linf", "eps": self.eps, "seed": seed, "device": images.device}
        with torch.random.fork_rng():
            if self.kind == "autoattack":
                attack = AutoAttack(model, version="standard", **same)
                found: Tensor = attack.run_standard_evaluation(images, labels, batch_size=len(images))[0]
            elif self.kind == "fab":
                attack = FABAttack_PT(model, n_restarts=1, n_iter=FAB_STEPS, targeted=True, n_target_classes=9, **same)
                found = attack.perturb(images, labels)
            else:
                attack = SquareAttack(model, p_init=0.8, n_queries=5000, n_restarts=1, resc_schedule=False, **same)
                found = attack.perturb(images, labels)
        return found


@dataclass(frozen=True)
class Radii:
    """Within which an attack counts: for Linf attacks, and for attacks that look for the smallest L2 change."""

    linf: float
    l2: float


Entrants = dict[str, Callable[[], Attack]]


def _pgd(radii: Radii) -> Entrants:
    eps, step = radii.linf, radii.linf / 10
    ours = {"eps": eps, "steps": 40, "step_size": step}
    return {
        "ours": lambda: ATTACKS.create("pgd", **ours),
        "ours, no early stop": lambda: ATTACKS.create("pgd", **ours, early_stop=False),
        "foolbox": lambda: foreign_attack("foolbox:LinfPGD", eps=eps, steps=40, abs_stepsize=step),
        "torchattacks": lambda: foreign_attack("torchattacks:PGD", eps=eps, steps=40, alpha=step),
        "adv-lib": lambda: foreign_attack("advlib:pgd_linf", eps=eps, steps=40, absolute_step_size=step),
        "art": lambda: foreign_attack(
            "art:ProjectedGradientDescentPyTorch", eps=eps, max_iter=40, eps_step=step, num_random_init=1
        ),
        "secml": lambda: foreign_attack("secml:PGD", eps=eps, num_steps=40, step_size=step, random_start=True),
    }


def _cw(radii: Radii) -> Entrants:
    # ART's form walks image by image (hundreds of times slower), Torchattacks' has no search for the weight.
    ours = {"searches": SEARCHES, "steps": CW_STEPS, "weight": CW_WEIGHT, "learning_rate": 0.01}
    search = {"binary_search_steps": SEARCHES, "initial_const": CW_WEIGHT}
    return {
        "ours": lambda: ATTACKS.create("carlini-wagner", **ours),
        "foolbox": lambda: foreign_attack("foolbox:L2CarliniWagnerAttack", steps=CW_STEPS, stepsize=0.01, **search),
        "adv-lib": lambda: foreign_attack("advlib:carlini_wagner_l2", max_iterations=CW_STEPS, learning_rate=0.01, **search),
    }


def _deepfool(radii: Radii) -> Entrants:
    return {
        "ours": lambda: ATTACKS.create("deepfool", norm="L2", steps=50),
        "foolbox": lambda: foreign_attack("foolbox:L2DeepFoolAttack", steps=50, candidates=10, overshoot=0.02),
        "adv-lib": lambda: foreign_attack("advlib:df", norm="L2", steps=50, overshoot=0.02),
        "torchattacks": lambda: foreign_attack("torchattacks:DeepFool", steps=50, overshoot=0.02),
        "art": lambda: foreign_attack("art:DeepFool", max_iter=50, nb_grads=10, epsilon=0.02),
    }


def _fab(radii: Radii) -> Entrants:
    # Torchattacks' form is the reference's, taken over.
    eps = radii.linf
    return {
        "ours": lambda: ATTACKS.create("fab", eps=eps, norm="Linf", targets=9, steps=FAB_STEPS),
        "pyautoattack": lambda: Reference("fab", eps),
        "adv-lib": lambda: foreign_attack("advlib:fab", norm="Linf", n_iter=FAB_STEPS, targeted_restarts=True),
    }


def _square(radii: Radii) -> Entrants:
    # ART's form asks all 5,000 times for every image, broken or not; torchattacks has the reference's code over again.
    eps = radii.linf
    return {
        "ours": lambda: ATTACKS.create("square", eps=eps, queries=5000),
        "pyautoattack": lambda: Reference("square", eps),
    }


def _autoattack(radii: Radii) -> Entrants:
    return {
        "ours": lambda: ATTACKS.create("autoattack", eps=radii.linf, version="standard"),
        "pyautoattack": lambda: Reference("autoattack", radii.linf),
    }


def _fast(radii: Radii) -> Entrants:
    return {**_autoattack(radii), "ours": lambda: ATTACKS.create("autoattack", eps=radii.linf, version="fast")}


CONTESTS: dict[str, Callable[[Radii], Entrants]] = {
    "pgd": _pgd, "cw": _cw, "deepfool": _deepfool, "fab": _fab, "square": _square, "autoattack": _autoattack, "fast": _fast,
}  # fmt: skip


def radius_of(contest: str, radii: Radii) -> float:
    """The radius within which a contest's images count as broken."""
    return radii.l2 if contest in ("cw", "deepfool") else radii.linf


@dataclass(frozen=True)
class Setting:
    """A model of the comparison: its data, the radii of the attacks on it, and how it is trained."""

    data: str
    radii: Radii
    training: dict[str, Any]
    widths: tuple[int, ...] = (16, 32, 64)  # two to three million multiply-adds at 28 and 32 pixels

    def train(self, out: Path, data: str, options: dict[str, Any]) -> None:
        """Train into the run folder `out`."""
        overproof.train("cnn", data, out=out, model_options={"widths": self.widths}, **{**self.training, **options})


# Short trainings: what is compared are attacks, on a network that gives way and on one that resists.
ROBUST = {"method": "pgd-at", "epochs": 2, "lr": 0.2}
SETTINGS = {
    "fashion_ordinary": Setting("fashion-mnist", Radii(0.1, 0.3), {"method": "ce", "epochs": 3}),
    "fashion_robust": Setting("fashion-mnist", Radii(0.1, 1.5), {**ROBUST, "eps": 0.1, "steps": 3, "step_size": 0.05}),
    "cifar_ordinary": Setting("cifar", Radii(8 / 255, 0.1), {"method": "ce", "epochs": 3}),
    "cifar_robust": Setting("cifar", Radii(8 / 255, 0.5), {**ROBUST, "eps": 8 / 255, "steps": 2, "step_size": 5 / 255}),
    # For a rehearsal in seconds.
    "digits_ordinary": Setting("digits", Radii(0.1, 0.5), {"method": "ce", "epochs": 20}, widths=(8, 16)),
    "digits_robust": Setting(
        "digits", Radii(0.1, 0.5), {**ROBUST, "epochs": 20, "eps": 0.1, "steps": 7, "step_size": 0.025}, widths=(8, 16)
    ),
}


def source(setting: Setting, cifar: str | None) -> str:
    """The name under which the setting's data are loaded."""
    if setting.data == "cifar" and not cifar:
        raise SystemExit("CIFAR-10 (JPEG) is read from a Parquet folder in the layout of the Hub: give --cifar DIR.")
    return f"parquet:{cifar}" if setting.data == "cifar" else setting.data
