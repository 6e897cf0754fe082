"""The detector on batches against the procedure that takes one image at a time, with two forward passes per step.

    python benchmarks/detector.py [--device cuda] [--images 256] [--blocks 3] [--save]

The plain procedure measures all three criteria of an image to their end, one image after the other: each step of a walk asks the
network once whether the class is left and once more for the gradient. It is handed the noise and the target classes that ours
draws by itself. Both use the same fitted detector; the images are real digits (32x32, three channels), a quarter of them attacked.
Both take turns; the median over the pairs' ratios is reported. Ours stops as soon as a verdict is known; `_complete` says what it
costs to measure every criterion to its end. Outcome check: the same verdicts. Ends with one JSON line; a ratio is our time divided by the plain
one's.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof import console, create_model, load_data
from overproof.attacks import AdamAttack, predictions
from overproof.attacks.randomness import Streams, normal, other_classes
from overproof.folder import write_json
from overproof.guards import Detector
from overproof.guards.detector_scores import Walk
from overproof.networks import full_precision
from overproof.run.environment import environment

NETWORKS = {"lenet": "lenet5", "resnet20": "resnet20"}
EPOCHS, SEED = 8, 0


def learned(name: str, images: Tensor, labels: Tensor) -> nn.Module:
    """A network that knows digits after a few epochs."""
    torch.manual_seed(SEED)
    model = create_model(name, 10, 3, 32).to(images.device).train()
    optimizer, order = torch.optim.Adam(model.parameters(), 2e-3), torch.Generator().manual_seed(SEED)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images), generator=order).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval()


def plain_walk(model: nn.Module, image: Tensor, walk: Walk, target: int) -> int:
    """K of one image (1, C, H, W)."""
    x, steps = image.clone(), 0
    base = int(model(x).argmax(1))
    while steps < walk.cap and int(model(x).argmax(1)) == base:
        x = x.detach().requires_grad_()
        logits = model(x)
        if walk.goal == "targeted":
            loss = F.cross_entropy(logits, torch.tensor([target], device=x.device))
        else:
            loss = logits[0, base] - logits[0, [k for k in range(logits.shape[1]) if k != base]].max()
        (gradient,) = torch.autograd.grad(loss, x)
        moved = (x.detach() - walk.step_size * gradient).clamp(0, 1)
        x = image + (moved - image).clamp(-walk.radius, walk.radius)
        steps += 1
    return steps


def plain_verdicts(detector: Detector, model: nn.Module, images: Tensor, noise: Tensor, targets: list[int]) -> list[bool]:
    """Whether each image is rejected, one after the other."""
    probe, limits, found = detector.probe, detector.thresholds, []
    for i in range(len(images)):
        image = images[i : i + 1]
        with torch.no_grad():
            shift = float((model(image).softmax(1) - model(image + noise[i : i + 1]).softmax(1)).abs().sum())
        counts = {name: plain_walk(model, image, walk, targets[i]) for name, walk in probe.walks.items()}
        found.append(shift > limits["noise"] or any(count > limits[name] for name, count in counts.items()))
    return found


def waited(device: str) -> float:
    """The time now, when the device has done what it was asked."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Images a second of the plain procedure, ratios of ours by pair, and whether all verdicts were the same."""
    digits = load_data("digits", seed=SEED)
    parts = {}
    for part in ("train", "validation", "test"):
        found = getattr(digits, part)
        images = F.interpolate(found.images.float() / 255, size=32, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
        parts[part] = images.to(options.device), found.labels.to(options.device)
    model = learned(NETWORKS[name], *parts["train"])
    images, labels = (tensor[: options.images].clone() for tensor in parts["test"])
    attacked = slice(0, len(images) // 4)
    images[attacked] = AdamAttack(eps=0.15, steps=20)(
        model, images[attacked], labels[attacked], torch.Generator().manual_seed(SEED)
    )
    whole = Detector(fpr=0.1).fit(model, *parts["validation"])
    quick = copy.deepcopy(whole)
    quick.stop_early = True
    streams = Streams.named(torch.arange(len(images), device=options.device), SEED)
    noise = normal(images, streams.fork(0), whole.facts["sigma"])
    targets = other_classes(predictions(model, images), 10, streams.fork(1)).tolist()
    ways = {
        "plain": lambda: plain_verdicts(whole, model, images, noise, targets),
        name: lambda: quick(model, images, streams).rejected.tolist(),
        f"{name}_complete": lambda: whole(model, images, streams).rejected.tolist(),
    }
    ways[name](), ways[f"{name}_complete"]()  # warm
    times: dict[str, list[float]] = {key: [] for key in ways}
    differing = 0
    for block in range(options.blocks):
        verdicts = {}
        for key in list(ways)[:: 1 if block % 2 else -1]:
            begun = waited(options.device)
            verdicts[key] = ways[key]()
            times[key].append(waited(options.device) - begun)
        differing = max(
            differing, *(sum(a != b for a, b in zip(verdicts["plain"], verdicts[key], strict=True)) for key in verdicts)
        )
    ratios = {key: [a / b for a, b in zip(times[key], times["plain"], strict=True)] for key in ways if key != "plain"}
    rejected = sum(verdicts["plain"])
    return {
        "rate": len(images) / statistics.median(times["plain"]),
        "ratios": ratios,
        "differing": differing,
        "rejected": rejected,
    }


def main() -> None:
    """Measure, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--only", default=",".join(NETWORKS))
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    console.set_quiet(True)
    ratios, spread, differing = {}, {}, 0
    print(f"{'case':28} {'plain images/s':>15} {'ours':>9} {'ratio':>8} {'rejected':>9} {'verdicts differing':>19}")
    for name in options.only.split(","):
        with full_precision(torch.device(options.device)):
            found = measure(name, options)
        differing += found["differing"]
        for key, values in found["ratios"].items():
            ratio = statistics.median(values)
            ratios[f"detector_{key}"] = round(ratio, 4)
            spread[f"detector_{key}"] = round(statistics.stdev(values) / len(values) ** 0.5, 4) if len(values) > 1 else 0.0
            print(
                f"detector_{key:19} {found['rate']:15.2f} {found['rate'] / ratio:9.2f} {ratio:8.4f} {found['rejected']:9} "
                f"{found['differing']:19}",
                flush=True,
            )
    line = {"name": "detector", "ratios": ratios, "equal": differing == 0}
    if options.save:
        about = (
            f"Verdicts of the detector (all criteria, fpr 0.1) on a batch of {options.images} real digits at 32x32, a quarter "
            f"of them attacked, against one image at a time with two forward passes per step; median of {options.blocks} pairs."
        )
        facts = {
            "about": about,
            "spread": spread,
            "environment": {**environment(options.device), "command": "", "platform": ""},
        }
        suffix = "" if options.device == "cpu" else "_gpu"
        write_json(Path(f"results/bench-detector{suffix}.json"), {**line, **facts})
    print(json.dumps(line))


if __name__ == "__main__":
    main()
