"""AutoAttack's memory and time as the number of images grows.

    python benchmarks/attack_scaling.py RUN --data NAME [--eps 2/255] [--save]

Version "fast" through the evaluator, each size in a process of its own: 250 to 2,000 images for the
time, 1,000 and 10,000 for the memory. The claims are that seconds per image do not grow, and that the peak above what data and model occupy does
not grow with the number of images. On a CPU two caches outside Overproof grow until they are full, as the number of attacked images takes
new values: oneDNN keeps the compiled kernels of up to 1,024 shapes, and glibc keeps freed blocks. So the peak is measured with both as they are, and
once more ("lean") with 16 kernels and blocks given back at once, which about doubles the time and shows what the attack itself needs. Choose
a radius that a part of the images withstands, so that all four members have work. `equal`: all sizes tell the same robust accuracy
within three standard errors. Ends with one JSON line; a ratio is the larger case divided by the smaller, per image for time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from overproof.folder import read_json, write_json
from overproof.registry import convert

SIZES = (250, 500, 1000, 2000, 10_000)
MEMORY = (1000, 10_000)
LEAN = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
    "MALLOC_MMAP_THRESHOLD_": "1000000",
    "MALLOC_TRIM_THRESHOLD_": "1000000",
}


def memory(line: str) -> float:
    """A line of this process's status (Linux), in MiB."""
    found = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(f"{line}:"))
    return int(found.split()[1]) / 1024


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
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = memory("VmRSS")
    begun = time.perf_counter()
    attack = AutoAttack(eps=convert(options.eps, float, "--eps"), version="fast")
    result = evaluate(model, data, attacks={"autoattack": attack}, batch_size=options.batch, sanity=0)
    seconds = time.perf_counter() - begun
    return {
        "images": options.images,
        "seconds": seconds,
        "mib": memory("VmHWM") - before,
        "robust": result.robust["autoattack"],
    }


def measure(options: argparse.Namespace, images: int, lean: bool = False) -> dict[str, float]:
    """One size in a fresh process; interrupted measurements go on."""
    kept = options.run / f"scaling-{options.eps.replace('/', '_')}-{images}{'-lean' * lean}.json"
    if not kept.exists():
        write_json(kept, _measure(options, images, LEAN if lean else {}))
    row: dict[str, float] = read_json(kept)
    return row


def _measure(options: argparse.Namespace, images: int, settings: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, __file__, str(options.run), "--data", options.data, "--images", str(images)]
    command += ["--eps", options.eps, "--batch", str(options.batch)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **settings})
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{images:6} images  {row['seconds']:8.1f} s  {1e3 * row['seconds'] / images:8.2f} ms/image  "
          f"{row['mib']:7.0f} MiB  robust {100 * row['robust']:.2f} %", flush=True)  # fmt: skip
    return row


def alike(rows: list[dict[str, float]]) -> bool:
    """Whether all sizes tell the same robust accuracy, as far as that many images can: three standard errors."""
    whole = rows[-1]["robust"]
    return all(abs(row["robust"] - whole) <= 3 * (whole * (1 - whole) / row["images"]) ** 0.5 for row in rows)


def main() -> None:
    """Measure, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eps", default="2/255")
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--images", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.images:
        print(json.dumps(child(options)))
        return
    rows = [measure(options, images) for images in SIZES]
    lean = [measure(options, images, lean=True) for images in MEMORY]
    each = [row["seconds"] / row["images"] for row in rows]
    ratios = {f"seconds_per_image_{n}": round(value / each[0], 4) for n, value in zip(SIZES[1:], each[1:], strict=True)}
    for name, measured in (("", rows), ("_lean", lean)):
        peak = {row["images"]: max(row["mib"], 1.0) for row in measured}
        ratios[f"peak_memory_10000_to_1000{name}"] = round(peak[10_000] / peak[1000], 4)
    line = {"name": "attack_scaling", "ratios": ratios, "equal": alike(rows + lean)}
    if options.save:
        from overproof.run.environment import environment

        about = f"AutoAttack, batch {options.batch}: seconds per image relative to 250 images; "
        about += "peak memory above data and model, 10,000 against 1,000 images, as it is and (lean) without what oneDNN and glibc keep."
        facts = {
            "about": about,
            "rows": rows,
            "lean": lean,
            "environment": {**environment("cpu"), "command": "", "platform": ""},
        }
        write_json(Path("results/bench-attack_scaling.json"), {**line, **facts})
    print(json.dumps(line))


if __name__ == "__main__":
    main()
