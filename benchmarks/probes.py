"""The whole suite of probes against the direct procedure, on the same models and images.

    python benchmarks/probes.py [--images 1000] [--turns 3] [--save]

One teacher and four students (two distilled, two independent) on digits in three channels, with an unseen domain. The direct procedure
explains one student after the other, and keeps nothing: images against the teacher, views, maps, Gram matrices, walks and the teacher's
answers are made anew for each, decision planes (of 20 x 20 points) are walked through one at a time, and the independent student that a
distilled one is compared with is computed beside each of them. The suite computes what concerns a model once. The two take turns; the
median over the turns' ratios is reported. Outcome check: all scores are equal, but for the boundary similarity, which is made of the
images that all its models know. Ends with one JSON line; the ratio is the suite's time divided by the direct procedure's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from overproof import console, create_model, load_data
from overproof.data import ImageSet
from overproof.data.modifiers import Modifier, modify
from overproof.folder import write_json
from overproof.probes import Explanation, Lab, Material, Planes, explain
from overproof.probes.planes import DecisionPlanes
from overproof.run.environment import environment

STUDENTS = ("student:a", "student:b", "independent:0", "independent:1")
OPTIONS: dict[str, dict[str, Any]] = {"adversarial-transfer": {"eps": 0.15}}
PLANES = {"planes": 50, "side": 20}
NOT_COMPARED = ("boundary-similarity",)  # made of the images that all its models know
COMPANY = "independent:0"  # whose maps every student's are compared with
EPOCHS = 3
DOMAINS = ("color",)
NETWORKS = ({"widths": (32, 64, 128)}, {"widths": (16, 32, 64)})  # of the teacher and of the students


def nobody(name: str) -> dict[str, ImageSet]:
    """No change here takes the pictures of another set."""
    raise ValueError(name)


def material(count: int) -> Material:
    """Digits, train and test part together, and the same on coloured grounds."""
    splits = load_data("digits+rgb", validation=None)
    parts = (splits.train, splits.test)
    images, labels = (torch.cat([getattr(part, name) for part in parts])[:count] for name in ("images", "labels"))
    whole = ImageSet(images, labels, classes=splits.classes)
    return Material.of(whole, domains={name: modify(whole, Modifier(name), part="test", read=nobody) for name in DOMAINS})


def trained(seed: int, options: dict[str, Any], data: Material) -> nn.Module:
    """A network that has seen the images a few times: its maps and boundaries are no accidents of the start."""
    torch.manual_seed(seed)
    model = create_model("cnn", 10, 3, 8, **options)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(data.images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.images[rows]), data.labels[rows]).backward()
            optimizer.step()
    return model.eval()


class OneByOne(DecisionPlanes):
    """Planes in the direct way: the points of one after the other, in a batch each."""

    def measure(self, lab: Lab) -> Any:
        scores = {}
        for domain, images in {"": lab.images, **{name: pair[0] for name, pair in lab.material.domains.items()}}.items():
            drawn, found = self.drawn(images), []
            for i in range(self.planes):
                points = Planes(drawn.images[i : i + 1], self.side)[slice(0, self.side**2)]
                with torch.no_grad():
                    classes: list[Tensor] = [lab.models[name](points).argmax(dim=1) for name in (lab.teacher, *lab.judged)]
                found.append(torch.stack([(own == classes[0]).double().mean() for own in classes[1:]]))
            scores[domain] = torch.stack(found)
        rows = [
            self.row(lab, "same class on planes", dict(zip(lab.judged, s.T, strict=True)), condition=d)
            for d, s in scores.items()
        ]
        return self.found(*rows)


def scores(found: dict[str, Any], names: dict[str, str]) -> dict[tuple[str, ...], float]:
    """Scores by probe, quantity, condition and student; `names` maps the models that are compared to what students are called."""
    return {
        (probe, row["quantity"], row["condition"], names[name]): number["value"]
        for probe, told in found.items()
        if probe not in NOT_COMPARED
        for row in told["rows"]
        for name, number in row["scores"].items()
        if name in names
    }


def direct(models: dict[str, nn.Module], data: Material, probes: list[str]) -> dict[tuple[str, ...], float]:
    """Each student by itself against the teacher, with one independent student to be compared with."""
    found: dict[tuple[str, ...], float] = {}
    others = [name for name in probes if name != "decision-planes"]
    for name in STUDENTS:
        two = {"teacher": models["teacher"], "student": models[name]}
        if name.startswith("student"):
            two["independent"] = models[COMPANY]
        alone: Explanation = explain(two, data, probes=others, options=OPTIONS)
        told = {probe: result.summary for probe, result in alone.results.items()}
        told["decision-planes"] = OneByOne(**PLANES).run(two, data).summary
        found |= scores(told, {"student": name, "student over independent": f"{name} over {COMPANY}"})
    return found


def suite(models: dict[str, nn.Module], data: Material, probes: list[str]) -> dict[tuple[str, ...], float]:
    """All students at once."""
    found = explain(models, data, probes=probes, options={**OPTIONS, "decision-planes": PLANES})
    names = (*STUDENTS, *(f"{name} over {COMPANY}" for name in STUDENTS))
    return scores({probe: result.summary for probe, result in found.results.items()}, dict(zip(names, names, strict=True)))


def main() -> None:
    """Measure, print and end with the JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    console.set_quiet(True)
    from overproof.probes import PROBES

    probes = [name for name in PROBES.names() if name != "shape-bias"]  # which has no images here
    data = material(options.images)
    kinds = dict(zip(("teacher", *STUDENTS), (NETWORKS[0], *[NETWORKS[1]] * len(STUDENTS)), strict=True))
    models = {name: trained(seed, kind, data) for seed, (name, kind) in enumerate(kinds.items())}
    ratios, equal = [], True
    for turn in range(options.turns):
        seconds, found = {}, {}
        for way in (suite, direct) if turn % 2 else (direct, suite):
            begun = time.perf_counter()
            found[way] = way(models, data, probes)
            seconds[way] = time.perf_counter() - begun
        ratios.append(seconds[suite] / seconds[direct])
        same = found[suite].keys() == found[direct].keys()
        equal = equal and same and all(abs(value - found[direct][key]) < 1e-6 for key, value in found[suite].items())
        print(
            f"suite {seconds[suite]:.1f} s, direct {seconds[direct]:.1f} s, ratio {ratios[-1]:.3f}, {len(found[suite])} scores",
            flush=True,
        )
    line = {"name": "probes", "ratios": {"suite": round(statistics.median(ratios), 4)}, "equal": equal}
    if options.save:
        about = f"All probes but the shape bias on {options.images} images, a convolutional teacher and four students of half its width: "
        about += (
            "everything once, against every student by itself, the distilled ones with an independent one to be compared with."
        )
        spread = {"suite": round(statistics.stdev(ratios), 4) if len(ratios) > 1 else 0.0}
        facts = {"about": about, "spread": spread, "environment": {**environment("cpu"), "command": "", "platform": ""}}
        write_json(Path("results/bench-probes.json"), {**line, **facts})
    print(json.dumps(line))


if __name__ == "__main__":
    main()
