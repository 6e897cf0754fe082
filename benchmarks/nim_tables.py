"""What a purifier gains, what its statistics leak, and where attacks on the average land: tables for the runs of a recipe.

    overproof run recipes/nim-digits.toml --out runs/nim-digits
    python benchmarks/nim_tables.py runs/nim-digits [--seeds 0,1] [--eps 32/255] [--images 400] [--steps 10] [--draws 10] [--only net] [--save]

The folder holds the runs nim, nim-plain (norm_pix off), mim, net, net-plain, net-mim, net-original and cnn, or some of them, for several
seeds in seed-0, seed-1 and so on. Measured on the test part, at each level of the noise (of masks: share of the patches):

- mean squared error of images before and after they are rebuilt, with the statistics of the clean and of the noisy image, and without;
- accuracy untouched, under PGD through everything (steps of eps / 4), under PGD on the mean log-probability over several draws, and on
  images made by PGD on the bare classifier (gray box), each judged on a fresh draw;
- the same for the small convolutional purifier, with the parameters of both.

Ends with one JSON line; figures are means over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from overproof.attacks import EOT, PGD, Transfer
from overproof.config import resolve
from overproof.data import ImageSet, stratified_subset
from overproof.data.pixels import to_float
from overproof.errors import UsageError
from overproof.folder import RunFolder, write_json
from overproof.guards import Guarded, NIMPurifier, Purifier, SmallPurifier
from overproof.models.rebuilding import denoised
from overproof.models.weights import load_model
from overproof.registry import convert
from overproof.run.environment import environment
from overproof.run.prepare import data_of
from overproof.run.purifying import sigma_curve

LEVELS: tuple[Any, ...] = ("off", 0, 35, 70, 105, 140)
SHARES: tuple[Any, ...] = ("off", 0.25, 0.5, 0.75, 0.9)
ERRORS = (30.0, 70.0, 140.0)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "net behind nim": ("net", "nim", {}),
    "net behind nim, statistics of the noisy image": ("net", "nim", {"stats": "noisy"}),
    "net-plain behind nim-plain": ("net-plain", "nim-plain", {}),
    "net-original behind nim": ("net-original", "nim", {}),
    "net-mim behind mim": ("net-mim", "mim", {}),
    "cnn behind nim": ("cnn", "nim", {}),
    "cnn behind nim-plain": ("cnn", "nim-plain", {}),
    "cnn behind mim": ("cnn", "mim", {}),
    "cnn behind the small purifier of nim": ("cnn", "nim", {"small": True}),
    "cnn behind the small purifier of nim-plain": ("cnn", "nim-plain", {"small": True}),
}
COLUMNS = ("clean", "pgd", "eot", "gray-box")


def guarded(home: Path, case: str, train: ImageSet, device: str) -> Guarded | None:
    """The classifier of a case behind its purifier; None where a run is missing."""
    net, source, options = CASES[case]
    if not (RunFolder(home / net).exists and RunFolder(home / source).exists):
        return None
    model, autoencoder = load_model(home / net).to(device), load_model(home / source, "last").to(device)
    rest = {key: value for key, value in options.items() if key != "small"}
    start: dict[str, Any] = {"sigma": 0.75 if source == "mim" else 70.0}
    purifier: Purifier = NIMPurifier(**start, **rest).fit(model, train.images, train.labels, autoencoder=autoencoder)
    if options.get("small"):
        assert isinstance(purifier, NIMPurifier)
        purifier = SmallPurifier().fit(model, train.images, train.labels, teacher=purifier)
    return Guarded(model, purifier=purifier).eval()


def rebuilt(home: Path, images: torch.Tensor) -> dict[str, dict[str, float]]:
    """Mean squared errors by level: of the noisy images, and of what is made of them."""
    found: dict[str, dict[str, float]] = {f"{sigma:g}": {} for sigma in ERRORS}
    models = {
        name: load_model(home / name, "last").to(images.device)
        for name in ("nim", "nim-plain")
        if RunFolder(home / name).exists
    }
    generator = torch.Generator().manual_seed(0)
    for sigma in ERRORS:
        noisy = images + sigma / 255 * torch.randn(images.shape, generator=generator).to(images.device)
        row = {"noisy": noisy}
        with torch.no_grad():
            if "nim" in models:
                row["clean statistics"] = denoised(models["nim"], noisy, images)
                row["noisy statistics"] = denoised(models["nim"], noisy, noisy)
            if "nim-plain" in models:
                row["norm_pix off"] = denoised(models["nim-plain"], noisy, None)
        found[f"{sigma:g}"] = {name: float((made - images).square().mean()) for name, made in row.items()}
    return found


def turned(behind: Guarded, data: ImageSet, options: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """Accuracies by level."""
    eps = convert(options.eps, float, "--eps")
    pgd = PGD(eps=eps, steps=options.steps, step_size=eps / 4, early_stop=False)
    attacks = {"pgd": pgd, "eot": EOT(inner=pgd, samples=options.draws), "gray-box": Transfer(inner=pgd, source=behind.model)}
    levels = SHARES if behind.purifier is not None and behind.purifier.facts["kind"] == "mask" else LEVELS
    curve = sigma_curve(behind, data, attacks, levels, batch_size=options.batch_size, seed=seed, device=options.device)
    rows = {}
    for place, level in enumerate(curve["sigma"]):
        word = level if isinstance(level, str) else f"{level:g}"
        rows[word] = {"clean": curve["clean"][place], **{name: curve["attacks"][name][place] for name in attacks}}
    return rows


def mean(tables: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and standard deviation over the seeds, row by row."""
    first = tables[0]
    return {
        row: {
            name: {
                "mean": statistics.mean(table[row][name] for table in tables),
                "sd": statistics.stdev(table[row][name] for table in tables) if len(tables) > 1 else 0.0,
            }
            for name in first[row]
        }
        for row in first
    }


