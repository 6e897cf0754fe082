"""A training step of every distiller relative to plain knowledge distillation, SoKD's search, and CRD's negatives.

    python benchmarks/distillers.py [--save]

Steps (resnet20 teaching resnet8, 3x32x32, batch 64, SGD): all methods take turns step by step, in changing order, so that all see the
same machine; the median over the rounds of the ratio to KD's step of the same round is reported. `sokd_*_to_fitnet` is the same against FitNet.

`sokd_search_unrolled`: a step with our unrolled search against the straightforward procedure, written out below: the student one step
ahead and the two of the central difference are fresh copies of the whole method, each of which runs student and teacher anew.
Outcome check, in double precision on smooth networks: both give the same gradient for the policy.

`crd_*`: the two contrastive terms forward and backward against a bank of 50,000 rows of 128, 16,384 negatives for each of 64 images:
ours (scores by one matrix product, drawn ones picked) and "all" (every row of another class, nothing drawn) against gathering
the rows of every image's own negatives; peak memory in processes of their own. Outcome check: ours and the gathered form give
the same value. Ends with one JSON line; a ratio is the time (or memory) of the first divided by that of the second.
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
from torch import Tensor, nn

from overproof import console, create_model
from overproof.folder import write_json
from overproof.losses.contrast import noise_contrast
from overproof.methods import METHODS
from overproof.methods.crd import CRD
from overproof.methods.feature_bank import Bank
from overproof.methods.objective import Objective
from overproof.methods.sokd import DECAY, SoKD
from overproof.methods.sokd_policy import Draw
from overproof.methods.sokd_views import Step
from overproof.run.environment import environment
from overproof.types import Batch, Progress

BATCH, ROUNDS, WARM, ROWS, DIM, NEGATIVES, REPEATS = 64, 15, 2, 50_000, 128, 16_384, 9
SIDE = 32
SEARCHING, AFTER = Progress(epoch=0), Progress(epoch=999)
METHODS_TIMED: dict[str, tuple[str, dict[str, Any], Progress]] = {
    "kd": ("kd", {}, AFTER),
    "fitnet": ("fitnet", {}, AFTER),
    "at": ("at", {}, AFTER),
    "sp": ("sp", {}, AFTER),
    "rkd": ("rkd", {}, AFTER),
    "vid": ("vid", {}, AFTER),
    "crd": ("crd", {"samples": ROWS}, AFTER),
    "crd_all": ("crd", {"samples": ROWS, "negatives": "all"}, AFTER),
    "reviewkd": ("reviewkd", {}, AFTER),
    "dkd": ("dkd", {}, AFTER),
    "dist": ("dist", {}, AFTER),
    "logit_standard": ("logit-standard", {}, AFTER),
    "sokd_first_order": ("sokd", {}, SEARCHING),
    "sokd_after_search": ("sokd", {}, AFTER),
    "sokd_unrolled": ("sokd", {"search": "unrolled"}, SEARCHING),
}


def networks(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Student and teacher with random weights."""
    torch.manual_seed(seed)
    return create_model("resnet8", 10, image_size=SIDE), create_model("resnet20", 10, image_size=SIDE)


def random_batch() -> Batch:
    """Noise: the time of a step does not depend on what is seen."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(BATCH, 3, SIDE, SIDE, generator=generator)
    return Batch(images, torch.arange(BATCH) % 10, torch.randperm(ROWS, generator=generator)[:BATCH])


class Stepper:
    """A method with its optimiser."""

    def __init__(self, method: str, options: dict[str, Any], progress: Progress) -> None:
        self.objective: Objective = METHODS.create(method, *networks(), **options).train()
        for bank in (part for part in self.objective.modules() if isinstance(part, Bank)):
            bank.labels = torch.arange(len(bank)) % 10  # as after an epoch: negatives come from rows that images have filled
        self.progress = progress
        self.optimizer = torch.optim.SGD(self.objective.trainable(), 0.01, momentum=0.9, weight_decay=DECAY)

    def step(self, batch: Batch) -> float:
        """One training step; its seconds."""
        begun = time.perf_counter()
        self.optimizer.zero_grad()
        torch.stack(list(self.objective(batch, self.progress).losses.values())).sum().backward()
        self.optimizer.step()
        return time.perf_counter() - begun


def taking_turns(entrants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each entrant in each round, in changing order."""
    times: dict[str, list[float]] = {name: [] for name in entrants}
    for number in range(-WARM, rounds):
        names = list(entrants)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            seconds = entrants[name]()
            if number >= 0:
                times[name].append(seconds)
    return times


