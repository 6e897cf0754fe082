"""Our attacks against those of other libraries: same model, same images, same steps; one judge.

    python benchmarks/attack_peers.py --train --cifar DIR             # once; minutes to an hour
    python benchmarks/attack_peers.py --cifar DIR [--images 1000] [--only pgd,autoattack] [--save]

The libraries are the dependency group `bench`. One of adv-lib's own dependencies (visdom) needs the `pkg_resources` that
setuptools dropped, to be built and to be imported, so build that first, without isolation:

    pip install "setuptools<81" wheel && pip install --no-build-isolation visdom==0.2.4 && pip install --group bench

A library that is not there is left out and named. Every library's images are judged by our `verdict` (range, distance and
prediction again), the time is that of the attack call alone (of the contests in --untimed
none is taken), all see the images that the model gets right in batches of the same
size, on a model in eval mode with frozen weights (which spares the peers the weight gradients). Measurements shorter than 10
seconds are repeated three times, taking turns, and the median counts. Peers stop no image early in PGD; ours does (and is
also shown without). A peer is correct if its robust accuracy is at most 0.5 points above ours; a ratio is our time divided by that
of the fastest correct peer, and `equal` says that ours is never above the best peer's by more than 0.5 points (AutoAttack: 0.3).
Every finished measurement is a line in the state file, from which `--resume` goes on. Ends with
one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers import CONTESTS, SETTINGS, Radii, Timed, radius_of, source
from torch import Tensor, nn

import overproof
from overproof import console
from overproof.attacks.base import Attack, predictions
from overproof.attacks.randomness import Streams
from overproof.data import load_data, make_loader
from overproof.errors import OverproofError, UsageError
from overproof.evaluation.counting import Passes
from overproof.evaluation.verdicts import verdict
from overproof.folder import write_json
from overproof.run.environment import environment

LONG, REPEATS, SLACK = 10.0, 3, 0.005
KEYS = {"pgd": "pgd", "autoattack": "autoattack_standard", "fast": "autoattack_fast"}
Row = dict[str, Any]


class State:
    """The finished measurements, one JSON line each."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path, self.rows = path, {}
        if resume and path.exists():
            rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.endswith("}")]
            self.rows = {self.key(row): row for row in rows}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()), "utf-8")

    @staticmethod
    def key(row: Row) -> tuple[Any, ...]:
        """What a measurement is of."""
        return tuple(row[name] for name in ("model", "contest", "library", "images", "batch", "threads", "repeat"))

    def get(self, about: Row, measure: Callable[[], Row]) -> Row:
        """The known measurement, or a new one."""
        key = self.key(about)
        if key not in self.rows:
            self.rows[key] = {**about, **measure()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[key]) + "\n")
        return self.rows[key]


@dataclass(frozen=True)
class Field:
    """A model and the images on which all are compared."""

    name: str
    model: nn.Module
    images: Tensor
    labels: Tensor
    batch: int

    def measure(self, attack: Attack, radius: float, repeat: int) -> Row:
        """Attack what the model gets right; robust accuracy is a share of all images."""
        right = predictions(self.model, self.images) == self.labels
        images, labels = self.images[right], self.labels[right]
        streams = Streams.named(right.nonzero().flatten(), repeat)
        timed, passes, robust, sizes, invalid = Timed(attack), Passes(), 0, [], 0
        for rows in torch.split(torch.arange(len(labels), device=labels.device), self.batch):
            if not len(rows):
                continue
            result = verdict(timed, self.model, images[rows], labels[rows], streams.rows(rows), passes=passes)
            wrong = result.predictions != labels[rows]
            robust += int((~wrong | (result.sizes > radius * (1 + 1e-5) + 1e-5)).sum())
            sizes += result.sizes[wrong].tolist()
            invalid += int(result.invalid.sum())
        count = len(self.labels)
        return {
            "seconds": timed.seconds, "robust": robust / count, "clean": len(labels) / count, "invalid": invalid,
            "median_size": statistics.median(sizes) if sizes else None,
            "forward": passes.forward / count, "backward": passes.backward / count,
        }  # fmt: skip


def compare(field: Field, contest: str, state: State, radii: Radii, *, timed: bool = True) -> dict[str, Row]:
    """Measure all entrants of a contest, taking turns; rows by library."""
    attacks, done = {}, {}
    for library, build in CONTESTS[contest](radii).items():
        try:
            attacks[library] = build()
        except UsageError as error:
            if library.startswith("ours"):
                raise
            print(f"  {library} is left out: {error}", flush=True)
    threads = torch.get_num_threads() if timed else None
    about = {"model": field.name, "images": len(field.labels), "batch": field.batch, "threads": threads}
    few = Field(field.name, field.model, field.images[:4], field.labels[:4], field.batch)
    for repeat in range(REPEATS):
        for library, attack in list(attacks.items())[:: -1 if repeat % 2 else 1]:
            if repeat and (not timed or library not in done or done[library][0]["seconds"] >= LONG):
                continue
            # The reference's AutoAttack is one and the same measurement for both of our versions.
            which = "autoattack" if library == "pyautoattack" and contest == "fast" else contest
            key = {**about, "contest": which, "library": library, "repeat": repeat}

            def measure(attack: Attack = attack, repeat: int = repeat) -> Row:
                if repeat == 0 and contest in ("pgd", "cw", "deepfool", "fab"):
                    few.measure(attack, radius_of(contest, radii), 0)  # what is loaded on first use is not the attack's time
                row = field.measure(attack, radius_of(contest, radii), repeat)
                return row if timed else {**row, "seconds": None}

            try:
                done.setdefault(library, []).append(state.get(key, measure))
            except OverproofError as error:
                print(f"  {library} failed: {error}", flush=True)
    return {name: {**rows[0], "seconds": _median([row["seconds"] for row in rows])} for name, rows in done.items()}


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def judged(contest: str, rows: dict[str, Row]) -> tuple[float | None, bool]:
    """Our time divided by the fastest correct peer's, and whether our accuracy is not above the best peer's by too much."""
    peers = {name: row for name, row in rows.items() if not name.startswith("ours")}
    if not peers:
        return None, True
    ours, best = rows["ours"]["robust"], min(row["robust"] for row in peers.values())
    correct = [row["seconds"] for row in peers.values() if row["robust"] <= max(ours, best) + SLACK and row["seconds"]]
    limit = 0.003 if contest in ("autoattack", "fast") else SLACK
    return rows["ours"]["seconds"] / min(correct) if correct else None, ours <= best + limit + 1e-9


