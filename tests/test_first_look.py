"""What is found on the first images, before a run begins: networks that cannot be trained, or that answer with no numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import overproof
from overproof.errors import DataError, UsageError
from overproof.run.first_look import first_look
from overproof.run.prepare import UserData

IMAGES, LABELS = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plain() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


class Moody(nn.Module):
    """In train mode it does something else than in eval mode."""

    def __init__(self, mood: str) -> None:
        super().__init__()
        self.net, self.mood = plain(), mood

    def forward(self, images: Tensor) -> Any:
        logits = self.net(images)
        if self.mood == "detached":
            return logits.detach()
        if not self.training:
            return logits
        if self.mood == "raises":
            raise RuntimeError("no such thing")
        return (logits, logits) if self.mood == "tuple" else {"logits": logits}


def broken() -> nn.Module:
    net = plain()
    with torch.no_grad():
        net[1].bias[0] = math.nan  # type: ignore[index, union-attr, operator]
    return net


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (lambda: Moody("tuple"), plain, r"student returns tuple for 2 images in train mode.*Wrap it.*aux_logits=False"),
        (lambda: Moody("dict"), plain, r"student returns dict for 2 images in train mode"),
        (lambda: Moody("raises"), plain, r"student fails in train mode: RuntimeError: no such thing"),
        (lambda: Moody("detached"), plain, r"logits do not depend on its parameters.*Remove detach"),
        (lambda: plain().requires_grad_(False), plain, r"none of its parameters requires a gradient.*requires_grad_\(True\)"),
        (lambda: plain().half(), plain, r"The student: .*torch.float16, the images torch.float32.*call .float\(\)"),
        (plain, lambda: plain().double(), r"The teacher: .*torch.float64, the images torch.float32.*call .float\(\)"),
        (plain, broken, r"The teacher: .*not finite \(1.bias holds NaN"),
        (broken, plain, r"The student: .*not finite \(1.bias holds NaN"),
        (lambda: Moody, plain, r"student is the class Moody; pass an instance, Moody\(\)"),
        (plain, lambda: Moody, r"teacher is the class Moody; pass an instance, Moody\(\)"),
    ],
)
def test_what_cannot_be_trained_is_found_before_a_run_begins(student: Any, teacher: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        overproof.distill(student(), teacher(), (IMAGES, LABELS), epochs=1, out="r")
    assert not Path("r").exists()


def test_the_first_look_changes_nothing() -> None:
    student = nn.Sequential(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4, 3))
    student[1].eval()
    state, modes = {k: v.clone() for k, v in student.state_dict().items()}, [m.training for m in student.modules()]
    dice = torch.get_rng_state()
    for count in (24, 1):  # one image alone has no statistics
        assert first_look((student,), UserData((IMAGES[:count], LABELS[:count]))) == ([3], (1, 8, 8))
    assert all(torch.equal(value, state[name]) for name, value in student.state_dict().items())
    assert [m.training for m in student.modules()] == modes
    assert torch.equal(torch.get_rng_state(), dice)
    assert all(parameter.grad is None for parameter in student.parameters())


def test_options_that_are_no_finite_numbers_are_refused_by_name() -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(UsageError, match=rf"'kd', option 'temperature': {value} is not a finite number"):
            overproof.distill(plain(), plain(), (IMAGES, LABELS), epochs=1, out="r", temperature=value)
        with pytest.raises(UsageError, match=rf"train.lr = {value}"):
            overproof.distill(plain(), plain(), (IMAGES, LABELS), epochs=1, out="r", lr=value)
    with pytest.raises(UsageError, match=r"'composed', option 'weights.0': nan"):
        overproof.distill(plain(), plain(), (IMAGES, LABELS), method=("kd", "dkd"), out="r", weights=[math.nan, 1.0])


def test_an_evaluation_says_that_it_is_in_float32_and_wants_an_instance() -> None:
    with pytest.raises(UsageError, match=r"torch.float16, the images torch.float32.*call .float\(\)"):
        overproof.evaluate(plain().half(), (IMAGES, LABELS))
    with pytest.raises(UsageError, match=r"model is the class Moody; pass an instance, Moody\(\)"):
        overproof.evaluate(Moody, (IMAGES, LABELS))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"model is str \('runs/x'\).*overproof.load"):
        overproof.evaluate("runs/x", (IMAGES, LABELS))  # type: ignore[arg-type]


def test_a_single_class_is_named(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "one/ant").mkdir(parents=True)
    for number in range(8):
        Image.new("L", (8, 8), 9 * number).save(tmp_path / f"one/ant/{number}.png")
    with pytest.raises(DataError, match=r"one has a single class, 'ant'.*of another class"):
        overproof.train("resnet8", f"folder:{tmp_path / 'one'}", epochs=1, out="r", data_options={"test": 0.2})
