"""Threats, the one inner maximiser, and attacks as values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from overproof.attacks.catalogue import ATTACKS

if TYPE_CHECKING:
    from overproof.attacks.adam import AdamAttack
    from overproof.attacks.apgd import APGD
    from overproof.attacks.ascent import ascend
    from overproof.attacks.autoattack import AutoAttack
    from overproof.attacks.base import Attack, predictions
    from overproof.attacks.bim import BIM
    from overproof.attacks.bpda import BPDA
    from overproof.attacks.bss import BSS, draw_targets, walk_to_boundary
    from overproof.attacks.carlini_wagner import CarliniWagner
    from overproof.attacks.combined import WorstCase
    from overproof.attacks.ddn import DDN
    from overproof.attacks.deepfool import DeepFool
    from overproof.attacks.eot import EOT
    from overproof.attacks.fab import FAB
    from overproof.attacks.fgsm import FGSM
    from overproof.attacks.fmn import FMN
    from overproof.attacks.hop_skip_jump import HopSkipJump
    from overproof.attacks.mifgsm import MIFGSM
    from overproof.attacks.noise import Noise
    from overproof.attacks.ossa import OSSA
    from overproof.attacks.pgd import PGD
    from overproof.attacks.square import Square
    from overproof.attacks.threats import L0, L1, L2, Linf, Threat, make_threat
    from overproof.attacks.transfer import Transfer

_HOMES = {
    "APGD": "apgd",
    "AdamAttack": "adam",
    "Attack": "base",
    "AutoAttack": "autoattack",
    "BIM": "bim",
    "BPDA": "bpda",
    "BSS": "bss",
    "CarliniWagner": "carlini_wagner",
    "DDN": "ddn",
    "DeepFool": "deepfool",
    "EOT": "eot",
    "FAB": "fab",
    "FGSM": "fgsm",
    "FMN": "fmn",
    "HopSkipJump": "hop_skip_jump",
    "L0": "threats",
    "L1": "threats",
    "L2": "threats",
    "Linf": "threats",
    "MIFGSM": "mifgsm",
    "Noise": "noise",
    "OSSA": "ossa",
    "PGD": "pgd",
    "Square": "square",
    "Threat": "threats",
    "Transfer": "transfer",
    "WorstCase": "combined",
    "ascend": "ascent",
    "draw_targets": "bss",
    "make_threat": "threats",
    "predictions": "base",
    "walk_to_boundary": "bss",
}

__all__ = [
    "APGD", "ATTACKS", "BIM", "BPDA", "BSS", "DDN", "EOT", "FAB", "FGSM", "FMN", "L0", "L1", "L2", "MIFGSM", "OSSA", "PGD", "AdamAttack",
    "Attack", "AutoAttack", "CarliniWagner", "DeepFool", "HopSkipJump", "Linf", "Noise", "Square", "Threat", "Transfer", "WorstCase", "ascend",
    "draw_targets", "make_threat", "predictions", "walk_to_boundary",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"overproof.attacks.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'overproof.attacks' has no attribute {name!r}")
