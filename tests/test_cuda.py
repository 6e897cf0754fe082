"""What only an accelerator can break: OVERPROOF_TEST_CUDA=1 python -m pytest tests/test_cuda.py"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import overproof
from overproof.data import Splits

pytestmark = pytest.mark.skipif(
    not (os.environ.get("OVERPROOF_TEST_CUDA") and torch.cuda.is_available()), reason="needs OVERPROOF_TEST_CUDA=1 and a GPU"
)


@pytest.mark.parametrize("options", [
    {}, {"averaging": "swa"}, {"averaging": "ema"}, {"precision": "bf16-mixed"}, {"precision": "16-mixed", "clip": 1.0},
    {"channels_last": True}, {"compile": True}, {"cache_teacher": True}, {"awp": 0.01}, {"awp": 0.01, "precision": "16-mixed"},
], ids=str)  # fmt: skip
def test_distillation_trains_and_leaves_the_teacher(options: dict, digits: Splits, tmp_path: Path) -> None:
    teacher, student = overproof.create_model("cnn", 10, 1, 8), overproof.create_model("cnn", 10, 1, 8, widths=(8, 16))
    run = overproof.distill(
        student, teacher, digits, epochs=8, lr=0.05, out=tmp_path / "r", attacks=[overproof.PGD(eps=0.05)], **options
    )
    assert run.evaluations["test-best"]["agreement"]["clean"] > 0.1
    assert next(teacher.parameters()).device.type == "cpu"
    assert teacher._compiled_call_impl is None


@pytest.mark.parametrize("method", ["pgd-at", "trades"])
@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
def test_robust_training(method: str, precision: str, digits: Splits, tmp_path: Path) -> None:
    run = overproof.train(
        overproof.create_model("cnn", 10, 1, 8), digits, method=method, epochs=10, lr=0.05, eps=0.1, step_size=0.04, steps=4,
        precision=precision, out=tmp_path / "r",
    )  # fmt: skip
    assert run.evaluations["test-best"]["clean"] > 0.7


def test_evaluation_moves_what_is_elsewhere(digits: Splits) -> None:
    model, teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).cuda()
    images = digits.test.images[:64].cuda()
    for device in (None, "cuda"):
        result = overproof.evaluate(
            model,
            (images, digits.test.labels[:64]),
            teacher=teacher,
            device=device,
            attacks=[overproof.PGD(eps=0.1), overproof.FGSM(eps=0.1)],
        )
        assert result.summary["samples"] == 64
    assert next(model.parameters()).device.type == "cpu"


def test_interrupted_run_resumes(digits: Splits, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return overproof.create_model("cnn", 10, 1, 8)

    from overproof.training import loop

    original = loop.Trainer._step

    def step(self: loop.Trainer, batch: object, epoch: int) -> None:
        original(self, batch, epoch)
        if self.step == 12:
            self.stopper.stop = True

    loop.Trainer._step = step
    try:
        with pytest.raises(overproof.OverproofError, match="Stopped at step"):
            overproof.train(build(), digits, epochs=6, out=tmp_path / "r")
    finally:
        loop.Trainer._step = original
    assert overproof.train(build(), digits, epochs=6, out=tmp_path / "r", resume=True).folder.status["state"] == "done"


@pytest.mark.parametrize("estimator", ["exact", "rademacher", "fd-kl"])
def test_fisher_information_is_that_of_the_cpu(estimator: str) -> None:
    model, images = overproof.create_model("cnn", 10, 1, 8).eval(), torch.rand(40, 1, 8, 8)

    def measured(place: str) -> list[torch.Tensor]:
        net, here = model.to(place), images.to(place)
        draw = torch.Generator().manual_seed(0)
        found = [overproof.fisher.trace(net, here, estimator=estimator, generator=draw)]
        found += [overproof.fisher.lambda_max(net, here), overproof.fisher.lambda_max(net, here, estimator="power")]
        return [values.cpu() for values in found]

    for here, there in zip(measured("cpu"), measured("cuda"), strict=True):
        torch.testing.assert_close(there, here, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"estimator": "exact"}, {"estimator": "fd-kl"}, {"target": "lambda_max"}], ids=str)
def test_training_for_flatness(options: dict, digits: Splits, tmp_path: Path) -> None:
    run = overproof.train(
        overproof.create_model("cnn", 10, 1, 8), digits, method="fim", epochs=8, lr=0.05, mu=0.05,
        attacks=[overproof.attacks.OSSA(eps=0.5)], out=tmp_path / "r", **options,
    )  # fmt: skip
    assert run.evaluations["test-best"]["clean"] > 0.7
