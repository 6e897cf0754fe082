"""Linear classifiers on frozen features, for the data they were learned on or for others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from overproof.config import resolve
from overproof.errors import UsageError
from overproof.folder import RunFolder
from overproof.methods import METHODS
from overproof.run.api import start
from overproof.run.execute import Run
from overproof.run.prepare import USER

METHOD = "linear-probe"
THREAT = ("norm", "eps", "step_size", "steps")
OF_DATA = ("augment", "extra", "extra_share", "extra_options")  # what a probe does not take over


def probe_linear(
    source: nn.Module | str | Path,
    data: Any = None,
    *,
    which: Literal["best", "last"] = "best",
    out: str | Path | None = None,
    validation_data: Any = None,
    test_data: Any = None,
    attacks: Mapping[str, Any] | Sequence[Any] = (),
    curve: Sequence[float] = (),
    data_options: Mapping[str, Any] | None = None,
    resume: bool = False,
    **options: Any,
) -> Run:
    """Train a linear classifier on the frozen features of a network, and keep the run.

    The network is a copy with a new last layer, which alone is trained; attacks go through the whole of it.

    Args:
        source: a run folder; or images in [0, 1] -> logits, left as it is.
        data: as in `overproof.train`; None: the data of the run.
        which: weights of the run.
        attacks, curve: as in `overproof.train`; if there are none, those of the run.
        all others: see `overproof.train`; of the method `linear-probe`: images ("clean", "adv"), norm, eps, step_size, steps.

    Returns:
        The finished run; its `model` is the network with the trained last layer.

    Raises:
        UsageError: an unknown option or name, no data, or nobody knows how many classes there are.
        FolderError: no such run.
    """
    given = {
        "method": METHOD,
        "out": out,
        "validation_data": validation_data,
        "test_data": test_data,
        "attacks": attacks,
        "curve": curve,
        "data_options": data_options,
        "model_options": None,
        "resume": resume,
        "options": options,
    }
    if isinstance(source, nn.Module):
        if data is None:
            raise UsageError("A network says nothing about data: overproof.probe_linear(network, data).")
        return start(None, USER, data, given, source=source)
    table = probe_table(source, data=data if isinstance(data, str) or data is None else USER, which=which)
    of_model, of_data = table["model"], {key: value for key, value in table["data"].items() if key not in options}
    name = of_data.pop("name")
    given["model_options"] = {key: value for key, value in of_model.items() if key != "name"}
    given["data_options"] = {**of_data, **(data_options or {})}
    given["options"] = {**{key: value for key, value in table["method"].items() if key != "name"}, **options}
    if not attacks:
        given["attacks"], given["curve"] = table["evaluation"]["attacks"], curve or table["evaluation"]["curve"]
    return start(None, of_model["name"], name if data is None else data, given)


def probe_table(run: str | Path, *, data: str | None = None, which: Literal["best", "last"] = "best") -> dict[str, Any]:
    """The configuration of a linear probe of a finished run, with the run's own data, threat and attacks where nothing else is said.

    Args:
        run: a run folder.
        data: name of other data; None: the run's own, without augmentation.
        which: weights of the run.

    Raises:
        FolderError: no such run.
        UsageError: the run was made from data of a program.
    """
    folder = RunFolder(run).require()
    config = resolve(folder.config)
    table = config.table()
    if data is None and config.data.name == USER:
        raise UsageError(f"{folder.path} was trained on data of a program; name a data set with --data, or give the data.")
    own = {key: value for key, value in table["data"].items() if key not in OF_DATA}
    attacked = {"eps", "norm"} <= METHODS.get(config.method.name).options().keys()  # else `steps` is something else there
    threat = {key: value for key, value in config.method.options.items() if attacked and key in THREAT}
    return {
        "verb": "train",
        "model": {"name": config.model.name, "run": str(run), "which": which},
        "data": own if data is None else {"name": data},
        "method": {"name": METHOD, **threat},
        "evaluation": {"attacks": table["evaluation"]["attacks"], "curve": table["evaluation"]["curve"]},
    }
