"""Guards on disk: RUN/guards/NAME.safetensors with the tensors, NAME.json with options and findings. Nothing is executed."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overproof.errors import FolderError, UsageError
from overproof.folder import atomic, read_json, write_json
from overproof.guards import GUARDS
from overproof.guards.base import Guard
from overproof.models.weights import read_state

HOME = "guards"


def save_guard(guard: Guard, run: str | Path, name: str | None = None, **about: Any) -> Path:
    """Write a fitted guard into a run folder, in place of the one that had the name before.

    Args:
        guard: a registered guard.
        run: the folder.
        name: of the files; the registered name if None.
        **about: further JSON-able facts for the reader of the file, under "about".

    Returns:
        The path of the JSON file.

    Raises:
        UsageError: the guard is not fitted or not registered.
        FolderError: the disk is full or not writable.
    """
    from safetensors.torch import save_file

    guard.require_fitted()
    kind = next((entry.name for entry in GUARDS.entries() if entry.load() is type(guard)), None)
    if kind is None:
        raise UsageError(
            f"{type(guard).__name__} is not registered, so it could not be loaded again: GUARDS.register('name') comes first."
        )
    folder, name, stamp = Path(run) / HOME, name or kind, uuid.uuid4().hex
    tensors = {key: value.detach().cpu().contiguous() for key, value in guard.state().items()}
    with atomic(folder / f"{name}.safetensors") as file:
        save_file(tensors, file.name, metadata={"stamp": stamp})
    facts = {"guard": kind, "place": guard.place, "stamp": stamp, "options": guard.options(), "facts": guard.facts}
    write_json(folder / f"{name}.json", {**facts, "description": guard.describe(), "about": about})
    return folder / f"{name}.json"


def load_guard(path: str | Path) -> Guard:
    """The guard of a JSON file, on the CPU.

    Raises:
        FolderError: absent, truncated, of two different fits, of an unknown kind, or not what a guard of its kind keeps.
    """
    path = Path(path)
    facts = read_json(path)
    if not isinstance(facts, Mapping) or not {"guard", "stamp", "options", "facts"} <= facts.keys():
        raise FolderError(f"{path} does not describe a guard. Fit it again: overproof guard fit.")
    tensors = path.with_suffix(".safetensors")
    state = read_state(tensors)
    if _stamp(tensors) != facts["stamp"]:
        raise FolderError(f"{path} and {tensors.name} come from different fits. Fit the guard again: overproof guard fit.")
    try:
        guard: Guard = GUARDS.create(str(facts["guard"]), **facts["options"])
        return guard.restore(state, facts["facts"]).eval()
    except UsageError as error:
        raise FolderError(f"{path} cannot be used: {error}") from error


def _stamp(path: Path) -> str:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get("stamp", ""))
    except Exception as error:
        raise FolderError(f"{path} is truncated or no safetensors file ({error}).") from error


def load_guards(run: str | Path) -> dict[str, Guard]:
    """The guards of a run folder by place ("cache", "detector", "purifier"): the arguments of `Guarded`.

    Raises:
        FolderError: there is none, there are two for one place, or one is damaged.
    """
    found: dict[str, Guard] = {}
    for path in sorted((Path(run) / HOME).glob("*.json")):
        guard = load_guard(path)
        if guard.place in found:
            raise FolderError(f"{path.parent} holds two guards for the place of the {guard.place}; remove one of them.")
        found[guard.place] = guard
    if not found:
        raise FolderError(f"{run} holds no guard. Fit one: overproof guard fit {run} --cache")
    return found


def describe_guards(run: str | Path) -> dict[str, dict[str, Any]]:
    """What the guards of a run folder are, by name, without loading their tensors; {} if there are none."""
    found = {}
    for path in sorted((Path(run) / HOME).glob("*.json")):
        facts = read_json(path)
        if not isinstance(facts, Mapping):
            raise FolderError(f"{path} does not describe a guard. Fit it again: overproof guard fit.")
        found[path.stem] = dict(facts)
    return found
