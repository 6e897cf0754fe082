"""An iteration of a generative method through Overproof against the straightforward loop.

    python benchmarks/generative.py [--part dfad|cegan] [--device cuda] [--save]

dfad: five steps of the student and one of the generator. The straightforward loop, written out below, keeps the graph of the teacher
and of the generator while the student learns, and computes weight gradients of teacher and student while the generator learns, which
nobody needs. `dfad_exact` is the method as it is by default: neither of the two, the teacher's normalisations folded into its
convolutions, and the generator's doubling of pixels, too. `dfad_fast` adds an approximation, one backward pass for the generator and
the student's first step (shared), and channels last. Same networks, weights and noise; the contenders take turns in going first, and
the median of the turns' ratios is reported, with the peak memory of an iteration in a process of its own. Outcome check: after one
iteration from the same weights with the same noise, plain SGD, the exact method has moved each network as the straightforward loop
does.

cegan: a generation of CE-GAN against one of a plain GAN, on points in the plane (benchmarks/evolution.py).

Ends with one JSON line; a ratio is our time divided by the straightforward loop's, or the plain GAN's.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from overproof import create_model
from overproof.folder import write_json
from overproof.methods.dfad import DFAD
from overproof.models.blocks import Doubling
from overproof.models.generators import Generator
from overproof.run.environment import environment
from overproof.types import Batch, Progress

TURNS, WARM, STEPS, WIDTH = 9, 2, 5, 64
CASES = {"cpu": ("resnet20", "resnet8", 32), "cuda": ("resnet34", "resnet18", 256)}
FAST: dict[str, Any] = {"shared": True}
TOLERANCE = 0.02  # of the length of a network's step: folded normalisations round in another order, and L1 takes signs


def common_iteration(
    student: nn.Module, teacher: nn.Module, generator: Generator, optimizers: tuple[torch.optim.Optimizer, ...], count: int
) -> None:
    """One iteration as it is commonly written."""
    for _ in range(STEPS):
        images = generator(generator.draw(count)).detach()
        target = teacher(images).detach()
        optimizers[0].zero_grad()
        (student(images) - target).abs().mean().backward()
        optimizers[0].step()
    images = generator(generator.draw(count))
    optimizers[1].zero_grad()
    (-(student(images) - teacher(images)).abs().mean()).backward()
    optimizers[1].step()


def our_iteration(objective: DFAD, optimizers: dict[str, torch.optim.Optimizer], batch: Batch) -> None:
    """The same through the method."""
    for phase in objective.turns:
        optimizers[phase].zero_grad()
        losses = objective(batch, Progress(), phase).losses
        sum(losses.values(), torch.zeros((), device=batch.images.device)).backward()
        optimizers[phase].step()


def networks(device: str) -> tuple[nn.Module, nn.Module, int]:
    """Student and teacher with statistics that look trained, and the batch size."""
    large, small, count = CASES[device]
    torch.manual_seed(0)
    teacher, student = create_model(large, 10), create_model(small, 10)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return student.to(device), teacher.eval().to(device), count


def spelled_out(generator: Generator) -> Generator:
    """A copy with upsampling and convolution one after the other, as it is commonly written."""
    generator = copy.deepcopy(generator)
    for position, layer in enumerate(generator.net):
        if isinstance(layer, Doubling):
            conv = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1).to(layer.weight.device)
            conv.weight, conv.bias = layer.weight, layer.bias
            generator.net[position] = nn.Sequential(nn.Upsample(scale_factor=2), conv)
    return generator


def optimiser(parameters: Any, adam: bool, plain: bool) -> torch.optim.Optimizer:
    """The paper's, or plain SGD for the outcome check: Adam's first step is a sign, which rounding turns over."""
    if plain:
        return torch.optim.SGD(parameters, 0.01)
    return torch.optim.Adam(parameters, 1e-3) if adam else torch.optim.SGD(parameters, 0.1, 0.9, weight_decay=5e-4)


def contender(who: str, device: str, plain: bool = False) -> tuple[Callable[[], None], list[list[Tensor]]]:
    """What makes one iteration of `who`, and the weights of student and generator."""
    student, teacher, count = networks(device)
    torch.manual_seed(1)
    options = FAST if who == "fast" else {}
    objective = DFAD(student, teacher, image_shape=(3, 32, 32), student_steps=STEPS, width=WIDTH, **options).to(device).train()
    generator = objective.generator
    weights = [list[Tensor](net.parameters()) for net in (student, generator)]
    if who == "common":
        generator, student = spelled_out(generator), copy.deepcopy(student)
        teacher = copy.deepcopy(teacher).requires_grad_(True)
        weights = [list[Tensor](net.parameters()) for net in (student, generator)]
        pair = optimiser(student.parameters(), False, plain), optimiser(generator.parameters(), True, plain)
        return lambda: common_iteration(student, teacher, generator, pair, count), weights
    if who == "fast":
        objective.to(memory_format=torch.channels_last)
    blank = Batch(torch.zeros((), device=device).expand(count, 3, 32, 32), torch.zeros(count), torch.arange(count))
    named = {phase: optimiser(objective.trainable(phase), phase == "generator", plain) for phase in objective.phases}
    return lambda: our_iteration(objective, named, blank), weights


def now(device: str) -> float:
    """The time at which all work given to `device` is done."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def same_outcome(device: str) -> bool:
    """Whether one iteration leaves the exact method where it leaves the straightforward loop."""
    steps = []
    for who in ("common", "exact"):
        run, networks = contender(who, device, plain=True)
        before = [flat(weights) for weights in networks]
        torch.manual_seed(2)
        run()
        steps.append([flat(weights) - start for weights, start in zip(networks, before, strict=True)])
    return same_steps(*steps)


