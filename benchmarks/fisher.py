"""One step of training with each estimator of the Fisher trace, and the largest eigenvalue of 1,000 images, against the direct procedures.

    python benchmarks/fisher.py [--device cuda] [--images 1000] [--only steps | eigenvalues] [--save]

The direct step makes a backward pass for each class that can be differentiated again, and then differentiates their sum; ours is a
step of the method `fim`. Same networks, same weights, same batch; all take turns step by step, in an order that rotates, and the median of the
ratios counts. The largest eigenvalue is compared with one row of the Jacobian at a time (image by image, class by class) and with the
D x D matrix of each image; of the latter, which costs seconds an image, only a few are done. Peak memory beside what was there before is measured in
processes of their own. `equal`: the exact step ends with the direct step's weights, the estimates agree with the exact trace on average,
and all three ways find the same eigenvalues. Ends with one JSON line; a ratio is our time divided by the direct procedure's.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof import create_model, fisher
from overproof.folder import read_json, write_json
from overproof.losses.fisher_trace import Tracer
from overproof.methods.fim import FIM
from overproof.networks import in_mode
from overproof.run.environment import environment
from overproof.types import Batch, Progress

TURNS, WARM, ROUNDS, MU = 9, 2, 3, 0.05
CASES = (("lenet5", 10, 100), ("lenet5", 43, 100), ("resnet8", 10, 32), ("resnet8", 43, 16))  # network, classes, batch
OURS: dict[str, dict[str, Any]] = {
    "exact": {"estimator": "exact"},
    "rademacher": {"estimator": "rademacher"},
    "label": {"estimator": "label"},
    "hutchinson": {"estimator": "hutchinson"},
    "fdkl": {"estimator": "fd-kl"},
    "lambda": {"target": "lambda_max"},
}
FORMS = {"loop": False, "vectorised": True}  # of the exact form; which of them is the default is told by `exact`
NOW = Progress(step=1, total=1)


def direct_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """K backward passes with a graph, and one through them: what the formula says."""
    optimizer.zero_grad()
    moody = any(isinstance(part, nn.BatchNorm2d) for part in model.modules())
    x = batch.images.clone().requires_grad_()
    if moody:
        loss = F.cross_entropy(model(batch.images), batch.labels)
        with in_mode(model):
            logits = model(x)
    else:
        logits = model(x)
        loss = F.cross_entropy(logits, batch.labels)
    log_p = F.log_softmax(logits, dim=1)
    penalty = torch.zeros_like(log_p[:, 0])
    for k in range(log_p.shape[1]):
        (score,) = torch.autograd.grad(log_p[:, k].sum(), x, create_graph=True)
        penalty = penalty + log_p[:, k].exp() * score.flatten(1).square().sum(dim=1)
    (loss + MU * penalty.mean()).backward()
    optimizer.step()


def our_step(objective: FIM, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """A step of the method."""
    optimizer.zero_grad()
    sum(objective(batch, NOW).losses.values()).backward()
    optimizer.step()


def runners(
    name: str, classes: int, count: int, device: str
) -> tuple[dict[str, Callable[[], None]], dict[str, nn.Module], Batch]:
    """A step of every contender, their networks, and the batch."""
    torch.manual_seed(0)
    start = create_model(name, classes, 3, 32).to(device).train()
    images, labels = torch.rand(count, 3, 32, 32), torch.randint(0, classes, (count,))
    batch = Batch(images, labels, torch.arange(count)).to(device)
    steps: dict[str, Callable[[], None]] = {}
    models: dict[str, nn.Module] = {}

    def add(who: str, options: dict[str, Any] | None, at_once: bool | None = None) -> None:
        model = models[who] = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        if options is None:
            steps[who] = lambda: direct_step(model, optimizer, batch)
            return
        objective = FIM(model, mu=MU, ramp=0.0, **options).train()
        if at_once is not None:
            objective.measure = Tracer(estimator="exact", at_once=at_once)
        steps[who] = lambda: our_step(objective, optimizer, batch)

    add("direct", None)
    for who, options in OURS.items():
        add(who, options)
    for who, at_once in FORMS.items():
        add(who, {"estimator": "exact"}, at_once)
    return steps, models, batch


def waited(work: Callable[[], Any], device: str) -> float:
    """Seconds until the work is done, on the device too."""
    begun = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def measure_steps(name: str, classes: int, count: int, device: str) -> tuple[dict[str, float], dict[str, float], float, bool]:
    """Median ratios to the direct step, their standard errors, the direct step's seconds, and whether the outcome is the same."""
    steps, models, batch = runners(name, classes, count, device)
    for number in range(WARM):
        for step in steps.values():
            step()
        if number == 0:
            pairs = zip(models["direct"].parameters(), models["exact"].parameters(), strict=True)
            equal = all(torch.allclose(a, b, atol=1e-5, rtol=1e-3) for a, b in pairs)
    equal = equal and unbiased(models["direct"].eval(), batch.images)
    models["direct"].train()
    times: dict[str, list[float]] = {who: [] for who in steps}
    order = list(steps)
    for turn in range(TURNS):
        for who in order[turn % len(order) :] + order[: turn % len(order)]:
            times[who].append(waited(steps[who], device))
    ratios = {
        who: [a / b for a, b in zip(found, times["direct"], strict=True)] for who, found in times.items() if who != "direct"
    }
    middle = {who: statistics.median(found) for who, found in ratios.items()}
    spread = {who: statistics.stdev(found) / len(found) ** 0.5 for who, found in ratios.items()}
    return middle, spread, statistics.median(times["direct"]), equal


