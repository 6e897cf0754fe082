"""Boundary supporting samples: images pushed on from their class until another one just takes over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from overproof.attacks.ascent import differentiable, input_gradient
from overproof.attacks.base import MinimumNormAttack, logits_of
from overproof.attacks.boundary import begin, crossed
from overproof.attacks.randomness import Streams, uniform
from overproof.attacks.threats import AnyNorm, per_image
from overproof.errors import UsageError
from overproof.losses.boundaries import boundary_gap
from overproof.losses.feature_distances import wide
from overproof.networks import in_mode

StepSize = float | Literal["newton"]
STRETCH = 1.01  # prolongs a walk whose end is across the boundary by no more than rounding


@dataclass(frozen=True)
class Walk:
    """Where the walks of a batch ended.

    Attributes:
        images: last points (N, C, H, W), detached.
        logits: the model's there (N, K), detached.
        crossed: (N,), whether the target class has taken over: the point supports the boundary between the two.
        strayed: (N,), whether a third class has; what is neither crossed nor strayed did not get so far.
    """

    images: Tensor
    logits: Tensor
    crossed: Tensor
    strayed: Tensor


def walk_to_boundary(
    model: nn.Module,
    images: Tensor,
    base: Tensor,
    target: Tensor,
    *,
    step_size: StepSize = 0.06,
    overshoot: float = 1e-4,
    steps: int = 10,
    clamp: bool = True,
) -> Walk:
    """Walk down the gap L = z_b - z_k, image by image, until class b is predicted no more.

    x <- clip(x - step_size (L + overshoot) g / ||g||_2),  g = grad_x L

    Steps shrink with the gap, so a walk ends just behind the boundary. An image whose walk has ended costs nothing more, and its
    logits are those that ended the walk.

    Args:
        model: images -> logits (N, K); walked in eval mode, without gradients of its parameters.
        images: (N, C, H, W), N at least 1.
        base: the classes b that the model predicts (N,).
        target: the classes k to walk to (N,), each another than b.
        step_size: pixel units (Euclidean) per unit of the gap. A step e of networks that are fed (x - m) / s is e s here: 0.3
            becomes 0.06 at the s = 0.2 of CIFAR-10. "newton": 1 / ||g||, which would end on the boundary if the model were linear, and
            does not depend on the scale of the logits.
        overshoot: how far behind the boundary the steps aim, in logit units, above 0.
        steps: at most, at least 1.
        clamp: cut to [0, 1] after each step.

    Raises:
        UsageError: an option out of its range.
        NoGradientError: the logits do not depend on the images.

    Reference: Heo et al., AAAI 2019, arXiv 1805.05532.

    Differences from the paper: images lie in [0, 1], not normalised, and are cut to that range.
    """
    check_walk("walk_to_boundary", step_size, overshoot, steps)
    with in_mode(model), torch.inference_mode(False), torch.no_grad():
        x, left, aim = images.clone(), base.clone(), target.clone()
        rows, ends, known = torch.arange(len(x), device=x.device), x.clone(), x
        for turn in range(steps + 1):
            with differentiable(x) as leaf, torch.set_grad_enabled(turn < steps):
                logits = logits_of(model, leaf)
                known = logits.detach().clone() if turn == 0 else known.index_copy_(0, rows, logits.detach())
                ends[rows] = x
                going = (logits.detach().argmax(dim=1) == left).nonzero().flatten()
                if turn == steps or len(going) == 0:
                    break
                gap = boundary_gap(logits, left, aim)
                gradient = input_gradient(gap, leaf).nan_to_num(0, 0, 0)
            x, gap, gradient, rows, left, aim = (t.detach()[going] for t in (x, gap, gradient, rows, left, aim))
            x = x - per_image(_reach(gap + overshoot, gradient, step_size).to(x.dtype), x) * gradient
            x = x.clamp_(0, 1) if clamp else x
        predicted = known.argmax(dim=1)
        hit = predicted == target
        return Walk(ends, known, hit, ~hit & (predicted != base))


def _reach(gap: Tensor, gradient: Tensor, step_size: StepSize) -> Tensor:
    """By what the gradient is multiplied, (M,); where the gradient is zero the image stays."""
    length: Tensor = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
    return gap / length.square() if isinstance(step_size, str) else step_size * gap / length


def check_walk(who: str, step_size: StepSize, overshoot: float, steps: int) -> None:
    """Refuse options with which no walk can be made.

    Raises:
        UsageError: names them.
    """
    sized = step_size == "newton" if isinstance(step_size, str) else 0 < step_size < math.inf
    if not sized or not 0 < overshoot < math.inf or steps < 1:
        raise UsageError(
            f'{who} needs a step_size above 0 or "newton", overshoot above 0 and steps of at least 1, not {step_size!r}, {overshoot} and {steps}.'
        )


def draw_targets(logits: Tensor, base: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A wrong class for each image, drawn with the probability that the model gives it: p_k = q_k / (1 - q_b), p_b = 0.

    All are drawn at once: the largest of log q_k plus Gumbel noise. Nothing underflows, however sure the model is of b.

    Args:
        logits: (N, K), K at least 2; q is their softmax.
        base: classes b (N,) that are not drawn.
        generator: source of the noise; the global one if None.

    Returns:
        Class numbers (N,).
    """
    logits = wide(logits)
    noise = uniform(logits, generator).clamp_(min=torch.finfo(logits.dtype).tiny)
    scores = logits - noise.log_().neg_().log_()
    return scores.scatter(1, base[:, None], -torch.inf).argmax(dim=1)


