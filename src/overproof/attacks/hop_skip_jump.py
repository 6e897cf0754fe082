"""HopSkipJump: a minimum-norm attack that sees nothing but the predicted class."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof.attacks.base import MinimumNormAttack, Nearest, predictions, won
from overproof.attacks.randomness import Streams, normal, uniform
from overproof.attacks.threats import AnyNorm, per_image
from overproof.errors import UsageError
from overproof.networks import in_mode

CHUNK = 1024  # most images in one forward pass while directions are tried


@dataclass(frozen=True, kw_only=True)
class HopSkipJump(MinimumNormAttack):
    """Walks along the decision boundary towards the image, guided by a gradient estimated from decisions.

    Round t, at a boundary point x_t of distance r = ||x_t - x||_p, with phi = 1 where the attacker has won, else -1:

    g = mean_b (phi(x_t + delta u_b) - mean phi) u_b,  u_b uniform on the sphere, b = 1..probes * sqrt(t), delta = r / d
    x_{t+1} = search(x_t + xi v),  v = g / ||g||_2 (L2) or sign g (Linf),  xi = r / sqrt(t), halved until phi = 1

    where `search` halves the segment to x (L2), or the radius of the box around x (Linf), down to d^(-3/2) or d^(-2) of r.

    Args:
        eps, norm, targeted: see `MinimumNormAttack`; norms L2 and Linf.
        queries: predictions asked for each image at most, at least 100.
        probes: directions of the first round, at least 2.
        trials: random starts tried before an image is given up, at least 1.

    Raises:
        UsageError: an option below its bound.

    Reference: Chen, Jordan, Wainwright, S&P 2020, arXiv 1904.02144.

    Differences from the paper: only the first start is noise of single pixels; the next ones are coarser and coarser, down to
    plain colours, for many networks see one and the same class in all fine noise. A round begins only if the budget covers its
    probes. The search stops at 1e-5 of r at the finest, where float32 decisions end.
    """

    logits_only: ClassVar[bool] = True
    norms: ClassVar[tuple[AnyNorm, ...]] = ("L2", "Linf")

    queries: int = 5000
    probes: int = 100
    trials: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries < 100 or self.probes < 2 or self.trials < 1:
            given = f"queries={self.queries}, probes={self.probes}, trials={self.trials}"
            raise UsageError(f"HopSkipJump({given}): must be at least 100, 2 and 1.")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Nearest adversarial images found; the images themselves where none was found within eps."""
        streams, nearest = Streams.of(generator, images), Nearest(images, self.threat)
        with in_mode(model), torch.no_grad():
            walk = _Walk(self, model, images.detach(), labels, nearest)
            walk.start(streams.fork(0))
            step = 1
            while len(rows := walk.affordable(step)):
                walk.advance(rows, step, streams.fork(step).rows(rows))
                step += 1
        return nearest.within(self.eps)


