"""AutoAttack's memory and time as the number of images grows.

    python benchmarks/attack_scaling.py RUN --data NAME [--eps 8/255] [--save]

Each size runs in a process of its own. Time: version "fast" on 250, 500, 1,000 and 2,000 images of the run's model; the claim is
that seconds per image do not grow. Memory: the reference's set on 1,000 and on 10,000 images at a quarter of the radius; the claim
is that the peak above what data and model occupy does not grow with the number of images. Ends with one JSON line; a ratio is the
larger case divided by the smaller, per image for time.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from overproof.registry import convert

TIMED, REMEMBERED = (250, 500, 1000, 2000), (1000, 10_000)


def child(options: argparse.Namespace) -> dict[str, float]:
    """Evaluate once; peak memory in MiB before and after."""
    import torch

    from overproof import console, evaluate
    from overproof.attacks.autoattack import AutoAttack
    from overproof.data import load_data, stratified_subset
    from overproof.models.weights import load_model

    console.set_quiet(True)
    test = load_data(options.data).test
    data = test.subset(stratified_subset(test.labels, options.images))
    model = load_model(options.run)
    with torch.no_grad():
        model(torch.rand(options.batch, *data.images.shape[1:]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    begun = time.perf_counter()
    attack = AutoAttack(eps=convert(options.eps, float, "--eps") * options.scale, version=options.version)
    result = evaluate(model, data, attacks={"autoattack": attack}, batch_size=options.batch, sanity=0)
    seconds = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"images": options.images, "seconds": seconds, "mib": after - before, "robust": result.robust["autoattack"]}


def measure(options: argparse.Namespace, images: int, version: str, scale: float) -> dict[str, float]:
    """One size in a fresh process."""
    command = [
        sys.executable,
        __file__,
        str(options.run),
        "--data",
        options.data,
        "--eps",
        options.eps,
        "--batch",
        str(options.batch),
    ]
    command += ["--images", str(images), "--version", version, "--scale", str(scale)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{version:9} {images:6} images  {row['seconds']:8.1f} s  {1e3 * row['seconds'] / images:8.2f} ms/image  "
          f"{row['mib']:7.0f} MiB  robust {100 * row['robust']:.2f} %", flush=True)  # fmt: skip
    return row


def main() -> None:
    """Measure, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eps", default="8/255")
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--images", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--version", default="standard", help=argparse.SUPPRESS)
    parser.add_argument("--scale", type=float, default=1.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.images:
        print(json.dumps(child(options)))
        return
    timed = [measure(options, images, "fast", 1.0) for images in TIMED]
    kept = [measure(options, images, "standard", 0.25) for images in REMEMBERED]
    each = [row["seconds"] / row["images"] for row in timed]
    ratios = {f"seconds_per_image_{n}": round(value / each[0], 4) for n, value in zip(TIMED[1:], each[1:], strict=True)}
    ratios["peak_memory_10000"] = round(kept[1]["mib"] / max(kept[0]["mib"], 1.0), 4)
    line = {"name": "attack_scaling", "ratios": ratios, "equal": True}
    if options.save:
        from overproof.folder import write_json
        from overproof.run.environment import environment

        about = f"AutoAttack, batch {options.batch}: seconds per image relative to 250 images; "
        about += "peak memory above data and model, 10,000 against 1,000 images."
        facts = {"about": about, "rows": timed + kept, "environment": {**environment("cpu"), "command": "", "platform": ""}}
        write_json(Path("results/bench-attack_scaling.json"), {**line, **facts})
    print(json.dumps(line))


if __name__ == "__main__":
    main()
