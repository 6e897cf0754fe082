"""A detector in front of a CIFAR-10 classifier, the attacks that meet it, and the one that breaks it.

    python examples/detector_cifar.py --data parquet:DIR [--run RUN] [--images 600] [--device cuda] [--save]

Without --run a ResNet-20 is trained first. Of the test images, which the model has never seen, the first `--images` are attacked and
judged, and as many after them tell the detector what is natural. Printed is, for several rates of false alarms, what share of the
successful adversarial images each criterion alone (calibrated alone at the same rate) and all together detect, and what share of all
images is wrong and passes. The figures are written into the run folder, where `overproof report RUN` draws them.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import overproof
from overproof.attacks import AdamAttack
from overproof.attacks.base import Attack
from overproof.data import ImageSet, load_data
from overproof.evaluation.detection import Detection, measure_detector, over_steps
from overproof.folder import write_json
from overproof.guards import Detector, SegmentSearch, ThroughNoise, WhiteBox, save_guard
from overproof.run.environment import environment

NEAR, FAR = 8 / 255, 0.1
RATES = (0.05, 0.1, 0.2)
ABOUT = (
    "A detector in front of a classifier of CIFAR-10 (JPEG), on {images} test images that the classifier gets right "
    "(`examples/detector_cifar.py`). Shares of the images that each attack made wrong are detected by each criterion calibrated alone, and by all "
    "together at the same rate of false alarms; the row natural holds these themselves."
)


class Told:
    """An attack that says when it is done with a batch, and how long it took."""

    def __init__(self, name: str, attack: Attack) -> None:
        self.name, self.attack, self.seconds = name, attack, 0.0
        self.threat, self.targeted = attack.threat, attack.targeted
        self.logits_only = getattr(attack, "logits_only", False)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        begun = time.perf_counter()
        found = self.attack(model, images, labels, generator)
        self.seconds += time.perf_counter() - begun
        print(f"{self.name}: {len(images)} images, {self.seconds:.0f} s", flush=True)
        return found


def attacks(detector: Detector, steps: int, points: int) -> dict[str, Attack]:
    """From attacks that do not know the detector to the one that asks it at every point."""
    quick = copy.deepcopy(detector).set_rate(max(RATES))  # what passes the strictest thresholds passes all
    quick.stop_early = True
    return {
        "PGD, shallow, 8/255": AdamAttack(eps=NEAR, steps=3),
        "CW, shallow, 8/255": AdamAttack(eps=NEAR, steps=3, loss="margin"),
        "PGD, 8/255": AdamAttack(eps=NEAR, steps=steps // 2),
        "CW, 8/255": AdamAttack(eps=NEAR, steps=steps // 2, loss="margin"),
        "PGD, deep, 0.1": AdamAttack(eps=FAR, steps=steps),
        "CW, deep, 0.1": AdamAttack(eps=FAR, steps=steps, loss="margin"),
        "PGD through noise, 0.1": ThroughNoise(
            inner=AdamAttack(eps=FAR, steps=steps // 2), samples=8, sigma=detector.probe.sigma or 0.0
        ),
        "white-box PGD, 0.1": WhiteBox(detector=detector, eps=FAR, steps=steps),
        "white-box CW, 0.1": WhiteBox(detector=detector, eps=FAR, steps=steps, loss="margin"),
        "white-box PGD without L4, 0.1": WhiteBox(detector=detector, eps=FAR, steps=steps, weights=(2.0, 1.0, 1.0, 0.0)),
        "segment search, 8/255": SegmentSearch(detector=quick, eps=NEAR, points=points, restarts=2),
        "segment search, 0.1": SegmentSearch(detector=quick, eps=FAR, points=points, restarts=2),
    }


def table(found: Detection, detector: Detector, rate: float) -> dict[str, dict[str, float | None]]:
    """Shares by attack at one rate of false alarms; "natural" holds the false alarms themselves."""
    detector.set_rate(rate)
    alone = {name: detector.only(name).thresholds[name] for name in detector.criteria}
    told = found.at(detector).summary()
    natural = {name: float((found.natural.parts[name] > limit).mean()) for name, limit in alone.items()}
    rows: dict[str, dict[str, float | None]] = {"natural": {**natural, "union": told["clean_rejected"]}}
    for name, facts in told["attacks"].items():
        scored = found.attacks[name]
        hits = {
            key: float((scored.parts[key] > limit)[scored.wrong].mean()) for key, limit in alone.items() if scored.wrong.any()
        }
        rows[name] = {
            "success": facts["success"],
            **hits,
            "union": facts["detected"],
            "passed": facts["wrong_and_not_rejected"],
        }
    return rows


def show(rows: dict[str, dict[str, float | None]], rate: float, criteria: tuple[str, ...]) -> None:
    """A table in Markdown."""
    columns = ("success", *criteria, "union", "passed")
    print(f"\nWanted share of natural images rejected: {rate:g}\n")
    print("| attack | wrong | " + " | ".join(f"{name} alone" for name in criteria) + " | union | wrong and not rejected |")
    print("|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        print(
            f"| {name} | " + " | ".join("" if row.get(key) is None else f"{100 * row[key]:.1f}" for key in columns) + " |",
            flush=True,
        )


def tables(rates: dict[str, Any], criteria: tuple[str, ...]) -> list[dict[str, Any]]:
    """The figures as RESULTS.md shows them."""
    columns = ("success", *criteria, "union", "passed")
    heads = ["", "wrong", *(f"{name} alone" for name in criteria), "all together", "wrong and not rejected"]
    return [
        {
            "title": f"Wanted share of natural images rejected: {rate}",
            "columns": heads,
            "rows": [[name, *(row.get(key) for key in columns)] for name, row in rows.items()],
        }
        for rate, rows in rates.items()
    ]


def tensors(data: ImageSet, rows: slice, device: str) -> tuple[Tensor, Tensor]:
    """Images in [0, 1] and labels."""
    images = data.images[rows]
    return (images.float() / 255 if images.dtype == torch.uint8 else images).to(device), data.labels[rows].to(device)


def main() -> None:
    """Train or load, fit, attack, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10, such as parquet:DIR")
    parser.add_argument("--run", type=Path, help="run folder of a trained classifier")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", action="store_true", help="write results/table-detector-cifar10-jpeg.json")
    options = parser.parse_args()
    run = options.run
    if run is None:
        training: dict[str, Any] = {"epochs": options.epochs, "augment": ["crop", "flip"], "out": "runs/detector-cifar"}
        run = overproof.train("resnet20", options.data, **training).path
    model = overproof.load(run).requires_grad_(False).to(options.device)
    test = load_data(options.data, limit_test=2 * options.images).test
    detector = Detector(fpr=0.1, draws=8).fit(model, *tensors(test, slice(options.images, None), options.device))
    print(json.dumps(detector.describe(), indent=2))
    images, labels = tensors(test, slice(0, options.images), options.device)
    met = {name: Told(name, attack) for name, attack in attacks(detector, options.steps, options.points).items()}
    found = measure_detector(detector, model, images, labels, attacks=met)
    rows = {str(rate): table(found, detector, rate) for rate in RATES}
    for rate in RATES:
        show(rows[str(rate)], rate, detector.criteria)
    told: dict[str, Any] = found.at(detector.set_rate(0.1)).summary()
    few = min(128, len(images))
    told["over_steps"] = over_steps(detector, model, images[:few], labels[:few], attack=AdamAttack(eps=FAR))
    print(f"\nThe strongest attack is {told['strongest']}.")
    save_guard(detector, run)
    write_json(Path(run) / "evaluations" / "detector.json", {"clean": told["clean"], "samples": len(images), "detection": told})
    if options.save:
        seen = {**environment(options.device), "command": "", "platform": ""}
        facts = {
            "images": told["images"],
            "clean": told["clean"],
            "strongest": told["strongest"],
            "rates": rows,
            "seconds": {name: round(attack.seconds, 1) for name, attack in met.items()},
        }
        facts |= {"about": ABOUT.format(**told), "tables": tables(facts["rates"], detector.criteria)}
        write_json(
            Path("results/table-detector-cifar10-jpeg.json"), {**facts, "detector": detector.describe(), "environment": seen}
        )


if __name__ == "__main__":
    main()
