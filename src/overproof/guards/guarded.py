"""A classifier with its guards, as one module."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from overproof.attacks.base import logits_of
from overproof.attacks.randomness import Streams
from overproof.errors import UsageError
from overproof.guards.base import Answer, Guard, Judgement


@dataclass(frozen=True)
class Verdict:
    """What a guarded classifier says about N images.

    Args:
        logits: (N, K); with a cache the logarithm of its mixture.
        probabilities: (N, K), their softmax.
        score: (N,), the larger the more suspicious; 0 without a detector.
        rejected: (N,) bool; nowhere without a detector.
        parts: what the guards tell beside, (N, ...), as "cache/NAME", "detector/NAME"; "purified" images (N, C, H, W).
    """

    logits: Tensor
    probabilities: Tensor
    score: Tensor
    rejected: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class Guarded(nn.Module):
    """images -> purifier -> (model with cache, detector) -> `Verdict`.

    The classifier is the module handed in, not a copy. Gradients pass through the purifier and the cache. With a generator
    that has streams a batch gives what its images give one by one. Where a purifier averages several draws, the probabilities are
    averaged, in one batch; all else is told of the first draw.

    Args:
        model: images (N, C, H, W) in [0, 1] -> logits (N, K).
        cache, detector, purifier: fitted guards, each for its place, at least one of them.

    Raises:
        UsageError: no guard, one in the wrong place, not fitted, or fitted for another model.
    """

    def __init__(
        self, model: nn.Module, *, cache: Guard | None = None, detector: Guard | None = None, purifier: Guard | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.cache, self.detector, self.purifier = cache, detector, purifier
        for place, guard in (("cache", cache), ("detector", detector), ("purifier", purifier)):
            if guard is not None and (kind := getattr(guard, "place", type(guard).__name__)) != place:
                raise UsageError(f"Guarded({place}={type(guard).__name__}(...)): that guard belongs elsewhere: {kind}=...")
            if guard is not None:
                guard.check(model)
        if cache is None and detector is None and purifier is None:
            raise UsageError("Guarded(model) without a guard is the model; give cache=..., detector=... or purifier=....")

    def forward(self, images: Tensor, generator: torch.Generator | None = None, **purifying: Any) -> Verdict:
        """Images (N, C, H, W) in [0, 1] -> `Verdict`.

        Args:
            images: floats.
            generator: randomness of the guards, best `attacks.randomness.Streams`; the global generator if None.
            **purifying: what the purifier takes at call time, such as sigma=70, sigma="off" or draws=4; else its own options.

        Raises:
            UsageError: something to purify with, and no purifier.
        """
        logits, seen, parts = self.classify(images, generator, **purifying)
        score, rejected = torch.zeros_like(logits[:, 0]), torch.zeros(len(images), dtype=torch.bool, device=images.device)
        if self.detector is not None:
            judged: Judgement = self.detector(self.model, seen, Streams.of(generator, images).fork(1))
            score, rejected = judged.score, judged.rejected
            parts |= {f"detector/{name}": value for name, value in judged.parts.items()}
        return Verdict(logits, logits.softmax(dim=1), score, rejected, parts)

    def classify(
        self, images: Tensor, generator: torch.Generator | None = None, *, smooth: bool = False, **purifying: Any
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Logits (N, K), the images that the model saw, and what purifier and cache tell; the detector is not asked.

        Args:
            images, generator, **purifying: see `forward`.
            smooth: a cache without a gradient, or with that of its nearest items alone, answers with all items instead.
        """
        first, seen, parts = slice(len(images)), images, {}
        if self.purifier is not None:
            seen = self._purified(images, generator, **purifying)
            parts["purified"] = seen[first]
        else:
            self.repeats(**purifying)  # or an error: there is nobody to take them
        if self.cache is None:
            return _averaged(logits_of(self.model, seen), len(images)), seen[first], parts
        ask: Any = getattr(self.cache, "smoothly", self.cache) if smooth else self.cache
        answer: Answer = ask(self.model, seen)
        parts |= {f"cache/{name}": value[first] for name, value in answer.parts.items()}
        return _averaged(answer.logits, len(images)), seen[first], parts

    def repeats(self, *, draws: int | None = None, **knobs: Any) -> int:
        """Over how many draws of the purifier the probabilities are averaged, with these knobs at call time.

        Raises:
            UsageError: a knob that the purifier does not have, or a value that it does not take.
        """
        if self.purifier is None and (draws is not None or knobs):
            named = ", ".join([*knobs, *(["draws"] if draws is not None else [])])
            raise UsageError(f"Guarded({named}): there is no purifier that could take this; give purifier=....")
        ask = getattr(self.purifier, "repeats", None)
        if not callable(ask):
            if draws is not None:
                raise UsageError(f"draws={draws}: {type(self.purifier).__name__} does not average draws; leave it out.")
            return 1
        unknown = knobs.keys() - {"sigma"} if isinstance(self.purifier, Guard) and hasattr(self.purifier, "level") else ()
        if unknown:
            raise UsageError(f"{', '.join(sorted(unknown))}: what a purifier takes at call time is sigma and draws.")
        return int(ask(draws=draws, **knobs))

    def _purified(self, images: Tensor, generator: torch.Generator | None, *, draws: int | None = None, **knobs: Any) -> Tensor:
        """What the model sees of the images: all first draws, then all second ones, and so on."""
        assert self.purifier is not None
        streams, count = Streams.of(generator, images).fork(0), self.repeats(draws=draws, **knobs)
        if count > 1:
            images, streams = (
                images.repeat(count, 1, 1, 1),
                Streams(torch.cat([streams.fork(draw).keys for draw in range(count)])),
            )
        purified: Tensor = self.purifier(self.model, images, streams, **knobs)
        return purified

    def logits_model(self, **purifying: Any) -> GuardedLogits:
        """The same as an ordinary classifier, images -> logits, that attacks and evaluations take; it shares everything.

        Args:
            **purifying: see `forward`.
        """
        self.repeats(**purifying)  # or an error now
        return GuardedLogits(self, **purifying)


def _averaged(logits: Tensor, images: int) -> Tensor:
    """Logits (R N, K) of R draws -> logarithms of their mean probabilities (N, K); of a single draw the logits themselves."""
    draws = len(logits) // max(images, 1)
    if draws <= 1:
        return logits
    return logits.log_softmax(dim=1).view(draws, images, logits.shape[1]).logsumexp(dim=0) - math.log(draws)


class GuardedLogits(nn.Module):
    """The classifier that a guarded model is when nobody is turned away.

    A cache that has no gradient, or only that of its nearest items, would blind attacks: images that ask for a gradient are answered
    by all its items (`Cache.smoothly`), and judged by the cache as it is.

    Args:
        guarded: the guarded model.
        **purifying: see `Guarded.forward`.
    """

    own_dice = True  # every row of a batch draws for itself, see `attacks.eot.Averaged`

    def __init__(self, guarded: Guarded, **purifying: Any) -> None:
        super().__init__()
        self.guarded, self.purifying = guarded, purifying

    @property
    def rows_per_image(self) -> int:
        """How many images the classifier sees for each: the draws that are averaged."""
        return self.guarded.repeats(**self.purifying)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] -> logits (N, K)."""
        asked = torch.is_grad_enabled() and images.requires_grad
        return self.guarded.classify(images, smooth=asked, **self.purifying)[0]
