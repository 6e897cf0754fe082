"""Distillation with boundary supporting samples."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from overproof.attacks.bss import StepSize, Walk, check_walk, draw_targets, walk_to_boundary
from overproof.errors import UsageError
from overproof.folding import Follower
from overproof.losses.boundaries import discrepancy
from overproof.losses.divergences import cross_entropy, kl_divergence
from overproof.methods.feature_objective import hard_labels
from overproof.methods.objective import Objective
from overproof.types import Batch, Output, Progress

ENOUGH = 0.5  # share of the walks that should cross


class BSS(Objective):
    """The student imitates the teacher on the images, and on samples that lie just behind the teacher's decision boundaries.

    L = mean_n CE(y_n, S(x_n)) + alpha mean_n D(x_n) + beta mean_m D(b_m),  D(x) = KL(softmax(T(x) / tau) || softmax(S(x) / tau))

    b_m starts at an image that both networks get right and walks on the teacher, towards a wrong class drawn with the teacher's
    probability, until its own class is predicted no more (see `walk_to_boundary`). Bases are those `base_samples` images of
    the batch whose wrong classes the two networks rate most differently, sum_{k != y} (q^T_k - q^S_k)^2. With r the share of
    training done, alpha = last + (first - last) (1 - r) and beta = bss_weight max(1 - r / bss_until, 0).

    Args:
        student: images -> logits (N, K).
        teacher: images -> logits (N, K), frozen.
        temperature: tau > 0, in both terms, which are not multiplied by tau^2.
        kd_weight: alpha at the beginning and at the end (first, last), at least 0.
        bss_weight: beta at the beginning, at least 0.
        bss_until: share of training after which beta is 0 and nothing walks any more, above 0.
        base_samples: images of a batch that walk, at least 1; the default belongs to batches of 256.
        keep_failed: learn also from walks that did not end in the class they were sent to.
        step_size: pixel units (Euclidean) per unit of the gap between two logits, or "newton". It has to suit images and teacher.
            The authors' 0.3 counts normalised pixels: times their standard deviation, about 0.2 for CIFAR-10, it is 0.06 here.
        overshoot, steps, clamp: of the walk, see `walk_to_boundary`.

    Logs: "bss-base", the share of the images that walked; "bss-crossed" and "bss-strayed", the shares of the images whose walks
    ended in the class they were sent to, and in a third one.

    Raises:
        UsageError: an option out of its range.

    Reference: Heo, Lee, Yun, Choi, AAAI 2019, arXiv 1805.05532.

    Differences from the paper: KL divergence instead of cross-entropy; between them lies the teacher's entropy, which has no
    gradient. The weights move with every step; at the end of each epoch they are the authors'. Images are cut to [0, 1] where the
    authors cut normalised ones to [-2.5, 2.5]. Walks run in full precision.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        temperature: float = 3.0,
        kd_weight: tuple[float, float] = (4.0, 1.0),
        bss_weight: float = 2.0,
        bss_until: float = 0.75,
        base_samples: int = 64,
        keep_failed: bool = True,
        step_size: StepSize = 0.06,
        overshoot: float = 1e-4,
        steps: int = 10,
        clamp: bool = True,
    ) -> None:
        super().__init__(student, teacher)
        if temperature <= 0 or bss_until <= 0 or base_samples < 1 or min(*kd_weight, bss_weight) < 0:
            raise UsageError(
                "bss: needs temperature > 0, kd_weight and bss_weight >= 0, bss_until > 0 and base_samples >= 1, not "
                f"{temperature}, {kd_weight}, {bss_weight}, {bss_until} and {base_samples}."
            )
        check_walk("bss", step_size, overshoot, steps)
        self.temperature, self.kd_weight, self.bss_weight, self.bss_until = temperature, kd_weight, bss_weight, bss_until
        self.base_samples, self.keep_failed = base_samples, keep_failed
        self.step_size, self.overshoot, self.steps, self.clamp = step_size, overshoot, steps, clamp
        self._quick = Follower(frozen=True)

    def weights(self, done: float) -> tuple[float, float]:
        """Alpha and beta when the share `done` of training lies behind."""
        first, last = self.kd_weight
        return last + (first - last) * max(1 - done, 0.0), self.bss_weight * max(1 - done / self.bss_until, 0.0)

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's losses."""
        target, logits = self.teacher_logits(batch), self.student(batch.images)
        alpha, beta = self.weights((progress.step + 1) / max(progress.total, 1))
        losses = {"ce": cross_entropy(logits, batch.labels).mean(), "kd": alpha * self._distance(target, logits)}
        if beta == 0:
            return Output(losses, logits)
        rows = base_rows(target, logits.detach(), hard_labels(batch.labels), count=self.base_samples)
        walk = self.walk(batch.images[rows], target[rows])
        logs = {"bss-base": torch.tensor(len(rows) / len(batch), device=logits.device)}
        logs |= {"bss-crossed": walk.crossed.sum() / len(batch), "bss-strayed": walk.strayed.sum() / len(batch)}
        return Output({**losses, "bss": beta * self._on_samples(walk)}, logits, logs)

    def walk(self, images: Tensor, target: Tensor) -> Walk:
        """From images (M, C, H, W), on which the teacher's logits are `target` (M, K), to boundaries drawn by probability."""
        base = target.argmax(dim=1)
        if len(base) == 0:
            return Walk(images, target, base.bool(), base.bool())
        # Near a boundary the gap is the difference of two almost equal logits, of which half precision leaves nothing.
        with torch.autocast(images.device.type, enabled=False):
            return walk_to_boundary(
                self._quick_teacher(images),
                images,
                base,
                draw_targets(target, base),
                step_size=self.step_size,
                overshoot=self.overshoot,
                steps=self.steps,
                clamp=self.clamp,
            )

    def _quick_teacher(self, images: Tensor) -> nn.Module:
        """A copy of the teacher that is cheaper to walk on."""
        assert self.teacher is not None
        return self._quick.now(self.teacher, images)

    def concerns(self, means: Mapping[str, float]) -> dict[str, str]:
        """Whether enough walks reach the boundary they are sent to."""
        base, crossed, strayed = (means.get(f"bss-{name}", 0.0) for name in ("base", "crossed", "strayed"))
        if not base or crossed >= ENOUGH * base:
            return {}
        if 2 * strayed > base - crossed:
            rest, remedy = "most others ended in a third class: choose a smaller method.step_size", ""
        else:
            rest, remedy = "most others did not get as far: choose a larger method.step_size", " or more method.steps"
        now = f"{self.step_size!r} pixel units per unit of the logit gap, {self.steps} steps"
        return {
            "bss-crossed": f"bss: only {crossed / base:.0%} of the walks reached their boundary; {rest}{remedy} (now {now})."
        }

    def _distance(self, target: Tensor, logits: Tensor) -> Tensor:
        return kl_divergence(target, logits, temperature=self.temperature).mean()

    def _on_samples(self, walk: Walk) -> Tensor:
        kept = slice(None) if self.keep_failed else walk.crossed
        samples, known = walk.images[kept], walk.logits[kept]
        if len(samples) == 0:
            return known.new_zeros(())
        if len(samples) == 1:  # which BatchNorm may refuse; twice the same has the same mean
            samples, known = samples.repeat(2, 1, 1, 1), known.repeat(2, 1)
        return self._distance(known, self.student(samples))


def base_rows(target: Tensor, logits: Tensor, labels: Tensor, *, count: int) -> Tensor:
    """Numbers of at most `count` images that both networks get right, those rated most differently first.

    Args:
        target: the teacher's logits (N, K).
        logits: the student's (N, K).
        labels: class numbers (N,).
        count: at least 1.
    """
    right = (target.argmax(dim=1) == labels) & (logits.argmax(dim=1) == labels)
    scores = discrepancy(target, logits, labels).masked_fill(~right, -1)
    best = scores.topk(min(count, len(scores)))
    return best.indices[best.values >= 0]
