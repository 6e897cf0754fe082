"""The one inner maximiser: projected steepest ascent of any per-sample function under a threat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from overproof.attacks.randomness import normal
from overproof.attacks.threats import Threat
from overproof.losses.derivatives import differentiable as differentiable
from overproof.losses.derivatives import input_gradient as input_gradient

Start = Literal["uniform", "gaussian", "image"]
Loss = Callable[[Tensor, Tensor], "Tensor | tuple[Tensor, Tensor]"]


def ascend(
    loss: Loss,
    images: Tensor,
    threat: Threat,
    *,
    steps: int,
    step_size: float,
    start: Start = "uniform",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Maximise `loss` over the threat's ball around each image.

    x <- project(x + step_size * steepest(grad_x sum_n loss_n(x))), `steps` times. Only input gradients are computed;
    nothing is left in any parameter's `.grad`.

    Args:
        loss: called as `loss(x, rows)` with the current points (M, C, H, W) and the numbers (M,) of the images they belong
            to; returns values (M,), or values and a boolean mask (M,) of points that are good enough. Such a point is
            final: its image leaves the active set and costs nothing more. (Use the mask only with a model in eval mode:
            a smaller batch changes batch statistics.)
        images: (N, C, H, W) in [0, 1].
        threat: ball and distance; its radius is in pixel units.
        steps: number of gradient steps, at least 0.
        step_size: length of a step in the threat's norm, pixel units.
        start: "uniform" in the ball, "gaussian" with standard deviation 0.001 (TRADES, RSLAD), or the "image" itself.
        generator: source of the random start; the global one if None.

    Returns:
        The last points, detached, inside ball and box.

    Raises:
        NoGradientError: the loss does not depend on the images.
    """
    origin = images.detach()
    x = _start(origin, threat, start, generator)
    rows = torch.arange(len(images), device=images.device)
    final = x.clone()
    for _ in range(steps):
        gradient, finished = _gradient(loss, x, rows)
        if finished is not None and bool(finished.any()):
            final[rows[finished]] = x[finished]
            x, gradient, origin, rows = (t[~finished] for t in (x, gradient, origin, rows))
            if len(rows) == 0:
                return final
        x = threat.project(x + step_size * threat.steepest(gradient, x), origin)
    if len(rows) == len(final):
        return x
    final[rows] = x
    return final


def _start(images: Tensor, threat: Threat, start: Start, generator: torch.Generator | None) -> Tensor:
    if start == "uniform":
        return threat.random(images, generator)
    if start == "gaussian":
        return threat.project(images + normal(images, generator, 0.001), images)
    return images.clone()


def _gradient(loss: Loss, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    with differentiable(x) as x:
        result = loss(x, rows)
        values, finished = result if isinstance(result, tuple) else (result, None)
        return input_gradient(values, x), finished