def flat(weights: list[Tensor]) -> Tensor:
    """A copy of all numbers as one vector, in double precision: steps are small differences."""
    return torch.cat([p.detach().double().flatten() for p in weights])


def same_steps(wanted: list[Tensor], found: list[Tensor]) -> bool:
    """Whether every network has moved, and all by the wanted steps."""
    return all(bool(a.norm() > 0) and bool((a - b).norm() <= TOLERANCE * a.norm()) for a, b in zip(wanted, found, strict=True))


def measure(device: str) -> tuple[float, dict[str, list[float]]]:
    """Median seconds of the straightforward iteration, and the turns' ratios by contender."""
    runs = {who: contender(who, device)[0] for who in ("common", "exact", "fast")}
    times: dict[str, list[float]] = {who: [] for who in runs}
    for number in range(WARM + TURNS):
        order = list(runs)[number % 3 :] + list(runs)[: number % 3]
        for who in order:
            begun = now(device)
            runs[who]()
            times[who].append(now(device) - begun)
    common = times["common"][WARM:]
    ratios = {who: [a / b for a, b in zip(times[who][WARM:], common, strict=True)] for who in ("exact", "fast")}
    return statistics.median(common), ratios


def peak(who: str, device: str) -> float:
    """MiB that an iteration takes beyond what was there before, in this process."""
    run, _ = contender(who, device)
    run()  # optimiser states and copies are made
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status = Path("/proc/self/status")

    def line(key: str) -> int:
        return int(next(row for row in status.read_text().splitlines() if row.startswith(f"{key}:")).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = line("VmRSS")
    run()
    return (line("VmHWM") - before) / 1024


def peak_elsewhere(who: str, device: str) -> float:
    """`peak` in a fresh process."""
    command = [sys.executable, __file__, "--device", device, "--peak", who]
    # Memory that was freed goes back at once: what malloc keeps would be counted as there before.
    frugal = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=frugal)
    return float(done.stdout.splitlines()[-1])


def dfad(device: str) -> dict[str, Any]:
    """The part dfad: ratios, their standard errors, seconds, MiB, and whether outcomes agree."""
    teacher, student, count = CASES[device]
    equal = same_outcome(device)
    common, ratios = measure(device)
    memory = {who: round(peak_elsewhere(who, device), 1) for who in ("common", "exact", "fast")}
    print(f"dfad, {teacher} -> {student}, batch {count}, 3x32x32, {device}, median of {TURNS} turns")
    print(f"  straightforward {1e3 * common:9.1f} ms {memory['common']:9.1f} MiB")
    for who, values in ratios.items():
        print(
            f"  {who:15} {1e3 * common * statistics.median(values):9.1f} ms {memory[who]:9.1f} MiB   ratio {statistics.median(values):.3f}"
        )
    return {
        "ratios": {f"dfad_{who}": round(statistics.median(values), 4) for who, values in ratios.items()},
        "spread": {f"dfad_{who}": round(statistics.stdev(values) / len(values) ** 0.5, 4) for who, values in ratios.items()},
        "seconds": {"dfad_straightforward": common},
        "memory_mib": {f"dfad_{who}": value for who, value in memory.items()},
        "equal": equal,
    }


def cegan(device: str) -> dict[str, Any]:
    """The part cegan: the ratio of benchmarks/evolution.py, which tells more; on one thread of a CPU."""
    evolution = runpy.run_path(str(Path(__file__).with_name("evolution.py")))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds, equal = evolution["measure"](), evolution["same_outcome"]()
    finally:
        torch.set_num_threads(threads)
    values = [a / b for a, b in zip(seconds["ours"], seconds["plain"], strict=True)]
    print(f"cegan, a generation against one of a plain GAN, one thread: ratio {statistics.median(values):.3f}")
    return {
        "ratios": {"cegan": round(statistics.median(values), 4)},
        "spread": {"cegan": round(statistics.stdev(values) / len(values) ** 0.5, 4)},
        "seconds": {"gan": statistics.median(seconds["plain"])},
        "equal": equal,
    }


PARTS: dict[str, Callable[[str], dict[str, Any]]] = {"dfad": dfad, "cegan": cegan}


def main() -> None:
    """Measure, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=tuple(PARTS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak, options.device))
        return
    found: dict[str, dict[str, Any]] = {key: {} for key in ("ratios", "spread", "seconds", "memory_mib")}
    equal = True
    for name in [options.part] if options.part else PARTS:
        part = PARTS[name](options.device)
        equal = part.pop("equal") and equal
        for key, values in part.items():
            found[key] |= values
    line = {
        "name": "generative" if options.device == "cpu" else "generative_cuda",
        "ratios": found.pop("ratios"),
        "equal": equal,
    }
    if options.save:
        about = f"An iteration of a generative method against the straightforward loop; median of {TURNS} turns."
        seen = {**environment(options.device), "command": "", "platform": ""}
        write_json(Path(f"results/bench-{line['name']}.json"), {**line, "about": about, **found, "environment": seen})
    print(json.dumps(line))


if __name__ == "__main__":
    main()
