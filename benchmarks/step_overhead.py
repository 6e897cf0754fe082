"""One KD training step through Overproof against the same step in a bare PyTorch loop.

    python benchmarks/step_overhead.py [--save]

Same networks, same weights, same batches; the two loops take turns step by step, each going first every other time, so that both
see the same machine; the median over the pairs' ratios is reported. Outcome check: both students end with the same weights. Ends
with one JSON line; a ratio is our time divided by the bare loop's.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import nn

from overproof import console, create_model
from overproof.config import TrainConfig
from overproof.data import ImageSet, make_loader
from overproof.folder import RunFolder, write_json
from overproof.methods import METHODS
from overproof.run.environment import environment
from overproof.training.loop import Trainer
from overproof.training.schedules import learning_rate
from overproof.types import Batch

BATCH, BLOCKS, STEPS, WARM = 128, 80, 1, 4


def bare_step(student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, rate: float) -> None:
    """What a careful user writes by hand."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    with torch.no_grad():
        target = teacher(batch.images)
    logits = student(batch.images)
    soft = F.kl_div(F.log_softmax(logits / 4, 1), F.log_softmax(target / 4, 1), reduction="batchmean", log_target=True)
    loss = 0.1 * F.cross_entropy(logits, batch.labels) + 0.9 * 16 * soft
    loss.backward()
    optimizer.step()


def measure(name: str, folder: Path) -> tuple[float, float, float, bool]:
    """Median seconds per step of the bare loop, median and spread of the ratio ours / bare, and whether both ended equal."""
    torch.manual_seed(0)
    count = BATCH * (WARM + BLOCKS * STEPS)
    data = ImageSet(torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (count,)), classes=10)
    teacher = create_model("resnet20", 10).eval()
    ours = create_model(name, 10)
    bare = copy.deepcopy(ours)
    bare_teacher = copy.deepcopy(teacher)
    config = TrainConfig(epochs=1, batch_size=BATCH)
    loader = make_loader(data, BATCH, shuffle=True, drop_last=True)
    fabric = Fabric(accelerator="cpu", devices=1)
    objective = METHODS.create("kd", ours, teacher)
    trainer = Trainer(objective, loader, None, config=config, folder=RunFolder(folder), fabric=fabric, seed=0)
    trainer.wrapped.train()
    bare.train()
    optimizer = torch.optim.SGD(bare.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay)
    batches, times = list(loader.batches(0)), {"bare": [], "ours": []}
    for block in range(BLOCKS + 1):
        chunk = batches[:WARM] if block == 0 else batches[WARM + (block - 1) * STEPS : WARM + block * STEPS]
        first = trainer.step
        for who in ("bare", "ours") if block % 2 else ("ours", "bare"):
            begun = time.perf_counter()
            for offset, batch in enumerate(chunk):
                if who == "ours":
                    trainer._step(batch, 0)
                else:
                    bare_step(bare, bare_teacher, optimizer, batch, learning_rate(config, first + offset, trainer.total))
            if block:
                times[who].append((time.perf_counter() - begun) / len(chunk))
    equal = all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(ours.parameters(), bare.parameters(), strict=True))
    ratios = [a / b for a, b in zip(times["ours"], times["bare"], strict=True)]
    return statistics.median(times["bare"]), statistics.median(ratios), statistics.stdev(ratios), equal


def main() -> None:
    """Measure, print a table and the JSON line."""
    console.set_quiet(True)
    torch.set_num_threads(max(torch.get_num_threads(), 1))
    ratios, spreads, equal = {}, {}, True
    print(f"KD step, batch {BATCH}, 3x32x32, teacher resnet20, median of {BLOCKS} pairs")
    print(f"{'student':10} {'bare ms':>9} {'ours ms':>9} {'ratio':>7} {'sd of pair ratios':>19}")
    for name in ("resnet8", "resnet20"):
        with tempfile.TemporaryDirectory() as folder:
            bare, ratio, spread, same = measure(name, Path(folder))
        ratios[f"kd_{name}"] = round(ratio, 4)
        spreads[f"kd_{name}"] = round(spread / BLOCKS**0.5, 4)
        equal = equal and same
        print(f"{name:10} {1e3 * bare:9.2f} {1e3 * bare * ratio:9.2f} {ratio:7.3f} {spread:19.3f}")
    line = {"name": "step_overhead", "ratios": ratios, "equal": equal}
    if "--save" in sys.argv:
        about = f"One KD step, batch {BATCH}, 3x32x32, resnet20 teaching, against the same step in a bare PyTorch loop; median of {BLOCKS} pairs."
        facts = {"about": about, "spread": spreads, "environment": {**environment("cpu"), "command": "", "platform": ""}}
        write_json(Path("results/bench-step_overhead.json"), {**line, **facts})
    print(json.dumps(line))


if __name__ == "__main__":
    main()
