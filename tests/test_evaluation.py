"""The evaluator: figures against hand counts, records per sample, and distrust."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from overproof.attacks import FGSM, PGD
from overproof.data import ImageSet, Splits
from overproof.errors import DataError, UnknownNameError, UsageError
from overproof.evaluation import evaluate
from overproof.folder import RunFolder, read_arrays
from overproof.testing import small_model


class Threshold(nn.Module):
    """Class 1 iff the only pixel is above 0.5; the margin to the boundary is |x - 0.5|."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = 10 * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-value, value], 1)


@pytest.fixture
def pixels() -> ImageSet:
    values = torch.tensor([0.05, 0.25, 0.45, 0.55, 0.75, 0.95, 0.4, 0.6])
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0])  # the last two are misclassified
    return ImageSet(values.view(-1, 1, 1, 1), labels, classes=("low", "high"))


def test_figures_are_exact(pixels: ImageSet) -> None:
    result = evaluate(
        Threshold(), pixels, attacks={"pgd": PGD(eps=0.3, steps=10), "fgsm": FGSM(eps=0.1)}, curve=[0.1, 0.3, 0.5, 0.0]
    )
    assert result.clean == 6 / 8
    assert result.robust == {"pgd": 2 / 8, "fgsm": 4 / 8}
    assert result.worst_case == 2 / 8
    summary = result.summary
    assert summary["curve"] == {
        "attack": "pgd",
        "threat": "Linf",
        "eps": [0.0, 0.1, 0.3, 0.5],
        "robust": [6 / 8, 4 / 8, 2 / 8, 0.0],
    }
    assert summary["attacks"]["pgd"]["success_denominator"] == 6
    assert summary["attacks"]["pgd"]["success_rate"] == pytest.approx(4 / 6)
    assert summary["per_class"] == {"count": [4, 4], "clean": [0.75, 0.75], "robust": [0.25, 0.25]}
    rows = result.samples
    assert rows["pgd/robust"].tolist() == [True, False, False, False, False, True, False, False]
    assert (rows["pgd/size"] <= 0.3 + 1e-6).all()
    assert set(result.gallery) >= {"clean", "adversarial", "label", "adversarial_prediction"}


def test_order_and_agreement(pixels: ImageSet) -> None:
    class Opposite(Threshold):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -super().forward(x)

    assert evaluate(Threshold(), pixels, teacher=Threshold()).summary["agreement"]["clean"] == 1.0
    assert evaluate(Threshold(), pixels, teacher=Opposite()).summary["agreement"]["clean"] == 0.0
    half = pixels.subset([5, 0, 3])
    assert evaluate(Threshold(), half).samples["index"].tolist() == [5, 0, 3]


def test_result_does_not_depend_on_batch_size_without_random_start(digits: Splits) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    data = digits.test.subset(range(50))
    attack = {"pgd": PGD(eps=0.1, steps=5, random_start=False)}
    one, many = (evaluate(model, data, attacks=attack, batch_size=size) for size in (7, 50))
    assert one.robust == many.robust
    assert all(np.allclose(one.samples[k], many.samples[k], atol=1e-5) for k in one.samples)


def test_same_seed_same_verdicts_and_model_untouched(digits: Splits) -> None:
    model = small_model().train()
    nn.init.normal_(model[-1].weight)
    data = ImageSet(torch.rand(40, 1, 8, 8), torch.randint(0, 3, (40,)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = (evaluate(model, data, attacks={"pgd": PGD(eps=0.1, steps=3)}, seed=5) for _ in range(2))
    assert all(np.array_equal(first.samples[k], second.samples[k]) for k in first.samples)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_known_calibration() -> None:
    """Confidence 0.9 on everything, right on half: ECE = 0.4."""

    class Sure(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[0.9, 0.1]]).log().expand(len(x), 2) + 0 * x.sum()

    data = ImageSet(torch.rand(20, 1, 2, 2), torch.tensor([0, 1] * 10))
    assert evaluate(Sure(), data).summary["ece"] == pytest.approx(0.4, abs=1e-5)


def test_cost_figures() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(4 * 64, 10, bias=False))
    summary = evaluate(model, ImageSet(torch.rand(4, 1, 8, 8), torch.arange(4))).summary
    assert summary["macs"] == 64 * 4 * 9 + 256 * 10
    assert summary["parameters"] == 36 + 2560
    assert summary["latency_ms"]["median"] > 0


def test_softmax_output_is_noticed() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Softmax(1))
    warnings = evaluate(model, ImageSet(torch.rand(4, 1, 2, 2), torch.zeros(4, dtype=torch.long))).summary["warnings"]
    assert any("softmax" in text for text in warnings)


def test_targeted_attack_is_judged_as_robust_accuracy(pixels: ImageSet) -> None:
    result = evaluate(Threshold(), pixels, attacks={"t": PGD(eps=0.3, steps=10, targeted=True)})
    assert result.robust["t"] == 2 / 8


