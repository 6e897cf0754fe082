"""Two finished runs on the same data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from overproof.config import RunConfig, resolve
from overproof.data import Splits
from overproof.errors import UsageError
from overproof.evaluation.comparison import Comparison, compare
from overproof.folder import RunFolder
from overproof.models.weights import load_model
from overproof.run.judging import part_of
from overproof.run.prepare import USER, data_of, with_data

TRAINING_ONLY = (
    "augment",
    "limit_train",
    "extra",
    "extra_share",
    "extra_options",
    "long_tail",
    "attribute",
    "attribute_file",
)  # keys of [data] that do not touch what is compared on
FIGURE_IMAGES = 500  # for the boundaries of a recipe's figures


def compare_runs(
    a: str | Path,
    b: str | Path,
    *,
    which: str = "best",
    data: str | None = None,
    split: str = "test",
    limit: int | None = None,
    trusted: bool = False,
    read: Callable[[RunConfig], Splits] = data_of,
    **options: Any,
) -> Comparison:
    """Compare the models of two run folders.

    Args:
        a, b: run folders with weights.
        which: "best" or "last".
        data: a set that takes the place of the runs' own.
        split: "test", "validation" or "train".
        limit: use only so many images, the classes in proportion.
        trusted: allow a folder that names a package.module:callable to import and run it.
        read: the data of a configuration.
        **options: metric, images, seed, and options of the metric, as in `compare`.

    Raises:
        UsageError: the runs have different data and `data` names none, or an unknown option.
        FolderError: no such run, or weights that do not fit.
    """
    folders = [RunFolder(path).require() for path in (a, b)]
    config = _common([resolve(folder.config) for folder in folders], folders, data)
    chosen = part_of(read(config), split, limit)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    first, second = (load_model(folder.path, which, trusted=trusted).to(device) for folder in folders)
    names = (str(folders[0].path), str(folders[1].path))
    return compare(first, second, chosen, names=names, batch_size=config.evaluation.batch_size, **options)


def _common(configs: list[RunConfig], folders: list[RunFolder], data: str | None) -> RunConfig:
    """The first run's configuration, with data on which both can be judged."""
    if data is not None:
        return with_data(configs[0], data)
    tables = [{k: v for k, v in config.table()["data"].items() if k not in TRAINING_ONLY} for config in configs]
    if tables[0]["name"] == USER or tables[1]["name"] == USER:
        raise UsageError("A run was trained on data of a program; name a data set with --data, or use overproof.compare.")
    if tables[0] != tables[1]:
        keys = sorted(key for key in {*tables[0], *tables[1]} if tables[0].get(key) != tables[1].get(key))
        gaps = ", ".join(f"data.{key} {tables[0].get(key)!r} and {tables[1].get(key)!r}" for key in keys)
        raise UsageError(
            f"{folders[0].path} and {folders[1].path} have different data ({gaps}); name a set for both with --data."
        )
    return configs[0]


def similarities(
    a: str | Path,
    b: str | Path,
    which: str,
    *,
    options: Mapping[str, Any] | None = None,
    read: Callable[[RunConfig], Splits] = data_of,
) -> dict[str, float]:
    """How alike two runs are, by the names that figures of a recipe have: agreement, mag-sim, ang-sim, kept (share of pairs that count in both).

    Args:
        a, b, which, read: see `compare_runs`.
        options: of the comparison of boundaries, such as images and targets.
    """
    chosen = {"images": FIGURE_IMAGES, **(options or {})}
    found = compare_runs(a, b, which=which, metric=("boundary",), read=read, **chosen)
    assert found.boundary is not None
    walked = {"mag-sim": found.boundary.mag_sim, "ang-sim": found.boundary.ang_sim, "kept": found.boundary.kept}
    return {"agreement": found.agreement, **walked}
