"""The result of an evaluation: a summary, a row per sample, a few images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from overproof.folder import write_arrays, write_json


def fingerprint(run: str | Path, which: str) -> str:
    """What the "best" or "last" weights of a run are known by, whenever and wherever their file was written; "" without a file."""
    try:
        with (Path(run) / "weights" / f"{which}.safetensors").open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return ""


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        summary: figures by name, as written to JSON.
        samples: arrays with a row per sample: index, label, prediction, confidence, and for each attack
            "<attack>/prediction", "<attack>/size", "<attack>/robust".
        gallery: a few images with their attacked forms.
    """

    summary: dict[str, Any]
    samples: dict[str, np.ndarray]
    gallery: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def clean(self) -> float:
        """Accuracy on untouched images, in [0, 1]."""
        return float(self.summary["clean"])

    @property
    def robust(self) -> dict[str, float]:
        """Robust accuracy per attack, in [0, 1]."""
        return {name: float(facts["robust"]) for name, facts in self.summary["attacks"].items()}

    @property
    def worst_case(self) -> float | None:
        """Share of images that are right untouched and under every attack; None without attacks."""
        value = self.summary["worst_case"]
        return None if value is None else float(value)

    @property
    def warnings(self) -> list[str]:
        """What has to be known before the figures are believed."""
        return [str(text) for text in self.summary.get("warnings", ())]

    @property
    def suspected(self) -> bool:
        """Whether the sanity panel suspects masked gradients, so that robust accuracies flatter."""
        return bool((self.summary.get("sanity") or {}).get("suspected"))

    def save(self, run: str | Path, name: str = "test") -> Path:
        """Write the evaluation into a run folder.

        Returns:
            The path of the summary.
        """
        folder = Path(run) / "evaluations"
        write_arrays(folder / f"{name}.npz", self.samples)
        if self.gallery:
            write_arrays(folder / f"{name}-gallery.npz", self.gallery)
        write_json(folder / f"{name}.json", {**self.summary, "name": name})
        return folder / f"{name}.json"

    def __repr__(self) -> str:
        attacks = "".join(f", {name} {value:.2%}" for name, value in self.robust.items())
        worst = "" if self.worst_case is None else f", worst case {self.worst_case:.2%}"
        doubt = ", masked gradients suspected" if self.suspected else ""
        told = "".join(f"\n  warning: {text}" for text in self.warnings)
        return f"Evaluation(clean {self.clean:.2%}{attacks}{worst}{doubt}, {self.summary['samples']} samples){told}"
