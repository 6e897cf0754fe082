"""The criteria of the detector, measured on a batch: all to their end, or until the verdicts are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from overproof.attacks.base import logits_of, predictions
from overproof.attacks.randomness import Streams, other_classes
from overproof.data.pixels import check_images, check_labels
from overproof.errors import DataError
from overproof.folding import folded
from overproof.guards.cache_build import for_model
from overproof.guards.detector_scores import Walk, fitting_sigma, noise_shift
from overproof.networks import device_of, full_precision, in_mode

Criterion = Literal["noise", "targeted", "untargeted"]
CRITERIA: tuple[Criterion, ...] = ("noise", "targeted", "untargeted")  # in this order, the cheapest first
WALKED = 64  # images by which step sizes are fitted


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What is measured.

    Args:
        sigma: standard deviation of the noise, or None where "noise" is not measured or, before `fitted`, not known.
        draws: of the noise.
        noise: whether "noise" is measured.
        walks: the gradient walks by criterion.
        open_steps: criteria whose step size is still to be fitted.
    """

    sigma: float | None
    draws: int
    noise: bool
    walks: dict[str, Walk]
    open_steps: tuple[str, ...] = ()

    def fitted(self, model: nn.Module, images: Tensor, streams: Streams, batch_size: int = 256) -> Probe:
        """The same with noise and step sizes that suit natural images (N, C, H, W), where they are not known.

        Raises:
            UsageError: there is no such step size.
            DataError: the model knows a single class.
        """
        few, sigma = images[:WALKED], self.sigma
        with full_precision(images.device):
            model = _cheaper(model, images)
            with in_mode(model), torch.no_grad():
                parts = torch.split(torch.arange(len(few), device=few.device), batch_size)
                ways = [_ways(model, few[rows], streams.rows(rows))[1:] for rows in parts]
            base, target = (torch.cat(part) for part in zip(*ways, strict=True))
            walks = {
                name: walk.fitted(model, few, base, target, batch_size) if name in self.open_steps else walk
                for name, walk in self.walks.items()
            }
            if self.noise and sigma is None:
                sigma = fitting_sigma(model, images, streams.fork(0), batch_size)
        return replace(self, sigma=sigma, walks=walks, open_steps=())

    def measure(
        self, model: nn.Module, images: Tensor, streams: Streams, limits: Mapping[str, float] | None = None
    ) -> dict[str, Tensor]:
        """The scores (N,) by criterion.

        Args:
            model: images -> logits (N, K).
            images: (N, C, H, W) in [0, 1].
            streams: source of noise and target classes.
            limits: thresholds; an image above one of them is not measured further, walks end a step above theirs, and what no
                image can exceed is not measured. What was not measured is NaN.
        """
        parts, rows = {}, torch.arange(len(images), device=images.device)
        blank = torch.full((len(images),), math.nan, device=images.device)
        # Thresholds and verdicts must be made of the same numbers, whatever precision the caller works in.
        differentiable = torch.is_grad_enabled() and images.requires_grad
        with full_precision(images.device), in_mode(model), torch.set_grad_enabled(differentiable):
            model = _cheaper(model, images)
            logits, base, target = _ways(model, images, streams)
            if self.noise:
                shift = noise_shift(model, images, logits, streams.fork(0), sigma=self.sigma or 0.0, draws=self.draws)
                parts["noise"] = shift.float()
                rows = _left(rows, parts["noise"], limits, "noise")
            for name, walk in self.walks.items():
                cap = walk.cap if limits is None else math.floor(limits[name]) + 1
                parts[name] = blank.clone()
                if len(rows) and cap <= walk.cap:
                    counts = replace(walk, cap=cap).count(model, images[rows], base[rows], target[rows])
                    parts[name][rows] = counts.float()
                    rows = _left(rows, parts[name], limits, name)
        return parts


def _cheaper(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy with BatchNorm folded into the convolutions, if there is any and the copy gives the same logits."""
    if not any(isinstance(part, nn.BatchNorm2d) for part in model.modules()):
        return model
    return folded(model, images)


def _left(rows: Tensor, scores: Tensor, limits: Mapping[str, float] | None, name: str) -> Tensor:
    return rows if limits is None else rows[scores.detach()[rows] <= limits[name]]


def _ways(model: nn.Module, images: Tensor, streams: Streams) -> tuple[Tensor, Tensor, Tensor]:
    """The logits (N, K), the class of each image, and another one to walk to."""
    logits = logits_of(model, images)
    if logits.shape[1] < 2:
        raise DataError("The model gives one logit per image; a detector needs a classifier with at least two classes.")
    base = logits.detach().argmax(dim=1)
    return logits, base, other_classes(base, logits.shape[1], streams.fork(1))


class Natural:
    """The natural images a detector is fitted by, read in batches; randomness belongs to the number of the image.

    Args:
        model: images -> logits (N, K).
        images: (N, C, H, W), floats in [0, 1] or uint8, wherever they are.
        batch_size: images at once.
        seed: of the randomness.

    Raises:
        DataError: no images, or something else.
    """

    def __init__(self, model: nn.Module, images: Tensor, *, batch_size: int, seed: int) -> None:
        check_images(images, "detector")
        self.model, self.images, self.batch_size, self.seed = model, images, batch_size, seed

    def batch(self, rows: Tensor) -> tuple[Tensor, Streams]:
        """The images number `rows` as the model reads them, and their streams."""
        images = for_model(self.images[rows.to(self.images.device)], self.model)
        return images, Streams.named(rows.to(images.device), self.seed, "calibration")

    def right(self, labels: Tensor) -> Tensor:
        """Numbers of the images that the model classifies as `labels` (N,) say.

        Raises:
            DataError: the labels are no class numbers, or of another number.
        """
        known = check_labels(labels, len(self.images), "detector").cpu()
        rows = torch.arange(len(known))
        with full_precision(device_of(self.model)):
            found = [predictions(self.model, self.batch(part)[0]).cpu() for part in torch.split(rows, self.batch_size)]
        return rows[torch.cat(found) == known]

    @torch.no_grad()
    def survey(self, probe: Probe, rows: Tensor) -> Tensor:
        """The scores of the images number `rows`, (k, N) for k criteria."""
        found = [probe.measure(self.model, *self.batch(part)) for part in torch.split(rows, self.batch_size)]
        return torch.stack([torch.cat([part[name] for part in found]) for name in found[0]])
