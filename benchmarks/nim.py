"""Noisy image modelling through Overproof against the same operations written directly on public blocks.

    python benchmarks/nim.py [--device cuda] [--save]

Three cases on one autoencoder of timm's blocks: `step`, a step of the pre-training (noise, encoder, decoder, loss over all patches,
AdamW); `inference`, probabilities averaged over ten draws of the purifier's noise; `eot`, the gradient of the mean log-probability over
ten draws with respect to the images. The direct form computes attention as softmax(q k^T) v, cuts patches with unfold, and loops over the
draws. Same weights, same noise. Before each pair both stand at the same weights; the two take turns in going first, and the median over
the pairs' ratios is reported. Peak memory beyond what stood there before is measured in processes of their own. Outcome check: the
same weights, probabilities and gradients. Ends with one JSON line; a ratio is ours divided by the direct form's.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from guards import peak, reset_peak
from torch import Tensor, nn

from overproof import Batch, Guarded, Progress, create_model
from overproof.attacks.eot import Averaged
from overproof.attacks.randomness import Streams, normal
from overproof.folder import write_json
from overproof.guards import NIMPurifier
from overproof.methods.nim import NIM
from overproof.models.autoencoder import Pretext
from overproof.run.environment import environment

PAIRS, WARM, BATCH, ASKED, DRAWS, SIGMA = 15, 2, 64, 16, 10, 70.0
NETWORKS = {"cpu": "vit-ae-small", "cuda": "vit-ae-cifar"}
TOLERANCE = {"cpu": 2e-5, "cuda": 2e-3}
KINKS = 100  # times as much for gradients: where sums are rounded otherwise, a ReLU near its kink falls to the other side
CASES = ("step", "inference", "eot")


def network(device: str) -> nn.Module:
    """The autoencoder, the same in every call."""
    torch.manual_seed(0)
    made = create_model(NETWORKS[device], 10, 3, 32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    made.net.learns(Pretext("noise", True, 30.0, 120.0))
    return made.to(device)


def plain(model: nn.Module) -> nn.Module:
    """A copy without fused attention."""
    made = copy.deepcopy(model)
    for module in made.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return made


def rebuilt(model: nn.Module, noisy: Tensor) -> Tensor:
    """What the decoder says of the patches (N, L, P), written out; values of a patch lie channel by channel."""
    net, images = model.net, (noisy - model.normalize.mean) / model.normalize.std
    size, channels = net.patch_size, images.shape[1]
    patches = F.unfold(images, size, stride=size).transpose(1, 2)
    order = torch.arange(size * size * channels).view(channels, size * size).t().flatten().to(noisy.device)
    tokens = net.embed(patches[:, :, order]) + net.positions[1:]
    tokens = torch.cat([net.cls.expand(len(tokens), -1, -1), tokens], dim=1)
    for block in net.blocks:
        tokens = block(tokens)
    tokens = net.decoder.embed(net.decoder.norm(tokens)) + net.decoder.positions
    for block in net.decoder.blocks:
        tokens = block(tokens)
    return net.decoder.pixels(net.decoder.last_norm(tokens))[:, 1:][:, :, order.argsort()]


def truth(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Clean patches (N, L, P), their means, and the roots of their variances."""
    clean = (images - model.normalize.mean) / model.normalize.std
    patches = F.unfold(clean, model.net.patch_size, stride=model.net.patch_size).transpose(1, 2)
    return patches, patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def direct_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor) -> Tensor:
    """A step of the pre-training."""
    rate = torch.tensor(1 / 3.0, device=images.device)
    sigma = torch.distributions.Gamma(torch.tensor(25.0, device=images.device), rate).sample((len(images),))
    noisy = images + sigma.view(-1, 1, 1, 1) / 255 * torch.randn_like(images)
    patches, mean, scale = truth(model, images)
    loss = (rebuilt(model, noisy) - (patches - mean) / scale).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def direct_images(model: nn.Module, images: Tensor, streams: Streams) -> Tensor:
    """Purified images, one draw."""
    noisy = images + SIGMA / 255 * normal(images, streams)
    _, mean, scale = truth(model, images)
    patches = rebuilt(model, noisy) * scale + mean
    size = model.net.patch_size
    whole = F.fold(patches.transpose(1, 2), images.shape[2:], size, stride=size)
    return (whole * model.normalize.std + model.normalize.mean).clamp(0, 1)


