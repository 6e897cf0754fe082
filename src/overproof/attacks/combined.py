"""Attacks made of attacks: the worst case of several, and what wrappers around another attack have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from overproof.attacks.base import Attack, predictions, won
from overproof.attacks.randomness import Streams
from overproof.attacks.spelling import refuse_class, spelled
from overproof.attacks.threats import AnyNorm, Threat
from overproof.errors import NoGradientError, UsageError
from overproof.folding import folded
from overproof.networks import in_mode


@runtime_checkable
class Combined(Attack, Protocol):
    """An attack that consists of others, tried one after another on the images that still hold."""

    @property
    def members(self) -> Mapping[str, Attack]:
        """The attacks by name, in order."""
        ...


def build(inner: Any, **options: Any) -> Attack:
    """An attack from a value, a registered name, also with options ("pgd:steps=40"), or options such as {"attack": "pgd", "steps": 40}.

    Args:
        inner: what to build; a value is changed by the options.
        **options: fields such as eps, norm, targeted; None leaves the attack's own.

    Raises:
        UsageError: no such attack or option.
    """
    from overproof.attacks import ATTACKS

    options = {key: value for key, value in options.items() if value is not None}
    if isinstance(inner, str):
        inner = spelled(inner)
    if isinstance(inner, Mapping):
        named = dict(inner)
        made: Attack = ATTACKS.create(named.pop("attack"), **{**options, **named})
        return made
    refuse_class(inner, "An attack within another")
    try:
        changed: Attack = replace(inner, **options) if options else inner
    except TypeError as error:
        raise UsageError(f"{inner!r} does not take the options {', '.join(options)}: {error}") from None
    return changed


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """An attack around another one.

    Args:
        inner: the attack: a value, a registered name, or options such as {"attack": "pgd", "steps": 40}.
        eps, norm: for the inner attack; None means its own.
        targeted: labels are classes to be reached; also if the inner attack says so.
    """

    inner: str | Mapping[str, Any] | Attack = "pgd"
    eps: float | None = None
    norm: AnyNorm | None = None
    targeted: bool = False

    def __post_init__(self) -> None:
        attack = self.attack  # built now: a wrong name or option is an error before any work begins
        object.__setattr__(self, "targeted", self.targeted or attack.targeted)

    @property
    def attack(self) -> Attack:
        """The inner attack."""
        return build(self.inner, eps=self.eps, norm=self.norm, targeted=self.targeted or None)

    @property
    def threat(self) -> Threat:
        """What the attacker may do."""
        return self.attack.threat


@dataclass(frozen=True, kw_only=True)
class WorstCase:
    """Several attacks as one: each is tried on the images that withstood those before it.

    Args:
        attacks: values, registered names, or options such as {"attack": "pgd", "steps": 40}; in order, cheapest first.
        eps, norm: for all of them; None means their own, which must then agree.
        targeted: labels are classes to be reached; for all of them.

    Raises:
        UsageError: no attack, or attacks that do not share one threat and goal.
    """

    attacks: Sequence[str | Mapping[str, Any] | Attack] = ("fgsm", "pgd")
    eps: float | None = None
    norm: AnyNorm | None = None
    targeted: bool = False

    def __post_init__(self) -> None:
        kinds = {(repr(attack.threat), attack.targeted) for attack in self.members.values()}
        if len(kinds) != 1:
            raise UsageError(
                f"WorstCase needs attacks of one threat and goal, not {sorted(kinds) or 'none'}; set eps and norm."
            )
        object.__setattr__(self, "targeted", next(iter(kinds))[1])

    @property
    def members(self) -> dict[str, Attack]:
        """The attacks by name, in order."""
        made: dict[str, Attack] = {}
        for given in self.attacks:
            attack = build(given, eps=self.eps, norm=self.norm, targeted=self.targeted or None)
            name = given if isinstance(given, str) else type(attack).__name__.lower()
            made[name if name not in made else f"{name}-{len(made) + 1}"] = attack
        return made

    @property
    def threat(self) -> Threat:
        """What the attacker may do."""
        return next(iter(self.members.values())).threat

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        return one_after_another(self.members, model, images, labels, generator)


def one_after_another(
    members: Mapping[str, Attack], model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Try the attacks in order, each on the images that still hold.

    Where the first does not stop early (see `patient`), the model is no judge: every image is attacked, and one that nothing broke is
    what the last patient attack made of it. An attack through which no gradient reaches the images is passed over: that is for the next
    ones, black-box ones among them, to settle.

    Raises:
        NoGradientError: none of the attacks found a gradient or could do without.
    """
    streams, found, failed = Streams.of(generator, images), images.clone(), []
    with in_mode(model):
        quick = folded(model, images)
        first = next(iter(members.values()))
        holds = ~won(predictions(model, images), labels, first.targeted) | is_patient(first)
        for number, attack in enumerate(members.values()):
            rows = holds.nonzero().flatten()
            if len(rows) == 0:
                break
            through = quick if getattr(attack, "logits_only", False) else model
            try:
                tried = attack(through, images[rows], labels[rows], streams.fork(number).rows(rows))
            except NoGradientError as error:
                failed.append(error)
                continue
            broken = won(predictions(model, tried), labels[rows], attack.targeted)
            kept = broken | is_patient(attack)
            found[rows[kept]] = tried[kept]
            holds[rows[broken]] = False
    if len(failed) == len(members):
        raise failed[0]
    return found


def patient(attack: Attack) -> Attack:
    """The attack without its early end: for models that roll dice, where a lucky pass on the way is no success, and for others than the judge.

    Square, FAB and other attacks that cannot go on after a success stay as they are.
    """
    if isinstance(attack, WorstCase):
        return replace(attack, attacks=tuple(patient(member) for member in attack.members.values()))
    if isinstance(attack, Wrapper):
        calm: Any = replace(attack, inner=patient(attack.attack))
        return calm  # type: ignore[no-any-return]
    made: Any = attack
    return replace(made, early_stop=False) if hasattr(made, "early_stop") else attack


def is_patient(attack: Attack) -> bool:
    """Whether the attack goes on after a success, as `patient` makes it."""
    if isinstance(attack, WorstCase):
        return all(map(is_patient, attack.members.values()))
    if isinstance(attack, Wrapper):
        return is_patient(attack.attack)
    return getattr(attack, "early_stop", None) is False
