"""Test-time parts that stand in front of a finished classifier: purifiers, cache, detector, and the classifier they make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from overproof.registry import Registry

if TYPE_CHECKING:
    from overproof.guards.base import Answer, Guard, Judgement
    from overproof.guards.cache import Cache
    from overproof.guards.detector import Detector
    from overproof.guards.detector_attacks import SegmentSearch, ThroughNoise, WhiteBox
    from overproof.guards.guarded import Guarded, Verdict
    from overproof.guards.purifier import NIMPurifier
    from overproof.guards.purifier_base import Purifier
    from overproof.guards.purifier_small import SmallPurifier
    from overproof.guards.storage import load_guards, save_guard

GUARDS = Registry("guard", "overproof.guards")

GUARDS.add(
    "cache",
    "overproof.guards.cache:Cache",
    summary="Classes of similar training images, mixed into the network's answer; nothing is trained.",
    paper="Orhan: A Simple Cache Model for Image Recognition, NeurIPS 2018",
    url="https://arxiv.org/abs/1805.08709",
    tags=("cache", "accuracy"),
)
GUARDS.add(
    "detector",
    "overproof.guards.detector:Detector",
    summary="Rejects images that noise shakes or that too many gradient steps leave in their class; stops simple attacks only.",
    paper="Yu, Hu, Guo, Chao, Weinberger: A New Defense Against Adversarial Images, NeurIPS 2019",
    url="https://arxiv.org/abs/1910.07629",
    tags=("detector", "rejection"),
)
GUARDS.add(
    "nim",
    "overproof.guards.purifier:NIMPurifier",
    summary="Noise, then a pre-trained autoencoder that removes it, before any classifier; how much is chosen at call time.",
    paper="You, Liu, Han, Xu: Beyond Pretrained Features: Noisy Image Modeling Provides Adversarial Defense, NeurIPS 2023",
    url="https://arxiv.org/abs/2302.01056",
    tags=("purifier", "robust"),
)
GUARDS.add(
    "purifier-small",
    "overproof.guards.purifier_small:SmallPurifier",
    summary="Noise, then a few convolutions that have learned to rebuild images as the purifier nim does.",
    paper="You, Liu, Han, Xu: Beyond Pretrained Features: Noisy Image Modeling Provides Adversarial Defense, NeurIPS 2023",
    url="https://arxiv.org/abs/2302.01056",
    tags=("purifier", "robust"),
)

_HOMES = {
    "Answer": "base",
    "Cache": "cache",
    "Detector": "detector",
    "Guard": "base",
    "Guarded": "guarded",
    "Judgement": "base",
    "NIMPurifier": "purifier",
    "Purifier": "purifier_base",
    "SegmentSearch": "detector_attacks",
    "SmallPurifier": "purifier_small",
    "ThroughNoise": "detector_attacks",
    "Verdict": "guarded",
    "WhiteBox": "detector_attacks",
    "load_guards": "storage",
    "save_guard": "storage",
}

__all__ = [
    "GUARDS", "Answer", "Cache", "Detector", "Guard", "Guarded", "Judgement", "NIMPurifier", "Purifier", "SegmentSearch",
    "SmallPurifier", "ThroughNoise", "Verdict", "WhiteBox", "load_guards", "save_guard",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"overproof.guards.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'overproof.guards' has no attribute {name!r}")