class Sides:
    """Both ways through one case, from the same weights."""

    def __init__(self, case: str, device: str) -> None:
        self.case, self.device, ours = case, device, network(device)
        self.batch = Batch(torch.rand(BATCH, 3, 32, 32).to(device), torch.zeros(BATCH).long().to(device), torch.arange(BATCH))
        self.theirs = plain(ours)
        torch.manual_seed(1)
        self.classifier = create_model("resnet8", 10, 3, 32).eval().requires_grad_(False).to(device)
        if case == "step":
            self.objective = NIM(ours, probe=False).train()
            kinds = (self.objective.groups(), NIM(self.theirs, probe=False).groups())
            self.optimizers = [torch.optim.AdamW(groups, 1e-3, weight_decay=0.05) for groups in kinds]
            return
        images = self.batch.images[:ASKED]
        purifier = NIMPurifier(sigma=SIGMA).fit(self.classifier, images, self.batch.labels[:ASKED], autoencoder=ours)
        self.theirs.requires_grad_(False)
        self.guarded = Guarded(self.classifier, purifier=purifier).eval()

    def go(self, who: str, number: int) -> Tensor:
        """One time, with the randomness of `number`; the outcome."""
        torch.manual_seed(number)
        if self.case == "step":
            if who == "direct":
                direct_step(self.theirs, self.optimizers[1], self.batch.images)
                return torch.cat([p.detach().flatten() for p in self.theirs.parameters()])
            self.optimizers[0].zero_grad()
            sum(self.objective(self.batch, Progress()).losses.values()).backward()
            self.optimizers[0].step()
            return torch.cat([p.detach().flatten() for p in self.objective.student.parameters()])
        images, streams = self.batch.images[:ASKED], Streams.named(torch.arange(ASKED, device=self.device), number)
        return (self._inference if self.case == "inference" else self._gradient)(who, images, streams)

    def _inference(self, who: str, images: Tensor, streams: Streams) -> Tensor:
        with torch.no_grad():
            if who == "ours":
                return self.guarded(images, streams, draws=DRAWS).probabilities
            draws = [streams.fork(0).fork(draw) for draw in range(DRAWS)]
            return sum(self.classifier(direct_images(self.theirs, images, own)).softmax(dim=1) for own in draws) / DRAWS

    def _gradient(self, who: str, images: Tensor, streams: Streams) -> Tensor:
        asked = images.clone().requires_grad_()
        draws = [streams.fork(draw) for draw in range(DRAWS)]
        if who == "ours":
            model = _Fixed(self.guarded, Streams(torch.cat([own.keys for own in draws])))
            answer = Averaged(model, DRAWS)(asked)
        else:
            seen = (direct_images(self.theirs, asked, own.fork(0)) for own in draws)
            answer = sum(self.classifier(purified).log_softmax(dim=1) for purified in seen) / DRAWS
        return torch.autograd.grad(answer[:, 0].sum(), asked)[0]

    def level(self) -> None:
        """Both from the same weights and momenta again."""
        if self.case == "step":
            self.theirs.load_state_dict(self.objective.student.state_dict())
            self.optimizers[1].load_state_dict(copy.deepcopy(self.optimizers[0].state_dict()))


class _Fixed(nn.Module):
    """The guarded model with the streams of all draws, so that both sides have the same noise."""

    own_dice = True

    def __init__(self, guarded: Guarded, streams: Streams) -> None:
        super().__init__()
        self.guarded, self.streams = guarded, streams

    def forward(self, images: Tensor) -> Tensor:
        """Images of all draws, one draw after another -> logits."""
        return self.guarded.classify(images, self.streams)[0]


def now(device: str) -> float:
    """The time at which all work given to `device` is done."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(case: str, device: str) -> tuple[float, float, float, bool]:
    """Median seconds of the direct form, median and standard deviation of the ratios, and whether all pairs ended equal."""
    sides, times, equal = Sides(case, device), {"direct": [], "ours": []}, True
    for number in range(WARM + PAIRS):
        found = {}
        for who in ("direct", "ours") if number % 2 else ("ours", "direct"):
            begun = now(device)
            found[who] = sides.go(who, number)
            times[who].append(now(device) - begun)
        apart = (found["ours"] - found["direct"]).norm() / found["direct"].norm()
        equal = equal and float(apart) <= TOLERANCE[device] * (KINKS if case == "eot" else 1)
        sides.level()
    ratios = [a / b for a, b in zip(times["ours"][WARM:], times["direct"][WARM:], strict=True)]
    return statistics.median(times["direct"][WARM:]), statistics.median(ratios), statistics.stdev(ratios), equal


def memory(case: str, who: str, device: str) -> float:
    """Peak MiB of one way, in a process of its own."""
    command = [sys.executable, __file__, "--worker", case, who, device]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def worker(case: str, who: str, device: str) -> None:
    """Print the peak MiB of the second time, beyond what stood there before the first."""
    sides = Sides(case, device)
    before = reset_peak(device)
    for number in range(2):
        sides.go(who, number)
    print((peak(device) - before) / 2**20)


def main() -> None:
    """Measure, print a table and the JSON line."""
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    device, ratios, spreads, mib, equal = options.device, {}, {}, {}, True
    print(f"{NETWORKS[device]}, 3x32x32, batch {BATCH} (step) and {ASKED} x {DRAWS} draws, {device}, median of {PAIRS} pairs")
    print(
        f"{'case':10} {'direct ms':>10} {'ours ms':>9} {'ratio':>7} {'sd of pair ratios':>19} {'direct MiB':>11} {'ours MiB':>9}"
    )
    for case in CASES:
        direct, ratio, spread, same = measure(case, device)
        beside = {who: memory(case, who, device) for who in ("direct", "ours")}
        ratios[case], spreads[case], equal = round(ratio, 4), round(spread / PAIRS**0.5, 4), equal and same
        ratios[f"{case}_memory"] = round(beside["ours"] / max(beside["direct"], 1e-9), 4)
        mib |= {f"{case} {who}": value for who, value in beside.items()}
        print(f"{case:10} {1e3 * direct:10.1f} {1e3 * direct * ratio:9.1f} {ratio:7.3f} {spread:19.3f} {beside['direct']:11.0f} "
              f"{beside['ours']:9.0f}", flush=True)  # fmt: skip
    line: dict[str, Any] = {"name": "nim", "ratios": ratios, "equal": equal}
    if options.save:
        about = (
            f"Pre-training step (batch {BATCH}), probabilities and gradients averaged over {DRAWS} draws ({ASKED} images), {NETWORKS[device]} "
            f"at 3x32x32, against the direct form without fused attention and batched draws; median of {PAIRS} pairs; and peak memory."
        )
        facts = {"about": about, "spread": spreads, "memory_mib": mib}
        place = Path(f"results/bench-nim{'' if device == 'cpu' else '-cuda'}.json")
        write_json(place, {**line, **facts, "environment": {**environment(device), "command": "", "platform": ""}})
    print(json.dumps(line))


if __name__ == "__main__":
    main()