def show(field: Field, contest: str, rows: dict[str, Row], radii: Radii) -> None:
    """Print a contest."""
    clean = next(iter(rows.values()))["clean"]
    print(
        f"\n{field.name}, {contest}, {len(field.labels)} images (clean {100 * clean:.1f} %), radius {radius_of(contest, radii):.4g}"
    )
    print(
        f"  {'':20} {'robust %':>9} {'seconds':>9} {'ours/it':>8} {'forward':>9} {'backward':>9} {'median size':>12} {'invalid':>8}"
    )
    for name, row in rows.items():
        size = "" if row["median_size"] is None else f"{row['median_size']:.4f}"
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.2f}"
        ratio = "" if row["seconds"] is None else f"{rows['ours']['seconds'] / row['seconds']:.3f}"
        print(f"  {name:20} {100 * row['robust']:9.2f} {seconds:>9} {ratio:>8} {row['forward']:9.1f} "
              f"{row['backward']:9.1f} {size:>12} {row['invalid']:8}", flush=True)  # fmt: skip


def prepared(name: str, options: argparse.Namespace) -> Field:
    """The trained model with images of the test part, the classes in proportion."""
    folder = options.folder / name
    if not folder.exists():
        raise SystemExit(f"{folder} is not there: run this script with --train first.")
    test = load_data(source(SETTINGS[name], options.cifar), limit_test=options.images).test
    batches = list(make_loader(test, options.batch).batches(0))
    images, labels = (
        torch.cat(parts).to(options.device) for parts in zip(*((b.images, b.labels) for b in batches), strict=True)
    )
    model = overproof.load(folder).requires_grad_(False).to(options.device)
    return Field(name, model, images.float(), labels, options.batch)


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="fashion_ordinary,fashion_robust,cifar_ordinary,cifar_robust")
    parser.add_argument("--only", default=",".join(CONTESTS))
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--cifar", help="Parquet folder of CIFAR-10 (JPEG)")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="where the trained models are")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", type=Path, help="state file to go on from")
    parser.add_argument(
        "--untimed", default="", help="contests whose times do not matter: the machine may be busy with other things"
    )
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--train", action="store_true", help="train the models that are not there, and stop")
    parser.add_argument("--epochs", type=int, help="for --train")
    parser.add_argument("--limit-train", type=int, help="for --train: images")
    options = parser.parse_args()
    for chosen, known in ((options.models, SETTINGS), (options.only, CONTESTS)):
        if unknown := set(chosen.split(",")) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    return options


def train(options: argparse.Namespace) -> None:
    """Train the models that are missing."""
    for name in options.models.split(","):
        if not (options.folder / name).exists():
            given = {"epochs": options.epochs, "limit_train": options.limit_train}
            chosen = {key: value for key, value in given.items() if value is not None}
            SETTINGS[name].train(options.folder / name, source(SETTINGS[name], options.cifar), chosen)


def main() -> None:
    """Measure, print tables and the JSON line."""
    options = arguments()
    if options.train:
        return train(options)
    console.set_quiet(True)
    state = State(options.resume or options.folder / "attack_peers.jsonl", options.resume is not None)
    ratios, table, equal = {}, {}, True
    for name in options.models.split(","):
        field, radii = prepared(name, options), SETTINGS[name].radii
        for contest in options.only.split(","):
            rows = compare(field, contest, state, radii, timed=contest not in options.untimed.split(","))
            show(field, contest, rows, radii)
            ratio, same = judged(contest, rows)
            equal = equal and same
            if contest in KEYS and ratio is not None:
                ratios[f"{KEYS[contest]}_{name}"] = round(ratio, 4)
            table[f"{contest}_{name}"] = {"rows": rows, "ratio": ratio, "equal": same}
    line = {"name": "attack_peers", "ratios": ratios, "equal": equal}
    if options.save:
        about = "Our time divided by the fastest correct peer's; robust accuracy, seconds and passes per image of each library."
        facts = {"about": about, "table": table, "environment": {**environment(options.device), "command": "", "platform": ""}}
        write_json(Path("results/bench-attack_peers.json"), {**line, **facts})
    print(json.dumps(line))


if __name__ == "__main__":
    main()
