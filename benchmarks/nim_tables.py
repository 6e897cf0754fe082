"""What a purifier gains, what its statistics leak, and where attacks on the average land: tables for the runs of a recipe.

    overproof run recipes/nim-digits.toml --out runs/nim-digits
    python benchmarks/nim_tables.py runs/nim-digits [--seeds 0,1] [--eps 32/255] [--images 400] [--steps 10] [--draws 10] [--only net] [--save]

The folder holds the runs nim, nim-plain (norm_pix off), mim, net, net-plain, net-mim, net-original and cnn, or some of them, for several
seeds in seed-0, seed-1 and so on. Measured on the test part, at each level of the noise (of masks: share of the patches):

- mean squared error of images before and after they are rebuilt, with the statistics of the clean and of the noisy image, and without;
- accuracy untouched, under PGD through everything (steps of eps / 4), under PGD on the mean log-probability over several draws, and on
  images made by PGD on the bare classifier (gray box), each judged on a fresh draw;
- the same for the small convolutional purifier, with the multiply-adds of purifiers and classifiers;
- on the first `--strong` images, at a few levels, PGD of 40 steps (of eps / 10) on the average: where a stronger attack lands.

`--levels off,0,70` chooses other levels of the noise. Robust means right untouched and right under attack, on two draws of the noise:
with dice that is less than the accuracy on attacked images alone, the more so the stronger the noise. Kept after every case with
--save. Ends with one JSON line; figures are means over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from overproof.attacks import EOT, PGD, Transfer
from overproof.config import resolve
from overproof.data import ImageSet, stratified_subset
from overproof.data.pixels import to_float
from overproof.errors import UsageError
from overproof.evaluation.metrics import multiply_adds
from overproof.folder import RunFolder, write_json
from overproof.guards import Guarded, NIMPurifier, Purifier, SmallPurifier
from overproof.models.rebuilding import denoised
from overproof.models.weights import load_model
from overproof.registry import convert
from overproof.run.environment import environment
from overproof.run.prepare import data_of
from overproof.run.purifying import levels_of, sigma_curve

LEVELS = "off,0,35,70,105,140"
SHARES: tuple[Any, ...] = ("off", 0.25, 0.5, 0.75, 0.9)
ERRORS = (30.0, 70.0, 140.0)
IMITATION = 3000  # steps of the small purifier
DEEP, FEW = 40, ("off", 0, 70)  # steps of the strong attack, and levels at which it is made
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
    model, autoencoder = load_model(home / net, "last").to(device), load_model(home / source, "last").to(device)
    rest = {key: value for key, value in options.items() if key != "small"}
    start: dict[str, Any] = {"sigma": 0.75 if source == "mim" else 70.0}
    purifier: Purifier = NIMPurifier(**start, **rest).fit(model, train.images, train.labels, autoencoder=autoencoder)
    if options.get("small"):
        assert isinstance(purifier, NIMPurifier)
        epochs = max(1, IMITATION * SmallPurifier().batch_size // len(train))
        purifier = SmallPurifier(epochs=epochs).fit(model, train.images, train.labels, teacher=purifier)
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
    levels = SHARES if behind.purifier is not None and behind.purifier.facts["kind"] == "mask" else levels_of(options.levels)
    return _rows(sigma_curve(behind, data, attacks, levels, batch_size=options.batch_size, seed=seed, device=options.device))


def strongly(behind: Guarded, data: ImageSet, options: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    """Accuracies under many steps on the average over the noise, on a few images and levels."""
    eps = convert(options.eps, float, "--eps")
    long = PGD(eps=eps, steps=DEEP, step_size=eps / 10, early_stop=False)
    attacks = {f"eot, {DEEP} steps": EOT(inner=long, samples=options.draws)}
    few = data.subset(stratified_subset(data.labels, min(options.strong, len(data))))
    return _rows(sigma_curve(behind, few, attacks, FEW, batch_size=options.batch_size, seed=seed, device=options.device))


def _rows(curve: dict[str, Any]) -> dict[str, dict[str, float]]:
    rows = {}
    for place, level in enumerate(curve["sigma"]):
        word = level if isinstance(level, str) else f"{level:g}"
        rows[word] = {"clean": curve["clean"][place], **{name: values[place] for name, values in curve["attacks"].items()}}
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
    parser.add_argument("--strong", type=int, default=100, help="images of the strong attack; 0 leaves it out")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--levels", default=LEVELS, help="of the noise")
    parser.add_argument("--only", action="append", help="names of classifiers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    errors: list[dict[str, dict[str, float]]] = []
    found: dict[str, list[dict[str, dict[str, float]]]] = {}
    deep: Rows = {}
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
            if options.strong and behind.purifier.facts["kind"] == "noise":
                deep.setdefault(case, []).append(strongly(behind, test, options, seed))
            sizes[case] = _sizes(behind, to_float(test.images[:1]).to(options.device))
            if options.save:
                keep(name, options, errors, found, deep, sizes)
    show("Mean squared error of rebuilt images", mean(errors), 1.0, 4)
    for case, rows in found.items():
        counts = f"multiply-adds: classifier {sizes[case]['classifier']:,}, purifier {sizes[case]['purifier']:,}"
        show(f"{case} ({counts}), accuracy in %", mean(rows), 100, 1)
        if case in deep:
            show(f"{case}, {options.strong} images, accuracy in %", mean(deep[case]), 100, 1)
    print(json.dumps({"name": "nim_tables", "data": name, **summary(options, errors, found, deep, sizes)}))


Rows = dict[str, list[dict[str, dict[str, float]]]]


def summary(options: argparse.Namespace, errors: Any, found: Rows, deep: Rows, sizes: dict[str, Any]) -> dict[str, Any]:
    """All figures so far."""
    facts = {"eps": options.eps, "images": options.images, "steps": options.steps, "draws": options.draws, "seeds": len(errors)}
    means = {
        "figures": {case: mean(rows) for case, rows in found.items()},
        "strong": {case: mean(rows) for case, rows in deep.items()},
    }
    return {**facts, "errors": mean(errors), **means, "multiply_adds": sizes}


def keep(name: str, options: argparse.Namespace, errors: Any, found: Rows, deep: Rows, sizes: dict[str, Any]) -> None:
    """Write what there is, for RESULTS.md too."""
    about = (
        f"Purifiers with their knob turned (`benchmarks/nim_tables.py`): PGD-{options.steps} at {options.eps} through everything, the same on the "
        f"mean over {options.draws} draws (eot), and made on the bare classifier (gray-box); {options.images} images, {len(errors)} seed(s). "
        "Right untouched and under attack, on two draws of the noise."
    )
    errors_table = [[f"sigma {level}", *(f"{v['mean']:.4f}" for v in row.values())] for level, row in mean(errors).items()]
    told = [
        {
            "title": "Mean squared error of rebuilt images",
            "columns": ["", *next(iter(mean(errors).values()))],
            "rows": errors_table,
        }
    ]
    for case, rows in found.items():
        whole, strong = mean(rows), mean(deep[case]) if case in deep else {}
        extra = [column for column in next(iter(strong.values()), {}) if column != "clean"]
        heads = ["sigma", *next(iter(whole.values())), *(f"{column} ({options.strong} images)" for column in extra)]
        lines = [
            [
                level,
                *(v["mean"] for v in row.values()),
                *(strong[level][column]["mean"] if level in strong else None for column in extra),
            ]
            for level, row in whole.items()
        ]
        cost = (
            f"{sizes[case]['purifier'] / 1e6:.2f} million multiply-adds, the classifier {sizes[case]['classifier'] / 1e6:.2f}"
        )
        told.append({"title": f"{case} ({cost})", "columns": heads, "rows": lines})
    seen = {**environment(options.device), "command": "", "platform": ""}
    path = Path(f"results/table-nim-{name.rpartition(':')[2].rpartition('/')[2]}.json")
    write_json(path, {**summary(options, errors, found, deep, sizes), "about": about, "tables": told, "environment": seen})


def _sizes(behind: Guarded, image: torch.Tensor) -> dict[str, int]:
    """Multiply-adds of one image."""
    whole, bare = multiply_adds(behind.logits_model(), image), multiply_adds(behind.model, image)
    return {"classifier": bare, "purifier": whole - bare}


if __name__ == "__main__":
    main()
