"""What a cache gains and what it stops: tables for a finished run.

    overproof run recipes/cache-fashion-mnist.toml
    python benchmarks/cache_tables.py runs/cache-fashion-mnist/resnet20 [--images 500] [--eps 2/255 --eps 4/255] [--set cache.pool=1] [--save]

Fits a cache on the training part, tunes it on the validation part, lets it remember that part too, and measures on the test part:

- accuracy of the network, of the mixture and of the cache alone, and over lambda at the theta that was chosen;
- accuracy on images that the network gets right, attacked by PGD-10 (steps of 2.5 eps / 10), made on the network (transfer) and
  made through the mixture and through the cache alone (white box).

The second kind of attack is the one that counts. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from overproof.attacks.pgd import PGD
from overproof.attacks.randomness import Streams
from overproof.config import parse_override, resolve
from overproof.data import ImageSet, stratified_subset
from overproof.data.pixels import to_float
from overproof.folder import RunFolder, write_json
from overproof.guards.cache import Cache
from overproof.guards.cache_tuning import grid_search
from overproof.guards.guarded import Guarded
from overproof.networks import device_of, full_precision
from overproof.registry import convert
from overproof.run.environment import environment
from overproof.run.guarding import fit_guards, guard_data, load_guarded

STEPS, BATCH = 10, 250


def alone(cache: Cache, theta: float) -> Cache:
    """The same memory, answering without the network."""
    twin = copy.deepcopy(cache)
    twin.theta, twin.lam = theta, 1.0
    return twin


def clean(cache: Cache, model: nn.Module, test: ImageSet) -> dict[str, Any]:
    """Test accuracies over lambda, for the two theta that the validation part chose."""
    tuning = cache.facts["tuning"]
    thetas = (tuning["theta"], tuning["theta_alone"])
    lams = sorted({*(step / 10 for step in range(11)), cache.lam})
    parts = (cache.grid_answer(model, part, thetas) for part in _pictures(test))
    found = grid_search(parts, thetas, lams)
    return {
        "network": found["network"],
        "mixture": found["mixture"][0][lams.index(cache.lam)],
        "cache": found["cache"][1],
        "over_lambda": dict(zip((f"{lam:.4g}" for lam in lams), found["mixture"][0], strict=True)),
    }


def _pictures(test: ImageSet) -> Any:
    from overproof.guards.cache_build import Pictures

    return Pictures.checked(test.images, test.labels, None).batches()


def attacked(models: dict[str, nn.Module], images: Tensor, labels: Tensor, eps: float) -> dict[str, dict[str, float]]:
    """Accuracy of each model on images made on each model: {made on: {model: accuracy}}."""
    attack = PGD(eps=eps, steps=STEPS, step_size=2.5 * eps / STEPS, early_stop=False)
    hits = {made: dict.fromkeys(models, 0) for made in models}
    for rows in torch.split(torch.arange(len(images)), BATCH):
        x, y = images[rows.to(images.device)], labels[rows.to(images.device)]
        for made, source in models.items():
            with full_precision(x.device):
                found = attack(source, x, y, Streams.named(rows.to(x.device), "cache", made))
                for name, model in models.items():
                    with torch.no_grad():
                        hits[made][name] += int((model(found).argmax(dim=1) == y).sum())
    return {made: {name: count / len(images) for name, count in row.items()} for made, row in hits.items()}


def tables(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures as RESULTS.md shows them."""
    test, names = facts["test"], ("network", "mixture", "cache alone")
    found = [
        {
            "title": f"Test accuracy; theta {facts['theta']:.3g}, lambda {facts['lam']:.2g}",
            "columns": names,
            "rows": [[test["network"], test["mixture"], test["cache"]]],
        },
        {
            "title": "Test accuracy of the mixture over lambda",
            "columns": list(test["over_lambda"]),
            "rows": [list(test["over_lambda"].values())],
        },
    ]
    rows = [["none", "", *(facts["untouched"][name] for name in names)]]
    rows += [
        [eps, made, *(row[name] for name in names)]
        for eps, made_on in facts["attacked"].items()
        for made, row in made_on.items()
    ]
    title = f"Accuracy on {facts['images']} images that the network gets right, under PGD-{STEPS}"
    return [*found, {"title": title, "columns": ["radius", "made on", *names], "rows": rows}]


