"""Fast adaptive boundary attack."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from overproof.attacks.ascent import differentiable, input_gradient
from overproof.attacks.base import MinimumNormAttack, Nearest, logits_of, won
from overproof.attacks.fab_projection import to_hyperplane
from overproof.attacks.randomness import Streams, normal, uniform
from overproof.attacks.threats import AnyNorm, make_threat
from overproof.errors import UsageError
from overproof.losses.margins import margin
from overproof.networks import in_mode

_DUALS = {"Linf": "L1", "L2": "L2", "L1": "Linf"}
_RADII = {"Linf": 0.3, "L2": 1.0, "L1": 5.0}
_FINAL_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class FAB(MinimumNormAttack):
    """Projections onto the linearised decision boundary, drawn towards the image.

    x <- clip((1 - a)(x + eta d(x)) + a (x_0 + eta d(x_0))), where d(z) is the shortest way inside the box from z onto
    {z : f_t(x) - f_y(x) + <g, z - x> = 0}, g = grad (f_t - f_y)(x), and a = min(|d(x)| / (|d(x)| + |d(x_0)|), alpha_max).
    From an adversarial x the next step starts at x_0 + beta (x - x_0).

    Args:
        eps, norm, targeted: see `MinimumNormAttack`; norms "Linf", "L2" and "L1". With a finite radius an image leaves as
            soon as an adversarial one is found inside it; otherwise it goes on getting nearer.
        steps: steps per run; each costs one forward and one backward pass (untargeted: a backward pass per class).
        restarts: runs; the first starts at the image, later ones at random points near it.
        targets: run once for each of this many classes, those with the largest logits of the image (FAB-T; 9 in AutoAttack),
            each step towards that one class; None: each step goes to the nearest of the hyperplanes of `classes`.
        classes: how many of the best other classes an untargeted step considers; all of them if None.
        alpha_max: largest weight of the projection of the image itself, in [0, 1].
        eta: extrapolation beyond the hyperplane, at least 1.
        beta: where between the image (0) and an adversarial point (1) the next step starts, in (0, 1].

    Raises:
        UsageError: an unknown norm, an option out of range, or `targets` together with `targeted`.

    Reference: Croce and Hein, ICML 2020, arXiv 1907.02044; AutoAttack's FAB-T: arXiv 2003.01690.

    Differences from the paper: an adversarial x is linearised where it is and not where the step starts, so that the pass
    that judges it also gives its gradient: a step costs a third less. The norms found were as small for Linf and L2, and
    within 2 % for L1.
    """

    logits_only: ClassVar[bool] = True
    norms: ClassVar[tuple[AnyNorm, ...]] = ("Linf", "L2", "L1")

    norm: AnyNorm = "Linf"
    steps: int = 100
    restarts: int = 1
    targets: int | None = None
    classes: int | None = None
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low in (("steps", 1), ("restarts", 1), ("targets", 1), ("classes", 1), ("eta", 1)):
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise UsageError(f"FAB({name}={value}): must be at least {low}.")
        if not 0 <= self.alpha_max <= 1 or not 0 < self.beta <= 1:
            raise UsageError(f"FAB(alpha_max={self.alpha_max}, beta={self.beta}): they lie in [0, 1] and (0, 1].")
        if self.targeted and self.targets is not None:
            raise UsageError("FAB(targeted=True, targets=...): the labels are the only targets then; leave `targets` out.")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Nearest adversarial images."""
        streams, nearest = Streams.of(generator, images), Nearest(images, self.threat)
        with in_mode(model), torch.no_grad():
            logits = logits_of(model, images)
            nearest.offer(images, won(logits.argmax(dim=1), labels, self.targeted))
            others = logits.scatter(1, labels[:, None], -math.inf)
            goals = others.topk(min(self.targets or 1, logits.shape[1] - 1), dim=1).indices
            for target in range(goals.shape[1]):
                for restart in range(self.restarts):
                    rows = self._unfinished(nearest.sizes).nonzero().squeeze(1)
                    goal = goals[rows, target] if self.targets else None
                    chosen = streams.fork(target * self.restarts + restart).rows(rows) if restart else None
                    self._run(model, nearest, rows, (labels[rows], goal, chosen))
            self._tighten(model, nearest, logits, labels)
        return nearest.within(self.eps)

    def _unfinished(self, sizes: Tensor) -> Tensor:
        return sizes > (self.eps if math.isfinite(self.eps) else 0)

    def _run(
        self, model: nn.Module, nearest: Nearest, rows: Tensor, about: tuple[Tensor, Tensor | None, Streams | None]
    ) -> None:
        """Offer to `nearest` all adversarial points on the way of the images `rows`; about: labels, goals, random start."""
        labels, goals, streams = about
        origin = nearest.origin[rows]
        x = origin if streams is None else self._start(origin, nearest.sizes[rows], streams)
        for _ in range(self.steps if len(rows) else 0):
            value, normals, adversarial = self._linearise(model, x, labels, goals)
            nearest.offer(x, adversarial, rows)
            keep = self._unfinished(nearest.sizes[rows])
            if not bool(keep.any()):
                return
            if not bool(keep.all()):
                rows, labels, origin, x, value, normals, adversarial = (
                    t[keep] for t in (rows, labels, origin, x, value, normals, adversarial)
                )
                goals = goals[keep] if goals is not None else None
            x = self._step(x, origin, (value, normals), adversarial)
        if len(rows):
            nearest.offer(x, won(logits_of(model, x).argmax(dim=1), labels, self.targeted), rows)

    def _step(self, x: Tensor, origin: Tensor, plane: tuple[Tensor, Tensor], adversarial: Tensor) -> Tensor:
        value, normals = plane
        share = torch.where(adversarial, self.beta, 1.0).to(x.dtype)
        points = torch.stack([torch.lerp(origin, x, share.view(-1, 1, 1, 1)), origin]).flatten(2)
        back = torch.linalg.vecdot((x - origin).flatten(1), normals)
        ways = to_hyperplane(points, normals, torch.stack([(1 - share) * back, back]) - value, self.norm)
        near, far = self.threat.size(ways.flatten(0, 1)).clamp(min=1e-8).view(2, -1)
        alpha = (near / (near + far)).clamp(max=self.alpha_max)[:, None]
        moved = points.add_(ways, alpha=self.eta)
        return torch.lerp(moved[0], moved[1], alpha).clamp_(0, 1).view_as(x)

    def _linearise(self, model: nn.Module, x: Tensor, labels: Tensor, goals: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Value and gradient of the logit difference with the nearest hyperplane, and whether x is adversarial."""
        with differentiable(x) as x:
            logits = logits_of(model, x)
            seen, dual = logits.detach(), make_threat(_DUALS[self.norm], math.inf)
            # Clones, as autograd refuses what a caller's inference mode made.
            away, towards = (classes.clone() for classes in self._pairs(seen, labels, goals))
            value, normals = _difference(logits, x, (away, towards[:, 0]), keep_graph=towards.shape[1] > 1)
            for rank in range(1, towards.shape[1]):
                pair = away, towards[:, rank]
                other, direction = _difference(logits, x, pair, keep_graph=rank + 1 < towards.shape[1])
                nearer = other.abs() * dual.size(normals) < value.abs() * dual.size(direction)
                value, normals = torch.where(nearer, other, value), torch.where(nearer[:, None], direction, normals)
        return value, normals, won(seen.argmax(dim=1), labels, self.targeted)

    def _pairs(self, logits: Tensor, labels: Tensor, goals: Tensor | None) -> tuple[Tensor, Tensor]:
        """The class to leave (N,) and the classes to move to (N, R)."""
        others = logits.scatter(1, labels[:, None], -math.inf)
        if self.targeted:
            return others.argmax(dim=1), labels[:, None]
        if goals is not None:
            return labels, goals[:, None]
        count = logits.shape[1] - 1
        return labels, others.topk(min(self.classes or count, count), dim=1).indices

    def _start(self, origin: Tensor, sizes: Tensor, streams: Streams) -> Tensor:
        """A random point, half as far away as what is known or asked."""
        noise = uniform(origin, streams, -1, 1) if self.norm == "Linf" else normal(origin, streams)
        limit = self.eps if math.isfinite(self.eps) else _RADII[self.norm]
        scale = sizes.clamp(max=limit) / (2 * self.threat.size(noise).clamp(min=1e-12))
        return (origin + noise * scale.view(-1, 1, 1, 1)).clamp_(0, 1)

    def _tighten(self, model: nn.Module, nearest: Nearest, logits: Tensor, labels: Tensor) -> None:
        """The final search: the boundary on the segment from image to adversarial, by interpolating the margin."""
        rows = (nearest.found & (nearest.sizes > 0)).nonzero().squeeze(1)
        if len(rows) == 0:
            return
        origin, labels, sign = nearest.origin[rows], labels[rows], -1 if self.targeted else 1
        way = nearest.images[rows] - origin
        low, high = torch.zeros_like(nearest.sizes[rows]), torch.ones_like(nearest.sizes[rows])
        below = sign * margin(logits[rows], labels)
        above = sign * margin(logits_of(model, origin + way), labels)
        for _ in range(_FINAL_STEPS):
            # A hundredth beyond the crossing: exactly on it, rounding would decide whether the point is adversarial.
            crossing = (below / (below - above)).nan_to_num(0.5).clamp(0, 1)
            share = low + (high - low) * torch.lerp(crossing, torch.ones_like(crossing), 0.01)
            x = torch.lerp(origin, origin + way, share.view(-1, 1, 1, 1))
            scores = logits_of(model, x)
            value, adversarial = sign * margin(scores, labels), won(scores.argmax(dim=1), labels, self.targeted)
            nearest.offer(x, adversarial, rows)
            high, above = torch.where(adversarial, share, high), torch.where(adversarial, value, above)
            low, below = torch.where(adversarial, low, share), torch.where(adversarial, below, value)


def _difference(logits: Tensor, x: Tensor, pair: tuple[Tensor, Tensor], *, keep_graph: bool) -> tuple[Tensor, Tensor]:
    """f_t - f_y (N,) and its gradient (N, D), without a NaN, for the pair y, t."""
    away, towards = pair
    value = (logits.gather(1, towards[:, None]) - logits.gather(1, away[:, None])).squeeze(1)
    normals = input_gradient(value, x, keep_graph=keep_graph)
    return value.detach().nan_to_num(0, 0, 0), normals.flatten(1).nan_to_num(0, 0, 0)
