"""The Fisher information of a network's answer with respect to its input, of any classifier, at each image.

G(x) = sum_k p_k s_k s_k^T with s_k = grad_x log p_k: to second order KL(p(x) || p(x + d)) = d^T G d / 2. Its trace says how much the
answer moves in all directions together, its largest eigenvalue how much in the worst one. Units: 1 / pixel unit^2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from overproof.folding import folded
from overproof.losses.derivatives import differentiable
from overproof.losses.fisher_eigen import Eigensolver, Leading, Solver, factor
from overproof.losses.fisher_trace import Estimator, Tracer, refuse_mixing
from overproof.networks import spare_buffers

ROOM = 2**26  # numbers of the Jacobians that are held at once: a quarter of a GiB
AT_ONCE = 256  # images: beyond that, caches are too small
WORTHWHILE = 32  # images for which a copy with BatchNorm folded into the convolutions is worth making

__all__ = ["Estimator", "Leading", "Solver", "Tracer", "lambda_max", "leading", "spectrum", "trace"]


def trace(
    model: nn.Module,
    images: Tensor,
    *,
    estimator: Estimator = "exact",
    draws: int = 1,
    step: float | None = None,
    batch_statistics: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """tr G at each image; between lambda_max and K - 1 times as much.

    Args:
        model: images -> logits (N, K), in eval mode.
        images: (N, C, H, W) in [0, 1].
        estimator, draws, step, batch_statistics, generator: see `Tracer`, which a training loop of one's own calls with
            `create_graph=True`.

    Returns:
        (N,).

    Raises:
        UsageError: see `Tracer`.
        NoGradientError: the logits do not depend differentiably on the images.
    """
    work = Tracer(estimator=estimator, draws=draws, step=step, batch_statistics=batch_statistics, generator=generator)
    return _by_parts(lambda net, part: work(net, part)[0], model, images, whole=batch_statistics)


def lambda_max(
    model: nn.Module,
    images: Tensor,
    *,
    estimator: Eigensolver | None = None,
    steps: int = 20,
    tolerance: float = 1e-4,
    batch_statistics: bool = False,
) -> Tensor:
    """The largest eigenvalue of G at each image: under ||d||_2 <= eps the answer moves by at most eps^2 lambda_max / 2 nats.

    Args:
        model: images -> logits (N, K), in eval mode.
        images: (N, C, H, W) in [0, 1].
        estimator, steps, tolerance, batch_statistics: see `Solver`.

    Returns:
        (N,); NaN where the gradient is not finite.

    Raises:
        UsageError: see `Solver`.
        NoGradientError: the logits do not depend differentiably on the images.
    """
    solver = Solver(estimator=estimator, steps=steps, tolerance=tolerance, batch_statistics=batch_statistics)
    return _by_parts(lambda net, part: solver(net, part).values, model, images, whole=batch_statistics)


def leading(
    model: nn.Module, images: Tensor, *, estimator: Eigensolver | None = None, steps: int = 20, tolerance: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """The largest eigenvalue (N,) of G at each image, and its eigenvector (N, C, H, W) of length 1, whose sign means nothing.

    Args:
        model, images, estimator, steps, tolerance: see `lambda_max`.
    """
    solver = Solver(estimator=estimator, steps=steps, tolerance=tolerance)
    net, parts = _parts(model, images)
    found = [solver(net, part) for part in parts]
    return torch.cat([part.values for part in found]), torch.cat([part.directions for part in found])


def spectrum(model: nn.Module, images: Tensor, *, batch_statistics: bool = False) -> Tensor:
    """The K - 1 largest eigenvalues of G at each image, the largest first; all others are 0. Their sum is the trace.

    Args:
        model: images -> logits (N, K), in eval mode.
        images: (N, C, H, W) in [0, 1].
        batch_statistics: allow BatchNorm in train mode, see `Tracer`.

    Returns:
        (N, K - 1); NaN where the gradient is not finite.

    Raises:
        UsageError: BatchNorm in train mode.
        NoGradientError: the logits do not depend differentiably on the images.
    """
    if not batch_statistics:
        refuse_mixing(model)

    def values(net: nn.Module, part: Tensor) -> Tensor:
        with differentiable(part) as x:
            found = factor(net(x), x)
        ascending: Tensor = torch.linalg.eigvalsh(found.gram) * found.scale[:, None]
        return ascending.flip(1)[:, :-1].clamp(min=0).to(part.dtype)

    return _by_parts(values, model, images, whole=batch_statistics)


def _by_parts(work: Callable[[nn.Module, Tensor], Tensor], model: nn.Module, images: Tensor, *, whole: bool) -> Tensor:
    if whole:  # in train mode; measuring is no training
        with spare_buffers(model):
            return work(model, images)
    net, parts = _parts(model, images)
    return torch.cat([work(net, part) for part in parts])


def _parts(model: nn.Module, images: Tensor) -> tuple[nn.Module, list[Tensor]]:
    """The model, or its cheaper copy where that pays, and the images in parts whose Jacobians find room."""
    if not len(images):
        return model, [images]
    refuse_mixing(model)  # before anything is run, which would move its statistics
    with torch.no_grad():
        classes = model(images[:1]).shape[1]
    room = ROOM // (classes * images[0].numel())
    parts = list(torch.split(images, min(max(room, 1), AT_ONCE)))
    still = model._compiled_call_impl is None and not any(module.training for module in model.modules())
    still = still and any(isinstance(module, nn.BatchNorm2d) for module in model.modules())  # else nothing to fold
    copied = folded(model, images) if still and len(images) >= WORTHWHILE else model
    return copied if getattr(copied, "folds", ()) else model, parts
