"""Where a run took place: versions, device, command, commit; and who owns a folder."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from overproof.config import RunConfig, resolve
from overproof.errors import FolderError, NonFiniteLossError, UsageError
from overproof.folder import RunFolder

CHOSEN = "OVERPROOF_RUN_"  # and the number of the call: environment variables that tell further processes the folder
_calls = itertools.count()
# What a run may be continued with otherwise than it was begun: none of it changes what comes out.
SPARE = ("train.workers", "train.loggers", "train.checkpoint_seconds", "evaluation.batch_size")


def claim(folder: RunFolder, config: RunConfig, resume: bool) -> list[Path]:
    """Make the folder ours, or say who owns it; returns the folders that had to be made, the innermost first."""
    if folder.exists:
        state = folder.status.get("state")
        if not resume and state == "failed":
            raise FolderError(_dead_end(folder))
        if not resume:
            raise FolderError(
                f"{folder.path} holds another run (state: {state}). Choose another --out, or continue it with "
                f"`overproof resume {folder.path}`."
            )
        # Resolved again: options that have come since the run began have their defaults.
        known = resolve(folder.config).table() if (folder.path / "config.toml").exists() else config.table()
        if changed := _differences(known, config.table()):
            raise FolderError(
                f"{folder.path} holds a run with another configuration ({changed}). Choose another --out. (Only {', '.join(SPARE)} may "
                "change.)"
            )
        return []
    ours = {".lock", ".config.toml.partial"}  # all that a run killed in its first moment leaves
    if folder.path.exists() and (not folder.path.is_dir() or any(p.name not in ours for p in folder.path.iterdir())):
        raise FolderError(f"{folder.path} exists and is not a run folder. Choose another --out, or empty it.")
    made = [place for place in (folder.path, *folder.path.parents) if not place.exists()]
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"{folder.path} cannot be made: {error.strerror}.") from error
    return made


def _dead_end(folder: RunFolder) -> str:
    """What to do with the folder of a run that failed: where its numbers ran away, to go on would end in the same way."""
    why = str(folder.status.get("message") or "")
    known = f"{folder.path} holds a run that failed ({why.partition('. ')[0] or 'nobody knows why'}). Delete the folder, or choose another --out"
    if why.startswith(NonFiniteLossError.__name__):
        return f"{known}."
    return f"{known}; if what stopped it was put right (a full disk, say), `overproof resume {folder.path}` continues it."


def _differences(old: Any, new: Any, place: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [_differences(old.get(k), new.get(k), f"{place}.{k}" if place else k) for k in sorted({*old, *new})]
        return ", ".join(p for p in parts if p)
    return "" if old == new or place in SPARE else f"{place}: {old!r} there, {new!r} here"


def environment(device: Any) -> dict[str, Any]:
    """Versions, device and command of this process."""
    versions = {}
    for name in ("overproof", "torch", "torchvision", "timm", "lightning", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    device = torch.device(device)
    return {
        **versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The commit of the source tree Overproof runs from; empty if it is not one."""
    here = Path(__file__).resolve().parent
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude", "*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 and "site-packages" not in here.parts else ""


def free(name: str, *, resume: bool) -> Path:
    """The next free `runs/NAME-n`; in a process that another one has started, the one that was chosen there.

    Raises:
        UsageError: a run is to be continued, or several processes would choose, and none is named.
    """
    if resume or (int(os.environ.get("WORLD_SIZE") or 1) > 1 and "TORCHELASTIC_RUN_ID" in os.environ):
        why = "resume=True continues the run in `out`" if resume else "Under torchrun every process has to know the folder"
        raise UsageError(f"{why}: say which, such as out='runs/{name}-1'.")
    key = f"{CHOSEN}{next(_calls)}"
    if int(os.environ.get("LOCAL_RANK") or 0) and key in os.environ:
        return Path(os.environ[key])
    places = (Path(f"runs/{name}-{number}") for number in itertools.count(1))
    chosen = next(place for place in places if not place.exists())
    os.environ[key] = str(chosen)  # processes that are started for this run call the same program again
    return chosen