class _Walk:
    """The boundary points of a batch and the queries each has cost."""

    def __init__(self, attack: HopSkipJump, model: nn.Module, images: Tensor, labels: Tensor, nearest: Nearest) -> None:
        self.attack, self.model, self.images, self.labels, self.nearest = attack, model, images, labels, nearest
        self.points = images.clone()
        self.spent = torch.zeros(len(images), dtype=torch.long, device=images.device)
        self.size = images[0].numel() if len(images) else 1
        self.precision = max(self.size ** (-1.5 if attack.norm == "L2" else -2.0), 1e-5)
        self.halvings = math.ceil(-math.log2(self.precision))

    def asks(self, candidates: Tensor, rows: Tensor) -> Tensor:
        """Whether each of `candidates` (M, C, H, W) is what the attacker wants; costs its image (M,) one query."""
        self.spent[rows] += 1
        return won(predictions(self.model, candidates), self.labels[rows], self.attack.targeted)

    def start(self, streams: Streams) -> None:
        """A boundary point for every image for which one of the random starts succeeds."""
        rows = torch.arange(len(self.images), device=self.images.device)
        already = self.asks(self.images, rows)
        self.nearest.offer(self.images, already)
        rows = rows[~already]
        met = torch.zeros(len(self.images), dtype=torch.bool, device=rows.device)
        for trial in range(min(self.attack.trials, self.attack.queries - 2 * self.halvings - 1)):
            if len(rows) == 0:
                break
            noise = _noise(self.images[rows], streams.fork(trial).rows(rows), trial)
            hit = self.asks(noise, rows)
            self.points[rows[hit]], met[rows[hit]] = noise[hit], True
            rows = rows[~hit]
        met_rows = met.nonzero().flatten()
        self.search(self.points[met_rows], met_rows, blend=True)
        if self.attack.norm == "Linf":
            self.search(self.points[met_rows], met_rows)

    def affordable(self, step: int) -> Tensor:
        """Numbers of the images that stand on the boundary and can pay for another round."""
        # A jump may be halved as often as a search halves; what it does not use stays for the next round.
        cost = self.directions(step) + 2 * self.halvings
        moving = (self.nearest.sizes > 0) & self.nearest.found & (self.spent + cost <= self.attack.queries)
        return moving.nonzero().flatten()

    def directions(self, step: int) -> int:
        """Number of probes in round `step`."""
        return int(self.attack.probes * math.sqrt(step))

    def advance(self, rows: Tensor, step: int, streams: Streams) -> None:
        """One round: estimate the gradient, jump, come back to the boundary."""
        points = self.points[rows]
        distance = self.attack.threat.size(points - self.images[rows])
        count = self.directions(step)
        chunk = max(1, CHUNK // count)
        parts = torch.split(torch.arange(len(rows), device=rows.device), chunk)
        ways = torch.cat([self.estimate(rows[p], distance[p] / self.size, count, streams.rows(p)) for p in parts])
        length, found = distance / math.sqrt(step), points.clone()
        left = torch.arange(len(rows), device=rows.device)
        for _ in range(self.halvings):
            jumped = (points[left] + per_image(length[left], points) * ways[left]).clamp_(0, 1)
            hit = self.asks(jumped, rows[left])
            found[left[hit]] = jumped[hit]
            left = left[~hit]
            if len(left) == 0:
                break
            length[left] = length[left] / 2
        self.search(found, rows)

    def estimate(self, rows: Tensor, radius: Tensor, count: int, streams: Streams) -> Tensor:
        """Direction (M, C, H, W) in which the attacker's region lies, from `count` decisions around each boundary point."""
        points = self.points[rows][:, None]
        steps = normal(points.new_empty(len(rows), count, *points.shape[2:]), streams)
        radii = per_image(radius, steps)
        steps = F.normalize(steps.flatten(2), dim=2).view_as(steps)
        probes = (points + radii * steps).clamp_(0, 1)
        steps = (probes - points) / radii  # what the box left of them
        self.spent[rows] += count
        wanted = self.labels[rows].repeat_interleave(count)
        hit = won(predictions(self.model, probes.flatten(0, 1)), wanted, self.attack.targeted)
        signs = hit.view(len(rows), count).to(points.dtype) * 2 - 1
        baseline = signs.mean(dim=1, keepdim=True)
        weights = torch.where(baseline.abs() == 1, signs, signs - baseline)
        gradient = torch.einsum("nb,nb...->n...", weights, steps)
        if self.attack.norm == "Linf":
            return gradient.sign()
        return F.normalize(gradient.flatten(1), dim=1).view_as(gradient)

    def search(self, outside: Tensor, rows: Tensor, blend: bool = False) -> None:
        """Halve the way from adversarial points `outside` (M, C, H, W) back to the images; keep the last adversarial ones."""
        images, best = self.images[rows], outside.clone()
        straight = blend or self.attack.norm == "L2"
        reach = torch.ones_like(self.nearest.sizes[rows]) if straight else self.attack.threat.size(outside - images)
        low, high = torch.zeros_like(reach), reach.clone()
        for _ in range(self.halvings):
            middle = (low + high) / 2
            share = per_image(middle, images)
            inside = torch.minimum(torch.maximum(outside, images - share), images + share)
            candidates = (1 - share) * images + share * outside if straight else inside
            hit = self.asks(candidates, rows)
            best = torch.where(per_image(hit, images), candidates, best)
            low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
        self.points[rows] = best
        self.nearest.offer(best, torch.ones_like(rows, dtype=torch.bool), rows)


def _noise(images: Tensor, streams: Streams, trial: int) -> Tensor:
    """Uniform noise in cells of 1, 2, 4, ... pixels, the last of which cover the image, over and over."""
    height, width = images.shape[-2:]
    scales = math.ceil(math.log2(max(height, width))) + 1
    cell = 2 ** (trial % scales)
    coarse = uniform(images[..., : math.ceil(height / cell), : math.ceil(width / cell)], streams)
    return coarse.repeat_interleave(cell, -2).repeat_interleave(cell, -1)[..., :height, :width]
