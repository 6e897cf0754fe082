"""How good samples are: distances between samples and real data, and how much of the data's variety they show."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.features import Tap, penultimate
from overproof.networks import device_of, in_mode

KERNELS = 5
REACH = 12.0  # standard deviations within which a point belongs to a mode
LEAST = 20.0  # a mode or class is covered by a share of at least 1/LEAST of an equal share
CHUNK = 256
SPLITS = 10


def mmd2(a: Tensor, b: Tensor) -> float:
    """Squared maximum mean discrepancy of two samples (N, ...), biased: at least 0, and 0 for equal ones.

    mean k(a, a') + mean k(b, b') - 2 mean k(a, b),  k(x, y) = sum_{j < 5} exp(-||x - y||^2 / (h 2^j))

    with h a quarter of the mean squared distance between any two points of both samples.

    Reference: Gretton et al.: A Kernel Two-Sample Test, JMLR 2012.
    """
    points = torch.cat([a.flatten(1), b.flatten(1)]).double()
    squares = points.square().sum(dim=1)
    distances = (squares[:, None] + squares - 2 * points @ points.T).clamp(min=0)
    distances.fill_diagonal_(0)
    width = distances.sum() / (len(points) * (len(points) - 1)) / 4
    if width == 0:
        return 0.0
    kernel = torch.stack([(-distances / (width * 2**j)).exp() for j in range(KERNELS)]).sum(dim=0)
    n = len(a)
    return float((kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()).clamp(min=0))


def modes(points: Tensor, centres: Tensor, sigma: float) -> dict[str, float]:
    """How many modes of a mixture samples (N, 2) reach, and what share of them lies near one.

    A point is near a mode within 12 sigma of its centre; a mode is covered that has at least 1/20 of an equal share of the points.

    Returns:
        "modes" and "near" (a share).
    """
    distance, nearest = torch.cdist(points, centres.to(points)).min(dim=1)
    near = distance <= REACH * sigma
    counts = torch.bincount(nearest[near], minlength=len(centres))
    covered = counts >= len(points) / (LEAST * len(centres))
    return {"modes": float(covered.sum()), "near": float(near.double().mean())}


def spread(samples: Tensor) -> float:
    """Mean absolute difference between samples (N, ...) and others of the same batch: 0 where all are alike."""
    return float((samples - samples.roll(1, 0)).abs().mean())


@torch.no_grad()
def histogram(classifier: nn.Module, images: Tensor) -> Tensor:
    """Share of the images (N, C, H, W) in each class, by the classifier: (K,)."""
    logits = torch.cat([_asked(classifier, part) for part in torch.split(images, CHUNK)])
    return torch.bincount(logits.argmax(dim=1), minlength=logits.shape[1]).double() / len(images)


def entropy(shares: Tensor) -> float:
    """Entropy of shares (K,) in nats: log K where all are equal, 0 where there is one class."""
    return float(torch.special.entr(shares).sum())


def covered(shares: Tensor) -> int:
    """How many classes have at least 1/20 of an equal share."""
    return int((shares >= 1 / (LEAST * len(shares))).sum())


def _asked(classifier: nn.Module, images: Tensor) -> Tensor:
    with in_mode(classifier):
        logits: Tensor = classifier(images.to(device_of(classifier)))
    return logits.cpu()


class _Features(nn.Module):
    """The vector that a classifier's last layer reads, as torchmetrics wants it."""

    def __init__(self, classifier: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.classifier, self.tap, self.name = classifier, Tap(classifier, [penultimate(classifier)]), penultimate(classifier)
        self.num_features = int(self(example).shape[1])

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images -> features (N, d)."""
        with in_mode(self.classifier):
            _, found = self.tap(images.to(device_of(self.classifier)))
        return found[self.name].flatten(1).cpu()


class _Logits(nn.Module):
    """A classifier's logits, as torchmetrics wants them."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images -> logits (N, K)."""
        return _asked(self.classifier, images)


def frechet(real: Tensor, samples: Tensor, classifier: nn.Module | None = None) -> float:
    """Fréchet distance between the features of real images and of samples, both (N, C, H, W) in [0, 1]; 0 for equal sets.

    ||m - m'||^2 + Tr(S + S' - 2 (S S')^{1/2})  of means m and covariances S

    Args:
        classifier: whose penultimate features are compared; distances by different classifiers are not comparable. None: Inception-v3,
            which is the FID proper and needs torch-fidelity and its weights.

    Raises:
        UsageError: no classifier, and no torch-fidelity.

    Reference: Heusel et al., NeurIPS 2017, arXiv 1706.08500.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    if classifier is not None:
        metric = FrechetInceptionDistance(_Features(classifier, real[:2]))
    else:
        need_inception("FID")
        metric = FrechetInceptionDistance(normalize=True)
    for images, is_real in ((real, True), (samples, False)):
        for part in torch.split(images, CHUNK):
            metric.update(part if classifier is not None else _colour(part), real=is_real)
    return max(float(metric.compute()), 0.0)


def inception_score(samples: Tensor, classifier: nn.Module | None = None, *, seed: int = 0) -> float:
    """exp of the mean divergence of a sample's class probabilities from those of all: 1 to the number of classes.

    Args:
        samples: (N, C, H, W) in [0, 1].
        classifier: who says the probabilities; None: Inception-v3, which is the IS proper and needs torch-fidelity and its weights.
        seed: of the division into ten parts.

    Raises:
        UsageError: no classifier, and no torch-fidelity.

    Reference: Salimans et al., NeurIPS 2016, arXiv 1606.03498.
    """
    from torchmetrics.image.inception import InceptionScore

    how: dict[str, Any] = {"splits": min(SPLITS, len(samples))}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # that it keeps the logits
        torch.default_generator.manual_seed(seed)
        if classifier is not None:
            metric = InceptionScore(_Logits(classifier), **how)
        else:
            need_inception("IS")
            metric = InceptionScore(normalize=True, **how)
        for part in torch.split(samples, CHUNK):
            metric.update(part if classifier is not None else _colour(part))
        return float(metric.compute()[0])


def need_inception(what: str) -> None:
    """Refuse what needs Inception where its library is missing.

    Raises:
        UsageError: torch-fidelity is not installed.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        raise UsageError(
            f"{what} with Inception features needs torch-fidelity: pip install torch-fidelity (it fetches the weights). Or compare the "
            "features of a classifier of yours: --judge RUN."
        )


def _colour(images: Tensor) -> Tensor:
    return images if images.shape[1] == 3 else images.expand(-1, 3, -1, -1)
