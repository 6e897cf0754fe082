"""Run folders as they are found: whole, unfinished or damaged. What cannot be read becomes a warning, never a crash."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from overproof.errors import FolderError, UsageError
from overproof.folder import RunFolder, read_arrays, read_json
from overproof.report.flatness import flatness_lines
from overproof.report.values import attack_facts, items, number, sanity_facts, table

TRACES = ("status.json", "config.toml", "environment.json", "metrics.jsonl", "model.json", "evaluations")
PREFERRED = ("test", "test-best", "best")


@dataclass
class Run:
    """What one run folder says; parts that are missing or damaged are empty."""

    folder: RunFolder
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    _gallery: dict[str, np.ndarray] | None = field(default=None, repr=False)

    @property
    def chosen(self) -> str | None:
        """The evaluation that stands for the run: "test" or "test-best" where there is one, else the first by name."""
        return next((name for name in (*PREFERRED, *sorted(self.evaluations)) if name in self.evaluations), None)

    @property
    def evaluation(self) -> dict[str, Any]:
        """The chosen evaluation, or {}."""
        return self.evaluations[self.chosen] if self.chosen else {}

    def section(self, name: str) -> dict[str, Any]:
        """A table of the configuration, or {}."""
        return table(self.config.get(name))

    def gallery(self) -> dict[str, np.ndarray]:
        """Example images and loss surfaces of the chosen evaluation, or {}; a damaged file adds a warning."""
        if self._gallery is None:
            self._gallery = self._try("gallery", lambda: self.folder.arrays(self.chosen or "", "gallery"), {})
        return self._gallery or {}

    def pictures(self) -> dict[str, np.ndarray]:
        """What the method has to show, or {}; a damaged file adds a warning."""
        path = self.folder.path / "method.npz"
        return self._try("method.npz", lambda: read_arrays(path), {}) if path.exists() else {}

    def read(self) -> Run:
        """Fill this record from the folder."""
        for part in ("config", "environment", "status", "method", "samples"):
            setattr(self, part, self._try(part, partial(getattr, self.folder, part), {}))
        if (path := self.folder.path / "model.json").exists():
            self.model = self._try("model.json", partial(_table_in, path), {})
        self.metrics = self._try("metrics.jsonl", self._metrics, [])
        for path in sorted((self.folder.path / "evaluations").glob("*.json")):
            found = self._try(path.name, partial(_evaluation, path), {})
            if found:
                self.evaluations[path.stem] = found
        return self

    def _metrics(self) -> list[dict[str, Any]]:
        records = [record for record in self.folder.metrics if isinstance(record, dict)]
        path = self.folder.path / "metrics.jsonl"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        if len(records) < len(lines) - 1:  # a last line that a crash cut short is expected, more is damage
            self.warnings.append(f"{path}: line {len(records) + 1} is damaged; the epochs after it are left out.")
        return records

    def _try(self, part: str, read: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return read()
        except FolderError as error:
            self.warnings.append(str(error))
        except (ValueError, TypeError, OSError) as error:
            self.warnings.append(f"{self.folder.path}: {part} cannot be read ({error}).")
        return otherwise


def _table_in(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise FolderError(f"{path} holds a {type(value).__name__} where a JSON object is expected.")
    return value


def _evaluation(path: Path) -> dict[str, Any]:
    """The summary with every part of the expected type, so that nobody after this has to ask."""
    raw = _table_in(path)
    if number(raw.get("clean")) is None:
        raise FolderError(f'{path} has no number "clean"; evaluate the run again.')
    figures = ("clean", "worst_case", "ece", "nll", "parameters", "macs", "samples", "seconds")
    parts = ("curve", "agreement", "per_class", "latency_ms", "guard")
    return {
        **raw,
        **{key: number(raw.get(key)) for key in figures},
        **{key: table(raw.get(key)) for key in parts},
        "attacks": {name: attack_facts(facts) for name, facts in table(raw.get("attacks")).items() if isinstance(facts, dict)},
        "sanity": sanity_facts(raw.get("sanity")),
        "flatness": flatness_lines(raw.get("fisher")),
        "classes": [str(name) for name in items(raw.get("classes"))],
        "warnings": [str(text) for text in items(raw.get("warnings"))],
    }


def _names(paths: Sequence[Path]) -> Iterator[str]:
    """The last part of each path, with as many parents as it takes to tell them apart."""
    whole = [path.resolve() for path in paths]
    for path in whole:
        depth = 1
        while depth < len(path.parts) and sum(other.parts[-depth:] == path.parts[-depth:] for other in whole) > 1:
            depth += 1
        yield "/".join(path.parts[-depth:])


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Every run in `folders`, in the order given, each folder once.

    Raises:
        UsageError: no folder is given.
        FolderError: a folder does not exist or shows no trace of a run.
    """
    paths = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())
    if not paths:
        raise UsageError("No run folder was given to report on. Name at least one, such as runs/kd.")
    for path in paths:
        if not any((path / trace).exists() for trace in TRACES):
            RunFolder(path).require()
    return [Run(RunFolder(path), name).read() for path, name in zip(paths, _names(paths), strict=True)]
