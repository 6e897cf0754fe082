"""Weights on disk: safetensors beside a JSON that says how to rebuild the model. Nothing here executes what it reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from overproof.console import note
from overproof.errors import FolderError
from overproof.folder import atomic, read_json, write_json
from overproof.models.classifier import Classifier, parameters_of
from overproof.models.factory import rebuild

Which = Literal["best", "last"]
_NORMALISATION = re.compile(r"(^|\.)(normali[sz]\w*\.\w+|mean|std|mu|sigma)$")


def save_weights(model: nn.Module, run: Path, which: str) -> None:
    """Write `run/weights/<which>.safetensors` and `run/model.json`."""
    from safetensors.torch import save

    # Tied tensors are written once under each name: safetensors refuses shared memory, so each gets its own.
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    with atomic(run / "weights" / f"{which}.safetensors") as file:
        file.write(save(state))
    if not (run / "model.json").exists():
        write_json(run / "model.json", describe(model))


def describe(model: nn.Module) -> dict[str, Any]:
    """How to rebuild `model`, or only its class if it is a foreign module."""
    kind = type(model.net if isinstance(model, Classifier) else model)
    return {
        "spec": getattr(model, "spec", None),
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "parameters": parameters_of(model),
    }


def load_model(run: str | Path, which: str = "best", model: nn.Module | None = None, *, trusted: bool = False) -> nn.Module:
    """The trained model of a run folder, in eval mode on the CPU.

    Args:
        run: a run folder.
        which: "best" (by validation) or "last".
        model: a module of the same structure to fill, for a model that Overproof did not build itself.
        trusted: allow a folder that names a package.module:callable to import and run it.

    Raises:
        FolderError: no such run or weights, damaged weights, or weights that do not fit.
    """
    run = Path(run)
    path = run / "weights" / f"{which}.safetensors"
    if not path.exists():
        raise FolderError(
            f"{run} holds no {which} weights ({path} does not exist). If its training has not finished its first epoch, "
            f"`overproof resume {run}` continues it; otherwise check the folder's name."
        )
    if model is None:
        facts = read_json(run / "model.json")
        if not isinstance(facts, dict) or not facts.get("spec"):
            kind = facts.get("class") if isinstance(facts, dict) else None
            raise FolderError(
                f"The model in {run} {f'has the class {kind}, which' if kind else 'has a class that'} Overproof did not build, so it cannot be "
                f"rebuilt from the folder. Build it yourself and pass it: overproof.load({str(run)!r}, model=...), overproof.predict(..., model=...)."
            )
        model = rebuild(facts["spec"], trusted=trusted)
    fill(model, read_state(path), path)
    return model.eval()


def fill(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load `state` into `model`, saying plainly what does not fit.

    Raises:
        FolderError: names or shapes differ.
    """
    own = model.state_dict()
    wrong = [
        f"{n} is {tuple(state[n].shape)} there and {tuple(own[n].shape)} here"
        for n in own
        if n in state and own[n].shape != state[n].shape
    ]
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    for problem, names in (("missing", missing), ("not in the model", extra), ("of another shape", wrong)):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise FolderError(f"{path} does not fit the model: {problem}: {shown}. Is it another architecture or class count?")
    model.load_state_dict(state)


def fill_foreign(model: Classifier, state: dict[str, Tensor], path: Path) -> None:
    """Load weights that somebody else saved: of the whole classifier, or of the network behind our first layer.

    Names may stand under the prefixes of wrappers ("module.", "model.", "net.", "_orig_mod."). What lies beside the part that
    fits (a second copy) and a normalisation layer of the wrapper's are left out, which is said.

    Raises:
        FolderError: names or shapes differ.
    """
    offers = [(target, _unwrapped(state, set(target.state_dict()))) for target in (model, model.net)]
    target, found = min(offers, key=lambda offer: len(set(offer[0].state_dict()) - set(offer[1])))
    if target is model.net:
        own = set(target.state_dict())
        found = {name: value for name, value in found.items() if name in own or not _NORMALISATION.search(name)}
    if len(found) < len(state):
        note(
            f"note: {path}: {len(state) - len(found)} of its {len(state)} tensors are not part of the network. If it expects "
            "normalised images, say so with --mean and --std."
        )
    fill(target, found, path)


def _unwrapped(state: dict[str, Tensor], known: set[str]) -> dict[str, Tensor]:
    """`state` without the prefix that hides the `known` names; as it is if there is none."""
    best = state
    for prefix in ("module.", "model.", "net.", "_orig_mod."):
        inner = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if inner and len(known & set(found := _unwrapped(inner, known))) > len(known & set(best)):
            best = found
    return best


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file, or from a PyTorch file of plain tensors.

    A dict that wraps the weights under "state_dict", "model" or "net" is opened, and a "module." prefix is removed.

    Raises:
        FolderError: absent, truncated, or anything but tensors. Nothing in the file is executed.
    """
    path = Path(path)
    if not path.is_file():
        raise FolderError(f"{path}: no such file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: dict[str, Tensor] = load_file(path)
            return loaded
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FolderError(
            f"{path} is truncated, or is not a file of plain weights ({type(error).__name__}: {str(error).splitlines()[0][:120]}). "
            "It was not executed. Fetch or export it again; safetensors is preferred."
        ) from error
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise FolderError(f"{path} holds no dict of tensors; save model.state_dict() instead.")
    return {name.removeprefix("module."): value for name, value in state.items()}
