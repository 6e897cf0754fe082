"""Training with a small Fisher information of the output with respect to the input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.losses.divergences import cross_entropy
from overproof.losses.fisher_eigen import Solver
from overproof.losses.fisher_trace import ESTIMATORS, Tracer
from overproof.methods.fim_memory import ClassVectors
from overproof.methods.fim_serving import minds_its_mode, see_what_serves
from overproof.methods.objective import Objective
from overproof.methods.robust_objective import AttackMode
from overproof.networks import in_mode, spare_buffers
from overproof.types import Batch, Output, Progress

Penalised = Literal["trace", "lambda_max"]
AnyEstimator = Literal["exact", "rademacher", "label", "hutchinson", "fd-kl", "power"]


class FIM(Objective):
    """Accuracy on clean images, and an answer that hardly moves with the pixels: no adversarial example is made.

    L = mean_n CE(y_n, S(x_n)) + mu mean_n tr G(x_n)   (or lambda_max G),   G = sum_k p_k s_k s_k^T, s_k = grad_x log p_k

    lambda_max <= tr G <= (K - 1) lambda_max, and under ||d||_2 <= eps the answer moves by at most eps^2 lambda_max / 2 nats to
    second order. The weight of the penalty rises linearly from 0 to mu over the first part of the training.

    Args:
        student: images -> logits (N, K).
        mu: weight of the penalty, at least 0, in squared pixel units; what is right depends on the data and the network.
        target: what is penalised.
        estimator: of the trace, see `Tracer`: None is "rademacher"; of lambda_max, see `Solver`: "exact" or, None, "power".
        draws, step, detach_p: see `Tracer`.
        power_steps: steps of the iteration, which goes on where it ended when the image was last seen.
            An option that the chosen estimator does not use is refused.
        share: of each batch that is penalised, in (0, 1]; drawn anew each time.
        every: penalise each so many steps, with that many times the weight, at least 1.
        ramp: share of the training over which the weight rises, in [0, 1].
        penalty_mode: mode of BatchNorm and dropout in the penalty's own forward pass; "train" takes the values of the batch. Where
            that is the mode of the cross-entropy too, or makes no difference, one pass serves both; not with a share, nor in mixed
            precision. Running statistics are those of the cross-entropy's pass.

    Raises:
        UsageError: an option out of range.
        DerivativeError: at the first penalised step, an operator of the network that the estimator cannot differentiate; names
            it and an estimator that works.

    Reference: Shen, Peng, Zhang, Fan, 2019, arXiv 1909.06137.

    Differences from the paper: there the trace alone is penalised, with a weight and an estimator that are not known to us;
    all estimators but "exact", lambda_max, share, every and ramp are ours.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        mu: float = 0.05,
        target: Penalised = "trace",
        estimator: AnyEstimator | None = None,
        draws: int = 1,
        step: float | None = None,
        detach_p: bool = False,
        power_steps: int = 1,
        share: float = 1.0,
        every: int = 1,
        ramp: float = 0.1,
        penalty_mode: AttackMode = "eval",
    ) -> None:
        super().__init__(student)
        ranges = mu >= 0 and 0 < share <= 1 and every >= 1 and 0 <= ramp <= 1
        if not ranges or target not in ("trace", "lambda_max") or penalty_mode not in ("eval", "train"):
            raise UsageError(
                "fim: needs mu >= 0, share in (0, 1], every >= 1, ramp in [0, 1], target trace or lambda_max and penalty_mode eval or "
                f"train, not {mu}, {share}, {every}, {ramp}, {target!r} and {penalty_mode!r}."
            )
        self.measure = _instrument(
            target, estimator, draws=draws, step=step, detach_p=detach_p, steps=power_steps, mixing=penalty_mode == "train"
        )
        self.estimator: str = self.measure.estimator or ""
        self.memory = ClassVectors() if self.estimator == "power" else None
        self.mu, self.target, self.share, self.every, self.ramp = mu, target, share, every, ramp
        self.penalty_mode = penalty_mode
        self._served, self._moody = False, True
        self._seen: tuple[bool, int] | None = None

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's losses."""
        weight = self._weight(progress)
        if weight and not self._served:
            see_what_serves(self.student, self.measure, batch.images[:2])
            self._moody, self._served = minds_its_mode(self.student, batch.images[:2]), True
        if weight and self._one_pass(batch.images):
            values, logits = self._penalty(batch.images, batch.index)
        else:
            logits = self.student(batch.images)
            values = self._on_a_share(batch) if weight else logits.new_zeros(1)
        sure = logits.detach().softmax(dim=1).amax(dim=1).float().mean()
        full = progress.fraction >= self.ramp or progress.step + 1 >= progress.total
        self._seen = self.mu > 0 and full, logits.shape[1]
        logs = {"max probability": sure} | ({self.target: values.detach().mean()} if weight else {})
        losses = {"ce": cross_entropy(logits, batch.labels).mean(), "fim": weight * values.mean()}
        return Output(losses, logits, logs)

    def concerns(self, means: Mapping[str, float]) -> dict[str, str]:
        """Whether the penalty, at its full weight, has flattened the network."""
        if self._seen is None or not self._seen[0] or "max probability" not in means:
            return {}
        sure, chance = means["max probability"], 1 / self._seen[1]
        if sure - chance > 0.1 * (1 - chance):
            return {}
        return {
            "fim": f"fim: the network answers all images almost alike (mean largest probability {sure:.2f}, chance {chance:.2f}): "
            f"mu={self.mu:g} flattens it. Lower method.mu, or raise method.ramp."
        }

    def _weight(self, progress: Progress) -> float:
        if progress.step % self.every:
            return 0.0
        return self.mu * self.every * (min(progress.fraction / self.ramp, 1.0) if self.ramp else 1.0)

    def _on_a_share(self, batch: Batch) -> Tensor:
        count = math.ceil(self.share * len(batch))
        if count == len(batch):
            return self._penalty(batch.images, batch.index)[0]
        rows = torch.randperm(len(batch), device=batch.images.device)[:count]
        return self._penalty(batch.images[rows], batch.index[rows])[0]

    def _penalty(self, images: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The penalised quantity (N,), and the logits of its forward pass."""
        mode: Literal["eval", "keep"] = "eval" if self.penalty_mode == "eval" else "keep"
        precision: AbstractContextManager[Any] = nullcontext()
        if self._needs_full(images):
            precision = torch.autocast(images.device.type, enabled=False)
        spare = nullcontext() if mode == "eval" or self._one_pass(images) else spare_buffers(self.student)
        with in_mode(self.student, mode), precision, spare:
            if isinstance(self.measure, Tracer):
                return self.measure(self.student, images, create_graph=True)
            start = None if self.memory is None else self.memory.recall(index)
            found = self.measure(self.student, images, start=start, create_graph=True)
        if self.memory is not None:
            self.memory.remember(index, found.classes)
        return found.values, found.logits

    def _needs_full(self, images: Tensor) -> bool:
        """Derivatives of derivatives lose their digits in half precision; two forward passes do not."""
        return torch.is_autocast_enabled(images.device.type) and self.estimator != "fd-kl"

    def _one_pass(self, images: Tensor) -> bool:
        """Whether cross-entropy and penalty can stand on the same forward pass."""
        return self.share == 1 and not self._needs_full(images) and (self.penalty_mode == "train" or not self._moody)


def _instrument(
    target: Penalised,
    estimator: AnyEstimator | None,
    *,
    draws: int,
    step: float | None,
    detach_p: bool,
    steps: int,
    mixing: bool,
) -> Tracer | Solver:
    """What measures the penalised quantity."""
    known = ESTIMATORS if target == "trace" else ("exact", "power")
    chosen: Any = estimator or ("rademacher" if target == "trace" else "power")
    if chosen not in known:
        raise UsageError(f"fim: estimator={estimator!r} cannot serve target={target!r}; known are {', '.join(known)}.")
    used = {"draws": chosen not in ("exact", "power"), "step": chosen == "fd-kl", "power_steps": chosen == "power"}
    given = {"draws": draws != 1, "step": step is not None, "power_steps": steps != 1}
    idle = [name for name, asked in given.items() if asked and not used[name]]
    if idle:
        raise UsageError(f"fim: {', '.join(idle)} would do nothing with target={target!r}, estimator={chosen!r}; leave it out.")
    if target == "trace":
        return Tracer(estimator=chosen, draws=draws, step=step, detach_p=detach_p, batch_statistics=mixing)
    return Solver(estimator=chosen, steps=steps, detach_p=detach_p, batch_statistics=mixing)
