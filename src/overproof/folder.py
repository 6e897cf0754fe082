"""A run is a folder that can be read without Overproof; this file reads and writes it, and needs no torch.

RUN/
  config.toml            resolved configuration: `overproof run RUN/config.toml` repeats the run
  environment.json       versions, device, command, commit
  status.json            {"state": "running" | "done" | "failed" | "interrupted", "step", "epoch", "message", ...}
  metrics.jsonl          one JSON object a line and epoch
  model.json             how to rebuild the model
  data.json              how many images of each class and subgroup there are, if that is known
  method.json            what the method learned beside the model, if it did; method.npz: what of it can be looked at
  generator.json         how to rebuild the generator that a method has trained, with weights/generator.safetensors
  samples.json           figures of what a generator makes; samples/: pictures after so many steps, step-NNNNNNNN.png
  weights/               best.safetensors, last.safetensors
  checkpoint.pt          everything needed to resume (read with weights_only=True)
  evaluations/NAME.json  summary, with NAME.npz (a row per sample) and NAME-gallery.npz (a few images)
  explanation.json       what probes found, with explanation.npz (what of it can be looked at)
  probes/                what was computed of this run as a teacher, for the next student
  guards/NAME.json       a guard's options and findings, with NAME.safetensors (its tensors) and NAME.npz (what can be looked at)
  report.html
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from overproof.errors import FolderError

MARKER = "status.json"


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under `path` complete or not at all.

    Raises:
        FolderError: the disk is full or not writable; what was there before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise FolderError(disk_message(path, error)) from error
    finally:
        partial.unlink(missing_ok=True)


def disk_message(path: Path, error: OSError) -> str:
    """What went wrong with the disk, and what to do."""
    if error.errno == errno.ENOSPC:
        return (
            f"No space is left on the disk for {path}. What was written before is intact: free some space, then continue "
            f"with `overproof resume {path.parent if path.parent.name not in ('weights', 'evaluations') else path.parent.parent}`."
        )
    return f"Could not write {path}: {error.strerror or error}."


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically."""
    with atomic(path) as file:
        file.write(json.dumps(plain(value), indent=2, allow_nan=False).encode() + b"\n")


def plain(value: Any) -> Any:
    """`value` as JSON can say it: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def read_json(path: Path) -> Any:
    """The JSON value in `path`.

    Raises:
        FolderError: absent or not JSON.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise FolderError(f"{path} does not exist.") from None
    except (ValueError, OSError) as error:
        raise FolderError(f"{path} is not readable as JSON ({error}).") from error


def read_table(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; anything else there is a FolderError."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise FolderError(f"{path} holds a {type(value).__name__} where a JSON object is expected.")
    return value


def write_toml(path: Path, value: Mapping[str, Any]) -> None:
    """Write a table as TOML, atomically; keys whose value is None are left out."""
    import tomli_w

    def clean(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {k: clean(v) for k, v in item.items() if v is not None}
        return [clean(v) for v in item] if isinstance(item, list | tuple) else item

    with atomic(path) as file:
        file.write(tomli_w.dumps(clean(value)).encode())


def read_toml(path: Path) -> dict[str, Any]:
    """The table in `path`.

    Raises:
        FolderError: absent or not TOML; names the line.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise FolderError(f"{path} does not exist.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise FolderError(f"{path} is not readable as TOML: {error}.") from error


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays as compressed NPZ, atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict(arrays))  # type: ignore[arg-type]
    with atomic(path) as file:
        file.write(buffer.getvalue())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Named arrays from an NPZ file; object arrays, which could execute code, are refused.

    Raises:
        FolderError: absent, truncated or not plain arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise FolderError(f"{path} does not exist.") from None
    except Exception as error:
        raise FolderError(f"{path} is not a readable NPZ file of plain arrays ({error}).") from error


class RunFolder:
    """One run folder, by path; everything is read when asked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def exists(self) -> bool:
        """Whether this folder holds a run, if only just begun."""
        return (self.path / MARKER).is_file() or (self.path / "config.toml").is_file()

    def require(self) -> RunFolder:
        """This folder, or an error if it holds no run.

        Raises:
            FolderError: there is no run here.
        """
        if not self.exists:
            raise FolderError(f"{self.path} is not a run folder (no config.toml in it). Give the folder named by --out.")
        return self

    def _facts(self, name: str) -> dict[str, Any]:
        return read_table(self.path / name) if (self.path / name).exists() else {}

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        return read_toml(self.path / "config.toml")

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, device and command."""
        return self._facts("environment.json")

    @property
    def status(self) -> dict[str, Any]:
        """State of the run."""
        return self._facts(MARKER) if (self.path / MARKER).is_file() else {"state": "begun"}

    def write_status(self, state: str, **facts: Any) -> None:
        """Record the state, keeping earlier facts that are not given anew."""
        known = self.status
        write_json(self.path / MARKER, {**known, "state": state, **facts})

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One record per finished epoch; a last line cut off by a crash is ignored."""
        path = self.path / "metrics.jsonl"
        records = []
        for line in path.read_text("utf-8").splitlines() if path.exists() else []:
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    @property
    def data(self) -> dict[str, Any]:
        """How many images of each class there are; {} if that is not known."""
        return self._facts("data.json")

    @property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """Evaluation summaries by name."""
        return {path.stem: read_table(path) for path in sorted((self.path / "evaluations").glob("*.json"))}

    @property
    def method(self) -> dict[str, Any]:
        """What the method learned beside the model; {} if nothing."""
        return self._facts("method.json")

    @property
    def samples(self) -> dict[str, Any]:
        """What the samples of the run's generator show; {} if it was not looked at."""
        return self._facts("samples.json")

    def arrays(self, evaluation: str, kind: str = "") -> dict[str, np.ndarray]:
        """Per-sample records of an evaluation, or with kind="gallery" its example images; {} if not kept."""
        path = self.path / "evaluations" / (f"{evaluation}-{kind}.npz" if kind else f"{evaluation}.npz")
        return read_arrays(path) if path.exists() else {}
