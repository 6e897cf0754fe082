"""All probes at once, over one store: what several of them need is computed once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from overproof import console
from overproof.errors import UnknownNameError
from overproof.folder import write_arrays, write_json
from overproof.probes import PROBES
from overproof.probes.base import FEWER, Probe, Result
from overproof.probes.intervals import RESAMPLES
from overproof.probes.lab import Lab
from overproof.probes.store import Store

FEW = 10  # names in a message


@dataclass(frozen=True)
class Explanation:
    """What the probes found.

    Attributes:
        results: by probe.
        facts: about the models and images.
    """

    results: Mapping[str, Result]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, probe: str) -> Result:
        return self.results[probe]

    @property
    def skipped(self) -> dict[str, str]:
        """Probes that could not answer, and why."""
        return {name: result.skipped for name, result in self.results.items() if result.skipped}

    @property
    def summary(self) -> dict[str, Any]:
        """All figures in plain values, as written to JSON."""
        return {**self.facts, "probes": {name: result.summary for name, result in self.results.items()}}

    @property
    def pictures(self) -> dict[str, np.ndarray]:
        """Arrays by "PROBE/NAME"."""
        return {f"{name}/{key}": value for name, result in self.results.items() for key, value in result.pictures.items()}

    def save(self, folder: str | Path) -> Path:
        """Write explanation.json and explanation.npz into `folder`; returns the path of the former."""
        path = Path(folder) / "explanation.json"
        write_arrays(path.with_suffix(".npz"), self.pictures)
        write_json(path, self.summary)
        return path

    def __repr__(self) -> str:
        gaps = ((name, result.number) for name, result in self.results.items())
        return f"Explanation({', '.join(f'{name} {number.value:.3f}' for name, number in gaps if number is not None)})"


def explain(
    models: Mapping[str, nn.Module],
    data: Any,
    *,
    probes: Sequence[str] | str = "all",
    options: Mapping[str, Mapping[str, Any]] | None = None,
    store: Store | str | Path | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    batch_size: int = 256,
) -> Explanation:
    """In which respects have students become like their teacher?

    Args:
        models: by role, see `Lab`: {"teacher": t, "student": s, "independent:0": a, "independent:1": b}.
        data: held-out images: a `Material`, or whatever `overproof.evaluate` takes.
        probes: names from `overproof list probes`, or "all".
        options: of probes, by name.
        store: what is known already, or the folder in which what concerns the teacher is kept for the next students; None: nothing is kept.
        seed, resamples: for all probes that are not told otherwise.
        batch_size: images per forward pass.

    Raises:
        UnknownNameError: no such probe, option or role.
        UsageError: models that cannot be compared, or options out of range.
        DataError: images, labels or groups that do not fit together.
    """
    wanted = PROBES.names() if probes in ("all", ["all"], ("all",)) else [probes] if isinstance(probes, str) else list(probes)
    given = {name: dict(found) for name, found in (options or {}).items()}
    for name in given:
        if name not in wanted:
            raise UnknownNameError("probe to give options to:", name, wanted)
    common: dict[str, Any] = {"seed": seed, "resamples": resamples}
    made: dict[str, Probe] = {name: PROBES.create(name, **{**common, **given.get(name, {})}) for name in wanted}
    lab = Lab(models, data, store if isinstance(store, Store) else Store(store), batch_size=batch_size)
    results, seconds = {}, {}
    with console.bar("probing", len(made)) as bar:
        for number, (name, probe) in enumerate(made.items()):
            begun = time.perf_counter()
            results[name] = probe.result(lab)
            seconds[name] = round(time.perf_counter() - begun, 3)
            bar.update(number + 1)
    return Explanation(
        results, {**_facts(lab), "options": {name: asdict(probe) for name, probe in made.items()}, "seconds": seconds}
    )


def _facts(lab: Lab) -> dict[str, Any]:
    notes = [] if len(lab.independents) >= 2 else [FEWER]
    if absent := lab.absent:
        more = f" and {len(absent) - FEW} more" if len(absent) > FEW else ""
        notes.append(f"no held-out image of {', '.join(absent[:FEW])}{more}: no figure here says anything of such images")
    accuracy = {name: float((lab.clean(name) == lab.labels).double().mean()) for name in lab.watched}
    return {
        "images": len(lab.images),
        "domains": list(lab.material.domains),
        "classes": list(lab.material.classes),
        "roles": {role: names for role, names in lab.roles.items() if names},
        "accuracy": accuracy,
        "notes": notes,
    }
