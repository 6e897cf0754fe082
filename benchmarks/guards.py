"""Guards against the straightforward way to write them.

    python benchmarks/guards.py [--part cache|detector] [--device cuda] [--quick] [--save]

cache: 10,000 queries against 60,000 and 100,000 keys of 1,024 to 12,288 numbers. The direct form multiplies all queries with all keys,
takes the exponential of everything and multiplies with one-hot labels. Ours goes through the keys in blocks and adds up per class in
logarithms. Each runs in a process of its own on the same numbers; reported are our seconds and our peak memory (beyond keys and
queries) divided by theirs, and against the flat index of faiss, if installed, the seconds of a search for the 50 nearest (up to 4,096
numbers: an index is a second copy of the keys). Outcome check: the same class probabilities, the same neighbours.

detector: benchmarks/detector.py, whose ratios are repeated here.

Ends with one JSON line; ratios below 1 are in our favour.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overproof.folder import write_json
from overproof.guards.cache_items import Items
from overproof.guards.cache_votes import log_shares, nearest, sweep
from overproof.run.environment import environment

QUERIES, CLASSES, THETA, BLOCK, NEAREST = 10_000, 10, 50.0, 1024, 50
CASES = ((60_000, 1_024), (100_000, 1_024), (60_000, 4_096), (100_000, 12_288))
QUICK = ((6_000, 256),)
TURNS = {1_024: 3}  # times a small case is measured; the others once
TOLERANCE, INDEXED = 1e-4, 4_096


def numbers(count: int, length: int, seed: int, device: str) -> Tensor:
    """Vectors (count, length) of length one without negative entries, as behind a ReLU; made in place."""
    generator = torch.Generator(device).manual_seed(seed)
    found = torch.empty(count, length, device=device)
    for part in torch.split(found, 1000):
        part.normal_(generator=generator).clamp_(min=0)
        part /= part.norm(dim=1, keepdim=True)
    return found


def items_of(keys: Tensor, labels: Tensor) -> Items:
    """The cache of ours around keys that are sorted by class."""
    none, rows = keys.new_zeros(0), torch.arange(len(keys), device=keys.device)
    return Items(keys, none, none, labels, rows, torch.zeros_like(rows, dtype=torch.bool))


def direct(queries: Tensor, keys: Tensor, labels: Tensor) -> Tensor:
    """p_cache as its formula reads."""
    weights = torch.exp(THETA * (queries @ keys.T))
    votes = weights @ torch.nn.functional.one_hot(labels, CLASSES).to(keys.dtype)
    return votes / votes.sum(dim=1, keepdim=True)


def ours(queries: Tensor, keys: Tensor, labels: Tensor) -> Tensor:
    """p_cache by blocks and logarithms."""
    return log_shares(sweep(queries, items_of(keys, labels), (THETA,), BLOCK)[0], CLASSES).exp()


def near_ours(queries: Tensor, keys: Tensor, labels: Tensor) -> Tensor:
    """Numbers of the nearest keys, from our blocks."""
    return nearest(queries, items_of(keys, labels), NEAREST, BLOCK)[1]


def near_faiss(queries: Tensor, keys: Tensor, labels: Tensor) -> Any:
    """A search in a flat index, which has the keys already."""
    import faiss

    index = faiss.IndexFlatIP(keys.shape[1])
    index.add(keys.cpu().numpy())
    return lambda: torch.from_numpy(index.search(queries.cpu().numpy(), NEAREST)[1])


WAYS = {"direct": direct, "ours": ours, "near_ours": near_ours, "near_faiss": near_faiss}


def worker(way: str, count: int, length: int, queries_count: int, device: str, path: str) -> None:
    """Measure one way and keep its result; prints seconds and MiB beyond what stood there before."""
    labels = torch.arange(count, device=device) * CLASSES // count
    keys, queries = numbers(count, length, 0, device), numbers(queries_count, length, 1, device)
    WAYS["ours"](queries[:64], keys[:2048], labels[:2048])  # wakes the libraries
    call = WAYS[way]
    run = call(queries, keys, labels) if way == "near_faiss" else lambda: call(queries, keys, labels)
    seconds, memory = [], 0.0
    for _ in range(TURNS.get(length, 1)):
        before = reset_peak(device)
        begun = time.perf_counter()
        result = run()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
        memory = max(memory, peak(device) - before)
    torch.save(result.cpu(), path)
    print(json.dumps({"seconds": sorted(seconds)[len(seconds) // 2], "mib": memory / 2**20}))


def reset_peak(device: str) -> float:
    """Bytes in use now; peaks are counted from here."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(device: str) -> float:
    """Most bytes in use since `reset_peak`."""
    return float(torch.cuda.max_memory_allocated()) if device != "cpu" else _status("VmHWM")


