"""Which estimators a network can serve: found out on two images, before the first step needs it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from overproof.errors import DerivativeError
from overproof.losses.derivatives import naming_operators, refuse_dead_ends
from overproof.losses.fisher_eigen import Solver
from overproof.losses.fisher_trace import Tracer
from overproof.networks import dice, in_mode, put_dice, spare_buffers

SERVING: tuple[Literal["rademacher", "hutchinson", "fd-kl"], ...] = ("rademacher", "hutchinson", "fd-kl")


def see_what_serves(student: nn.Module, measure: Tracer | Solver, images: Tensor) -> None:
    """Differentiate the penalty by the weights once: what is missing would else only show in the loop's backward pass.

    The network, its gradients and the generators are left as they were.

    Raises:
        DerivativeError: names the operator that refuses, and an estimator that works.
    """
    error = _refusal(student, measure, images)
    if error is not None:
        # The last of these needs only what any training needs.
        other = next((name for name in SERVING[:-1] if _serves(student, name, images)), SERVING[-1])
        change = f"estimator={other!r}" if isinstance(measure, Tracer) else f"target='trace' and estimator={other!r}"
        raise DerivativeError(f"fim: estimator={measure.estimator!r}", error.operator, f"Use {change}.") from error


def minds_its_mode(student: nn.Module, images: Tensor) -> bool:
    """Whether the network as it is answers otherwise than in eval mode, or rolls dice; found out by asking, for layers do not tell.

    The network and the generators are left as they were.
    """
    before = dice(images.device)
    with torch.no_grad(), spare_buffers(student):
        answer = student(images)
        after = dice(images.device)
        with in_mode(student):
            still = student(images)
    put_dice(images.device, before)
    rolled = any(
        one is not None and two is not None and not torch.equal(one, two) for one, two in zip(before, after, strict=True)
    )
    return rolled or not torch.equal(answer, still)


def _serves(student: nn.Module, estimator: Literal["rademacher", "hutchinson", "fd-kl"], images: Tensor) -> bool:
    try:
        return _refusal(student, Tracer(estimator=estimator), images) is None
    except RuntimeError:  # there are many ways not to serve
        return False


def _refusal(student: nn.Module, measure: Tracer | Solver, images: Tensor) -> DerivativeError | None:
    weights = [parameter for parameter in student.parameters() if parameter.requires_grad]
    try:
        with (
            torch.random.fork_rng(devices=[images.device] if images.is_cuda else []),
            torch.autocast(images.device.type, enabled=False),
            in_mode(student),
            naming_operators("The penalty", ""),
        ):
            found = measure(student, images, create_graph=True)
            values = found[0] if isinstance(found, tuple) else found.values
            refuse_dead_ends(values)
            torch.autograd.grad(values.sum(), weights, allow_unused=True)
    except DerivativeError as error:
        return error
    return None
