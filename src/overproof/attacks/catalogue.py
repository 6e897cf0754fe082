"""The attacks by name, each with its paper. Other libraries' attacks have names such as foolbox:LinfPGD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from overproof.registry import Entry, Registry


@dataclass(frozen=True)
class ForeignEntry(Entry):
    """An attack of another library; that library, not we, knows its options."""

    def load(self) -> Callable[..., Any]:
        """The builder."""
        from overproof.attacks.adapters import foreign_attack

        return partial(foreign_attack, self.name)

    def check(self, options: dict[str, Any], kind: str = "entry") -> dict[str, Any]:
        """The options as they are: the adapter checks them against the library."""
        return options


class AttackRegistry(Registry):
    """Our attacks, those of plug-ins, and LIBRARY:NAME."""

    def get(self, name: str) -> Entry:
        """The entry called `name`.

        Raises:
            UnknownNameError: no such attack or library.
        """
        if ":" in name and name not in self._entries:
            from overproof.attacks.adapters import library_of

            library_of(name.partition(":")[0])
            return ForeignEntry(
                name, "", summary=f"The attack {name.partition(':')[2]} of another library, behind our contract."
            )
        return super().get(name)


ATTACKS = AttackRegistry("attack", "overproof.attacks")
_CROCE = "Croce and Hein: Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks, ICML 2020"
_BOX, _BLACK, _SIZE = ("white-box", "gradient"), ("black-box",), ("white-box", "gradient", "minimum-norm")


def _add(name: str, target: str, summary: str, paper: str, link: str, tags: tuple[str, ...]) -> None:
    url = f"https://arxiv.org/abs/{link}" if link else ""
    ATTACKS.add(name, f"overproof.attacks.{target}", summary=summary, paper=paper, url=url, tags=tags)


_add(
    "fgsm", "fgsm:FGSM", "One step along the sign of the gradient, optionally from a random start.",
    "Goodfellow, Shlens, Szegedy: Explaining and Harnessing Adversarial Examples, ICLR 2015", "1412.6572", (*_BOX, "single-step"),
)  # fmt: skip
_add(
    "bim", "bim:BIM", "Small steps along the sign of the gradient, from the image itself (I-FGSM).",
    "Kurakin, Goodfellow, Bengio: Adversarial Examples in the Physical World, ICLR 2017 workshop", "1607.02533", _BOX,
)  # fmt: skip
_add(
    "mi-fgsm", "mifgsm:MIFGSM", "Iterated steps along an accumulated gradient; transfers well.",
    "Dong et al.: Boosting Adversarial Attacks with Momentum, CVPR 2018", "1710.06081", _BOX,
)  # fmt: skip
_add(
    "pgd", "pgd:PGD", "Projected gradient ascent with random starts, early exit per image and restarts; also targeted.",
    "Madry, Makelov, Schmidt, Tsipras, Vladu: Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018", "1706.06083",
    (*_BOX, "iterative"),
)  # fmt: skip
_add(
    "adam", "adam:AdamAttack", "Adam on the pixels towards a wrong class; goes on when it has won: deep, confident images.",
    "Yu, Hu, Guo, Chao, Weinberger: A New Defense Against Adversarial Images, NeurIPS 2019", "1910.07629", (*_BOX, "iterative"),
)  # fmt: skip
_add("apgd", "apgd:APGD", "PGD that finds its own step size; cross-entropy, DLR or targeted DLR.", _CROCE, "2003.01690", _BOX)
_add(
    "deepfool", "deepfool:DeepFool", "Steps to the nearest linearised decision boundary.",
    "Moosavi-Dezfooli, Fawzi, Frossard: DeepFool, CVPR 2016", "1511.04599", _SIZE,
)  # fmt: skip
_add(
    "carlini-wagner", "carlini_wagner:CarliniWagner", "Smallest L2 change by Adam on a penalty whose weight is searched.",
    "Carlini and Wagner: Towards Evaluating the Robustness of Neural Networks, S&P 2017", "1608.04644", _SIZE,
)  # fmt: skip
_add(
    "ddn", "ddn:DDN", "Smallest L2 change with direction and length decoupled.",
    "Rony et al.: Decoupling Direction and Norm for Efficient Gradient-Based L2 Adversarial Attacks and Defenses, CVPR 2019", "1811.09600",
    _SIZE,
)  # fmt: skip
_add(
    "fmn", "fmn:FMN", "Fast minimum-norm attack for L0, L1, L2 and Linf.",
    "Pintor, Roli, Brendel, Biggio: Fast Minimum-norm Adversarial Attacks through Adaptive Norm Constraints, NeurIPS 2021", "2102.12827",
    _SIZE,
)  # fmt: skip
_add(
    "fab", "fab:FAB", "Projections on linearised boundaries, biased towards the image.",
    "Croce and Hein: Minimally Distorted Adversarial Examples with a Fast Adaptive Boundary Attack, ICML 2020", "1907.02044", _SIZE,
)  # fmt: skip
_add(
    "bss", "bss:BSS", "Walks to just behind the boundary towards a chosen class, or one drawn by its probability.",
    "Heo, Lee, Yun, Choi: Knowledge Distillation with Adversarial Samples Supporting Decision Boundary, AAAI 2019", "1805.05532", _SIZE,
)  # fmt: skip
_add(
    "ossa", "ossa:OSSA", "One or two steps along the direction in which the answer changes most (the Fisher eigenvector).",
    "Zhao et al.: The Adversarial Attack and Detection under the Fisher Information Metric, AAAI 2019", "1810.03806", (*_BOX, "single-step"),
)  # fmt: skip
_add(
    "square", "square:Square", "Random search with squares; needs logits only.",
    "Andriushchenko, Croce, Flammarion, Hein: Square Attack, ECCV 2020", "1912.00049", (*_BLACK, "score-based"),
)  # fmt: skip
_add(
    "hop-skip-jump", "hop_skip_jump:HopSkipJump", "Walks along the decision boundary; needs predicted classes only.",
    "Chen, Jordan, Wainwright: HopSkipJumpAttack, S&P 2020", "1904.02144", (*_BLACK, "decision-based", "minimum-norm"),
)  # fmt: skip
_add("noise", "noise:Noise", "The worst of a few random points of the ball: the floor for every attack.", "", "", _BLACK)
_add(
    "autoattack", "autoattack:AutoAttack", "The worst case of APGD-CE, targeted APGD, targeted FAB and Square; also fast, quick and rand.",
    _CROCE, "2003.01690", ("ensemble",),
)  # fmt: skip
_add(
    "worst-case",
    "combined:WorstCase",
    "Several attacks as one, each tried on the images that still hold.",
    "",
    "",
    ("ensemble",),
)
_add(
    "eot", "eot:EOT", "An attack on the average of a model that rolls dice.",
    "Athalye, Engstrom, Ilyas, Kwok: Synthesizing Robust Adversarial Examples, ICML 2018", "1707.07397", ("adaptive",),
)  # fmt: skip
_add(
    "bpda", "bpda:BPDA", "An attack through parts without a useful gradient.",
    "Athalye, Carlini, Wagner: Obfuscated Gradients Give a False Sense of Security, ICML 2018", "1802.00420", ("adaptive",),
)  # fmt: skip
_add(
    "transfer", "transfer:Transfer", "An attack crafted on another model (option source, in Python; --transfer-from RUN).",
    "Papernot, McDaniel, Goodfellow: Transferability in Machine Learning, 2016", "1605.07277", _BLACK,
)  # fmt: skip
