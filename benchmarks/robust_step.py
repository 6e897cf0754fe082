"""An adversarial training step through Overproof against the common way to write it.

    python benchmarks/robust_step.py [--device cuda] [--save]

Two steps: `pgd_at_*`, adversarial training with PGD-10, and `iad_*`, IAD-I in an epoch in which the teacher is doubted. The common
implementation, written out below, lets the attack's `loss.backward()` compute the weights' gradients too, which nobody needs; asks
the teacher about clean and adversarial images one after the other; and takes the trust sample by sample in a Python loop, waiting for the
device each time. Same networks, same batches of 128 images of 3x32x32, same random starts, both bare loops with SGD. Before each pair
both stand at the same weights, statistics and momenta; the two take turns in going first, and the median over the pairs' ratios is
reported. Outcome check, in float64: after three steps both students have the same weights. In float32 they agree up to rounding: our
attack looks at a copy with BatchNorm folded into the convolutions, and the sign of a vanishing gradient depends on the last bit. The
distance of the two updates is told as a share of that which another random start makes. With --device cuda also images per second
of our step in float32 and under bfloat16, each with and without channels_last. Ends with one JSON line; a ratio is our time divided by
the common implementation's.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof import create_model
from overproof.folder import write_json
from overproof.methods import METHODS
from overproof.methods.objective import Objective
from overproof.run.environment import environment
from overproof.types import Batch, Progress

BATCH, PAIRS, WARM, SPEED_STEPS, PROOF = 128, 15, 2, 20, 32
EPS, STEP_SIZE, STEPS, BETA, RATE = 8 / 255, 2 / 255, 10, 0.1, 0.1
TOLERANCE = 1e-6  # in float64, of weights and statistics
STUDENTS = {"cpu": ("resnet8", "resnet20"), "cuda": ("resnet18",)}
METHOD = {"pgd_at": ("pgd-at", {}), "iad": ("iad-1", {"begin": 0, "beta": BETA})}


def common_attack(student: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """PGD-10 in eval mode; every backward pass also adds to the weights' gradients."""
    student.eval()
    x = (images + torch.empty_like(images).uniform_(-EPS, EPS)).clamp(0, 1)
    for _ in range(STEPS):
        x.requires_grad_()
        F.cross_entropy(student(x), labels).backward()
        x = x.detach() + STEP_SIZE * x.grad.sign()
        x = torch.min(torch.max(x, images - EPS), images + EPS).clamp(0, 1)
    student.train()
    return x


def common_introspection(logits: Tensor, own: Tensor, target: Tensor, guide: Tensor, labels: Tensor) -> Tensor:
    """The loss of IAD-I, its trust taken sample by sample."""
    probabilities, alpha = F.softmax(guide, dim=1), torch.ones(len(labels), device=labels.device)
    for n in range(len(labels)):
        alpha[n] = probabilities[n][labels[n].item()].pow(BETA).item()
    log_q = F.log_softmax(logits, dim=1)
    imitation = F.kl_div(log_q, F.softmax(target, dim=1), reduction="none").sum(dim=1)
    introspection = F.kl_div(log_q, F.softmax(own, dim=1), reduction="none").sum(dim=1)
    return (imitation + (1 - alpha) * introspection).mean()