def unbiased(model: nn.Module, images: Tensor) -> bool:
    """Whether each estimator's mean over images and draws is the exact one's within a quarter."""
    exact = float(fisher.trace(model, images).mean())
    rest = ("rademacher", "label", "hutchinson", "fd-kl")
    return all(abs(float(fisher.trace(model, images, estimator=e, draws=20).mean()) / exact - 1) < 0.25 for e in rest)


def one_row_at_a_time(model: nn.Module, image: Tensor) -> Tensor:
    """lambda_max of one image: a backward pass for each class, then K x K."""
    x = image[None].clone().requires_grad_()
    logits = model(x)[0]
    rows = [torch.autograd.grad(logits[k], x, retain_graph=True)[0].flatten() for k in range(len(logits))]
    j, p = torch.stack(rows), logits.detach().softmax(dim=0)
    b = p.sqrt()[:, None] * (j - p @ j)
    return torch.linalg.eigvalsh(b @ b.T)[-1]


def whole_matrix(model: nn.Module, image: Tensor) -> Tensor:
    """lambda_max of one image: the D x D matrix of the definition."""
    x = image[None].clone().requires_grad_()
    log_p = F.log_softmax(model(x)[0], dim=0)
    g = torch.zeros(image.numel(), image.numel(), device=image.device)
    for k in range(len(log_p)):
        score = torch.autograd.grad(log_p[k], x, retain_graph=True)[0].flatten()
        g += log_p[k].detach().exp() * torch.outer(score, score)
    return torch.linalg.eigvalsh(g)[-1]


def measure_eigenvalue(name: str, classes: int, device: str, count: int) -> tuple[dict[str, float], dict[str, float], bool]:
    """Ratios of our seconds per image to both other ways', and of the iteration's to the rows'; the seconds; whether the values are the same."""
    torch.manual_seed(0)
    model = create_model(name, classes, 1, 28).to(device).eval()
    images = torch.rand(count, 1, 28, 28, device=device)
    few = {"ours": count, "power": min(count, 200), "rows": min(count, 200), "dxd": min(count, 10)}
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": lambda part: fisher.lambda_max(model, part),
        "power": lambda part: fisher.lambda_max(model, part, estimator="power"),
        "rows": lambda part: torch.stack([one_row_at_a_time(model, image) for image in part]),
        "dxd": lambda part: torch.stack([whole_matrix(model, image) for image in part]),
    }
    found: dict[str, Tensor] = {}
    rounds: dict[str, list[float]] = {way: [] for way in ways}
    for work in ways.values():
        work(images[:2])
    for _ in range(ROUNDS):
        for way, work in ways.items():
            begun = time.perf_counter()
            found[way] = work(images[: few[way]])
            found[way].sum().item()  # waits for the device
            rounds[way].append((time.perf_counter() - begun) / few[way])
    times = {way: statistics.median(seconds) for way, seconds in rounds.items()}
    exact = found.pop("ours")
    close = {"power": 0.2}  # of a network that is not trained all eigenvalues are alike, and twenty steps stop below
    equal = all(
        torch.allclose(values, exact[: len(values)], rtol=close.get(way, 1e-3), atol=1e-7) for way, values in found.items()
    )
    ratios = {way: times["ours"] / times[way] for way in ("rows", "dxd")} | {"power": times["power"] / times["rows"]}
    return ratios, times, equal