def test_saved_files_are_plain(pixels: ImageSet, tmp_path: Path) -> None:
    result = evaluate(Threshold(), pixels, attacks=["fgsm"])
    path = result.save(tmp_path, "test")
    assert json.loads(path.read_text())["clean"] == 0.75
    assert read_arrays(path.with_suffix(".npz"))["label"].tolist() == pixels.labels.tolist()
    assert RunFolder(tmp_path).evaluations["test"]["attacks"]["fgsm"]["eps"] == 8 / 255


@pytest.mark.parametrize(
    ("data", "attacks", "error", "message"),
    [
        ((torch.rand(2, 1, 1, 1), torch.tensor([0, 2])), {}, DataError, "Label 2 does not exist"),
        ((torch.rand(2, 1, 1, 1) * 255, torch.tensor([0, 1])), {}, DataError, r"\[0, 1\]"),
        ((torch.full((2, 1, 1, 1), float("nan")), torch.tensor([0, 1])), {}, DataError, "(?i)nan|finite"),
        ((torch.rand(0, 1, 1, 1), torch.zeros(0, dtype=torch.long)), {}, DataError, "(?i)empty|no image"),
        ((torch.rand(2, 1, 1, 1), torch.tensor([0, 1])), ["pdg"], UnknownNameError, "Did you mean 'pgd'"),
        ((torch.rand(2, 1, 1, 1), torch.tensor([0, 1])), {"pgd": {"step": 3}}, UnknownNameError, "Did you mean 'steps'"),
        ((torch.rand(2, 1, 1, 1), torch.tensor([0, 1])), {"pgd": 3}, UsageError, "expected an attack"),
    ],
)
def test_bad_input(data: object, attacks: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(Threshold(), data, attacks=attacks)


def test_model_without_logits_is_named() -> None:
    data = ImageSet(torch.rand(2, 1, 2, 2), torch.tensor([0, 1]))
    with pytest.raises(DataError, match=r"returned \(2,\).*shape \(N, K\)"):
        evaluate(nn.Sequential(nn.Flatten(), nn.Linear(4, 1), nn.Flatten(0)), data)


def test_attacks_as_a_list_and_data_by_name() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    result = evaluate(model, "digits", attacks=[FGSM(eps=0.1), "pgd"])
    assert set(result.robust) == {"fgsm", "pgd"}
    assert result.summary["samples"] == 450


def test_verdict_of_a_targeted_attack_leaves_a_training_model_alone() -> None:
    from overproof.evaluation import verdict

    model = small_model().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    verdict(PGD(eps=0.1, steps=2, targeted=True), model, torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training


class Sometimes(Threshold):
    """No number for bright images, or for those that an attack has made bright."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        return torch.where(x.flatten(1).mean(1, keepdim=True) > 0.7, torch.nan, logits)


def test_answers_that_are_no_numbers_count_as_wrong(pixels: ImageSet) -> None:
    result = evaluate(Sometimes(), pixels, attacks={"fgsm": FGSM(eps=0.2)}, sanity=4)
    assert result.samples["prediction"].tolist() == [0, 0, 0, 1, -1, -1, 0, 1]
    assert result.clean == 4 / 8
    assert result.summary["nll"] is None
    assert any("2 of 8 untouched images with NaN" in text for text in result.warnings)
    assert np.isfinite(result.summary["ece"])
    json.dumps(result.summary, allow_nan=False)
    nothing = evaluate(lambda_module(lambda x: torch.full((len(x), 2), torch.nan)), pixels, attacks={"fgsm": FGSM(eps=0.2)})
    assert (nothing.clean, nothing.worst_case) == (0.0, 0.0)
    # An attack that drives a model out of its numbers has broken it.
    up = ImageSet(torch.full((1, 1, 1, 1), 0.45), torch.zeros(1, dtype=torch.long), classes=("low", "high"))
    assert evaluate(Sometimes(), up, attacks={"fgsm": FGSM(eps=0.3)}, sanity=0).robust["fgsm"] == 0.0


def lambda_module(function) -> nn.Module:  # type: ignore[no-untyped-def]
    class Module(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    return Module()


def test_what_is_printed_tells_the_alarms(pixels: ImageSet) -> None:
    fine = evaluate(Threshold(), pixels, attacks={"pgd": PGD(eps=0.3, steps=10)}, sanity=0)
    assert not fine.suspected
    assert repr(fine).startswith("Evaluation(clean 75.00%, pgd 25.00%, worst case 25.00%, 8 samples)")
    blind = Threshold()
    cut = lambda_module(lambda x: blind(x.detach()))
    told = repr(evaluate(cut, pixels, attacks={"pgd": PGD(eps=0.3, steps=10)}, sanity=6))
    assert "masked gradients suspected" in told
    assert "warning: pgd: no gradient reaches the images" in told
