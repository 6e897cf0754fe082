"""How alike the decision boundaries of two models lie, as seen from the same images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from overproof import console
from overproof.attacks.base import logits_of
from overproof.attacks.bss import StepSize, Walk, walk_to_boundary
from overproof.attacks.randomness import Streams, uniform
from overproof.errors import DataError, UsageError
from overproof.folding import folded
from overproof.losses.boundaries import direction_similarity, length_similarity
from overproof.networks import full_precision, in_mode

Interval = tuple[float, float]


@dataclass(frozen=True)
class BoundarySimilarity:
    """What two models' walks from the same images to the same boundaries have in common.

    Attributes:
        mag_sim: mean ratio of the shorter walk's size to the longer one's, in [0, 1].
        ang_sim: mean cosine of the angle between them, in [-1, 1].
        mag_sim_interval, ang_sim_interval: 95 % of these means over images drawn with replacement.
        images: images from which was walked.
        pairs: (image, class) pairs whose walks crossed the boundary in both models; only they count.
        kept: their share of all pairs.
    """

    mag_sim: float
    ang_sim: float
    mag_sim_interval: Interval
    ang_sim_interval: Interval
    images: int
    pairs: int
    kept: float


def boundary_similarity(
    a: nn.Module,
    b: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    targets: int | None = None,
    step_size: StepSize = "newton",
    overshoot: float = 1e-4,
    steps: int = 30,
    clamp: bool = False,
    batch_size: int = 512,
    resamples: int = 1000,
    seed: int = 0,
) -> BoundarySimilarity:
    """MagSim and AngSim: do the boundaries of two models lie equally far, and in the same direction?

    MagSim = mean min(||u||, ||v||) / max(||u||, ||v||),  AngSim = mean <u, v> / (||u|| ||v||)

    u and v are the changes from an image to the boundary between its class and another one, found by walking on either model (see
    `walk_to_boundary`); the means run over images and other classes.

    Args:
        a, b: images -> logits (N, K) of the same classes, on the device of the images.
        images: (N, C, H, W) in [0, 1]; those count on which both models predict the same class, the right one if that is known.
        labels: true classes (N,), or None.
        targets: other classes for each image, drawn uniformly, at least 1; None: all K - 1.
        step_size: "newton", with which the scale of the logits plays no part; or pixel units per unit of the logit gap, as in training.
        overshoot, steps, clamp: of the walks; cut to [0, 1] they would stop short of boundaries outside.
        batch_size: walks at a time; the figures do not depend on it.
        resamples: bootstrap samples of the images, at least 1.
        seed: of the drawn classes and of the bootstrap.

    Raises:
        UsageError: the models have other numbers of classes, or an option is out of its range.
        DataError: there is no image that both get right, or no pair of walks crossed.

    Reference: Heo, Lee, Yun, Choi, AAAI 2019, arXiv 1805.05532.

    Differences from the paper: pairs of which a walk failed are left out, and their share is told; Newton's steps; the intervals. The
    walks go over copies with BatchNorm folded into the convolutions, where these answer alike up to rounding.
    """
    counts = (batch_size, resamples, 1 if targets is None else targets)
    if min(counts) < 1:
        raise UsageError(f"boundary_similarity: batch_size, resamples and targets must be at least 1, not {counts}.")
    go = partial(walk_to_boundary, step_size=step_size, overshoot=overshoot, steps=steps, clamp=clamp)
    with full_precision(images.device), in_mode(a), in_mode(b), torch.no_grad():
        rows, base, classes = _common(a, b, images, labels, batch_size)
        streams = Streams.named(rows, seed, "boundary-similarity")
        order = uniform(torch.empty(len(rows), classes - 1, device=rows.device), streams).argsort(dim=1)
        goals = (base[:, None] + 1 + order[:, :targets]) % classes
        sums = torch.zeros(len(rows), 3, dtype=torch.float64, device=rows.device)
        first, second = (folded(model, images) for model in (a, b))
        with console.bar("walking to boundaries", goals.numel()) as bar:
            for part in torch.split(torch.arange(goals.numel(), device=rows.device), batch_size):
                at = part // goals.shape[1]
                starts, goal = images[rows[at]], goals.flatten()[part]
                found = walk_similarities(starts, go(first, starts, base[at], goal), go(second, starts, base[at], goal))
                sums.index_add_(0, at, found)
                bar.update(int(part[-1]) + 1)
    return _summary(sums.cpu(), goals.numel(), resamples, seed)


def same_classes(first: Tensor, second: Tensor) -> None:
    """Refuse logits (N, K) of two models with different K.

    Raises:
        UsageError: names both numbers.
    """
    if first.shape[1] != second.shape[1]:
        raise UsageError(
            f"One model has {first.shape[1]} classes and the other {second.shape[1]}: only models of the same classes can be compared."
        )


def _common(a: nn.Module, b: nn.Module, images: Tensor, labels: Tensor | None, batch_size: int) -> tuple[Tensor, Tensor, int]:
    """Rows of the images that count, their classes, and the number of classes."""
    predicted, classes = [], 0
    for part in torch.split(images, batch_size):
        first, second = logits_of(a, part), logits_of(b, part)
        same_classes(first, second)
        classes = first.shape[1]
        predicted.append(torch.stack([first.argmax(dim=1), second.argmax(dim=1)]))
    ours, theirs = torch.cat(predicted, dim=1)
    agree = ours == theirs if labels is None else (ours == theirs) & (ours == labels)
    rows = agree.nonzero().flatten()
    if len(rows) == 0:
        what = "predict the same class" if labels is None else "are right"
        raise DataError(
            f"There is none among {len(images)} images on which both models {what}; their boundaries cannot be compared."
        )
    return rows, ours[rows], classes


def walk_similarities(starts: Tensor, first: Walk, second: Walk) -> Tensor:
    """For each pair of walks (M, 3): 1, and the two similarities; 0 throughout if one of them failed."""
    u, v = first.images - starts, second.images - starts
    length = length_similarity(u, v)
    found = torch.stack([torch.ones_like(length), length, direction_similarity(u, v)], dim=1).double()
    both = first.crossed & second.crossed & found.isfinite().all(dim=1)
    return found.where(both[:, None], torch.zeros_like(found))


def _summary(sums: Tensor, total: int, resamples: int, seed: int) -> BoundarySimilarity:
    """From the sums of each image (M, 3). Pairs of one image resemble each other, so the bootstrap draws whole images."""
    pairs, mag, ang = sums.sum(dim=0).tolist()
    if not pairs:
        raise DataError(
            f"None of {total} pairs of walks crossed the boundary in both models; take more steps, or another step_size."
        )
    count, generator = len(sums), torch.Generator().manual_seed(seed)
    drawn = [sums[torch.randint(count, (count,), generator=generator)].sum(dim=0) for _ in range(resamples)]
    means = torch.stack([sample[1:] / sample[0] for sample in drawn])
    low, high = means.nanquantile(torch.tensor([0.025, 0.975], dtype=means.dtype), dim=0).tolist()
    return BoundarySimilarity(
        mag_sim=mag / pairs,
        ang_sim=ang / pairs,
        mag_sim_interval=(low[0], high[0]),
        ang_sim_interval=(low[1], high[1]),
        images=count,
        pairs=int(pairs),
        kept=pairs / total,
    )
