"""One BSS training step of ours against the same step written down straightforwardly.

    python benchmarks/bss_step.py [--save]

The straightforward step follows the description of the method without a thought for cost: every step of the attack takes all base
samples through the teacher until the last has crossed, gradients of the teacher's weights are accumulated and thrown away, target
classes are drawn by a loop over samples and classes, the teacher sees the images with a graph and the samples once more.

A ResNet-26 that has learned real digits (32x32, three channels) teaches a ResNet-8. Both steps take turns on the same batches with
the same random numbers, each going first every other time; the median over the pairs' ratios is reported. Outcome check: each step
makes the same samples and leaves the same student. Ends with one JSON line; a ratio is our time divided by the straightforward one.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof import console, create_model, load_data
from overproof.folder import write_json
from overproof.methods.bss import BSS, base_rows
from overproof.run.environment import environment
from overproof.types import Batch, Progress

TEACHER, STUDENT, EPOCHS, LEARNING_RATE = "resnet26", "resnet8", 4, 3e-3
BATCH, BASES, BLOCKS = 256, 64, 12
STEP_SIZE, OVERSHOOT, STEPS, TEMPERATURE, ALPHA, BETA = 0.06, 1e-4, 10, 3.0, 4.0, 2.0
NEAR, SAME = 1e-2, 1e-4  # pixels of a sample, and weights, up to what rounding does at the kinks of a network
CASES = {"bss_step": "seconds", "bss_samples": "sample seconds"}


def learned(name: str, images: Tensor, labels: Tensor) -> nn.Module:
    """A network that knows the images after a few epochs."""
    torch.manual_seed(0)
    model, order = create_model(name, 10, 3, 32).train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * (len(images) // 64))
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images), generator=order)[: len(images) // 64 * 64].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model


def soft_cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """J of the paper, at the temperature."""
    return -(F.softmax(target / TEMPERATURE, 1) * F.log_softmax(logits / TEMPERATURE, 1)).sum(1).mean()


def drawn_classes(logits: Tensor, base: Tensor) -> Tensor:
    """A wrong class for each sample by its probability, one sample and one class after the other."""
    noise = torch.empty_like(logits).uniform_()
    probabilities = F.softmax(logits, 1)
    chosen = base.clone()
    for i in range(len(logits)):
        best = -float("inf")
        for k in range(logits.shape[1]):
            share = probabilities[i, k] / (1 - probabilities[i, base[i]])
            score = float(torch.log(share) - torch.log(-torch.log(noise[i, k])))
            if k != int(base[i]) and score > best:
                best, chosen[i] = score, k
    return chosen


def plain_samples(teacher: nn.Module, images: Tensor, base: Tensor, target: Tensor) -> Tensor:
    """All samples through the teacher in every step; a mask keeps those that have crossed where they are."""
    x = images.clone()
    for _ in range(STEPS):
        x = x.detach().requires_grad_()
        logits = teacher(x)
        going = logits.argmax(1) == base
        if not going.any():
            break
        gap = logits.gather(1, base[:, None])[:, 0] - logits.gather(1, target[:, None])[:, 0]
        gap.sum().backward()
        slope = x.grad / (x.grad.flatten(1).norm(dim=1) + 1e-12)[:, None, None, None]
        moved = x.detach() - STEP_SIZE * (gap.detach() + OVERSHOOT)[:, None, None, None] * slope
        x = torch.where(going[:, None, None, None], moved.clamp(0, 1), x.detach())
    return x.detach()


class Plain:
    """The straightforward step."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self.student, self.teacher = student.train(), teacher.eval().requires_grad_(True)
        self.optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9)
        self.samples, self.seconds, self.crossed = torch.empty(0), 0.0, 0.0

    def step(self, batch: Batch) -> None:
        """One optimiser step."""
        logits, target = self.student(batch.images), self.teacher(batch.images)
        loss = F.cross_entropy(logits, batch.labels) + ALPHA * soft_cross_entropy(target.detach(), logits)
        rows = base_rows(target.detach(), logits.detach(), batch.labels, count=BASES)
        begun = time.perf_counter()
        base = target[rows].argmax(1)
        classes = drawn_classes(target[rows].detach(), base)
        self.samples = plain_samples(self.teacher, batch.images[rows], base, classes)
        known = self.teacher(self.samples).detach()
        self.seconds = time.perf_counter() - begun
        self.crossed = float((known.argmax(1) == classes).float().mean())
        loss = loss + BETA * soft_cross_entropy(known, self.student(self.samples))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Ours(BSS):
    """Our step, as the training loop makes it; it remembers its samples and what they cost."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        walk = {"base_samples": BASES, "step_size": STEP_SIZE, "overshoot": OVERSHOOT, "steps": STEPS}
        super().__init__(student, teacher, temperature=TEMPERATURE, kd_weight=(ALPHA, ALPHA), bss_weight=BETA, **walk)
        self.train()
        self.optimizer = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9)
        self.samples, self.seconds = torch.empty(0), 0.0

    def walk(self, images: Tensor, target: Tensor) -> Any:
        """The samples."""
        begun = time.perf_counter()
        found = super().walk(images, target)
        self.seconds, self.samples = time.perf_counter() - begun, found.images
        return found

    def step(self, batch: Batch) -> None:
        """One optimiser step."""
        self.optimizer.zero_grad()
        sum(self(batch, Progress(0, 10**9)).losses.values()).backward()
        self.optimizer.step()


def same_outcome(ours: Ours, plain: Plain) -> bool:
    """Whether both steps made the same samples and left the same student; afterwards both go on from our student."""
    same = ours.samples.shape == plain.samples.shape and torch.allclose(ours.samples, plain.samples, atol=NEAR, rtol=0)
    pairs = zip(ours.student.parameters(), plain.student.parameters(), strict=True)
    same = same and all(torch.allclose(a, b, atol=SAME, rtol=0) for a, b in pairs)
    # Otherwise rounding would sooner or later turn two bases round, and with them the random numbers they get.
    plain.student.load_state_dict(ours.student.state_dict())
    plain.optimizer.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
    return same


def measure() -> tuple[dict[str, list[float]], dict[str, list[float]], float, bool]:
    """By case the straightforward seconds and the pairs' ratios; the share of walks that crossed, and whether all is equal."""
    digits = load_data("digits", validation=0).train
    images = F.interpolate(digits.images.float() / 255, size=32, mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    teacher, student = (learned(name, images, digits.labels) for name in (TEACHER, STUDENT))
    rivals = {"plain": Plain(copy.deepcopy(student), copy.deepcopy(teacher)), "ours": Ours(student, teacher)}
    seconds, ratios, crossed = {case: [] for case in CASES}, {case: [] for case in CASES}, []
    equal, order = True, torch.Generator().manual_seed(1)
    for block in range(BLOCKS + 1):
        rows, found = torch.randperm(len(images), generator=order)[:BATCH], {}
        for who in ("plain", "ours") if block % 2 else ("ours", "plain"):
            torch.manual_seed(block)
            begun = time.perf_counter()
            rivals[who].step(Batch(images[rows], digits.labels[rows], rows))
            found[who] = {"seconds": time.perf_counter() - begun, "sample seconds": rivals[who].seconds}
        equal = same_outcome(rivals["ours"], rivals["plain"]) and equal
        crossed.append(rivals["plain"].crossed)
        for case, kind in CASES.items() if block else ():  # the first pair warms up
            seconds[case].append(found["plain"][kind])
            ratios[case].append(found["ours"][kind] / found["plain"][kind])
    return seconds, ratios, statistics.mean(crossed), equal


def main() -> None:
    """Measure, print a table and the JSON line."""
    console.set_quiet(True)
    seconds, ratios, crossed, equal = measure()
    median = {case: statistics.median(values) for case, values in ratios.items()}
    error = {case: statistics.stdev(values) / len(values) ** 0.5 for case, values in ratios.items()}
    about = (
        f"batch {BATCH}, {BASES} base samples, at most {STEPS} steps, 3x32x32, {TEACHER} that knows digits teaching {STUDENT}; "
    )
    about += f"{crossed:.0%} of the walks crossed; median of {BLOCKS} pairs"
    print(f"BSS step, {about}")
    print(f"{'case':12} {'plain s':>9} {'ours s':>9} {'ratio':>7} {'error':>7}")
    for case, ratio in median.items():
        plain = statistics.median(seconds[case])
        print(f"{case:12} {plain:9.3f} {plain * ratio:9.3f} {ratio:7.3f} {error[case]:7.3f}")
    line = {"name": "bss_step", "ratios": {case: round(value, 4) for case, value in median.items()}, "equal": equal}
    if "--save" in sys.argv:
        what = f"One BSS step (bss_step), and its samples alone (bss_samples), against the same written straightforwardly: {about}."
        spread = {case: round(value, 4) for case, value in error.items()}
        facts = {"about": what, "spread": spread, "environment": {**environment("cpu"), "command": "", "platform": ""}}
        write_json(Path("results/bench-bss_step.json"), {**line, **facts})
    print(json.dumps(line))


if __name__ == "__main__":
    main()
