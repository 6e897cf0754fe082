"""What was distilled: probes that tell a student that got better from one that became like its teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from overproof.registry import Registry

if TYPE_CHECKING:
    from overproof.probes.base import Probe, Result, Row, SkipProbe
    from overproof.probes.cam import grad_cam
    from overproof.probes.cka import linear_cka
    from overproof.probes.group_bias import read_groups
    from overproof.probes.intervals import Number, Table
    from overproof.probes.lab import Lab
    from overproof.probes.material import Cues, Groups, Material
    from overproof.probes.planes import Planes
    from overproof.probes.store import Store
    from overproof.probes.suite import Explanation, explain

PROBES = Registry("probe", "overproof.probes")

_PAPER = {
    "paper": "Ojha, Li, Sundara Rajan, Liang, Lee: What Knowledge Gets Distilled in Knowledge Distillation?, NeurIPS 2023",
    "url": "https://arxiv.org/abs/2205.16004",
}


def _add(name: str, target: str, summary: str, **about: str) -> None:
    PROBES.add(name, f"overproof.probes.{target}", summary=summary, **{**_PAPER, **about})


_add("localisation", "localisation:Localisation", "Whose Grad-CAM is more like the teacher's?")
_add("adversarial-transfer", "transfer:AdversarialTransfer", "Do images made against the teacher alone fool the student too?")
_add("colour", "invariance:Colour", "How often is the answer the same when brightness, contrast and colours change?")
_add("crop", "invariance:Crop", "How often is the answer the same for two crops of the image?")
_add("shift", "invariance:Shift", "How often is the answer the same for two windows some pixels apart?")
_add("domains", "domains:Domains", "Do student and teacher say the same where the student was never taught?")
_add(
    "corruptions",
    "domains:Corruptions",
    "Do student and teacher say the same of noisy, blurred, faded and compressed images?",
    paper="Hendrycks, Dietterich: Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, ICLR 2019",
    url="https://arxiv.org/abs/1903.12261",
)
_add(
    "shape-bias",
    "shape_bias:ShapeBias",
    "Where shape and texture say different things: how often does the shape win?",
    paper="Geirhos et al.: ImageNet-trained CNNs are biased towards texture, ICLR 2019",
    url="https://arxiv.org/abs/1811.12231",
)
_add(
    "cka",
    "cka:CKA",
    "How alike are the representations of corresponding layers?",
    paper="Kornblith, Norouzi, Lee, Hinton: Similarity of Neural Network Representations Revisited, ICML 2019",
    url="https://arxiv.org/abs/1905.00414",
)
_add(
    "decision-planes",
    "planes:DecisionPlanes",
    "On planes through three images: where do both predict the same class?",
    paper="Somepalli et al.: Can Neural Nets Learn the Same Model Twice?, CVPR 2022",
    url="https://arxiv.org/abs/2203.08124",
)
_add(
    "boundary-similarity",
    "boundaries:BoundarySimilarity",
    "Do the boundaries of other classes lie equally far, and in the same direction?",
    paper="Heo, Lee, Yun, Choi: Knowledge Distillation with Adversarial Samples Supporting Decision Boundary, AAAI 2019",
    url="https://arxiv.org/abs/1805.05532",
)
_add("group-bias", "group_bias:GroupBias", "Does a group that the teacher never saw gain less than the others?")

_HOMES = {
    **dict.fromkeys(("Probe", "Result", "Row", "SkipProbe"), "base"),
    **dict.fromkeys(("Cues", "Groups", "Material"), "material"),
    **dict.fromkeys(("Number", "Table"), "intervals"),
    **dict.fromkeys(("Explanation", "explain"), "suite"),
    **{"grad_cam": "cam", "linear_cka": "cka", "read_groups": "group_bias", "Lab": "lab", "Planes": "planes", "Store": "store"},
}

__all__ = [
    "PROBES", "Cues", "Explanation", "Groups", "Lab", "Material", "Number", "Planes", "Probe", "Result", "Row", "SkipProbe", "Store",
    "Table", "explain", "grad_cam", "linear_cka", "read_groups",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"overproof.probes.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'overproof.probes' has no attribute {name!r}")