def _status(name: str) -> float:
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
        return 1024.0 * int(line.split()[1])
    except (OSError, StopIteration):  # no Linux: the whole process's peak is all there is
        return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def elsewhere(way: str, case: tuple[int, int], queries: int, device: str) -> tuple[dict[str, float], Tensor]:
    """`worker` in a process of its own, and its result."""
    path = Path(f".bench-{way}-{case[0]}-{case[1]}.pt").resolve()
    arguments = [way, str(case[0]), str(case[1]), str(queries), device, str(path)]
    try:
        done = subprocess.run([sys.executable, __file__, "--worker", *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{way} {case}: {done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}")
        return json.loads(done.stdout.splitlines()[-1]), torch.load(path, weights_only=True)
    finally:
        path.unlink(missing_ok=True)


def cache_part(device: str, quick: bool) -> tuple[dict[str, float], dict[str, Any], bool]:
    """Ratios, facts beside, and whether all results agree."""
    ratios: dict[str, float] = {}
    facts: dict[str, Any] = {}
    equal, queries = True, 500 if quick else QUERIES
    faiss = importlib.util.find_spec("faiss") is not None and device == "cpu"
    for case in QUICK if quick else CASES:
        name = f"{case[0] // 1000}k_{case[1]}"
        theirs, expected = elsewhere("direct", case, queries, device)
        mine, found = elsewhere("ours", case, queries, device)
        equal = equal and torch.allclose(found, expected, atol=TOLERANCE)
        ratios[f"cache_{name}"] = mine["seconds"] / theirs["seconds"]
        ratios[f"cache_memory_{name}"] = mine["mib"] / theirs["mib"]
        facts[name] = {"direct": theirs, "ours": mine}
        told = f"{name:12} direct {theirs['seconds']:.2f} s, {theirs['mib']:.0f} MiB; ours {mine['seconds']:.2f} s, {mine['mib']:.0f} MiB"
        if faiss and case[1] <= INDEXED:
            index, expected = elsewhere("near_faiss", case, queries, device)
            own, found = elsewhere("near_ours", case, queries, device)
            same = float((found.sort(dim=1).values == expected.sort(dim=1).values).double().mean())
            equal = equal and same > 0.99  # neighbours that are equally near may change places
            ratios[f"cache_faiss_{name}"] = own["seconds"] / index["seconds"]
            facts[name] |= {"faiss": index, "near": own}
            told += f"; {NEAREST} nearest: faiss {index['seconds']:.2f} s, ours {own['seconds']:.2f} s, {same:.1%} the same"
        print(told, flush=True)
    return ratios, facts, equal


def detector_part(device: str, quick: bool) -> tuple[dict[str, float], dict[str, Any], bool]:
    """What benchmarks/detector.py measures."""
    few = ["--images", "16", "--blocks", "1", "--only", "lenet"] if quick else []
    command = [sys.executable, str(Path(__file__).with_name("detector.py")), "--device", device, *few]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    *told, last = done.stdout.splitlines()
    print("\n".join(told), flush=True)
    line = json.loads(last)
    return line["ratios"], {}, bool(line["equal"])


PARTS = {"cache": cache_part, "detector": detector_part}


def main() -> None:
    """Measure, print a table and the JSON line."""
    if sys.argv[1:2] == ["--worker"]:
        way, count, length, queries, device, path = sys.argv[2:]
        worker(way, int(count), int(length), int(queries), device, path)
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=list(PARTS), action="append")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    ratios: dict[str, float] = {}
    facts: dict[str, Any] = {}
    equal = True
    for part in options.part or list(PARTS):
        found, beside, same = PARTS[part](options.device, options.quick)
        ratios |= {key: round(value, 4) for key, value in found.items()}
        facts[part], equal = beside, equal and same
    line = {"name": "guards" if options.device == "cpu" else f"guards_{options.device}", "ratios": ratios, "equal": equal}
    if options.save:
        about = f"{QUERIES:,} queries against the direct form and the flat index of faiss: seconds and peak memory, ours divided by theirs."
        seen = {**environment(options.device), "command": "", "platform": ""}
        write_json(Path(f"results/bench-{line['name']}.json"), {**line, "about": about, "facts": facts, "environment": seen})
    print(json.dumps(line))


if __name__ == "__main__":
    main()