def common_step(kind: str, student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One step as it is commonly written."""
    adversarial = common_attack(student, batch.images, batch.labels)
    optimizer.zero_grad()
    logits = student(adversarial)
    if kind == "pgd_at":
        loss = F.cross_entropy(logits, batch.labels)
    else:
        with torch.no_grad():
            target = teacher(batch.images)
            guide = teacher(adversarial)
        loss = common_introspection(logits, student(batch.images), target, guide, batch.labels)
    loss.backward()
    optimizer.step()


def our_step(objective: Objective, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """The same step through Overproof's method."""
    optimizer.zero_grad()
    sum(objective(batch, Progress()).losses.values()).backward()
    optimizer.step()


def make(kind: str, name: str, device: str) -> tuple[Objective, nn.Module]:
    """A method with its student on `device`, and its teacher."""
    torch.manual_seed(0)
    teacher = create_model("resnet20" if device == "cpu" else "resnet18", 10).eval().requires_grad_(False).to(device)
    student = create_model(name, 10).to(device)
    method, options = METHOD[kind]
    networks = (student, teacher) if "teacher" in METHODS.get(method).positional() else (student,)
    return METHODS.create(method, *networks, eps=EPS, step_size=STEP_SIZE, steps=STEPS, **options).train(), teacher


def sgd(network: nn.Module) -> torch.optim.SGD:
    """The optimiser of both sides."""
    return torch.optim.SGD(network.parameters(), RATE, momentum=0.9, weight_decay=5e-4)


def batches(count: int, device: str, size: int = BATCH) -> list[Batch]:
    """Random images, the same in every call."""
    torch.manual_seed(1)
    shape = (size, 3, 32, 32)
    return [Batch(torch.rand(shape).to(device), torch.randint(0, 10, (size,)).to(device), torch.arange(size).to(device))
            for _ in range(count)]  # fmt: skip


def now(device: str) -> float:
    """The time at which all work given to `device` is done."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def outcome(kind: str, name: str, device: str) -> tuple[bool, float]:
    """Whether both students have the same weights after three steps in float64, and how far apart they are in float32."""
    some, moved = batches(3, device, PROOF), {}
    for dtype in (torch.float64, torch.float32):
        objective, teacher = make(kind, name, device)
        objective, teacher, before = objective.to(dtype), teacher.to(dtype), flat(objective.student).to(dtype)
        theirs, other = (copy.deepcopy(objective.student).train() for _ in range(2))
        for seed, step, student in ((0, "ours", objective.student), (0, "common", theirs), (1, "common", other)):
            torch.manual_seed(seed)
            optimizer = sgd(student)
            for batch in some:
                own = Batch(batch.images.to(dtype), batch.labels, batch.index)
                if step == "ours":
                    our_step(objective, optimizer, own)
                else:
                    common_step(kind, student, teacher, optimizer, own)
        moved[dtype] = [flat(student) - before for student in (objective.student, theirs, other)]
    ours, common, _ = moved[torch.float64]
    equal = torch.allclose(ours, common, atol=TOLERANCE, rtol=0)
    ours, common, elsewhere = moved[torch.float32]
    return equal, float((ours - common).norm() / (elsewhere - common).norm())


def flat(network: nn.Module) -> Tensor:
    """Weights and statistics in one row."""
    return torch.cat([value.detach().flatten() for value in network.state_dict().values() if value.is_floating_point()]).clone()


def measure(kind: str, name: str, device: str) -> tuple[float, float, float]:
    """Median seconds of the common step, median and standard deviation of the ratios."""
    objective, teacher = make(kind, name, device)
    ours, theirs = objective.student, copy.deepcopy(objective.student).train()
    ours_sgd, theirs_sgd, times = sgd(ours), sgd(theirs), {"common": [], "ours": []}
    for number, batch in enumerate(batches(WARM + PAIRS, device)):
        for who in ("common", "ours") if number % 2 else ("ours", "common"):
            torch.manual_seed(number)
            begun = now(device)
            if who == "ours":
                our_step(objective, ours_sgd, batch)
            else:
                common_step(kind, theirs, teacher, theirs_sgd, batch)
            times[who].append(now(device) - begun)
        theirs.load_state_dict(ours.state_dict())
        theirs_sgd.load_state_dict(copy.deepcopy(ours_sgd.state_dict()))  # else both would share their momenta
    ratios = [a / b for a, b in zip(times["ours"][WARM:], times["common"][WARM:], strict=True)]
    return statistics.median(times["common"][WARM:]), statistics.median(ratios), statistics.stdev(ratios)


def speeds(kind: str, name: str) -> dict[str, float]:
    """Images per second of our step on the accelerator, by precision and memory format."""
    found = {}
    for half in (False, True):
        for last in (False, True):
            objective, _ = make(kind, name, "cuda")
            form = torch.channels_last if last else torch.contiguous_format
            optimizer, times = sgd(objective.to(memory_format=form).student), []
            for batch in batches(WARM + SPEED_STEPS, "cuda"):
                batch = Batch(batch.images.contiguous(memory_format=form), batch.labels, batch.index)
                begun = now("cuda")
                with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half):
                    optimizer.zero_grad()
                    loss = sum(objective(batch, Progress()).losses.values())
                loss.backward()
                optimizer.step()
                times.append(now("cuda") - begun)
            label = f"{kind}_{name}_{'bf16' if half else 'fp32'}{'_channels_last' if last else ''}"
            found[label] = round(BATCH / statistics.median(times[WARM:]), 1)
    return found


def main() -> None:
    """Measure, print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    device, ratios, spreads, speed, apart, equal = options.device, {}, {}, {}, {}, True
    print(f"adversarial step, PGD-{STEPS}, batch {BATCH}, 3x32x32, {device}, median of {PAIRS} pairs")
    print(f"{'step':18} {'common ms':>10} {'ours ms':>9} {'ratio':>7} {'sd of pair ratios':>19} {'rounding / other start':>24}")
    for kind in METHOD:
        for name in STUDENTS[device]:
            same, rounding = outcome(kind, name, device)
            common, ratio, spread = measure(kind, name, device)
            ratios[f"{kind}_{name}"], spreads[f"{kind}_{name}"] = round(ratio, 4), round(spread / PAIRS**0.5, 4)
            equal, apart[f"{kind}_{name}"] = equal and same, round(rounding, 4)
            print(
                f"{kind + ' ' + name:18} {1e3 * common:10.1f} {1e3 * common * ratio:9.1f} {ratio:7.3f} {spread:19.3f} {rounding:24.3f}",
                flush=True,
            )
            if device == "cuda":
                speed |= speeds(kind, name)
    for label, value in speed.items():
        print(f"{label:32} {value:10.1f} images/s")
    line = {"name": "robust_step", "ratios": ratios, "equal": equal}
    if options.save:
        about = f"One PGD-{STEPS} step, batch {BATCH}, 3x32x32, against the common implementation; median of {PAIRS} pairs."
        facts = {
            "about": about,
            "spread": spreads,
            "rounding_over_other_start": apart,
            "environment": {**environment(device), "command": "", "platform": ""},
        }
        place = Path(f"results/bench-robust_step{'' if device == 'cpu' else '-cuda'}.json")
        write_json(place, {**line, **facts, **({"images_per_second": speed} if speed else {})})
    print(json.dumps(line))


if __name__ == "__main__":
    main()
