"""How SoKD's policy learns: from one step ahead of the student, or from how far refined features are from the student's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from overproof.methods.sokd_policy import NAMES, Draw, Policy

Parameters = dict[str, Tensor]
Loss = Callable[[Parameters], Tensor]


def consistency(refined: Tensor, student: Tensor) -> Tensor:
    """L_aug = mean (F - F_s)^2 / 2, a 0-d tensor; only the policy learns from it."""
    return (refined - student.detach()).square().mean() / 2


def first_order(policy: Policy, leaves: dict[str, Tensor], loss: Tensor) -> None:
    """A step of the policy down `loss`, through the relaxed samples."""
    found = torch.autograd.grad(loss, [leaves[name] for name in NAMES], allow_unused=True)
    gradients = {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(NAMES, found, strict=True)}
    policy.update(gradients)


def unrolled(
    policy: Policy,
    draw: Draw,
    leaves: dict[str, Tensor],
    parameters: Parameters,
    *,
    inner: Loss,
    outer: Loss,
    step: float,
    decay: float,
) -> dict[str, Tensor]:
    """Gradients of the outer loss one step ahead, with respect to the policy.

    v = grad outer(theta - step (grad inner + decay theta)); what the step owes to the policy is -<v, d grad inner>. For alpha
    and beta the score function makes of it REINFORCE with the reward r = <v, grad inner>: the control variate of the finite
    differences does not depend on theta and cancels, so no further forward pass is needed. For magnitudes, which are
    straight-through, it is the derivative of r itself.

    Args:
        policy: whose alpha, beta and baseline are read.
        draw: the sampled refinement of both losses.
        leaves: those that `inner` refines with.
        parameters: theta by name.
        inner, outer: losses as functions of theta.
        step: length of the step ahead.
        decay: weight decay of that step.
    """
    names = list(parameters)
    here = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    slopes = _gradients(inner(here), here, create_graph=True)
    ahead = {n: (here[n] - step * (slopes[n] + decay * here[n])).detach().requires_grad_() for n in names}
    direction = _gradients(outer(ahead), ahead)
    reward = torch.stack([(direction[n] * slopes[n]).sum() for n in names]).sum()
    (magnitudes,) = torch.autograd.grad(reward, [leaves["magnitude"]], allow_unused=True) if reward.requires_grad else (None,)
    moved = torch.zeros_like(leaves["magnitude"]) if magnitudes is None else -magnitudes
    return {**policy.reinforce(draw, reward), "magnitude": moved}


def called_with(module: nn.Module, parameters: Parameters, args: tuple[Any, ...]) -> Any:
    """`module(*args)` with other parameters, named as in `named_parameters`, and with copies of all buffers.

    Modules that occur under several names are entered once: swapping a tensor in and out under each of its names would leave the
    wrong one behind. Parameters that several modules share are swapped in all of them.
    """
    known = dict(module.named_parameters())
    replaced = {id(known[name]): value for name, value in parameters.items()}
    state: Parameters = {}
    for prefix, part in module.named_modules():
        own = (*part.named_parameters(recurse=False, remove_duplicate=False), *part.named_buffers(recurse=False))
        for name, tensor in own:
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(tensor, nn.Parameter):
                state[path] = replaced.get(id(tensor), tensor)
            elif part.training:
                state[path] = tensor.clone()
    return torch.func.functional_call(module, state, args, tie_weights=False)


def _gradients(loss: Tensor, parameters: Parameters, *, create_graph: bool = False) -> Parameters:
    found = torch.autograd.grad(loss, list(parameters.values()), create_graph=create_graph, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}