def main() -> None:
    """Measure, print tables and the JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=500, help="attacked images, which the network gets right")
    parser.add_argument("--eps", action="append", default=None)
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="cache.key=value")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    chosen: dict[str, Any] = {}
    for text in options.overrides:
        chosen |= parse_override(text)["cache"]
    begun = time.perf_counter()
    described = fit_guards(options.run, {"cache": chosen})["cache"]
    fitted = time.perf_counter() - begun
    guarded = load_guarded(options.run).to("cuda" if torch.cuda.is_available() else "cpu")
    model, cache = guarded.model, guarded.cache
    assert isinstance(cache, Cache)
    config = resolve(RunFolder(options.run).config)
    test = guard_data(config, None).test
    assert isinstance(test, ImageSet)
    known = cache.check_unseen(test.images)
    device = device_of(model)
    table = clean(cache, model, test)
    print(f"{len(test):,} test images: network {table['network']:.2%}, mixture {table['mixture']:.2%} (theta {cache.theta:.4g}, lambda "
          f"{cache.lam:.3g}), cache alone {table['cache']:.2%} (theta {cache.facts['tuning']['theta_alone']:.4g})")  # fmt: skip
    print("over lambda: " + "  ".join(f"{lam}: {value:.2%}" for lam, value in table["over_lambda"].items()), flush=True)
    only = Guarded(model, cache=alone(cache, cache.facts["tuning"]["theta_alone"])).eval()
    models = {"network": model, "mixture": guarded.logits_model(), "cache alone": only.logits_model()}
    few = test.subset(stratified_subset(test.labels, 2 * options.images))
    images, labels = to_float(few.images).to(device), few.labels.to(device)
    with torch.no_grad():
        right = torch.cat([model(x).argmax(dim=1) for x in torch.split(images, BATCH)]) == labels
    images, labels = images[right][: options.images], labels[right][: options.images]
    rows, correct = {}, {}
    for name, net in models.items():
        with torch.no_grad():
            found = torch.cat([net(part).argmax(dim=1) for part in torch.split(images, BATCH)])
        correct[name] = float((found == labels).float().mean())
    print("not attacked                   " + "  ".join(f"{name} {value:.1%}" for name, value in correct.items()), flush=True)
    for text in options.eps or ["2/255", "4/255"]:
        rows[text] = attacked(models, images, labels, convert(text, float, "--eps"))
        for made, row in rows[text].items():
            print(
                f"PGD-{STEPS} {text:6} made on {made:12} " + "  ".join(f"{name} {value:.1%}" for name, value in row.items()),
                flush=True,
            )
    facts = {
        "test": table,
        "untouched": correct,
        "attacked": rows,
        "images": len(images),
        "also_in_cache": known,
        "fit_seconds": fitted,
    }
    facts |= {"cache": {key: described[key] for key in ("layers", "length", "items", "images", "bytes", "dtype")}}
    facts |= {
        "theta": cache.theta,
        "lam": cache.lam,
        "tuning": cache.facts["tuning"],
        "data": config.data.name,
        "model": config.model.name,
    }
    if options.save:
        about = (
            f"A cache of {described['images']:,} images beside {config.model.name} on {config.data.name.rpartition(':')[2]}, tuned on "
            "the validation part (`benchmarks/cache_tables.py`). Made on the network: transfer. Made on the mixture or the cache alone: "
            "white box."
        )
        name = f"table-cache-{config.data.name.rpartition(':')[2].rpartition('/')[2]}-{config.model.name}"
        seen = {**environment(device), "command": "", "platform": ""}
        write_json(Path(f"results/{name}.json"), {**facts, "about": about, "tables": tables(facts), "environment": seen})
    print(json.dumps({"name": "cache_tables", "test": table, "attacked": rows}))


if __name__ == "__main__":
    main()
