"""How far a teacher is right about each class, or subgroup, of images it has not learned from; and losses that trust it as far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof.errors import DataError
from overproof.losses.divergences import cross_entropy
from overproof.losses.margins import margin
from overproof.networks import device_of, full_precision, in_mode
from overproof.types import Batch

Kind = Literal["margin", "accuracy", "hard_margin"]
MarginForm = Literal["pairwise", "target"]
FLOOR = 1e-30  # of 1 - q, whose logarithm is taken


@dataclass(frozen=True)
class Reliability:
    """What was found about G groups.

    Attributes:
        values: g (G,), float64 on the CPU; NaN for a group without images.
        counts: images (G,), int64.
    """

    values: Tensor
    counts: Tensor


def label_margin(probabilities: Tensor, labels: Tensor) -> Tensor:
    """The label's probability minus the mean of the others, gamma = p_y - sum_{k != y} p_k / (K - 1) = (K p_y - 1) / (K - 1).

    Args:
        probabilities: (N, K), K at least 2, rows that sum to 1.
        labels: class numbers (N,).

    Returns:
        (N,) from -1 / (K - 1) to 1; 0 where all classes are alike.

    Reference: Wang et al., UAI 2023 (PMLR 216), where it drives AdaMargin and AdaAlpha.
    """
    classes = probabilities.shape[1]
    own = probabilities.gather(1, labels[:, None]).squeeze(1)
    return (classes * own - 1) / (classes - 1)


def credit(probabilities: Tensor, labels: Tensor, *, kind: Kind = "margin") -> Tensor:
    """What a teacher earns with each answer.

    Args:
        probabilities: (N, K).
        labels: class numbers (N,).
        kind: "margin", see `label_margin`; "accuracy", 1 where it is right; "hard_margin", p_y - max_{k != y} p_k.

    Returns:
        (N,), at most 1.
    """
    if kind == "accuracy":
        return (probabilities.argmax(dim=1) == labels).to(probabilities.dtype)
    return -margin(probabilities, labels) if kind == "hard_margin" else label_margin(probabilities, labels)


def estimate_reliability(
    teacher: nn.Module,
    batches: Iterable[Batch],
    *,
    kind: Kind = "margin",
    groups: Tensor | None = None,
    count: int | None = None,
) -> Reliability:
    """Mean credit of a teacher by class, or by subgroup, in fp32, in eval mode and at temperature 1.

    Args:
        teacher: images -> logits (N, K); left as it is.
        batches: images with class numbers, on the teacher's device, not augmented and not what the teacher was trained on.
        kind: see `credit`.
        groups: the group of each image by its `Batch.index` (M,); None: its class.
        count: number of groups; needed with `groups`.

    Raises:
        DataError: there are no batches.
    """
    sums: Tensor | None = None
    with full_precision(device_of(teacher)), in_mode(teacher), torch.no_grad():
        for batch in batches:
            probabilities = teacher(batch.images).cpu().double().softmax(dim=1)
            labels = batch.labels.cpu()
            members = labels if groups is None else groups.cpu()[batch.index.cpu()]
            found = credit(probabilities, labels, kind=kind)
            if sums is None:
                sums = torch.zeros(2, probabilities.shape[1] if groups is None or count is None else count, dtype=torch.float64)
            sums.index_add_(1, members, torch.stack([found, torch.ones_like(found)]))
    if sums is None:
        raise DataError("There are no held-out images on which the teacher's reliability could be measured.")
    return Reliability(sums[0] / sums[1], sums[1].long())


def shrunk(found: Reliability, *, few: int = 5, strength: float = 5.0) -> Tensor:
    """Reliabilities in which groups of n < few images are drawn towards the mean: (n g + m g_mean) / (n + m).

    Args:
        found: what was measured.
        few: from so many images on a group speaks for itself.
        strength: m, at least 0: how many images the mean is worth.

    Returns:
        (G,), the mean over all groups with images where a group has none.
    """
    known, counts = found.counts > 0, found.counts.double()
    middle = found.values[known].mean()
    drawn = (counts * found.values.nan_to_num() + strength * middle) / (counts + strength).clamp(min=1e-9)
    return torch.where(known, torch.where(found.counts < few, drawn, found.values), middle)


def mixed_target(target: Tensor, labels: Tensor, alpha: Tensor) -> Tensor:
    """What a student learns that trusts its teacher to the part alpha: (1 - alpha_n) y_n + alpha_n p_n.

    The cross-entropy with it is the same mixture of the cross-entropies with y and with p.

    Args:
        target: the teacher's probabilities (N, K).
        labels: class numbers (N,), or class weights (N, K) after mixup or cutmix.
        alpha: (N,) in [0, 1].

    Returns:
        (N, K), rows that sum to 1.
    """
    hot = labels if labels.dim() == 2 else F.one_hot(labels, target.shape[1])
    share = alpha[:, None]
    return (1 - share) * hot.to(target.dtype) + share * target


def margin_cross_entropy(target: Tensor, logits: Tensor, rho: Tensor, *, form: MarginForm = "pairwise") -> Tensor:
    """Soft-label cross-entropy with margins, sum_k p_k log(1 + sum_{j != k} exp(z_j - z_k + Delta_kj)).

    Args:
        target: the teacher's probabilities (N, K).
        logits: the student's (N, K).
        rho: margins (K,) by class, or (N, 1) by image, in logit units.
        form: "pairwise", Delta_kj = rho_j - rho_k: the cross-entropy of z + rho, which lifts classes of small rho;
            "target", Delta_kj = rho_k: a label wants a lead that grows with its own rho.

    Returns:
        (N,) in nats; with rho = 0 the plain cross-entropy.

    Reference: Lukasik et al., TMLR 2022, arXiv 2106.10494; both forms are reconstructions, see `AdaMargin`.
    """
    if form == "pairwise":
        return cross_entropy(logits + rho, target)
    log_q = F.log_softmax(logits, dim=1)
    # log(1 - q) in two steps: below the floor there is no gradient, and none is multiplied by infinity.
    rest = (-torch.expm1(log_q)).clamp(min=FLOOR).log()
    return (target * F.softplus(rho + rest - log_q)).sum(dim=1)
