"""What an adapter has to say about a library, and what it is handed for a run."""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from overproof.attacks.threats import AnyNorm
from overproof.errors import UnknownNameError, UsageError

Builder = Callable[..., Any]


@dataclass(frozen=True)
class Facts:
    """What an attack of a library is.

    Args:
        minimum: it looks for the smallest change and takes no radius.
        norms: those it knows, its own default first.
        options: names it takes besides radius, norm and target.
        required: those of them without a default.
        targeted: whether it can be told a class to reach, as far as the library lets us see.
    """

    minimum: bool
    norms: tuple[AnyNorm, ...]
    options: frozenset[str]
    required: frozenset[str] = frozenset()
    targeted: bool = True


@dataclass(frozen=True)
class Call:
    """One batch to be attacked: images (N, C, H, W) that still hold, and what the attack was told."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    classes: int
    eps: float
    norm: AnyNorm
    targeted: bool
    options: Mapping[str, Any]
    seed: int


class Library(ABC):
    """One library: the names of its attacks, what each takes, and how one is run."""

    prefix: ClassVar[str]
    module: ClassVar[str]
    install: ClassVar[str]
    taken: ClassVar[frozenset[str]]  # parameters that the adapter fills in itself

    def load(self) -> Any:
        """The module that holds the attacks.

        Raises:
            UsageError: it is not installed, lacks something, or fails to import.
        """
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            owner = self.module.partition(".")[0]
            lacks = "" if error.name == owner else f" ({owner} itself asks for the missing module {error.name!r})"
            raise UsageError(
                f"{self.prefix}: attacks need a package that is not here{lacks}: pip install {self.install}"
            ) from None
        except Exception as error:
            raise UsageError(f"{self.prefix}: importing {self.module} failed with {type(error).__name__}: {error}") from error

    def builder(self, name: str) -> Builder:
        """The library's class or function called `name`.

        Raises:
            UnknownNameError: there is none; offers the nearest names.
        """
        known = self.attacks()
        if name not in known:
            raise UnknownNameError(f"{self.prefix} attack", name, known)
        return known[name]

    def options_of(self, builder: Builder) -> tuple[frozenset[str], frozenset[str]]:
        """Names of the options of a builder, and those of them without a default."""
        free = {name: p for name, p in parameters_of(builder).items() if name not in self.taken}
        return frozenset(free), frozenset(name for name, p in free.items() if p.default is inspect.Parameter.empty)

    @abstractmethod
    def attacks(self) -> dict[str, Builder]:
        """The library's attacks by name."""

    @abstractmethod
    def facts(self, builder: Builder) -> Facts:
        """What `builder` makes."""

    @abstractmethod
    def run(self, builder: Builder, call: Call) -> Tensor:
        """The library's answer for one batch."""


def parameters_of(builder: Builder) -> dict[str, inspect.Parameter]:
    """The named parameters of a class or function; *args and **kwargs say nothing and are left out."""
    loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: p for name, p in inspect.signature(builder).parameters.items() if p.kind not in loose}


def scaled_step(builder: Builder, call: Call, step: str, eps: str = "eps") -> dict[str, float]:
    """The default step of an attack that counts in pixels, grown with the ball: at the library's own radius it is its own."""
    known = parameters_of(builder)
    if step not in known or eps not in known or step in call.options:
        return {}
    length, radius = known[step].default, known[eps].default
    numbers = all(isinstance(value, float | int) for value in (length, radius))
    return {step: length * call.eps / radius} if numbers and radius else {}
