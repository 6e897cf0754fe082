"""Run folders as they are found: whole, unfinished or damaged. What cannot be read becomes a warning, never a crash."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from overproof.errors import FolderError, UsageError
from overproof.evaluation.records import fingerprint
from overproof.folder import RunFolder, read_arrays, read_table
from overproof.report.flatness import flatness_lines
from overproof.report.values import attack_facts, items, number, sanity_facts, table

TRACES = ("status.json", "config.toml", "environment.json", "metrics.jsonl", "model.json", "evaluations")
# Keys of [data] that do not change the images of the test split.
OF_TRAINING = {
    "root",
    "validation",
    "split_seed",
    "long_tail",
    "limit_train",
    "augment",
    "extra",
    "extra_share",
    "extra_options",
}
OF_TRAINING |= {"attribute", "attribute_file"}
USUAL = (("data", None), ("split", "test"), ("weights", "best"))  # what an evaluation is of that does not say


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
    damaged: list[str] = field(default_factory=list)
    outdated: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    _gallery: dict[str, np.ndarray] | None = field(default=None, repr=False)

    @property
    def chosen(self) -> str | None:
        """The evaluation that stands for the run: of its own test images and best weights, that of most images.

        Without any, one of its last weights, of other images or behind guards stands in. None is of weights that the run no longer has.
        """
        return next(iter(self._standing()), None)

    @property
    def alike(self) -> list[str]:
        """The chosen evaluation, and all others of the same images and weights, or of a part of these images; most images first."""
        known = self._standing()
        return [name for name in known if self.measured(name) == self.measured(known[0])]

    def measured(self, name: str) -> dict[str, str]:
        """In what an evaluation is not one of the run's own test images with its best weights; {} if it is."""
        found, own = self.evaluations[name], {"validation_from": "train", **self.section("data")}
        set_, split, weights = (str(found.get(key) or usual) for key, usual in USUAL)
        asked = {"validation_from": "train", **table(table(found.get("protocol")).get("data"))}
        keys = (own.keys() | asked.keys()) - OF_TRAINING - {"name"} if "name" in own and "name" in asked else set()
        changed = [f"{key}={asked.get(key)}" for key in sorted(keys) if asked.get(key) != own.get(key)]
        apart = {"guards": "behind guards"} if found["guard"] else {}
        apart |= {"weights": f"{weights} weights"} if weights != "best" else {}
        apart |= {"split": f"{split} split"} if split != "test" else {}
        if changed or set_ not in ("None", str(own.get("name", set_))):
            apart["data"] = " ".join(["data", set_, *changed])
        return apart

    def _standing(self) -> list[str]:
        """Evaluations of weights that the run still has, those that speak for it first."""

        def rank(name: str) -> tuple[Any, ...]:
            found, apart = self.evaluations[name], self.measured(name)
            foreign = [part in apart for part in ("guards", "data", "split", "weights")]
            # Of the same images and weights, the one that tells most about attacks has the examples and the sanity panel.
            return *foreign, -(found["samples"] or 0), -len(found["attacks"]), name not in ("test", "test-best"), name

        return sorted((name for name in self.evaluations if name not in self.outdated), key=rank)

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
            self.model = self._try("model.json", partial(read_table, path), {})
        self.metrics = self._try("metrics.jsonl", self._metrics, [])
        for path in sorted((self.folder.path / "evaluations").glob("*.json")):
            found = self._try(path.name, partial(_evaluation, path), {})
            if found:
                self.evaluations[path.stem] = found
            else:
                self.damaged.append(path.stem)
        self.outdated = self._outdated()
        return self

    def _outdated(self) -> list[str]:
        """Evaluations of weights that the run no longer has, as far as they say what weights they are of."""
        told = [(name, str(e.get("weights")), e["fingerprint"]) for name, e in self.evaluations.items() if e.get("fingerprint")]
        asked = {"best", "last"} & {which for _, which, _ in told}
        now = {which: fingerprint(self.folder.path, which) for which in asked}
        return [name for name, which, made_of in told if now.get(which, "") not in ("", made_of)]

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


def _evaluation(path: Path) -> dict[str, Any]:
    """The summary with every part of the expected type, so that nobody after this has to ask."""
    raw = read_table(path)
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


def runs_in(folder: Path) -> list[Path]:
    """`folder`, or the run folders in it or one level deeper if it is none, in sorted order; [] without any."""
    if any((folder / trace).exists() for trace in TRACES):
        return [folder]
    inside = sorted(path for path in folder.glob("[!.]*") if path.is_dir())
    below = {path: [path] if RunFolder(path).exists else sorted(path.glob("[!.]*")) for path in inside}
    return [path for paths in below.values() for path in paths if RunFolder(path).exists]


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Every run in `folders`, in the order given, each once; a folder that is no run stands for the runs in it (`runs_in`).

    Raises:
        UsageError: no folder is given.
        FolderError: a folder does not exist, or there is no trace of a run in it.
    """
    found = {folder: runs_in(Path(folder)) for folder in folders}
    if not found:
        raise UsageError("No run folder was given to report on. Name at least one, such as runs/kd.")
    for folder, runs in found.items():
        if not runs:
            raise FolderError(
                f"{folder} is not a run folder (no config.toml in it), and holds none. Give the folder named by --out, or one that it lies in."
            )
    paths = list({path.resolve(): path for runs in found.values() for path in runs}.values())
    return [Run(RunFolder(path), name).read() for path, name in zip(paths, _names(paths), strict=True)]
