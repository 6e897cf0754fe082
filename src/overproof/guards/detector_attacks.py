"""Attacks that know the detector: its published white-box attack, expectation over its noise, and the search that breaks it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from overproof.attacks.adam import AdamAttack, Aim
from overproof.attacks.ascent import input_gradient
from overproof.attacks.base import Attack, logits_of, predictions, won
from overproof.attacks.bpda import straight_through
from overproof.attacks.combined import Wrapper, build
from overproof.attacks.eot import EOT
from overproof.attacks.randomness import Streams, other_classes
from overproof.attacks.threats import Linf, per_image
from overproof.errors import UsageError
from overproof.guards.base import Judgement
from overproof.guards.detector import Detector
from overproof.guards.detector_scores import Walk, noise_shift
from overproof.networks import in_mode

Weights = tuple[float, float, float, float]

# Ways to deep images: towards the nearest wrong class, and towards one drawn at random.
NEAREST = {"attack": "pgd", "loss": "margin", "steps": 50, "early_stop": False}
ANY = {"attack": "adam", "loss": "margin"}


@dataclass(frozen=True, kw_only=True, eq=False)
class WhiteBox(AdamAttack):
    """Descent towards a wrong class and towards what the detector takes for natural, through all of its criteria.

    L = w_1 L1 + w_2 L2 + w_3 L3 - w_4 L4, with t the target class and l the loss that `AdamAttack` minimises

        L1 = l(x, t)
        L2 = ||h(x + sigma u) - h(x)||_1       firm under noise, drawn anew in each step
        L3 = l(A_t(x), t2)                     a step towards another class t2 != t, drawn anew in each step, gets near it
        L4 = l(A_u(x), t)                      a step away from the predicted class leads out of t

    A_t and A_u are one step of the detector's walks; the backward pass takes them for the identity. Terms of criteria that the
    detector does not measure are left out. With the weights (1, 0, 0, 0) this is `AdamAttack`, the gray-box attack.

    Args:
        eps, norm, targeted, loss, steps, learning_rate, confidence: see `AdamAttack`.
        detector: fitted for the attacked model.
        weights: w_1 to w_4, at least 0.
        samples: draws of u and t2 that L2 and L3 are averaged over in each step, at least 1.

    Raises:
        UsageError: an option out of its range, or a detector that is not fitted.

    Reference: Yu, Hu, Guo, Chao, Weinberger, NeurIPS 2019, arXiv 1910.07629.

    Differences from the paper: those of `AdamAttack`; `samples`. L4 has no lower bound and can drag points back to the boundary: a
    weak result of this attack says nothing about the detector.
    """

    detector: Detector = field(repr=False)
    weights: Weights = (2.0, 1.0, 1.0, 1.0)
    samples: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.detector.require_fitted()
        if len(self.weights) != 4 or not all(weight >= 0 for weight in self.weights) or self.samples < 1:
            raise UsageError(
                f"WhiteBox(weights={self.weights}, samples={self.samples}): four weights of at least 0, at least one sample."
            )

    def objective(self, model: nn.Module, x: Tensor, logits: Tensor, aim: Aim) -> Tensor:
        """L at the points `x`, (N,)."""
        reach, firm, near, away = self.weights
        probe, total = self.detector.probe, reach * super().objective(model, x, logits, aim)
        if firm and probe.noise:
            shift = noise_shift(model, x, logits, aim.streams, sigma=probe.sigma or 0.0, draws=self.samples)
            total = total + firm * shift
        if near and "targeted" in probe.walks:
            for _ in range(self.samples):
                goal = other_classes(aim.target, logits.shape[1], aim.streams)
                moved = self._after(probe.walks["targeted"], model, (x, logits), goal)
                total = total + near / self.samples * self.lack(moved, goal)
        if away and "untargeted" in probe.walks:
            moved = self._after(probe.walks["untargeted"], model, (x, logits), aim.target)
            total = total - away * self.lack(moved, aim.target)
        return total

    def _after(self, walk: Walk, model: nn.Module, place: tuple[Tensor, Tensor], goal: Tensor) -> Tensor:
        """The logits (N, K) a step of `walk` further than `place`, the points and their logits."""
        x, logits = place
        values = walk.value(logits, logits.detach().argmax(dim=1), goal)
        gradient = input_gradient(values, x, keep_graph=True).nan_to_num(0, 0, 0)
        return logits_of(model, straight_through(walk.step(x.detach(), gradient, x.detach()), x))


@dataclass(frozen=True, kw_only=True)
class ThroughNoise(EOT):
    """An attack on E_u[log h(x + sigma u)], the classifier as the detector's noise sees it.

    Args:
        inner, eps, norm, targeted, samples: see `EOT`.
        sigma: standard deviation of u in pixel units, such as `detector.probe.sigma`, at least 0.

    Raises:
        UsageError: a negative sigma.

    Reference: Athalye, Engstrom, Ilyas, Kwok, ICML 2018, arXiv 1707.07397.

    Differences from the paper: those of `EOT`.
    """

    sigma: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma >= 0:
            raise UsageError(f"ThroughNoise(sigma={self.sigma}): at least 0.")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        return super().__call__(_Shaken(model, self.sigma), images, labels, generator)


class _Shaken(nn.Module):
    def __init__(self, model: nn.Module, sigma: float) -> None:
        super().__init__()
        self.model, self.sigma = model, sigma

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.model, images + self.sigma * torch.randn_like(images))


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentSearch(Wrapper):
    """Looks for a natural-looking point on the way to a deep adversarial image. No gradient goes through the detector.

    x_a = x + a (x' - x), x' by the inner attack; a* = argmin_a score(x_a) over the x_a that the model gets wrong

    Where the detector rolls dice, the least of many scores is a lucky one: the best place of each way is judged anew before it counts.

    Args:
        inner, eps, norm, targeted: see `Wrapper`; an inner attack that goes far beyond the boundary. By default the margin is
            descended: by PGD towards the nearest wrong class first, in later restarts by Adam towards one drawn at random.
        detector: called as `detector(model, images, streams)`, judges images.
        points: places on the way from the first wrong point to x' that are judged, at least 1.
        restarts: inner attacks, each with its own random numbers, later ones for images that are still rejected; at least 1.
        looks: fresh judgements of the best place of a way, whose mean score counts, at least 1; open while one rejects it.

    Raises:
        UsageError: points, restarts or looks below 1.

    Reference: Tramer, Carlini, Brendel, Madry, NeurIPS 2020, arXiv 2002.08347 (adaptive attacks without gradients of the defence).

    Differences from the paper: the search itself, which follows the idea and not a published algorithm.
    """

    inner: str | Mapping[str, Any] | Attack = field(default_factory=lambda: dict(NEAREST))
    detector: Callable[..., Judgement] = field(repr=False)
    points: int = 20
    restarts: int = 3
    looks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.points, self.restarts, self.looks) < 1:
            given = f"points={self.points}, restarts={self.restarts}, looks={self.looks}"
            raise UsageError(f"SegmentSearch({given}): all must be at least 1.")

    def way(self, number: int) -> Attack:
        """The inner attack of a restart."""
        if number == 0 or self.inner != NEAREST:
            return self.attack
        threat = self.attack.threat
        pace = {"learning_rate": min(AdamAttack.learning_rate, threat.eps / 2)} if isinstance(threat, Linf) else {}
        return build({**ANY, **pace}, eps=self.eps, norm=self.norm, targeted=self.targeted or None)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        streams = Streams.of(generator, images)
        with in_mode(model), torch.inference_mode(False), torch.no_grad():
            search = _Search(self, model, images.clone(), labels.clone())
            search.offer(search.images, torch.arange(len(labels), device=labels.device), streams.fork(0))
            for number in range(self.restarts):
                rows = search.open.nonzero().flatten()
                if len(rows) == 0:
                    break
                search.along(rows, self.way(number), streams.fork(number + 1).rows(rows))
        return search.found


class _Search:
    """The best points of a batch so far: their scores, and whether they are still rejected."""

    def __init__(self, attack: SegmentSearch, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.attack, self.model, self.images, self.labels = attack, model, images, labels
        self.found, self.scores = images.clone(), torch.full(labels.shape, torch.inf, device=images.device)
        self.open = torch.ones_like(labels, dtype=torch.bool)

    def wrong(self, points: Tensor, rows: Tensor) -> Tensor:
        """Whether the model gets these points of the images `rows` wrong (a target: right)."""
        return won(predictions(self.model, points), self.labels[rows], self.attack.targeted)

    def judged(self, points: Tensor, rows: Tensor, streams: Streams, looks: int) -> tuple[Tensor, Tensor]:
        """The scores (N,) of points of the images `rows`, infinite where the model is right, and whether they are rejected."""
        scores = torch.full(rows.shape, torch.inf, dtype=self.scores.dtype, device=rows.device)
        rejected = torch.ones_like(rows, dtype=torch.bool)
        hit = self.wrong(points, rows).nonzero().flatten()
        if len(hit):
            seen = [self.attack.detector(self.model, points[hit], streams.fork(look).rows(hit)) for look in range(looks)]
            scores[hit] = torch.stack([judgement.score for judgement in seen]).mean(dim=0).to(scores.dtype)
            rejected[hit] = torch.stack([judgement.rejected for judgement in seen]).float().mean(dim=0) > 0
        return scores, rejected

    def offer(self, points: Tensor, rows: Tensor, streams: Streams) -> None:
        """Keep those of the points that win and look more natural than what is known."""
        scores, rejected = self.judged(points, rows, streams, self.attack.looks)
        better = scores < self.scores[rows]
        kept = rows[better]
        self.scores[kept], self.found[kept], self.open[kept] = scores[better], points[better], rejected[better]

    def along(self, rows: Tensor, attack: Attack, streams: Streams) -> None:
        """Attack the images `rows`, judge places between the first wrong point and the attack's, and offer the best."""
        start, points = self.images[rows], self.attack.points
        far = attack(self.model, start, self.labels[rows], streams.fork(0))
        low, high = (torch.full(rows.shape, value, dtype=start.dtype, device=start.device) for value in (0.0, 1.0))
        for _ in range(7):
            middle = (low + high) / 2
            hit = self.wrong(start.lerp(far, per_image(middle, start)), rows)
            low, high = torch.where(hit, low, middle), torch.where(hit, middle, high)
        best, least = far, torch.full(rows.shape, torch.inf, dtype=self.scores.dtype, device=rows.device)
        for number in range(points):
            share = high + (1 - high) * (number / max(points - 1, 1))
            place = start.lerp(far, per_image(share, start)).clamp(0, 1)
            scores, _ = self.judged(place, rows, streams.fork(number + 1), 1)
            best = torch.where(per_image(scores < least, place), place, best)
            least = torch.minimum(scores, least)
        self.offer(best, rows, streams.fork(points + 1))
