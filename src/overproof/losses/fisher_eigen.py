"""Eigenvalues and eigenvectors of the input Fisher information: in class space, where the matrix is K x K and not D x D."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from overproof.errors import DerivativeError, UsageError
from overproof.losses.derivatives import Transposed, differentiable, naming_operators, pull
from overproof.losses.fisher_trace import class_weights, gaps_to_top, refuse_mixing

Eigensolver = Literal["exact", "power"]
EXACT = 'Use estimator="exact".'
MANY = 200  # classes beyond which a power iteration is cheaper than a backward pass for each


@dataclass(frozen=True)
class Leading:
    """The largest eigenvalue of the Fisher information at each image.

    Attributes:
        values: lambda, (N,).
        directions: the eigenvector u, (N, C, H, W), of length 1; 0 where the network is flat. Its sign means nothing.
        classes: q = B u / ||B u||, (N, K): the same eigenvector in class space.
        logits: of the same forward pass, (N, K).
    """

    values: Tensor
    directions: Tensor
    classes: Tensor
    logits: Tensor


@dataclass(frozen=True, kw_only=True)
class Solver:
    """The largest eigenvalue of G = B^T B, B_k = sqrt(p_k) (J_k - mean_p J), with its eigenvector.

    - exact: the K x K matrix B B^T has the same non-zero eigenvalues; K - 1 backward passes.
    - power: q <- B B^T q / ||.||, all images together, each with its own length; per step one backward pass (B^T q) and its
      transpose (B u). It stops for an image when 1 - |cos| of two directions falls below the tolerance, and then has a value
      from below.

    B is scaled by the second largest probability, so that a direction is found however sure the network is.

    Args:
        estimator: one of these; None: exact up to 200 classes.
        steps: of the iteration, at least 1.
        tolerance: at least 0.
        detach_p: with `create_graph`, the p_k carry no gradient.
        batch_statistics: allow BatchNorm in train mode.
        at_once: see `derivatives.pull_each`.

    Raises:
        UsageError: an option out of range, or BatchNorm in train mode.
        DerivativeError: an operator that cannot be differentiated twice, which the iteration needs.

    Reference: Zhao et al., AAAI 2019, arXiv 1810.03806 (the eigenvector, by iteration over sampled classes).
    """

    estimator: Eigensolver | None = None
    steps: int = 20
    tolerance: float = 1e-4
    detach_p: bool = False
    batch_statistics: bool = False
    at_once: bool | None = None

    def __post_init__(self) -> None:
        if self.estimator not in (None, "exact", "power") or self.steps < 1 or not self.tolerance >= 0:
            raise UsageError(
                "The largest eigenvalue needs estimator exact or power, steps >= 1 and tolerance >= 0, not "
                f"{self.estimator!r}, {self.steps} and {self.tolerance}."
            )

    def __call__(self, model: nn.Module, images: Tensor, *, start: Tensor | None = None, create_graph: bool = False) -> Leading:
        """The leading eigenpair at each image; where logits or Jacobian are not finite the value is NaN and the direction 0.

        Args:
            model: images -> logits (N, K).
            images: (N, C, H, W).
            start: q (N, K) from which the iteration begins; rows of zeros, and None, are filled in.
            create_graph: values and logits can be differentiated. q is held fixed, which for a simple eigenvalue is its exact
                gradient.
        """
        if not self.batch_statistics:
            refuse_mixing(model)
        with naming_operators("The power iteration", EXACT), differentiable(images) as x:
            logits: Tensor = model(x)
            exact = self.estimator == "exact" or (self.estimator is None and logits.shape[1] <= MANY)
            values, directions, classes = self._exact(logits, x) if exact else self._iterated(logits, x, start)
            if create_graph:
                weights = class_weights(logits, classes, detach_p=self.detach_p)
                rows = pull(logits, x, weights, create_graph=True).flatten(1)
                values = rows.square().sum(dim=1)
        return Leading(values, directions, classes, logits if create_graph else logits.detach())

    def _exact(self, logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = factor(logits, x, at_once=self.at_once)
        values, vectors = torch.linalg.eigh(found.gram)
        q = vectors[..., -1:]
        shares = (found.mixing.mT @ q)[:, 1:].to(x.dtype)
        directions = _unit((found.gaps.mT @ shares).view_as(x))
        classes = torch.zeros_like(q[..., 0]).scatter(1, found.order, q[..., 0])
        return (values[:, -1] * found.scale).clamp(min=0).to(x.dtype), directions, classes.to(x.dtype)

    def _iterated(self, logits: Tensor, x: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        try:
            with naming_operators("The power iteration", EXACT):
                return self._power(logits, x, start)
        except DerivativeError:
            if self.estimator is not None:
                raise
            return self._exact(logits, x)  # nobody asked for the iteration

    def _power(self, logits: Tensor, x: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        sides = _Sides(logits, x)
        u = sides.pixels(sides.start(start))
        b = sides.classes(u)
        moving = torch.ones_like(b[:, :1], dtype=torch.bool)
        for _ in range(self.steps - 1):
            fresh = sides.pixels(_unit(b))
            turned = 1 - (fresh * u).flatten(1).sum(dim=1, keepdim=True).abs()
            seen = sides.classes(fresh)
            # An image that has arrived stays where it is, however long others take: a batch gives what its images give alone.
            u = torch.where(moving.view(-1, *[1] * (u.dim() - 1)), fresh, u)
            b = torch.where(moving, seen, b)
            moving = moving & (turned > self.tolerance)
            if not bool(moving.any()):
                break
        return (b.square().sum(dim=1) * sides.scale).masked_fill(sides.broken, torch.nan), u, _unit(b)


@dataclass(frozen=True)
class Factor:
    """B of each image divided by sqrt(p_2), the second largest probability; classes in falling order of theirs.

    Attributes:
        gram: B B^T / p_2, (N, K, K), double.
        mixing: what makes B of the gaps J_k - J_top, (N, K, K), double.
        gaps: (N, K - 1, D), all but the first, which is 0.
        order: the classes, (N, K).
        scale: p_2, (N,), double; NaN where logits or gaps are not finite.
    """

    gram: Tensor
    mixing: Tensor
    gaps: Tensor
    order: Tensor
    scale: Tensor


def factor(logits: Tensor, x: Tensor, *, at_once: bool | None = None) -> Factor:
    """The factor of G at each image, from logits (N, K) computed from the leaf `x`."""
    order, gaps = gaps_to_top(logits, x, at_once=at_once)
    rows = torch.stack(gaps, dim=1).flatten(2)
    # Directions are looked for with what is left; the values below say that there is none.
    broken = ~(rows.isfinite().flatten(1).all(dim=1) & logits.detach().isfinite().all(dim=1))
    rows = rows.nan_to_num_(0, 0, 0)
    log_p = logits.detach().double().log_softmax(dim=1).gather(1, order)
    p = log_p.exp()
    inner = p.new_zeros(*p.shape, p.shape[1])
    inner[:, 1:, 1:] = rows @ rows.mT
    # sqrt(p_k / p_2): of the first class astronomical at times, but it only meets numbers that are as small.
    root = ((log_p - log_p[:, 1:2]) / 2).clamp(max=300).exp()
    mixing = root[:, :, None] * (torch.eye(p.shape[1], dtype=p.dtype, device=p.device) - p[:, None, :])
    gram = (mixing @ inner @ mixing.mT).nan_to_num(0, 0, 0)
    return Factor(gram, mixing, rows, order, p[:, 1].masked_fill(broken, torch.nan))


class _Sides:
    """B / sqrt(p_2) and its transpose as products; p_2 is the second largest probability."""

    def __init__(self, logits: Tensor, x: Tensor) -> None:
        self._logits, self._x, self._jacobian = logits, x, Transposed(logits, x)
        log_p = logits.detach().log_softmax(dim=1)
        self._p, self._top = log_p.exp(), log_p.argmax(dim=1, keepdim=True)
        self._others = log_p.scatter(1, self._top, -torch.inf)
        self._second = self._others.amax(dim=1, keepdim=True)
        self._root = ((self._others - self._second) / 2).exp()  # sqrt(p_k / p_2), 0 for the first class
        self.scale = self._second.exp().squeeze(1)
        self.broken = ~logits.detach().isfinite().all(dim=1)  # so far

    def start(self, given: Tensor | None) -> Tensor:
        """q (N, K) to begin with: the second class, and a little of all others so that none is out of reach."""
        some = 0.1 * torch.arange(self._p.shape[1], device=self._p.device).to(self._p).cos()
        made = some + (self._others == self._second).to(self._p)
        if given is None:
            return made
        return torch.where((given == 0).all(dim=1, keepdim=True), made, given.to(made))

    def pixels(self, classes: Tensor) -> Tensor:
        """B^T q, scaled to length 1. (q is orthogonal to sqrt(p), and that says what its first class has to be.)"""
        weights = self._root * classes
        weights = weights.scatter(1, self._top, -weights.sum(dim=1, keepdim=True))
        pulled = pull(self._logits, self._x, weights)
        self.broken = self.broken | ~pulled.isfinite().flatten(1).all(dim=1)
        return _unit(pulled.nan_to_num(0, 0, 0))

    def classes(self, directions: Tensor) -> Tensor:
        """B u."""
        changes = self._jacobian.push(directions)
        changes = changes - changes.gather(1, self._top)
        mean = (self._p * changes).sum(dim=1, keepdim=True)
        first = ((self._others / 2).exp() * self._root * changes).sum(dim=1, keepdim=True)
        first = -self._p.gather(1, self._top).sqrt() * first
        return (self._root * (changes - mean)).scatter(1, self._top, first).nan_to_num(0, 0, 0)


def _unit(vectors: Tensor) -> Tensor:
    """Vectors (N, ...) scaled to length 1, also those whose squares vanish; 0 stays 0."""
    flat: Tensor = vectors.flatten(1)
    flat = flat / flat.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)
    flat = flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True).clamp(min=1e-12)
    return flat.view_as(vectors)
