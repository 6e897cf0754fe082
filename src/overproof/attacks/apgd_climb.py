"""One run of APGD: from a start to the best point, image by image, with whatever step rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from overproof.attacks.apgd_steps import Pace
from overproof.attacks.threats import per_image

# look(points (M, C, H, W), rows (M,), gradient wanted) -> values (M,), success (M,), gradient like the points (or zeros)
Look = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor]]


@dataclass
class Found:
    """What a run found per image: a successful point with its value, or the point with the highest value."""

    images: Tensor
    values: Tensor
    won: Tensor

    @classmethod
    def nothing(cls, images: Tensor, values: Tensor) -> Found:
        """Before the first point."""
        return cls(images.clone(), torch.full_like(values, -math.inf), torch.zeros_like(values, dtype=torch.bool))

    def take(self, rows: Tensor, images: Tensor, values: Tensor, won: Tensor) -> None:
        """Keep points of the images `rows`: success before failure, then the higher value."""
        higher = ~(values <= self.values[rows])
        better = (won & ~self.won[rows]) | ((won == self.won[rows]) & higher)
        rows = rows[better]
        self.images[rows], self.values[rows], self.won[rows] = images[better], values[better], won[better]


@dataclass
class _Path:
    rows: Tensor
    x: Tensor
    gradient: Tensor
    best: Tensor
    best_gradient: Tensor
    best_values: Tensor

    def keep(self, rows: Tensor) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])

    def note(self, values: Tensor) -> None:
        higher = values > self.best_values
        self.best = torch.where(per_image(higher, self.x), self.x, self.best)
        self.best_gradient = torch.where(per_image(higher, self.x), self.gradient, self.best_gradient)
        self.best_values = torch.where(higher, values, self.best_values)

    def go_back(self, back: Tensor) -> None:
        self.x = torch.where(per_image(back, self.x), self.best, self.x)
        self.gradient = torch.where(per_image(back, self.x), self.best_gradient, self.gradient)


def climb(look: Look, start: Tensor, pace: Callable[[Tensor], Pace], steps: int, *, stop: bool) -> Found:
    """Maximise the values of `look`.

    Args:
        look: values, success and gradient at points; called once per step, the last time without a gradient.
        start: (N, C, H, W).
        pace: makes the step rule, given the values at the start.
        steps: at least 1.
        stop: successful images leave at once.
    """
    rows = torch.arange(len(start), device=start.device)
    values, won, gradient = look(start, rows, True)
    path = _Path(rows, start, gradient, start, gradient, values.nan_to_num(nan=-math.inf))
    rule, found = pace(path.best_values), Found.nothing(start, values)
    checkpoint = rule.window
    for step in range(steps + 1):
        if step > 0:
            path.x = rule.move(path.x, path.gradient)
            values, won, path.gradient = look(path.x, path.rows, step < steps)
            path.note(values)
            rule.see(values)
        if bool(won.any()):
            found.take(path.rows[won], path.x[won], values[won], won[won])
            if stop:
                left = (~won).nonzero().flatten()
                path.keep(left)
                rule.keep(left)
                if len(left) == 0:
                    return found
        if step == checkpoint < steps:
            path.go_back(rule.judge(path.best, path.best_values))
            checkpoint += rule.window
    found.take(path.rows, path.best, path.best_values, torch.zeros_like(path.rows, dtype=torch.bool))
    return found
