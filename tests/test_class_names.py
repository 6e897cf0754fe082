"""Classes are numbers with names: what other data call them, and who says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import overproof
from overproof import console
from overproof.cli import call
from overproof.data.extra import check_numbers_of_classes
from overproof.errors import DataError, FolderError, UsageError
from overproof.run.predicting import predict


def pictures(home: Path, names: dict[str, int], count: int = 12) -> Path:
    """Class k is bright in its k-th quarter, whatever it is called."""
    stream = np.random.default_rng(0)
    for part in ("train", "test"):
        for name, quarter in names.items():
            (home / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = stream.integers(0, 60, (8, 8))
                rows, columns = divmod(quarter, 2)
                pixels[4 * rows : 4 * rows + 4, 4 * columns : 4 * columns + 4] += 180
                Image.fromarray(pixels.astype(np.uint8), mode="L").save(home / part / name / f"{number}.png")
    return home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    pictures(folder / "ours", {"cat": 0, "dog": 1, "ship": 2})
    pictures(folder / "renamed", {"zcat": 0, "dog": 1, "ship": 2})  # so that dog comes first
    pictures(folder / "two", {"dog": 1, "ship": 2})
    pictures(folder / "other", {"a": 0, "b": 1, "c": 2})
    how = {"data_options": {"image_size": 8}, "model_options": {"hidden": (16,)}, "epochs": 8, "batch_size": 8, "lr": 0.1}
    overproof.train("mlp", f"folder:{folder / 'ours'}", out=folder / "run", **how)
    return folder


def test_predictions_keep_their_names_whatever_was_evaluated(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(home / "run", run)
    image = home / "ours" / "test" / "ship" / "0.png"
    assert predict(run, image)[0].label == "ship"
    (run / "evaluations" / "a-first.json").write_text(json.dumps({"classes": ["x", "y", "z"], "data": "other"}))
    assert predict(run, image)[0].label == "ship"
    (run / "evaluations" / "test-best.json").write_text("damaged")
    assert predict(run, image)[0].label == "ship"
    for path in (run / "evaluations").iterdir():
        path.unlink()
    assert predict(run, image)[0].label == "ship"
    (run / "data.json").unlink()
    assert predict(run, image)[0].label == "2"


def test_other_numbers_of_the_same_names_are_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(home / "run"), "--sanity", "0", "--data"]
    assert call([*command, f"folder:{home / 'renamed'}"]) == 1
    assert "the class 'dog' has number 1 there and 0 here" in capsys.readouterr().err
    assert call([*command, f"folder:{home / 'two'}"]) == 1
    capsys.readouterr()
    console.set_quiet(False)
    assert call([*command, f"folder:{home / 'other'}"]) == 0
    assert "names classes (a, b, c) that the run does not know" in capsys.readouterr().err
    how = ["--teacher", str(home / "run"), "--student", "mlp", "--epochs", "1", "--out"]
    for name, code in (("renamed", 1), ("ours", 0)):
        data = ["--data", f"folder:{home / name}", "--set", "data.image_size=8"]
        assert call(["distill", *data, *how, str(home / f"student-{name}")]) == code
    assert "the teacher" in capsys.readouterr().err


def test_numbers_alone_are_compared_with_nothing() -> None:
    check_numbers_of_classes(("0", "1", "2"), ("b", "a"), "we", "they")
    check_numbers_of_classes(("a", "b"), (), "we", "they")
    check_numbers_of_classes(("a", "b", "c"), ("a", "b"), "we", "they")
    with pytest.raises(DataError, match="'b' has number 1 there and 0 here"):
        check_numbers_of_classes(("a", "b"), ("b", "a"), "we", "they")


def test_a_teacher_that_guesses_is_told_of_with_any_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.eye(10)[:1])

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.shift.expand(len(images), -1) + 0 * images.flatten(1).sum(dim=1, keepdim=True)

    console.set_quiet(False)
    overproof.distill("mlp", Constant(), "digits", method="kd", epochs=1, out=tmp_path / "run", limit_train=100)
    assert "the teacher gets" in capsys.readouterr().err


def test_a_module_of_ones_own_predicts_too(home: Path, tmp_path: Path) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

    data = overproof.load_data(f"folder:{home / 'ours'}", image_size=8)
    run = overproof.train(network(), data, epochs=2, batch_size=8, out=tmp_path / "run")
    image = home / "ours" / "test" / "ship" / "0.png"
    with pytest.raises(FolderError, match="overproof.predict"):
        predict(run.path, image)
    row = predict(run.path, image, model=network())[0]
    pixels = data.test.images[data.test.labels == 2][:1]
    shares = run.model(pixels.float() / 255).softmax(dim=1)
    assert row.label == data.classes[int(shares.argmax())]
    assert row.probability == pytest.approx(float(shares.max().detach()), abs=1e-5)
    with pytest.raises(UsageError, match="guards belong to the weights"):
        predict(run.path, image, model=network(), guarded=True)
    (run.path / "data.json").unlink()
    with pytest.raises(UsageError, match="give image_shape"):
        predict(run.path, image, model=network())
    assert predict(run.path, image, model=network(), image_shape=(1, 8, 8))[0].probability == pytest.approx(row.probability)


def test_a_run_is_not_taken_up_on_other_data(tmp_path: Path) -> None:
    images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 3
    how = {"epochs": 1, "batch_size": 8, "out": tmp_path / "run"}
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    overproof.train(network, (images, labels), **how)
    overproof.train(network, (images, labels), resume=True, **how)
    for other in ((images[:20], labels[:20]), (images, labels.flip(0)), (images.flip(0), labels)):
        with pytest.raises(UsageError, match="begun on other train images or labels"):
            overproof.train(network, other, resume=True, **how)


def test_a_run_tells_how_many_images_were_left_out(tmp_path: Path) -> None:
    source = pictures(tmp_path / "data", {"a": 0, "b": 1})
    (source / "train" / "a" / "broken.png").write_bytes(b"?")
    with pytest.warns(UserWarning, match="left out 1 of 25 images"):
        run = overproof.train(
            "mlp", f"folder:{source}", data_options={"on_error": "skip"}, epochs=1, batch_size=4, out=tmp_path / "run"
        )
    assert run.folder.data["skipped"] == 1
