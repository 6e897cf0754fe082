"""What the detector measures: how an answer shakes under noise, and how many gradient steps an image keeps its class."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from overproof.attacks.ascent import differentiable, input_gradient
from overproof.attacks.base import logits_of, predictions
from overproof.attacks.randomness import Streams, normal
from overproof.attacks.threats import Linf
from overproof.errors import UsageError
from overproof.losses.divergences import cross_entropy
from overproof.losses.margins import margin
from overproof.networks import in_mode

Goal = Literal["targeted", "ce", "margin"]

KEPT = 0.97  # share of natural images that keep their class; where more lose it, they fill the upper end of Delta themselves
FEWEST, WANTED, MOST = 5, 7, 10  # steps of the median natural image
TRIAL, ROUNDS = 40, 14


def noise_shift(model: nn.Module, images: Tensor, logits: Tensor, streams: Streams, *, sigma: float, draws: int = 1) -> Tensor:
    """How far the answer moves under noise, Delta = ||h(x) - h(x + sigma u)||_1, h = softmax(z), u ~ N(0, I).

    Args:
        model: images -> logits (N, K).
        images: (N, C, H, W) in [0, 1]; with the noise they are not cut.
        logits: the model's on `images`.
        streams: source of u.
        sigma: standard deviation in pixel units, at least 0.
        draws: values of u that are averaged over, at least 1.

    Returns:
        (N,) in [0, 2].
    """
    answer, total = logits.softmax(dim=1), torch.zeros_like(logits[:, 0])
    for _ in range(draws):
        shaken = logits_of(model, images + normal(images, streams, sigma)).softmax(dim=1)
        total = total + (answer - shaken).abs().sum(dim=1)
    return total / draws


def fitting_sigma(model: nn.Module, images: Tensor, streams: Streams, batch_size: int = 256) -> float:
    """The strongest noise, between 0.0001 and 1, under which 97 % of the `images` keep their class."""
    low, high = 1e-4, 1.0
    parts = torch.split(torch.arange(len(images), device=images.device), batch_size)
    known = [predictions(model, images[rows]) for rows in parts]
    for _ in range(10):
        sigma, kept = math.sqrt(low * high), 0.0
        for rows, classes in zip(parts, known, strict=True):
            shaken = normal(images[rows], streams.rows(rows).fork(0), sigma)  # the same noise each time, only stronger
            kept += float((predictions(model, images[rows] + shaken) == classes).sum()) / len(images)
        low, high = (sigma, high) if kept >= KEPT else (low, sigma)
    return low


@dataclass(frozen=True, kw_only=True)
class Walk:
    """Gradient steps on which an image leaves its class c: x <- project(x - step_size * grad F(x)).

    The gradient is taken as it is, without its sign: steps are as long as it is.

        "targeted"  F = -log h_y(x) towards another class y
        "ce"        F = log h_c(x)
        "margin"    F = z_c(x) - max_{j != c} z_j(x)

    Args:
        goal: F.
        step_size: above 0, in pixel units per unit of the gradient.
        radius: how far each pixel may go, in [0, 1].
        cap: steps at most, at least 1.
    """

    goal: Goal
    step_size: float = 0.01
    radius: float = 0.5
    cap: int = 200

    def value(self, logits: Tensor, base: Tensor, target: Tensor) -> Tensor:
        """F of images of the classes `base` (N,), of which "targeted" wants to make `target` (N,); (N,)."""
        if self.goal == "targeted":
            return cross_entropy(logits, target)
        return -cross_entropy(logits, base) if self.goal == "ce" else -margin(logits, base)

    def step(self, points: Tensor, gradient: Tensor, images: Tensor) -> Tensor:
        """The points after one step, within the radius around `images` and in [0, 1]."""
        return Linf(self.radius).project(points - self.step_size * gradient, images)

    def count(self, model: nn.Module, images: Tensor, base: Tensor, target: Tensor) -> Tensor:
        """K: the steps each image makes until it is not predicted as `base` any more, whatever it is then; at most `cap`.

        One forward pass per step serves the test and the gradient; images that have left cost nothing more.

        Returns:
            Integers (N,).

        Raises:
            NoGradientError: the logits do not depend on the images.
        """
        with in_mode(model), torch.inference_mode(False), torch.no_grad():
            origin, leave, aim = images.clone(), base.clone(), target.clone()
            rows = torch.arange(len(origin), device=origin.device)
            counts, x = torch.zeros_like(rows), origin
            for step in range(1, self.cap + 1):
                with differentiable(x) as leaf:
                    logits = logits_of(model, leaf)
                    going = (logits.detach().argmax(dim=1) == leave).nonzero().flatten()
                    if len(going) == 0:
                        break
                    gradient = input_gradient(self.value(logits, leave, aim), leaf).nan_to_num(0, 0, 0)
                if len(going) < len(rows):
                    x, gradient, origin, leave, aim, rows = (t[going] for t in (x, gradient, origin, leave, aim, rows))
                x = self.step(x, gradient, origin)
                counts[rows] = step
            return counts

    def fitted(self, model: nn.Module, images: Tensor, base: Tensor, target: Tensor, batch_size: int = 256) -> Walk:
        """This walk with a step size at which the median of natural `images` makes 5 to 10 steps.

        Raises:
            UsageError: half of them keep their class at every step size.
        """
        trial, low, high = replace(self, cap=min(TRIAL, self.cap)), 0.0, math.inf
        nearest, best = math.inf, self.step_size
        parts = torch.split(torch.arange(len(images), device=images.device), batch_size)
        for _ in range(ROUNDS):
            counts = [trial.count(model, *(part[rows] for part in (images, base, target))) for rows in parts]
            median = max(float(torch.cat(counts).float().median()), 0.5)
            off, slow = abs(math.log(median / WANTED)), median > MOST or median >= trial.cap
            if median < trial.cap and off < nearest:
                nearest, best = off, trial.step_size
            if not slow and median >= FEWEST:
                break
            low, high = (trial.step_size, high) if slow else (low, trial.step_size)
            guess = trial.step_size * (max(median / WANTED, 2.0) if slow else min(median / WANTED, 0.5))
            guess = math.sqrt(low * high) if low > 0 and high < math.inf else guess
            trial = replace(trial, step_size=guess)
        if nearest == math.inf:
            raise UsageError(
                f"Half of {len(images)} natural images keep their class for {trial.cap} steps ({self.goal!r}) however long the "
                f'steps within radius={self.radius:g}. Give a larger radius or step size, take untargeted_loss="margin", or leave '
                "this criterion out."
            )
        return replace(self, step_size=best)
