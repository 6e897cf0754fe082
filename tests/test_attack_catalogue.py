"""Every registered attack keeps the contract, under every norm it knows, targeted and not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from overproof.attacks import ATTACKS
from overproof.attacks.base import Attack, MinimumNormAttack
from overproof.attacks.combined import Combined
from overproof.errors import UnknownNameError, UsageError
from overproof.evaluation import evaluate, verdict
from overproof.evaluation.pipeline import Chunk
from overproof.testing import check_attack, small_batch, small_model

# What makes an attack cheap enough for a test; nothing here changes what the contract asks.
CHEAP: dict[str, dict[str, Any]] = {
    "adam": {"steps": 3},
    "apgd": {"steps": 4},
    "autoattack": {"version": "quick"},
    "bpda": {"inner": "fgsm", "parts": ("2",)},
    "carlini-wagner": {"searches": 2, "steps": 5},
    "ddn": {"steps": 5},
    "deepfool": {"steps": 5},
    "eot": {"inner": "fgsm", "samples": 2},
    "fab": {"steps": 4},
    "fmn": {"steps": 5},
    "hop-skip-jump": {"queries": 100, "probes": 10},
    "noise": {"samples": 3},
    "pgd": {"steps": 3},
    "square": {"queries": 20},
    "worst-case": {"attacks": ("fgsm", "noise")},
}
RADII = {"Linf": 0.08, "L2": 0.6, "L1": 2.0, "L0": 4.0}
OURS = [name for name in ATTACKS.names() if name != "transfer"]  # which needs a source: tests/test_combined.py


def variants() -> list[Any]:
    """Name and options of every attack under every norm it knows."""
    found = []
    for name in OURS:
        for norm, eps in RADII.items():
            for targeted in (False, True):
                options = {**CHEAP.get(name, {}), "norm": norm, "eps": eps, "targeted": targeted}
                try:
                    attack = ATTACKS.create(name, **options)
                except UsageError:
                    continue  # this attack does not know the norm, or has no targeted form
                found.append(pytest.param(attack, id=f"{name}-{norm}" + "-targeted" * targeted))
    return found


@pytest.mark.parametrize("attack", variants())
def test_contract(attack: Attack) -> None:
    check_attack(attack)


def test_no_attack_is_forgotten() -> None:
    known = {param.id for param in variants()}
    for name in OURS:
        assert any(known_id.startswith(f"{name}-") for known_id in known), name
    assert {f"fmn-{norm}" for norm in RADII} <= known
    assert {f"apgd-{norm}-targeted" for norm in ("Linf", "L2", "L1")} <= known
    assert "autoattack-L1" in known
    assert "autoattack-Linf-targeted" not in known
    assert "deepfool-L1" not in known


def test_verdict_does_not_depend_on_the_batch_for_the_whole_set() -> None:
    model, batch = small_model(4).eval(), small_batch(30, seed=5)
    results = [
        evaluate(
            model,
            (batch.images, model(batch.images).argmax(1)),
            attacks={"aa": {"attack": "autoattack", "version": "fast", "eps": 0.01}},
            batch_size=size,
            sanity=0,
        )
        for size in (4, 30)
    ]
    assert (results[0].samples["aa/robust"] == results[1].samples["aa/robust"]).all()
    assert (results[0].samples["aa/by"] == results[1].samples["aa/by"]).all()


def test_autoattack_is_at_least_as_strong_as_its_members() -> None:
    model, batch = small_model(4).eval(), small_batch(60, seed=6)
    with torch.no_grad():
        model[-1].bias -= model(batch.images).mean(0)
        labels = model(batch.images).argmax(1)
    whole = ATTACKS.create("autoattack", version="fast", eps=0.008)
    assert isinstance(whole, Combined)
    broken = verdict(whole, model, batch.images, labels, torch.Generator().manual_seed(0)).predictions != labels
    for name, member in whole.members.items():
        alone = verdict(member, model, batch.images, labels, torch.Generator().manual_seed(0)).predictions != labels
        assert broken.sum() >= alone.sum(), name
    assert 0 < broken.sum() < 60


def test_versions_of_autoattack() -> None:
    standard = ATTACKS.create("autoattack").members
    assert list(standard) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert (standard["apgd-ce"].steps, standard["apgd-t"].steps, standard["fab-t"].steps, standard["square"].queries) == (
        100,
        100,
        100,
        5000,
    )
    assert standard["apgd-t"].targets == standard["fab-t"].targets == 9
    assert all(member.threat.eps == 8 / 255 for member in standard.values())
    assert list(ATTACKS.create("autoattack", version="rand").members) == ["apgd-ce", "apgd-dlr"]
    assert list(ATTACKS.create("autoattack", norm="L1", eps=2.0).members) == ["apgd-ce", "apgd-t", "fab-t"]
    with pytest.raises(UsageError, match="untargeted"):
        ATTACKS.create("autoattack", targeted=True)
    with pytest.raises(UsageError):
        ATTACKS.create("autoattack", version="slow")


def test_names_of_other_libraries() -> None:
    assert ATTACKS.get("foolbox:LinfPGD").name == "foolbox:LinfPGD"
    with pytest.raises(UnknownNameError, match="foolbox"):
        ATTACKS.get("foolbax:LinfPGD")
    assert not any(":" in name for name in ATTACKS.names())


def test_minimum_norm_attacks_say_so() -> None:
    tagged = {entry.name for entry in ATTACKS.entries() if "minimum-norm" in entry.tags}
    assert tagged == {
        name
        for name in OURS
        if isinstance(ATTACKS.get(name).load(), type) and issubclass(ATTACKS.get(name).load(), MinimumNormAttack)
    }


def test_chunks_keep_rows_together() -> None:
    whole = Chunk(torch.rand(5, 1, 2, 2), torch.arange(5), torch.arange(5) + 10, torch.arange(5))
    part = whole.take(torch.tensor([3, 1]))
    assert part.index.tolist() == [13, 11]
    assert Chunk.joined([part, whole.take(slice(0, 1))]).labels.tolist() == [3, 1, 0]
