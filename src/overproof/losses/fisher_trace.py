"""The trace of the input Fisher information, exactly and by four estimators, a value per image."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from overproof.errors import UsageError
from overproof.losses.derivatives import differentiable, naming_operators, pull, pull_each, push_forward
from overproof.losses.divergences import kl_divergence
from overproof.losses.feature_distances import HALVES, wide
from overproof.networks import dice, put_dice, spare_buffers

Estimator = Literal["exact", "rademacher", "label", "hutchinson", "fd-kl"]
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
COARSE = 0.02  # the smallest step whose divergence is not lost in half precision


@dataclass(frozen=True, kw_only=True)
class Tracer:
    """tr G = sum_k p_k ||J_k - mean_p J||^2 of a network at each image; J_k = grad_x z_k, p = softmax(z).

    With v a draw of K signs, u of pixels, and w = a - p sum(a):

    - exact: sum_k p_k ||D_k||^2 - ||sum_k p_k D_k||^2 with D_k = J_k - J_top, K - 1 backward passes. Relative to the surest
      class the difference loses no digits, however sure the network is.
    - rademacher: ||J^T w||^2, a_k = v_k sqrt(p_k). Unbiased in value and gradient, for v does not depend on the network.
    - label: ||J^T w||^2, w = e_k - p with k drawn from p. Unbiased in value; its gradient is that of `detach_p`.
    - hutchinson: Var_{k ~ p}[(J u)_k], u of signs, by forward-mode differentiation. Unbiased in value and gradient.
    - fd-kl: 2 KL(p(x) || p(x + h u)) / h^2, u Gaussian: no second derivative at all. Biased by O(h^2). Dropout in train mode has
      the same masks in both passes.

    Args:
        estimator: one of these.
        draws: over how many an estimate is averaged, at least 1.
        step: h in pixel units, positive; None: 0.4 / sqrt(pixels), and at least 0.02 where the network answers in half precision.
        detach_p: the weights p_k carry no gradient: sureness is not rewarded for itself.
        batch_statistics: allow BatchNorm in train mode, which mixes the images: the values are then those of the batch.
        generator: of the draws; the global one if None.
        at_once: of the exact form, see `derivatives.pull_each`.

    Raises:
        UsageError: an option out of range, or BatchNorm in train mode.
        DerivativeError: an operator that cannot be differentiated as the estimator needs it. (With `create_graph` some refuse only
            when the values are differentiated; the method fim asks before.)

    Reference: Shen et al., 2019, arXiv 1909.06137 (the trace); the estimators are Hutchinson's in class space and in pixel space.
    """

    estimator: Estimator = "exact"
    draws: int = 1
    step: float | None = None
    detach_p: bool = False
    batch_statistics: bool = False
    generator: torch.Generator | None = None
    at_once: bool | None = None

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise UsageError(f"The Fisher trace: estimator={self.estimator!r} is unknown; known are {', '.join(ESTIMATORS)}.")
        if self.draws < 1 or (self.step is not None and not self.step > 0):
            raise UsageError(f"The Fisher trace needs draws >= 1 and step > 0, not {self.draws} and {self.step}.")

    def __call__(self, model: nn.Module, images: Tensor, *, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        """The traces (N,) and, from the same forward pass, the logits (N, K); with `create_graph` both can be differentiated."""
        if not self.batch_statistics:
            refuse_mixing(model)
        if self.estimator == "exact":
            work = self._exact
        elif self.estimator == "hutchinson":
            work = self._hutchinson
        else:
            work = self._finite_difference if self.estimator == "fd-kl" else self._sampled
        others = "" if self.estimator == "rademacher" else '"rademacher", or '
        remedy = f'Use estimator={others}"fd-kl", which differentiates only once.'
        with naming_operators(f"The Fisher trace with estimator={self.estimator!r}", remedy), differentiable(images) as x:
            values, logits = work(model, x, create_graph)
        return (values, logits) if create_graph else (values.detach(), logits.detach())

    def _exact(self, model: nn.Module, x: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
        logits: Tensor = model(x)
        order, gaps = gaps_to_top(logits, x, create_graph=create_graph, at_once=self.at_once)
        total, mean = torch.zeros_like(logits[:, 0]), torch.zeros_like(x).flatten(1)
        for p, gap in zip(self._weights(logits).gather(1, order)[:, 1:].T, gaps, strict=True):
            row = gap.flatten(1)
            total = total + p * torch.linalg.vecdot(row, row)
            mean = torch.addcmul(mean, row, p[:, None])
        return total - mean.square().sum(dim=1), logits

    def _sampled(self, model: nn.Module, x: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
        logits: Tensor = model(x)
        p, total = logits.softmax(dim=1), torch.zeros_like(logits[:, 0])
        for _ in range(self.draws):
            if self.estimator == "label":
                weights = _drawn(p.detach(), self.generator) - p
            else:
                weights = class_weights(logits, _signs(p, self.generator), detach_p=self.detach_p)
            total = total + pull(logits, x, weights, create_graph=create_graph).flatten(1).square().sum(dim=1)
        return total / self.draws, logits

    def _hutchinson(self, model: nn.Module, x: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
        parts, x = [], x.detach()
        with torch.set_grad_enabled(create_graph):
            for number in range(self.draws):
                with self._spare(model) if number else nullcontext():
                    logits, changes = push_forward(model, x, _signs(x, self.generator))
                p = self._weights(logits)
                mean = (p * changes).sum(dim=1, keepdim=True)
                parts.append((p * (changes - mean).square()).sum(dim=1))
        return torch.stack(parts).mean(dim=0), logits

    def _finite_difference(self, model: nn.Module, x: Tensor, create_graph: bool) -> tuple[Tensor, Tensor]:
        parts, x = [], x.detach()
        with torch.set_grad_enabled(create_graph):
            masks = dice(x.device)
            logits: Tensor = model(x)
            step = self.step or max(0.4 / x[0].numel() ** 0.5, COARSE if logits.dtype in HALVES else 0.0)
            for _ in range(self.draws):
                moved = x + step * _normal(x, self.generator)
                later = dice(x.device)
                put_dice(x.device, masks)
                with self._spare(model):
                    near = model(moved)
                put_dice(x.device, later)
                # In double: of two answers that hardly differ the divergence is smaller than the rounding of its terms.
                apart = self._divergence(logits.double(), near.double())
                parts.append((2 * apart / step**2).to(wide(logits).dtype))
        return torch.stack(parts).mean(dim=0), logits

    def _spare(self, model: nn.Module) -> AbstractContextManager[None]:
        """For passes beside the first: BatchNorm in train mode shall not count them."""
        return spare_buffers(model) if self.batch_statistics else nullcontext()

    def _divergence(self, logits: Tensor, near: Tensor) -> Tensor:
        if not self.detach_p:
            return kl_divergence(logits, near)
        return (self._weights(logits) * (logits.log_softmax(dim=1) - near.log_softmax(dim=1))).sum(dim=1)

    def _weights(self, logits: Tensor) -> Tensor:
        p = logits.softmax(dim=1)
        return p.detach() if self.detach_p else p


def gaps_to_top(
    logits: Tensor, x: Tensor, *, create_graph: bool = False, at_once: bool | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The classes of each image by falling probability (N, K), and J_k - J_top (N, C, H, W) of each but the first."""
    order = logits.detach().argsort(dim=1, descending=True)
    others = order.T[1:, :, None]
    weights = torch.zeros(len(others), *logits.shape, dtype=logits.dtype, device=logits.device)
    weights.scatter_(2, others, 1.0).scatter_(2, order.T[:1, :, None].expand_as(others), -1.0)
    return order, pull_each(logits, x, weights, create_graph=create_graph, at_once=at_once)


