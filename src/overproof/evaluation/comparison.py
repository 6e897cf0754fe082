"""Two models on the same images: who is right where, and how alike they decide."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from overproof.attacks.base import logits_of
from overproof.attacks.randomness import Streams
from overproof.errors import DataError, UnknownNameError, UsageError
from overproof.evaluation.boundaries import BoundarySimilarity, boundary_similarity, same_classes
from overproof.evaluation.evaluator import images_of
from overproof.evaluation.metrics import Z, wilson
from overproof.evaluation.sharing import Group, Share
from overproof.networks import device_of, full_precision, in_mode, on_device

METRICS = ("boundary",)


@dataclass(frozen=True)
class Comparison:
    """What two models have in common.

    Attributes:
        names: of the models.
        samples: images.
        clean: accuracy of each, in [0, 1]; clean_intervals: 95 %.
        difference: accuracy of the first minus that of the second, with its 95 % interval; paired, for both saw the same images.
        agreement: share of images on which both predict the same class, with its 95 % interval.
        only: images that only the first, and only the second, gets right.
        boundary: similarity of the decision boundaries, if asked for.
    """

    names: tuple[str, str]
    samples: int
    clean: tuple[float, float]
    clean_intervals: tuple[list[float], list[float]]
    difference: float
    difference_interval: list[float]
    agreement: float
    agreement_interval: list[float]
    only: tuple[int, int]
    boundary: BoundarySimilarity | None = None

    @property
    def summary(self) -> dict[str, Any]:
        """The figures in plain values, as written to JSON."""
        return asdict(self)


def compare(
    a: nn.Module,
    b: nn.Module,
    data: Any,
    *,
    metric: Sequence[str] = (),
    images: int = 200,
    names: tuple[str, str] = ("A", "B"),
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str | None = None,
    **options: Any,
) -> Comparison:
    """Let two models predict the same images, in fp32.

    Args:
        a, b: images in [0, 1] -> logits (N, K) of the same classes. Modes, parameters and buffers stay as they are.
        data: a registered name (its test part), an `ImageSet`, a Dataset of (image, label), a pair of tensors, or an iterable of (images, labels).
        metric: what else is measured: "boundary", see `boundary_similarity`.
        images: on how many images that both get right the metric is measured, at least 1; a fair sample of them.
        names: what the models are called.
        batch_size: images per step. The figures do not depend on it.
        seed: of the sample and of the metric.
        device: where to run, the first model's own device if None; both are moved there for the call.
        **options: of the metric.

    Raises:
        DataError: empty data, or bad pixels or labels.
        UsageError: an unknown metric or option, or models of different classes.
    """
    metric = (metric,) if isinstance(metric, str) else metric
    for name in metric:
        if name not in METRICS:
            raise UnknownNameError("metric", name, METRICS)
    check_options(metric, options)
    device = torch.device(device) if device is not None else device_of(a)
    count, sample = torch.zeros(5, dtype=torch.long, device=device), Sample(images, seed)
    with (
        torch.random.fork_rng(devices=[]),  # a loader's order may draw from the global generator
        on_device(a, device),
        on_device(b, device),
        in_mode(a),
        in_mode(b),
        full_precision(device),
    ):
        for _, batch in Share(images_of(data), batch_size, device, Group()):
            right, agree = _predicted(a, b, batch.images.float(), batch.labels)
            both = right.all(dim=0)
            count += torch.stack([torch.ones_like(agree), *right, both, agree]).sum(dim=1)
            if metric:
                sample.offer(batch.images.float()[both], batch.labels[both], batch.index[both])
        boundary = _boundary(a, b, sample, seed=seed, **options) if "boundary" in metric else None
    return _concluded(names, count.tolist(), boundary)


class Sample:
    """A fair sample of the images offered so far; which they are depends on their numbers and the seed, not on batches or order.

    Args:
        size: images at most, at least 1.
        seed: of the choice.

    Raises:
        UsageError: a size below 1.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise UsageError(f"A metric on {size} images was asked for; give images of at least 1.")
        self.size, self.seed = size, seed
        self.kept: tuple[Tensor, ...] = ()

    def offer(self, images: Tensor, labels: Tensor, index: Tensor) -> None:
        """Take in images (N, C, H, W) with labels (N,), which have the numbers `index` (N,) in their set."""
        keys = Streams.named(index, self.seed, "sample").bits((), index.device)
        found = (keys, images, labels)
        merged = tuple(torch.cat(pair) for pair in zip(self.kept, found, strict=True)) if self.kept else found
        first = merged[0].argsort(stable=True)[: self.size]
        self.kept = tuple(part[first] for part in merged)


def _predicted(a: nn.Module, b: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each model is right (2, N), and whether both say the same (N,)."""
    with torch.no_grad():
        first, second = logits_of(a, images), logits_of(b, images)
    same_classes(first, second)
    predicted = torch.stack([first.argmax(dim=1), second.argmax(dim=1)])
    return predicted == labels, predicted[0] == predicted[1]


def _boundary(a: nn.Module, b: nn.Module, sample: Sample, **options: Any) -> BoundarySimilarity:
    if not sample.kept or not len(sample.kept[1]):
        raise DataError("There is no image that both models get right; their boundaries cannot be compared.")
    _, images, labels = sample.kept
    return boundary_similarity(a, b, images, labels, **options)


def check_options(metric: Sequence[str], options: Mapping[str, Any]) -> None:
    """Refuse options that no metric has.

    Raises:
        UsageError: there is no metric that they could belong to.
        UnknownNameError: names one, and the nearest that exists.
    """
    if options and not metric:
        raise UsageError(f"{', '.join(options)}: give these options a metric to belong to, for example metric=['boundary'].")
    known = inspect.signature(boundary_similarity).parameters.values()
    names = {p.name for p in known if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for name in options:
        if name not in names:
            raise UnknownNameError("option of metric 'boundary':", name, names)


def _concluded(names: tuple[str, str], counts: list[int], boundary: BoundarySimilarity | None) -> Comparison:
    total, first, second, both, agree = counts
    if not total:
        raise DataError("There is nothing to compare: the data holds no image.")
    gap, apart = (first - second) / total, (first + second - 2 * both) / total
    half = Z * (max(apart - gap * gap, 0.0) / total) ** 0.5
    return Comparison(
        names=names,
        samples=total,
        clean=(first / total, second / total),
        clean_intervals=(wilson(first, total), wilson(second, total)),
        difference=gap,
        difference_interval=[gap - half, gap + half],
        agreement=agree / total,
        agreement_interval=wilson(agree, total),
        only=(first - both, second - both),
        boundary=boundary,
    )