@dataclass(frozen=True, kw_only=True)
class BSS(MinimumNormAttack):
    """Walks from the predicted class to a wrong one, and ends just behind the boundary (see `walk_to_boundary`).

    Args:
        eps, norm, targeted: see `MinimumNormAttack`; norm L2. With `targeted` the labels are the classes to walk to, otherwise
            each is drawn with the probability that the model gives it; a third class that takes over on the way then counts too.
        step_size: pixel units per unit of the gap, or "newton"; see `walk_to_boundary`.
        overshoot: how far behind the boundary the steps aim, in logit units, above 0.
        steps: at most, at least 1.

    Raises:
        UsageError: an option out of its range.

    Reference: Heo et al., AAAI 2019, arXiv 1805.05532.

    Differences from the paper: a sample that is across by no more than rounding is prolonged by one per cent, so that it still counts
    when it is judged again; failures are given back untouched.
    """

    logits_only: ClassVar[bool] = True
    norms: ClassVar[tuple[AnyNorm, ...]] = ("L2",)

    step_size: StepSize = 0.06
    overshoot: float = 1e-4
    steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_walk("BSS", self.step_size, self.overshoot, self.steps)

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Samples just behind the boundary; the images themselves where none was found within eps."""
        streams = Streams.of(generator, images)
        with in_mode(model), torch.inference_mode(False), torch.no_grad():
            images, labels = images.clone(), labels.clone()
            nearest, rows = begin(self, model, images, labels)
            if len(rows) == 0:
                return nearest.images
            starts, labels = images[rows], labels[rows]
            logits = logits_of(model, starts)
            base = logits.argmax(dim=1)
            target = labels if self.targeted else draw_targets(logits, base, streams.rows(rows))
            walk = walk_to_boundary(
                model, starts, base, target, step_size=self.step_size, overshoot=self.overshoot, steps=self.steps
            )
            nearest.offer(walk.images, crossed(walk.logits, labels, self.targeted), rows)
            further = (starts + STRETCH * (walk.images - starts)).clamp_(0, 1)
            nearest.offer(further, crossed(logits_of(model, further), labels, self.targeted), rows)
        return nearest.within(self.eps)
