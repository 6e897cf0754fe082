"""Adversarial weight perturbation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from overproof.methods.objective import Objective, remembering
from overproof.networks import buffers_unchanged, copied_buffers, device_of, unchanged
from overproof.types import Output


def worst_gradients(run: Callable[[], Output], objective: Objective, phase: str, *, gamma: float) -> Output:
    """Leave in `.grad` the gradients where the weights are worst, a little way off; the weights keep their bits.

    .grad = grad L(w + v),  v_l = gamma ||w_l|| g_l / ||g_l||,  g = grad L(w)

    for each tensor w_l of the student that `phase` trains and that has two dimensions or more: kernels and matrices, neither
    biases nor the scales of normalisations. Both passes see the same adversarial images, those crafted at w. Running statistics,
    and whatever else a forward writes into buffers, are those of the pass at w.

    Args:
        run: one forward and backward pass over the step's batch; it leaves its gradients in `.grad`, and no older ones. Of several
            processes these are the mean gradients, so that v is the same everywhere.
        objective: the method; what it attacks with `perturb` is attacked once.
        phase: whose weights are moved.
        gamma: size of v_l as a share of ||w_l||, above 0; 0.005 in most of the paper.

    Returns:
        The output of the second pass; its logs tell by how much its loss is higher than that of the first ("awp rise").

    Reference: Wu, Xia, Wang: Adversarial Weight Perturbation Helps Robust Generalization, NeurIPS 2020, arXiv 2004.05884.

    Differences from the paper: one step in one alternation, as in its experiments. The optimiser steps from w with the gradient at
    w + v; the authors' code steps from w + v and takes v off afterwards, so that the weight decay acts on v, too. Its running
    statistics are those of the weights w + v, though w is kept.
    """
    chosen = {id(p) for p in objective.trainable(phase)}
    weights = [p for p in objective.student.parameters() if p.dim() > 1 and id(p) in chosen]
    with remembering(objective) as again:
        as_before = copied_buffers(objective, besides=objective.teacher)
        with _numbers_repeated(device_of(objective.student)):
            first = run()
        again()
        with buffers_unchanged(objective, besides=objective.teacher), moved(weights, gamma):
            as_before()  # a memory bank must not know these very images already
            second = run()
    return replace(second, logs={**(second.logs or {}), "awp rise": _total(second) - _total(first)})


@contextmanager
def moved(weights: Sequence[nn.Parameter], gamma: float) -> Iterator[None]:
    """Each weight moved by gamma ||w|| g / ||g|| along its gradient g inside the block, and back to the same bits."""
    with unchanged(weights):
        with torch.no_grad():
            for weight in weights:
                if weight.grad is not None:
                    weight.add_(_shift(weight, weight.grad, gamma))
        yield


def _shift(weight: Tensor, gradient: Tensor, gamma: float) -> Tensor:
    length = gradient.norm()
    usable = length.isfinite() & (length > 0)  # under 16-mixed gradients overflow now and then; that step is skipped anyway
    return torch.where(usable, gradient * (gamma * weight.norm() / length), torch.zeros_like(gradient))


def _total(output: Output) -> Tensor:
    return torch.stack([value.detach() for value in output.losses.values()]).sum()


@contextmanager
def _numbers_repeated(device: torch.device) -> Iterator[None]:
    """The random numbers drawn in the block are drawn again after it: both passes have the same dropout."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
