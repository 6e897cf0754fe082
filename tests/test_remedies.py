"""What a message says has to help: attacks in one word, data that cannot be read, folders of runs that came to nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

import overproof
from overproof.attacks import PGD
from overproof.attacks.spelling import spelled
from overproof.cli.options import attacks_of
from overproof.data import load_data, make_loader
from overproof.errors import DataError, FolderError, NonFiniteLossError, UsageError
from overproof.evaluation.evaluator import make_attacks
from overproof.folder import RunFolder

IMAGES, LABELS = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plain() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


# Attacks


def test_attacks_in_one_word_are_read_as_on_the_command_line() -> None:
    wanted = {"pgd:steps=2,eps=4/255": PGD(steps=2, eps=4 / 255)}
    for given in ("pgd:steps=2,eps=4/255", ["pgd:steps=2,eps=4/255"], attacks_of(["pgd:steps=2,eps=4/255"], [])[0]):
        assert make_attacks(given) == wanted
    assert make_attacks({"a": "pgd:steps=2"}) == {"a": PGD(steps=2)}
    assert make_attacks({"pgd:steps=2": {"eps": 0.1}}) == {"pgd:steps=2": PGD(steps=2, eps=0.1)}
    assert spelled("foolbox:LinfPGD:steps=20") == {"attack": "foolbox:LinfPGD", "steps": 20}
    assert attacks_of(["pgd:steps=2"], ["attack.steps=5", "attack.eps=0.1"])[0]["pgd:steps=2"] == {
        "attack": "pgd", "steps": 2, "eps": 0.1,
    }  # fmt: skip
    with pytest.raises(UsageError, match=r"'pgd:steps=2,strong': 'strong' is no key=value; write NAME:key=value"):
        overproof.evaluate(plain(), (IMAGES, LABELS), attacks="pgd:steps=2,strong")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PGD(eps="8/255"), r"eps='8/255'\): the radius must be a number; in Python write 8/255 without quotes"),  # type: ignore[arg-type]
        (lambda: PGD(step_size="2/255"), r"step_size='2/255'\).* 2/255 without quotes"),  # type: ignore[arg-type]
        (lambda: make_attacks({"a": PGD}), r"attacks\['a'\] is the class PGD; .*PGD\(\)"),
        (lambda: make_attacks([PGD]), r"attacks\['pgd'\] is the class PGD"),
    ],
)
def test_attacks_that_are_none_say_what_to_write(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_a_curve_takes_fractions_as_a_configuration_does() -> None:
    done = overproof.evaluate(plain(), (IMAGES, LABELS), attacks="fgsm", curve=["8/255"], sanity=0)  # type: ignore[list-item]
    assert done.summary["curve"]["eps"][-1] == 8 / 255


def test_quantised_models_are_evaluated_and_masked_gradients_are_named() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    model = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    labels = model(IMAGES).argmax(dim=1)
    attacks = {"pgd": "pgd", "square": {"eps": 0.3, "queries": 50}}
    done = overproof.evaluate(model, (IMAGES, labels), attacks=attacks, sanity=8)
    assert done.clean == 1
    assert done.summary["attacks"]["pgd"]["no_gradient"]
    assert done.robust["square"] < 1


# Data


class Photos(Dataset[Any]):
    """One of its files is broken."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        if row == 7:
            raise OSError("cannot identify image file")
        return IMAGES[row], int(LABELS[row])


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_dataset_raises_names_it_and_the_image(workers: int) -> None:
    message = r"Image 7 of the Dataset Photos cannot be read: OSError: cannot identify image file \(.*, line \d+\)\. Repair"
    for data in (Photos(), Subset(Photos(), [6, 7, 8])):
        with pytest.raises(DataError, match=message):
            list(make_loader(data, 2, num_workers=workers).batches(0))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((IMAGES.numpy(), LABELS.numpy()), r"batch 0 is ndarray; .*torch.from_numpy"),
        ([(IMAGES.numpy(), LABELS.numpy())], r"\['ndarray', 'ndarray'\].*torch.from_numpy"),
        (
            [{"image": IMAGES, "label": LABELS}],
            r"batch 0 is dict; .*Yield \(images, labels\), taken from its keys \(image, label\)",
        ),
        ([(IMAGES[0], 1)], r"\['Tensor', 'int'\].*list of single images goes into a torch.utils.data.DataLoader"),
    ],
)
def test_batches_of_another_kind_have_a_remedy_of_their_own(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(make_loader(data, 2).batches(0))


def pictures(top: Path, *classes: str, count: int = 4, side: int = 8) -> None:
    from PIL import Image

    for name in classes:
        (top / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (side, side), 9 * number).save(top / name / f"{number}.png")


def test_folders_name_the_part_and_the_remedy(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path / "train", "ant", "bee", "cow")
    with pytest.raises(DataError, match=r"no test part.*--set data.test=0.2"):
        load_data(f"folder:{tmp_path}")
    (tmp_path / "test").mkdir()
    with pytest.raises(
        DataError, match=rf"{re.escape(str(tmp_path))}/test holds no images.*remove that folder.*--set data.test=0.2"
    ):
        load_data(f"folder:{tmp_path}")
    pictures(tmp_path / "test", "ant", "cow", side=9)
    with pytest.raises(DataError, match=r"--set data.image_size=32"):
        load_data(f"folder:{tmp_path}", validation=None)
    assert "test holds no image of 1 of the 3 classes: bee" in capfd.readouterr().err
    pictures(tmp_path / "mixed", "ant")
    pictures(tmp_path / "mixed", "bee", side=9)
    with pytest.raises(DataError, match=r"bee/0.png has the shape .*--set data.image_size=32"):
        load_data(f"folder:{tmp_path / 'mixed'}", test=0.5)


def test_ten_unreadable_images_are_named_and_all_counted(tmp_path: Path) -> None:
    pictures(tmp_path, "ant", "bee", count=20)
    for number in range(3, 15):
        (tmp_path / f"ant/{number}.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"12 of its 40 images cannot be read") as met:
        load_data(f"folder:{tmp_path}", test=0.5)
    assert str(met.value).count("\n  " + str(tmp_path)) == 10
    assert "and 2 more" in str(met.value)
    assert "--set data.on_error=skip" in str(met.value)


# Runs


def test_a_run_that_failed_is_no_dead_end() -> None:
    options: dict[str, Any] = {"data": (IMAGES, LABELS), "epochs": 1, "out": "boom"}
    with pytest.raises(NonFiniteLossError, match=r"Start again with a smaller train\.lr"):
        overproof.train(plain(), lr=1e38, weight_decay=1e3, **options)
    with pytest.raises(
        FolderError, match=r"boom holds a run that failed \(NonFiniteLossError: .*Delete the folder, or choose another"
    ) as met:
        overproof.train(plain(), lr=0.1, **options)
    assert "resume" not in str(met.value)
    RunFolder("boom").write_status("failed", message="OSError: no space left on the disk")
    with pytest.raises(FolderError, match=r"no space left.*Delete the folder.*`overproof resume boom`"):
        overproof.train(plain(), lr=0.1, **options)
    RunFolder("boom").write_status("interrupted", message="")
    with pytest.raises(FolderError, match=r"another run \(state: interrupted\).*`overproof resume boom`"):
        overproof.train(plain(), lr=0.1, **options)


def test_stopped_at_once_it_still_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    from overproof.training.loop import Trainer

    step = Trainer._step

    def stopping(self: Trainer, batch: Any, epoch: int) -> None:
        if epoch == 1:
            raise KeyboardInterrupt
        step(self, batch, epoch)

    monkeypatch.setattr(Trainer, "_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        overproof.train(plain(), (IMAGES, LABELS), epochs=2, batch_size=8, out="r")
    status = json.loads(Path("r/status.json").read_text())
    assert status["message"] == "KeyboardInterrupt: stopped at once, without a checkpoint of its own"
    assert (status["state"], status["step"], status["epoch"]) == ("interrupted", 3, 1)


def test_a_foreign_model_is_named_in_whole_sentences() -> None:
    overproof.train(plain(), (IMAGES, LABELS), epochs=1, out="r")
    with pytest.raises(
        FolderError, match=r"in r has the class torch\S+Sequential, which Overproof did not build.*model=\.\.\."
    ):
        overproof.load("r")
    Path("r/model.json").write_text("{}")
    with pytest.raises(FolderError, match=r"in r has a class that Overproof did not build"):
        overproof.load("r")
