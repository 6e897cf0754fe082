"""Expectation over transformation: attack the average of a model that rolls dice."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from overproof.attacks.base import logits_of
from overproof.attacks.combined import Wrapper
from overproof.attacks.randomness import Streams
from overproof.errors import UsageError
from overproof.networks import in_mode

SALT = 20  # names the dice of the attack among the forks of an image's streams
ROWS = 1024  # images in one pass through a model whose rows have dice of their own


@dataclass(frozen=True, kw_only=True)
class EOT(Wrapper):
    """Run an attack on E_t[log softmax f_t(x)], estimated with fresh randomness at every call of the model.

    Args:
        inner, eps, norm, targeted: see `Wrapper`.
        samples: forward passes per call, at least 1; 20 is the habit of AutoAttack's version for random defences.

    Raises:
        UsageError: samples below 1.

    Reference: Athalye, Engstrom, Ilyas, Kwok, ICML 2018, arXiv 1707.07397.

    Differences from the paper: the average is taken of log-probabilities of the model, before the attack's loss, so that
    every attack of this package can be wrapped. A model that draws from the global generator is made repeatable by seeding a
    fork of it, but its draws are shared by the batch: results are equal for equal batches only.
    """

    samples: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise UsageError(f"EOT(samples={self.samples}): at least 1.")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        streams = Streams.of(generator, images)
        devices = [images.device] if images.is_cuda else []
        with in_mode(model), torch.random.fork_rng(devices=devices):
            # Not the seed of the streams themselves: a caller may have used that one for the dice by which the images are judged.
            torch.manual_seed(streams.fork(SALT).initial_seed())
            return self.attack(Averaged(model, self.samples), images, labels, streams)


class Averaged(nn.Module):
    """The mean log-probability of `samples` passes through a random model.

    A model with the attribute `own_dice` draws for every row of a batch anew, so that many passes are one over a longer batch, of at
    most `ROWS` rows (`rows_per_image`, if it has that, for each image). Where more are needed, memory for gradients is that of one.
    """

    def __init__(self, model: nn.Module, samples: int) -> None:
        super().__init__()
        self.model, self.samples = model, samples

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) -> log-probabilities (N, K), up to a constant per image."""
        own, each = getattr(self.model, "own_dice", False), getattr(self.model, "rows_per_image", 1)
        at_once = max(1, ROWS // max(each * len(images), 1)) if own else 1
        total, left = images.new_zeros(()), self.samples
        again = own and at_once < self.samples and torch.is_grad_enabled() and images.requires_grad
        while left:
            passes = min(at_once, left)
            repeated = images.repeat(passes, *[1] * (images.dim() - 1))
            # The graph of one pass is kept at a time; the same dice are thrown when it is made anew.
            answers = checkpoint(self._said, repeated, use_reentrant=False) if again else self._said(repeated)
            total, left = total + answers.view(passes, len(images), answers.shape[1]).sum(dim=0), left - passes
        return total / self.samples

    def _said(self, images: Tensor) -> Tensor:
        return logits_of(self.model, images).log_softmax(dim=1)
