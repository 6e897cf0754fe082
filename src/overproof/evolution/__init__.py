"""Populations of generators that vary, compete and are crossed by distillation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from overproof.registry import Registry

if TYPE_CHECKING:
    from overproof.evolution.population import Evolution
    from overproof.evolution.settings import CEGAN, EGAN, GAN, IEGAN

EVOLUTIONS = Registry("evolution", "overproof.evolutions")

_CEGAN = {
    "paper": "Li, Zhang, Gong, Lü: Evolutionary Generative Adversarial Networks with Crossover Based Knowledge Distillation, IJCNN 2021",
    "url": "https://arxiv.org/abs/2101.11186",
}
_EGAN = {
    "paper": "Wang, Xu, Yao, Tao: Evolutionary Generative Adversarial Networks, IEEE TEVC 2019",
    "url": "https://arxiv.org/abs/1803.00657",
}
_IEGAN = {"paper": "IE-GAN, 2021: crossover with a fitness that rewards diversity", "url": "https://arxiv.org/abs/2109.11078"}
EVOLUTIONS.add(
    "cegan", "overproof.evolution.settings:CEGAN", summary="Three mutations, and children distilled from two.", **_CEGAN
)
EVOLUTIONS.add(
    "egan", "overproof.evolution.settings:EGAN", summary="Three mutations, fitness with the discriminator's slope.", **_EGAN
)
EVOLUTIONS.add("iegan", "overproof.evolution.settings:IEGAN", summary="CE-GAN with a fitness that rewards diversity.", **_IEGAN)
EVOLUTIONS.add("gan", "overproof.evolution.settings:GAN", summary="One generator and one loss: a plain GAN.")

_HOMES = {"Evolution": "population", **dict.fromkeys(("CEGAN", "EGAN", "GAN", "IEGAN"), "settings")}

__all__ = ["CEGAN", "EGAN", "EVOLUTIONS", "GAN", "IEGAN", "Evolution"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"overproof.evolution.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'overproof.evolution' has no attribute {name!r}")
