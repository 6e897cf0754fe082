"""Models with their roles, images, and everything that was computed of the two so far."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from overproof.attacks.base import logits_of
from overproof.attacks.randomness import Streams
from overproof.errors import DataError, OverproofError, UnknownNameError, UsageError
from overproof.networks import device_of, digest, full_precision, in_mode
from overproof.probes.material import Material
from overproof.probes.store import Store, fingerprint

ROLES = {
    "teacher": "from which was distilled; one",
    "student": "distilled from the teacher; one or more",
    "independent": "like the students, without any teacher; at least two seeds for the controls",
    "control": "a student that must not resemble the teacher: of another teacher, of soft labels without teacher",
    "foreign": "a network that has nothing to do with the teacher, for the foreign attack",
    "plain": "the teacher without the property in question",
}


class Pictures(Protocol):
    """Images (N, C, H, W) that may be made slice by slice; a tensor is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Tensor: ...


class Lab:
    """What probes work in: models by role, images, and a store.

    Args:
        models: images in [0, 1] -> logits (N, K), all of the same classes, by name. A name begins with the role: "teacher", "student",
            "independent", "control", "foreign" or "plain", and what follows after a space or colon tells them apart: "student:kd".
        data: a `Material`, or whatever `overproof.evaluate` takes.
        store: what is known already; what concerns the teacher lasts in it.
        batch_size: images per forward pass.

    Raises:
        UnknownNameError: a name with another role.
        UsageError: no teacher or no student, models of different classes, one that does not take such images, or two independent students
            of the same weights.
        DataError: labels that the models do not know.
    """

    def __init__(
        self, models: Mapping[str, nn.Module], data: Any, store: Store | None = None, *, batch_size: int = 256
    ) -> None:
        self.models, self.material, self.store = dict(models), Material.of(data), store or Store()
        self.batch_size = batch_size
        self.roles: dict[str, list[str]] = {role: [] for role in ROLES}
        for name in models:
            role = re.split("[ :]", name, maxsplit=1)[0]
            if role not in ROLES:
                raise UnknownNameError(f"role of the model {name!r}:", role, ROLES)
            self.roles[role].append(name)
        if len(self.roles["teacher"]) != 1 or not self.students:
            raise UsageError(
                f"Probes need one teacher and at least one student, not {len(self.roles['teacher'])} and {len(self.students)}; the models are "
                f"called {', '.join(map(repr, models)) or 'nothing'}."
            )
        self.teacher = self.roles["teacher"][0]
        self._digests: dict[str, str] = {}
        self._data = fingerprint(self.images, self.labels, self.index)
        self.classes = self._same_classes()
        self._refuse_twins()

    @property
    def images(self) -> Tensor:
        """(N, C, H, W) in [0, 1]."""
        return self.material.images

    @property
    def labels(self) -> Tensor:
        """(N,)."""
        return self.material.labels

    @property
    def index(self) -> Tensor:
        """Numbers of the images in their set (N,)."""
        assert self.material.index is not None
        return self.material.index

    @property
    def students(self) -> list[str]:
        """Names of the distilled students."""
        return self.roles["student"]

    @property
    def independents(self) -> list[str]:
        """Names of the students without teacher."""
        return self.roles["independent"]

    @property
    def judged(self) -> list[str]:
        """Students, independent ones and controls."""
        return [*self.students, *self.independents, *self.roles["control"]]

    @property
    def watched(self) -> list[str]:
        """All whose own figures are worth telling: the teacher, the teacher without the property, and the judged."""
        return [self.teacher, *self.roles["plain"], *self.judged]

    @property
    def absent(self) -> list[str]:
        """Names of the classes of which there is no image."""
        known = self.material.classes if len(self.material.classes) == self.classes else tuple(map(str, range(self.classes)))
        there = set(self.labels.tolist())
        return [name for number, name in enumerate(known) if number not in there]

    def streams(self, purpose: str, seed: int, rows: Tensor | None = None) -> Streams:
        """Random numbers that belong to the images, at `rows` if not all."""
        return Streams.named(self.index if rows is None else self.index[rows], seed, purpose)

    def some(self, most: int, seed: int) -> Tensor:
        """Rows of at most so many images, a fair draw, ascending."""
        keys = self.streams("some", seed).bits((), self.index.device)
        return keys.argsort(stable=True)[:most].sort().values

    def about(self, name: str, *parts: object) -> tuple[object, ...]:
        """What something computed of the model `name` and these images depends on, beside `parts`."""
        if name not in self._digests:
            self._digests[name] = digest(self.models[name])
        return (self._digests[name], self._data, *parts)

    def lasting(self, name: str) -> bool:
        """Whether what is computed of the model is kept in files: it serves the next student too."""
        return name == self.teacher

    @contextmanager
    def running(self, name: str) -> Iterator[tuple[nn.Module, torch.device]]:
        """The model in eval mode and full precision, and where it is."""
        model = self.models[name]
        device = device_of(model)
        with in_mode(model), full_precision(device), torch.inference_mode(False):
            yield model, device

    def predictions(self, name: str, *key: object, of: Pictures | Callable[[], Pictures]) -> Tensor:
        """Classes (N,) that the model predicts for the images `of`, which `key` names; or which `of` makes if they are needed."""
        parts = self.about(name, "predictions", *key)
        return self.store.tensor(parts, lambda: self._predicted(name, of), lasting=self.lasting(name))

    def clean(self, name: str) -> Tensor:
        """Classes (N,) that the model predicts for the images."""
        return self.predictions(name, "clean", of=self.images)

    def _predicted(self, name: str, of: Pictures | Callable[[], Pictures]) -> Tensor:
        found: list[Tensor] = []
        images = of() if callable(of) else of
        with self.running(name) as (model, device), torch.no_grad():
            for first in range(0, len(images), self.batch_size):
                batch = images[slice(first, first + self.batch_size)].to(device)
                found.append(logits_of(model, batch).argmax(dim=1).cpu())
        return torch.cat(found)

    def _same_classes(self) -> int:
        widths = {name: self._width(name) for name in self.models}
        (first, count), *others = widths.items()
        for name, width in others:
            if width != count:
                raise UsageError(
                    f"{first!r} has {count} classes and {name!r} has {width}: probes compare what models of the same classes answer."
                )
        for place, labels in (
            ("The data have", self.labels),
            *((f"The domain {d!r} has", y) for d, (_, y) in self.material.domains.items()),
        ):
            top = int(labels.max())
            if top >= count:
                raise DataError(f"{place} the label {top}, but the models only {count} classes (0 to {count - 1}).")
        return count

    def _refuse_twins(self) -> None:
        """Two seeds that are one would make the control between seeds exactly 0, and every gap seem clear."""
        known: dict[object, str] = {}
        for name in self.independents:
            first = known.setdefault(self.about(name)[0], name)
            if first != name:
                raise UsageError(
                    f"{first!r} and {name!r} have the same weights, so their difference says nothing about seeds. Give independent students "
                    "of different seeds."
                )

    def _width(self, name: str) -> int:
        try:
            with self.running(name) as (model, device), torch.no_grad():
                return logits_of(model, self.images[:1].to(device)).shape[1]
        except OverproofError:
            raise
        except Exception as error:
            shape = tuple(self.images.shape[1:])
            raise UsageError(
                f"The model {name!r} does not take images of shape {shape} ({type(error).__name__}: {error}). Name data for it."
            ) from error