def class_weights(logits: Tensor, vectors: Tensor, *, detach_p: bool = False) -> Tensor:
    """w = a - p sum(a) with a = v sqrt(p): J^T w is sum_k v_k sqrt(p_k) grad_x log p_k.

    Args:
        logits: (N, K).
        vectors: v, (N, K).
        detach_p: the sqrt(p_k) carry no gradient.
    """
    log_p = logits.log_softmax(dim=1)
    root = (0.5 * (log_p.detach() if detach_p else log_p)).exp()
    parts = vectors * root
    return parts - log_p.exp() * parts.sum(dim=1, keepdim=True)


def refuse_mixing(model: nn.Module) -> None:
    """See that each image is answered by itself.

    Raises:
        UsageError: a BatchNorm normalises with the statistics of the batch; names it.
    """
    for name, part in model.named_modules():
        if isinstance(part, _BatchNorm) and (part.training or part.running_mean is None):
            remedy = "Put the model into eval mode, or say" if part.running_mean is not None else "It keeps no others, so say"
            raise UsageError(
                f"The layer {name!r} ({type(part).__name__}) normalises with the statistics of the batch, so no image has a Fisher "
                f"information of its own. {remedy} batch_statistics=True (of the method fim: penalty_mode='train') for the values of the "
                "batch; directions (fisher.leading, ossa) are those of single images alone."
            )


def _drawn(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """A class for each row of probabilities (N, K), as a unit vector."""
    place = p.device if generator is None else generator.device
    level = torch.rand(len(p), 1, generator=generator, device=place, dtype=p.dtype).to(p.device)
    sums = p.cumsum(dim=1)
    chosen = (sums < level * sums[:, -1:]).sum(dim=1, keepdim=True)
    return torch.zeros_like(p).scatter(1, chosen, 1.0)


def _signs(like: Tensor, generator: torch.Generator | None) -> Tensor:
    place = like.device if generator is None else generator.device
    return 2 * torch.randint(0, 2, like.shape, generator=generator, device=place).to(like) - 1


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    place = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=place, dtype=like.dtype).to(like.device)