def show(title: str, table: dict[str, dict[str, dict[str, float]]], factor: float, digits: int) -> None:
    """A table in Markdown."""
    names = list(next(iter(table.values())))
    print(f"\n{title}\n\n| sigma | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1))
    for row, values in table.items():
        cells = (f"{factor * v['mean']:.{digits}f} ± {factor * v['sd']:.{digits}f}" for v in values.values())
        print(f"| {row} | " + " | ".join(cells) + " |", flush=True)


def homes(folder: Path, seeds: list[int]) -> dict[int, Path]:
    """Where the runs of each seed lie."""
    split = {seed: folder / f"seed-{seed}" for seed in seeds if (folder / f"seed-{seed}").is_dir()}
    return split or {seeds[0]: folder}


def main() -> None:
    """Measure, print tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--eps", default="32/255")
    parser.add_argument("--images", type=int, default=450)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--only", action="append", help="names of classifiers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    errors: list[dict[str, dict[str, float]]] = []
    found: dict[str, list[dict[str, dict[str, float]]]] = {}
    sizes: dict[str, dict[str, int]] = {}
    name = ""
    for seed, home in homes(options.runs, [int(part) for part in options.seeds.split(",")]).items():
        known = next((path for path in sorted(home.iterdir()) if RunFolder(path).exists), None)
        if known is None:
            raise UsageError(f"{home} holds no run; run the recipe first.")
        splits = data_of(resolve(RunFolder(known).config))
        test = splits.test.subset(stratified_subset(splits.test.labels, min(options.images, len(splits.test))))
        name = splits.name
        errors.append(rebuilt(home, to_float(test.images).to(options.device)))
        for case, (net, _, _) in CASES.items():
            if options.only and net not in options.only:
                continue
            behind = guarded(home, case, splits.train, options.device)
            if behind is None:
                continue
            print(f"seed {seed}: {case}", flush=True)
            found.setdefault(case, []).append(turned(behind, test, options, seed))
            sizes[case] = {"classifier": _size(behind.model), "purifier": behind.purifier.facts["parameters"]}
    tables = {case: mean(rows) for case, rows in found.items()}
    rebuilding = mean(errors)
    show("Mean squared error of rebuilt images", rebuilding, 1.0, 4)
    for case, table in tables.items():
        show(
            f"{case} (parameters: classifier {sizes[case]['classifier']:,}, purifier {sizes[case]['purifier']:,}), accuracy in %",
            table,
            100,
            1,
        )
    facts = {"eps": options.eps, "images": options.images, "steps": options.steps, "draws": options.draws, "seeds": len(errors)}
    line = {"name": "nim_tables", "data": name, **facts, "errors": rebuilding, "tables": tables, "parameters": sizes}
    if options.save:
        seen = {**environment(options.device), "command": "", "platform": ""}
        write_json(Path(f"results/nim-tables-{name.rpartition(':')[2].rpartition('/')[2]}.json"), {**line, "environment": seen})
    print(json.dumps(line))


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