def paired(ours: list[float], theirs: list[float]) -> float:
    """Median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def measure_steps() -> dict[str, float]:
    """Ratios of all methods to KD, and of SoKD to FitNet."""
    batch = random_batch()
    steppers = {name: Stepper(*about) for name, about in METHODS_TIMED.items()}
    times = taking_turns({name: lambda s=s: s.step(batch) for name, s in steppers.items()}, ROUNDS)  # type: ignore[misc]
    ratios = {name: paired(found, times["kd"]) for name, found in times.items() if name != "kd"}
    print(f"{'method':20} {'ms':>8} {'to KD':>7}")
    for name, found in times.items():
        print(f"{name:20} {1e3 * statistics.median(found):8.2f} {ratios.get(name, 1.0):7.3f}", flush=True)
    return ratios | {f"{n}_to_fitnet": paired(times[n], times["fitnet"]) for n in ("sokd_first_order", "sokd_after_search")}


def straightforward(objective: SoKD, batch: Batch, draw: Draw, *, radius: float = 0.01) -> dict[str, Tensor]:
    """The policy's gradients by a central difference around copies of the method."""
    leaves, half = objective.policy.leaves(), len(batch) // 2
    first, second = (
        Batch(batch.images[rows], batch.labels[rows], batch.index[rows]) for rows in (slice(0, half), slice(half, None))
    )

    def loss_of(method: SoKD, part: Batch, attached: bool) -> Tensor:
        method._step = Step(draw, leaves, method.teach(part), attached=attached)
        try:
            return torch.stack(list(method(part, SEARCHING, "search").losses.values())).sum()
        finally:
            method._step = None

    def weights(method: SoKD) -> list[nn.Parameter]:
        return [p for p in method.parameters() if p.requires_grad]

    def slopes(loss: Tensor, method: SoKD) -> list[Tensor]:
        found = torch.autograd.grad(loss, weights(method), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(weights(method), found, strict=True)]

    def moved(by: list[Tensor], scale: float) -> SoKD:
        other = copy.deepcopy(objective).train(objective.training)
        with torch.no_grad():
            for p, d in zip(weights(other), by, strict=True):
                p += scale * d
        return other

    here = slopes(loss_of(objective, first, False), objective)
    ahead = moved([g + DECAY * p.detach() for g, p in zip(here, weights(objective), strict=True)], -objective.unroll_step)
    direction = slopes(loss_of(ahead, second, False), ahead)
    length = radius / float(torch.stack([d.square().sum() for d in direction]).sum().sqrt())
    losses = [loss_of(moved(direction, sign * length), first, True) for sign in (1, -1)]
    magnitudes = [torch.autograd.grad(loss, leaves["magnitude"], allow_unused=True)[0] for loss in losses]
    difference = (losses[0] - losses[1]).detach() / (2 * length)
    plus, minus = (torch.zeros_like(leaves["magnitude"]) if g is None else g for g in magnitudes)
    return {**objective.policy.reinforce(draw, difference), "magnitude": -(plus - minus) / (2 * length)}


def measure_search() -> tuple[float, bool]:
    """Our unrolled step relative to the straightforward one, and whether the gradients agree."""
    batch = random_batch()
    ours, theirs = (Stepper("sokd", {"search": "unrolled"}, SEARCHING) for _ in range(2))
    theirs.progress = AFTER  # its search is made below

    def straight() -> float:
        begun = time.perf_counter()
        objective: SoKD = theirs.objective  # type: ignore[assignment]
        draw = objective.policy.draw(objective.policy.leaves())
        objective.policy.update(straightforward(objective, batch, draw))
        return time.perf_counter() - begun + theirs.step(batch)

    times = taking_turns({"ours": lambda: ours.step(batch), "straightforward": straight}, ROUNDS)
    for name, found in times.items():
        print(f"search, {name:16} {1e3 * statistics.median(found):8.2f} ms", flush=True)
    return paired(times["ours"], times["straightforward"]), _agree()


def _agree() -> bool:
    """Gradients of both procedures in double precision, without the kinks that would spoil a difference."""
    torch.manual_seed(0)
    pair = create_model("cnn", 3, 1, 16, widths=(6, 8)), create_model("cnn", 3, 1, 16, widths=(8, 12))
    objective = SoKD(*pair, search="unrolled", areas=0).double().eval()
    for module in objective.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus())
    batch = Batch(torch.rand(8, 1, 16, 16, dtype=torch.float64), torch.arange(8) % 3, torch.arange(8))
    draw = Draw(3, (True, True), 5, torch.ones(()).double(), torch.ones(2).double())
    leaves = objective.policy.leaves()
    found = objective._look_ahead(batch, SEARCHING, Step(draw, leaves, objective.teach(batch), attached=True))
    objective.policy.baseline = torch.zeros_like(objective.policy.baseline)
    expected = straightforward(objective, batch, draw, radius=1e-3)
    return all(torch.allclose(found[name], expected[name], rtol=1e-2, atol=1e-9) for name in ("alpha", "beta"))


