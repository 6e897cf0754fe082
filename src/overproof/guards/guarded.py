"""A classifier with its guards, as one module."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    that has streams a batch gives what its images give one by one.

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

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Verdict:
        """Images (N, C, H, W) in [0, 1] -> `Verdict`.

        Args:
            images: floats.
            generator: randomness of the guards, best `attacks.randomness.Streams`; the global generator if None.
        """
        logits, seen, parts = self.classify(images, generator)
        score, rejected = torch.zeros_like(logits[:, 0]), torch.zeros(len(images), dtype=torch.bool, device=images.device)
        if self.detector is not None:
            judged: Judgement = self.detector(self.model, seen, Streams.of(generator, images).fork(1))
            score, rejected = judged.score, judged.rejected
            parts |= {f"detector/{name}": value for name, value in judged.parts.items()}
        return Verdict(logits, logits.softmax(dim=1), score, rejected, parts)

    def classify(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Logits (N, K), the images that the model saw, and what purifier and cache tell; the detector is not asked."""
        seen, parts = images, {}
        if self.purifier is not None:
            seen = self.purifier(self.model, images, Streams.of(generator, images).fork(0))
            parts["purified"] = seen
        if self.cache is None:
            return logits_of(self.model, seen), seen, parts
        answer: Answer = self.cache(self.model, seen)
        parts |= {f"cache/{name}": value for name, value in answer.parts.items()}
        return answer.logits, seen, parts

    def logits_model(self) -> GuardedLogits:
        """The same as an ordinary classifier, images -> logits, that attacks and evaluations take; it shares everything."""
        return GuardedLogits(self)


class GuardedLogits(nn.Module):
    """The classifier that a guarded model is when nobody is turned away.

    Args:
        guarded: the guarded model.
    """

    def __init__(self, guarded: Guarded) -> None:
        super().__init__()
        self.guarded = guarded

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] -> logits (N, K)."""
        return self.guarded.classify(images)[0]
