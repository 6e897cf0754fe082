"""The step rules of APGD: where each image moves next, and how far. Their state is per image and shrinks with the active set."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from overproof.attacks.threats import L1, L2, Linf, Threat, per_image, project_l1


class Pace(ABC):
    """The step rule of one run.

    Attributes:
        window: steps until the next checkpoint, at which `judge` is to be called.
    """

    window: int

    @abstractmethod
    def move(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The next points, inside ball and box."""

    @abstractmethod
    def see(self, values: Tensor) -> None:
        """Take note of the values (M,) at the new points."""

    @abstractmethod
    def judge(self, best: Tensor, best_values: Tensor) -> Tensor:
        """Adapt steps and window at a checkpoint; mask (M,) of images that go back to their best point."""

    def keep(self, rows: Tensor) -> None:
        """Go on with the images `rows` alone."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[rows])


class MomentumPace(Pace):
    """Linf and L2: steps with momentum, 2 eps long at first, halved where a window brought too little.

    z = project(x + step * direction), x+ = project(x + alpha (z - x) + (1 - alpha) (x - x-)). A window brought too little if
    the value rose in at most a share rho of its steps, or if neither step nor best value changed since the checkpoint
    before. Windows last 0.22, 0.19, 0.16, ... of all steps, at least 0.06.
    """

    def __init__(
        self, images: Tensor, start: Tensor, values: Tensor, *, eps: float, steps: int, alpha: float, rho: float
    ) -> None:
        self.eps, self.alpha, self.rho, self.first = eps, alpha, rho, True
        self.window, self.shorter, self.shortest = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
        self.previous = start
        self.step = per_image(torch.full_like(images.flatten(1)[:, 0], 2 * eps), images)
        self.values = self.best_before = values
        self.rises = torch.zeros_like(values)
        self.halved = torch.ones_like(values, dtype=torch.bool)

    @abstractmethod
    def direction(self, gradient: Tensor) -> Tensor:
        """The gradient brought to size 1; a new tensor."""

    @abstractmethod
    def inside(self, points: Tensor) -> Tensor:
        """`points` brought into ball and box, in place."""

    def move(self, x: Tensor, gradient: Tensor) -> Tensor:
        moved = self.inside(self.direction(gradient).mul_(self.step).add_(x))
        if not self.first:
            moved.lerp_(x, 1 - self.alpha).add_(x - self.previous, alpha=1 - self.alpha)
            moved = self.inside(moved)
        self.previous, self.first = x, False
        return moved

    def see(self, values: Tensor) -> None:
        self.rises = self.rises + (values > self.values)
        self.values = values

    def judge(self, best: Tensor, best_values: Tensor) -> Tensor:
        idle = ~self.halved & (self.best_before >= best_values)
        self.halved = (self.rises <= self.rho * self.window) | idle
        self.step = torch.where(self.halved.view_as(self.step), self.step / 2, self.step)
        self.best_before, self.rises = best_values, torch.zeros_like(self.rises)
        self.window = max(self.window - self.shorter, self.shortest)
        return self.halved


class LinfPace(MomentumPace):
    """Signs of the gradient."""

    def __init__(
        self, images: Tensor, start: Tensor, values: Tensor, *, eps: float, steps: int, alpha: float, rho: float
    ) -> None:
        super().__init__(images, start, values, eps=eps, steps=steps, alpha=alpha, rho=rho)
        self.low, self.high = (images - eps).clamp_(min=0), (images + eps).clamp_(max=1)

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign()

    def inside(self, points: Tensor) -> Tensor:
        return points.clamp_(self.low, self.high)


class L2Pace(MomentumPace):
    """The gradient divided by its length; the change is shortened to the ball, then cut to the box."""

    def __init__(
        self, images: Tensor, start: Tensor, values: Tensor, *, eps: float, steps: int, alpha: float, rho: float
    ) -> None:
        super().__init__(images, start, values, eps=eps, steps=steps, alpha=alpha, rho=rho)
        self.images = images

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient / per_image(gradient.flatten(1).norm(dim=1).clamp_(min=1e-12), gradient)

    def inside(self, points: Tensor) -> Tensor:
        change = points.sub_(self.images)
        scale = (self.eps / change.flatten(1).norm(dim=1).clamp_(min=1e-12)).clamp_(max=1)
        return change.mul_(per_image(scale, change)).add_(self.images).clamp_(0, 1)


class SparsePace(Pace):
    """L1: signs of the largest gradient entries, whose number follows the sparsity of the best point.

    A step is `step` long and moves 2/3 as many entries as the best point at the last checkpoint changed. At a checkpoint
    (every 0.04 of all steps) where it changes less than 0.95 times as many as before, the image goes back to it with
    step = eps; else the step is divided by 1.5, down to eps / 10.
    """

    def __init__(self, images: Tensor, start: Tensor, *, eps: float, steps: int) -> None:
        self.images, self.eps = images, eps
        self.window = max(int(0.04 * steps), 1)
        self.step = torch.full_like(images.flatten(1)[:, :1], eps)
        self._follow(self._changed(start))

    def _changed(self, points: Tensor) -> Tensor:
        return (points != self.images).flatten(1).sum(dim=1, keepdim=True)

    def _follow(self, changed: Tensor) -> None:
        self.changed = changed
        self.moving = (changed / 1.5).long().clamp_(1, self.images[0].numel())
        self.most = int(self.moving.max())

    def move(self, x: Tensor, gradient: Tensor) -> Tensor:
        flat = gradient.flatten(1)
        heights = flat.abs()
        least = heights.topk(self.most, dim=1).values.gather(1, self.moving - 1)
        signs = flat.sign().mul_(heights >= least)
        signs.mul_(self.step / signs.abs().sum(dim=1, keepdim=True).clamp_(min=1e-10))
        return project_l1(signs.view_as(x).add_(x), self.images, self.eps)

    def see(self, values: Tensor) -> None:
        pass

    def judge(self, best: Tensor, best_values: Tensor) -> Tensor:
        changed = self._changed(best)
        sparser = changed < 0.95 * self.changed
        self.step = torch.where(sparser, self.eps, (self.step / 1.5).clamp_(min=self.eps / 10))
        self._follow(changed)
        return sparser.squeeze(1)


def make_pace(threat: Threat, images: Tensor, start: Tensor, values: Tensor, *, steps: int, alpha: float, rho: float) -> Pace:
    """The step rule for `threat`, from points `start` with values (N,)."""
    if isinstance(threat, L1):
        return SparsePace(images, start, eps=threat.eps, steps=steps)
    paces = {Linf: LinfPace, L2: L2Pace}
    return paces[type(threat)](images, start, values, eps=threat.eps, steps=steps, alpha=alpha, rho=rho)