def contrast_case(kind: str) -> tuple[Callable[[], float], Callable[[], float]]:
    """A call that takes one step of CRD's terms and returns its seconds, and one that returns the terms' value."""
    torch.manual_seed(0)
    student, teacher = networks()
    crd = CRD(student, teacher, negatives="all" if kind == "all" else NEGATIVES, samples=ROWS, dim=DIM).train()
    bank = crd.bank
    assert bank is not None
    bank.labels = torch.arange(ROWS) % 10
    batch = random_batch()
    labels = batch.index % 10
    vectors = [torch.nn.functional.normalize(torch.randn(BATCH, DIM), dim=1).requires_grad_() for _ in range(2)]
    torch.manual_seed(1)
    drawn = bank.draw_others(labels, NEGATIVES)

    def gathered() -> Tensor:
        log_noise = torch.tensor(NEGATIVES / ROWS).log()
        total = torch.zeros(())
        for anchors, rows, log_z in zip(vectors, (bank.teacher, bank.student), bank.log_z.unbind(), strict=True):
            own = rows[torch.cat([batch.index[:, None], drawn], dim=1)]  # (N, 1 + m, d)
            scores = torch.einsum("nd,nmd->nm", anchors, own) / crd.temperature - log_z
            total = total + noise_contrast(scores[:, 0], scores[:, 1:], log_noise).mean()
        return total

    def ours() -> Tensor:
        torch.manual_seed(1)
        return sum(part.mean() for part in crd._against_bank(bank, *vectors, batch.index, labels))  # type: ignore[return-value]

    ours()  # sets Z
    run = gathered if kind == "gathered" else ours

    def step() -> float:
        begun = time.perf_counter()
        torch.autograd.grad(run(), vectors)
        return time.perf_counter() - begun

    return step, lambda: float(run().detach())


def peak(kind: str) -> float:
    """Peak memory of a step above what bank and networks occupy, MiB (Linux)."""

    def status(line: str) -> float:
        text = Path("/proc/self/status").read_text()
        return int(next(row for row in text.splitlines() if row.startswith(f"{line}:")).split()[1]) / 1024

    step, _ = contrast_case(kind)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    step()
    return max(status("VmHWM") - before, 1.0)


def measure_contrast() -> tuple[dict[str, float], bool]:
    """Time and memory of CRD's two forms relative to gathered negatives, and whether the values agree."""
    cases = {kind: contrast_case(kind) for kind in ("gathered", "ours", "all")}
    times = taking_turns({kind: step for kind, (step, _) in cases.items()}, REPEATS)
    command = [sys.executable, __file__, "--peak"]
    peaks = {
        k: float(subprocess.run([*command, k], check=True, capture_output=True, text=True).stdout.split()[-1]) for k in cases
    }
    ratios = {}
    for kind in cases:
        print(f"crd, {kind:10} {1e3 * statistics.median(times[kind]):8.1f} ms {peaks[kind]:8.0f} MiB", flush=True)
        if kind != "gathered":
            ratios[f"crd_{kind}_to_gathered"] = paired(times[kind], times["gathered"])
            ratios[f"crd_{kind}_to_gathered_memory"] = peaks[kind] / peaks["gathered"]
    value, reference = (cases[kind][1]() for kind in ("ours", "gathered"))
    return ratios, abs(value - reference) <= 1e-4 * abs(reference)


def main() -> None:
    """Measure, print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--peak", choices=("gathered", "ours", "all"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    console.set_quiet(True)
    if options.peak:
        print(peak(options.peak))
        return
    ratios = measure_steps()
    search, same_gradients = measure_search()
    contrast, same_values = measure_contrast()
    ratios = {name: round(value, 4) for name, value in {**ratios, "sokd_search_unrolled": search, **contrast}.items()}
    line = {"name": "distillers", "ratios": ratios, "equal": same_gradients and same_values}
    if options.save:
        about = f"A training step relative to KD's (resnet20 teaching resnet8, 3x32x32, batch {BATCH}), medians of {ROUNDS} rounds; SoKD's "
        about += "search against finite differences around copies; CRD's negatives against gathered ones (50,000 rows)."
        facts = {"about": about, "environment": {**environment("cpu"), "command": "", "platform": ""}}
        write_json(Path("results/bench-distillers.json"), {**line, **facts})
    print(json.dumps(line))


if __name__ == "__main__":
    main()
