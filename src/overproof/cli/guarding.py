"""guard fit, predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from cyclopts import App

from overproof.cli.options import Json, Names, Plugin, Set, Trust, plugins, show
from overproof.errors import OverproofError, UsageError

guard = App(name="guard", help="Guards: what stands in front of a finished model.")


@guard.command
def fit(
    run: Path,
    *,
    cache: bool = False,
    detector: bool = False,
    nim: bool = False,
    purifier_small: bool = False,
    pretrained: Path | None = None,
    layers: Names = (),
    fpr: float | None = None,
    tune: bool = True,
    which: Literal["best", "last"] = "best",
    data: str | None = None,
    set_: Set = (),
    plugin: Plugin = (),
    trust: Trust = False,
    json_: Json = False,
) -> None:
    """Fit guards for a finished run and keep them in it.

    Parameters
    ----------
    run
        A run folder.
    cache
        Training images that look alike to the network take part in its answer (options: --set cache.top_k=50).
    detector
        Suspicious images are rejected (options: --set detector.draws=8).
    nim
        Images get noise, and an autoencoder rebuilds them (options: --set nim.sigma=70).
    purifier_small
        The same by a few convolutions, which imitate the purifier nim of this run, or of --pretrained.
    pretrained
        With --nim or --purifier-small: a run with the method nim or mim. Without it the purifier is pre-trained on the training images.
    layers
        With --cache: layers that make the keys, or the name of a published set, such as resnet32; repeatable.
    fpr
        With --detector: share of natural images that may be rejected.
    tune
        Choose theta and lam of the cache on the validation part.
    data
        Another data set than the run's own.
    """
    plugins(plugin)
    from overproof.guards.cache_keys import PRESETS
    from overproof.report.guards import description_text
    from overproof.run.guarding import fit_guards

    asked = {"cache": cache, "detector": detector, "nim": nim, "purifier-small": purifier_small}
    wanted = {name for name, said in asked.items() if said}
    options, overrides = _options(set_, wanted)
    if layers:
        preset = len(layers) == 1 and layers[0] in PRESETS
        _give(options, "cache", "layers", layers[0] if preset else list(layers))
    if fpr is not None:
        _give(options, "detector", "fpr", fpr)
    found = fit_guards(
        run, options, which=which, data=data, tune=tune, pretrained=pretrained, overrides=overrides, trusted=trust
    )
    show(found, json_, description_text(found) + f"\nkept: {run / 'guards'}")


def _options(overrides: Sequence[str], wanted: set[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Options of the guards that are wanted, from --set GUARD.key=value; and the other overrides."""
    from overproof.config import parse_override
    from overproof.guards import GUARDS

    options: dict[str, dict[str, Any]] = {name: {} for name in sorted(wanted)}
    rest = []
    for text in overrides:
        section = text.partition(".")[0]
        if section in GUARDS:
            for key, value in parse_override(text)[section].items():
                _give(options, section, key, value)
        else:
            rest.append(text)
    return options, rest


def _give(options: dict[str, dict[str, Any]], name: str, key: str, value: Any) -> None:
    if name not in options:
        raise UsageError(f"{key}={value} belongs to the {name}, which is not to be fitted; say --{name} too.")
    options[name][key] = value


def predict(
    run: Path,
    images: tuple[Path, ...],
    *,
    guarded: bool = False,
    which: Literal["best", "last"] = "best",
    seed: int = 0,
    plugin: Plugin = (),
    trust: Trust = False,
    json_: Json = False,
) -> None:
    """Classify image files: label, probability, and with guards score and verdict.

    Parameters
    ----------
    run
        A run folder.
    images
        Image files of any mode and size, or folders of them.
    guarded
        Put the model behind the guards of the run.
    json_
        One JSON object a line and file.
    """
    plugins(plugin)
    import json

    from overproof.folder import plain
    from overproof.report.guards import predictions_text
    from overproof.run.predicting import predict as classify

    rows = [asdict(row) for row in classify(run, images, guarded=guarded, which=which, seed=seed, trusted=trust)]
    kept = [{key: value for key, value in row.items() if value is not None} for row in rows]
    print("\n".join(json.dumps(plain(row)) for row in kept) if json_ else predictions_text(rows))
    if all(row["problem"] is not None for row in rows):
        raise OverproofError(f"None of these {len(rows)} files could be read as an image.")