def peak(who: str, case: tuple[str, int, int], device: str) -> float:
    """MiB that a step of one contender takes beyond what was there before, in this process."""
    steps, *_ = runners(*case, device)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        steps[who]()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status = Path("/proc/self/status")

    def line(key: str) -> int:
        return int(next(row for row in status.read_text().splitlines() if row.startswith(f"{key}:")).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = line("VmRSS")
    steps[who]()
    return (line("VmHWM") - before) / 1024


def peak_elsewhere(who: str, case: tuple[str, int, int], device: str) -> float:
    """`peak` in a fresh process, where nothing lies around that could be used again."""
    command = [sys.executable, __file__, "--device", device, "--peak", ":".join(map(str, (who, *case)))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--only", choices=("steps", "eigenvalues"), help="what is saved of the other stays")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    return parser.parse_args()


def tell_steps(device: str, found: dict[str, dict[str, float]]) -> bool:
    """Measure and print the steps; fills `found`. Returns whether the outcomes agree."""
    print(f"A step, 3x32x32, {device}: median ratio to the direct step of {TURNS}, peak MiB in brackets", flush=True)
    equal = True
    for case in CASES:
        middle, error, direct, same = measure_steps(*case, device)
        equal, short = equal and same, label(case)
        memory = {who: peak_elsewhere(who, case, device) for who in ("direct", *middle)}
        found["memory_mib"] |= {f"{who}_{short}": round(value, 1) for who, value in memory.items()}
        found["ratios"] |= {f"{who}_{short}": round(value, 4) for who, value in middle.items()}
        found["spread"] |= {f"{who}_{short}": round(value, 4) for who, value in error.items()}
        found["seconds"][f"direct_{short}"] = direct
        cells = "  ".join(f"{who} {value:.3f} ({memory[who]:.0f})" for who, value in middle.items())
        print(
            f"{short:12} direct {1e3 * direct:.0f} ms ({memory['direct']:.0f})  {cells}{'' if same else '  NOT the same'}",
            flush=True,
        )
    return equal


def tell_eigenvalues(device: str, images: int, found: dict[str, dict[str, float]]) -> bool:
    """Measure and print the largest eigenvalue; fills `found`. Returns whether the values agree."""
    print(f"lambda_max of {images} images 1x28x28: seconds an image", flush=True)
    equal = True
    for case in CASES:
        ratios, times, same = measure_eigenvalue(*case[:2], device, images)
        equal, short = equal and same, label(case)
        found["ratios"] |= {f"lambda_max_{way}_{short}": round(value, 6) for way, value in ratios.items()}
        found["seconds"] |= {f"lambda_max_{way}_{short}": value for way, value in times.items()}
        cells = "  ".join(f"{way} {value:.2e}" for way, value in times.items())
        print(f"{short:12} {cells}{'' if same else '  NOT the same'}", flush=True)
    return equal


def label(case: tuple[str, int, int]) -> str:
    return f"{case[0].removesuffix('5')}_{case[1]}"


def main() -> None:
    """Measure, print tables and the JSON line."""
    options = arguments()
    device: str = options.device
    if options.peak:
        who, name, classes, count = options.peak.split(":")
        print(peak(who, (name, int(classes), int(count)), device))
        return
    found: dict[str, dict[str, float]] = {key: {} for key in ("ratios", "spread", "memory_mib", "seconds")}
    name = "fisher" if device == "cpu" else f"fisher_{device}"
    place = Path(f"results/bench-{name}.json")
    seen = {**environment(device), "command": "", "platform": ""}
    parts: dict[str, Any] = {}
    if options.only and options.save and place.exists():
        known = read_json(place)
        found, parts = {key: dict(known[key]) for key in found}, known["parts"]
    if options.only != "eigenvalues":
        parts["steps"] = {"equal": tell_steps(device, found), "commit": seen["commit"]}
    if options.only != "steps":
        parts["eigenvalues"] = {"equal": tell_eigenvalues(device, options.images, found), "commit": seen["commit"]}
    equal = all(part["equal"] for part in parts.values())
    line = {"name": name, "ratios": found.pop("ratios"), "equal": equal}
    if options.save:
        about = f"One step of fim, 3x32x32, in batches of {', '.join(f'{case[2]} ({label(case)})' for case in CASES)}, against K backward passes "
        about += (
            f"that are differentiated again: median of {TURNS} turns. exact is the default, loop and vectorised its two forms. "
        )
        about += "lambda_max_rows, lambda_max_dxd: seconds an image of 1x28x28 against one row of the Jacobian at a time, and the D x D matrix; "
        about += "lambda_max_power: the power iteration against the rows."
        write_json(place, {**line, "about": about, **found, "parts": parts, "environment": seen})
    print(json.dumps(line))


if __name__ == "__main__":
    main()
