"""Derivatives of a network with respect to its images: gradients, and products with the Jacobian of the logits from both sides."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from overproof.errors import DerivativeError, NoGradientError

ONCE = "function that was marked with @once_differentiable"
# How autograd says which operator it cannot differentiate in the way that was asked for.
_REFUSALS = (
    r"forward AD with (\S+) that does not support",
    r"derivative for '?(?:aten::)?([\w:.]+)'? is not implemented",
    r"(custom autograd\.Function) to use it with forward mode",
    rf"({ONCE})",
    r"(torch\.compile) with aot_autograd does not currently support double backward",
)


@contextmanager
def differentiable(x: Tensor) -> Iterator[Tensor]:
    """`x` as a leaf that gradients reach, whatever the caller switched off."""
    # Inference mode of the caller would make gradients impossible; no_grad is simply lifted.
    with torch.inference_mode(False), torch.enable_grad():
        yield x.clone().requires_grad_() if x.is_inference() else x.detach().requires_grad_()


def input_gradient(values: Tensor, x: Tensor, *, keep_graph: bool = False) -> Tensor:
    """Gradient of sum(values) with respect to the images `x` alone; parameters receive nothing.

    Raises:
        NoGradientError: `values` does not depend on `x` as far as autograd can see.
    """
    gradient = None
    if values.requires_grad:
        (gradient,) = torch.autograd.grad(values.sum(), x, retain_graph=keep_graph, allow_unused=True)
    return _found(gradient)


def pull(logits: Tensor, x: Tensor, weights: Tensor, *, create_graph: bool = False) -> Tensor:
    """J^T w: the gradient of sum_k w_k z_k at each image.

    Args:
        logits: z, (N, K), computed from `x`; their graph is kept.
        x: (N, C, H, W), a leaf that requires gradients.
        weights: w, (N, K).
        create_graph: the result can be differentiated again.

    Returns:
        (N, C, H, W).

    Raises:
        NoGradientError: the logits do not depend on `x` as far as autograd can see.
    """
    gradient = None
    if logits.requires_grad:
        options = {"retain_graph": True, "create_graph": create_graph, "allow_unused": True}
        (gradient,) = torch.autograd.grad(logits, x, weights, **options)
    return _found(gradient)


def pull_each(
    logits: Tensor, x: Tensor, weights: Tensor, *, create_graph: bool = False, at_once: bool | None = None
) -> list[Tensor]:
    """`pull` for several sets of weights (M, N, K): a list of M results (N, C, H, W).

    Args:
        logits, x, weights, create_graph: see `pull`.
        at_once: one vectorised backward pass (M times the memory) instead of M passes; None: at once where that is faster, on
            an accelerator. An operator that cannot be vectorised is served by M passes.
    """
    if (x.is_cuda if at_once is None else at_once) and logits.requires_grad:
        try:
            options = {"retain_graph": True, "create_graph": create_graph, "allow_unused": True, "is_grads_batched": True}
            return list(_found(torch.autograd.grad(logits, x, weights, **options)[0]))
        except RuntimeError:  # no batching rule, or too little memory
            pass
    return [pull(logits, x, each, create_graph=create_graph) for each in weights]


class Transposed:
    """J u at the images of one forward pass: the derivative of `pull` by its weights, in which it is linear.

    No operator needs forward-mode differentiation for that, and the forward pass is not repeated.

    Args:
        logits, x: see `pull`.
    """

    def __init__(self, logits: Tensor, x: Tensor) -> None:
        self._weights = torch.zeros_like(logits, requires_grad=True)
        self._image = pull(logits, x, self._weights, create_graph=True)
        refuse_dead_ends(self._image)

    def push(self, directions: Tensor) -> Tensor:
        """J u for directions (N, C, H, W): (N, K)."""
        (changes,) = torch.autograd.grad(self._image, self._weights, directions, retain_graph=True)
        return changes


def push_forward(model: nn.Module, images: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and J u (N, K) by forward-mode differentiation: one pass, nothing kept of it.

    Raises:
        NoGradientError: the logits do not depend on the images.
    """
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(images, directions)  # type: ignore[no-untyped-call]
        logits, changes = forward_ad.unpack_dual(model(dual))  # type: ignore[no-untyped-call]
    return logits, _found(changes)


def refuse_dead_ends(values: Tensor) -> None:
    """See that `values`, made of derivatives, can be differentiated: `autograd.grad` passes in silence where `backward` complains.

    Raises:
        RuntimeError: a function on the way has no derivative of its derivative; `naming_operators` understands it.
    """
    known, left = set(), [values.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in known:
            if node.name() == "torch::autograd::Error":
                raise RuntimeError(f"The derivative passes through a {ONCE}.")
            known.add(node)
            left += [following for following, _ in node.next_functions]


@contextmanager
def naming_operators(what: str, remedy: str) -> Iterator[None]:
    """Turn autograd's refusal inside the block into an error that names the operator and the remedy.

    Raises:
        DerivativeError: an operator of the network cannot be differentiated in this way.
    """
    try:
        yield
    except RuntimeError as error:
        found = (re.search(pattern, str(error)) for pattern in _REFUSALS)
        name = next((match[1] for match in found if match), None)
        if name is None:
            raise
        raise DerivativeError(what, name, remedy) from error


def _found(gradient: Tensor | None) -> Tensor:
    if gradient is None:
        raise NoGradientError(
            "The function does not depend differentiably on the images (its value carries no gradient). Remove "
            "detach(), no_grad() or rounding from the model's forward, put a BPDA wrapper around that part, or use a "
            "black-box attack (square, hop-skip-jump)."
        )
    return gradient
