"""The verbs in Python, on a user's own modules, data and loaders."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import overproof
from overproof.data import Splits
from overproof.errors import DataError, FolderError, UnknownNameError, UsageError


@pytest.fixture(scope="module")
def colour() -> tuple[torch.Tensor, torch.Tensor]:
    """Real digits as 32x32 colour images: what a stranger's network takes."""
    digits = overproof.load_data("digits", limit_train=120, validation=0.0).train
    images = nn.functional.interpolate(digits.images / 255, size=32).expand(-1, 3, -1, -1).contiguous()
    return images.clamp(0, 1), digits.labels


def own_student() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10))


TEACHERS = {
    "torchvision": lambda: torchvision.models.resnet18(num_classes=10),
    "timm": lambda: timm.create_model("resnet10t", num_classes=10),
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_readme_example_with_a_strangers_teacher(kind: str, colour: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    """The README's lines: own network and loader, a torchvision or timm teacher, a run folder, an attacked result."""
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(*colour), batch_size=40, shuffle=True)
    teacher = overproof.Classifier(TEACHERS[kind](), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = own_student()
    start = [p.detach().clone() for p in student.parameters()]
    run = overproof.distill(student, teacher, loader, method="kd", epochs=2, temperature=4.0, out=tmp_path / "kd")
    result = overproof.evaluate(run.model, loader, attacks={"pgd": overproof.PGD(eps=8 / 255, steps=3)}, teacher=teacher)
    assert run.model is student
    assert any(not torch.equal(a, b) for a, b in zip(start, student.parameters(), strict=True))
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items()), "the teacher changed"
    assert 0 <= result.robust["pgd"] <= result.clean <= 1
    loaded = overproof.load(tmp_path / "kd", model=own_student())
    images = colour[0][:5]
    torch.testing.assert_close(loaded(images), student.eval()(images))
    with pytest.raises(FolderError, match="overproof.load.*model="):
        overproof.load(tmp_path / "kd")


def test_every_kind_of_data(digits: Splits, tmp_path: Path) -> None:
    images, labels = digits.train.images[:64], digits.train.labels[:64]

    class Own(Dataset):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
            return images[row] / 255, int(labels[row])

    kinds = {
        "splits": digits,
        "imageset": digits.train.subset(range(64)),
        "tensors": (images, labels),
        "dataset": Own(),
        "loader": DataLoader(Own(), batch_size=16),
        "list": [(images[:32], labels[:32]), (images[32:], labels[32:])],
    }
    for name, data in kinds.items():
        model = overproof.create_model("mlp", 10, 1, 8, hidden=(8,))
        how = {} if name in ("loader", "list") else {"batch_size": 16, "workers": 0}
        run = overproof.train(model, data, epochs=1, out=tmp_path / name, **how)
        assert run.folder.status["state"] == "done", name


def test_named_everything_and_final_evaluation(tmp_path: Path) -> None:
    run = overproof.train(
        "mlp",
        "digits",
        limit_train=300,
        limit_test=50,
        epochs=2,
        lr=0.05,
        out=tmp_path / "t",
        attacks={"fgsm": overproof.FGSM(eps=0.1)},
    )
    assert run.evaluations["test-best"]["attacks"]["fgsm"]["eps"] == 0.1
    assert overproof.RunFolder(tmp_path / "t").config["evaluation"]["attacks"]["fgsm"]["attack"] == "fgsm"
    student = overproof.distill("mlp", tmp_path / "t", "digits", limit_train=300, limit_test=50, epochs=1, out=tmp_path / "s")
    assert student.evaluations["test-best"]["agreement"]["teacher"] == str(tmp_path / "t")
    same = overproof.load(tmp_path / "s")
    assert isinstance(same, overproof.Classifier)
    assert not same.training


def test_own_attack_in_the_final_evaluation(digits: Splits, tmp_path: Path) -> None:
    class Shift:
        threat = overproof.Linf(0.2)
        targeted = False

        def __call__(self, model, images, labels, generator=None):
            return (images + 0.2).clamp(0, 1)

    model = overproof.create_model("mlp", 10, 1, 8)
    run = overproof.train(model, digits, epochs=1, out=tmp_path / "r", attacks={"shift": Shift()})
    assert "shift" in run.evaluations["test-best"]["attacks"]


def test_resume_with_own_objects(digits: Splits, tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    overproof.train(build(), digits, epochs=1, out=tmp_path / "r")
    with pytest.raises(FolderError, match="holds another run.*another --out"):
        overproof.train(build(), digits, epochs=1, out=tmp_path / "r")
    again = overproof.train(build(), digits, epochs=1, out=tmp_path / "r", resume=True)
    assert again.folder.status["state"] == "done"
    with pytest.raises(FolderError, match="train.epochs: 1 there, 2 here"):
        overproof.train(build(), digits, epochs=2, out=tmp_path / "r", resume=True)
    with pytest.raises(UsageError, match="resume=True"):
        overproof.resume(tmp_path / "r")


def test_runs_get_the_next_free_folder(digits: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        run = overproof.train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits, epochs=1)
        assert run.path == Path(f"runs/ce-{number}")


def test_cached_teacher_gives_the_same_student(digits: Splits, tmp_path: Path) -> None:
    ends = []
    teacher = overproof.create_model("mlp", 10, 1, 8)
    for cached in (False, True):
        torch.manual_seed(0)
        student = overproof.create_model("mlp", 10, 1, 8, hidden=(16,))
        overproof.distill(student, teacher, digits, epochs=1, cache_teacher=cached, out=tmp_path / str(cached))
        ends.append(student.state_dict())
    for name in ends[0]:
        torch.testing.assert_close(ends[0][name], ends[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, d, o: overproof.train(m, d, out=o, epoch=3), UnknownNameError, "Did you mean 'epochs'"),
        (lambda m, d, o: overproof.train(m, d, out=o, method="kd"), UsageError, "distils: name a teacher"),
        (lambda m, d, o: overproof.distill(m, nn.Sequential(nn.Flatten(), nn.Linear(64, 7)), d, out=o), UsageError, "10 classes and the teacher 7"),
        (lambda m, d, o: overproof.distill(m, m, d, out=o), UsageError, "same module"),
        (lambda m, d, o: overproof.train("mlp", (d.train.images, d.train.labels), out=o), UsageError, "create_model"),
        (lambda m, d, o: overproof.train(m, [(torch.rand(4, 3, 8, 8), torch.zeros(4).long())], out=o), UsageError, "shape .3, 8, 8."),
        (lambda m, d, o: overproof.train(m, [(torch.rand(4, 1, 8, 8) * 255, torch.zeros(4).long())], out=o), DataError, r"\[0, 1\]"),
        (lambda m, d, o: overproof.train(m, [(torch.rand(4, 1, 8, 8), torch.full((4,), 12))], out=o), DataError, "12"),
        (lambda m, d, o: overproof.train(m, [], out=o), DataError, "empty"),
        (lambda m, d, o: overproof.train(m, iter([(torch.rand(4, 1, 8, 8), torch.zeros(4).long())]), out=o), UsageError, "no length"),
        (lambda m, d, o: overproof.train(m, d, out=o, cache_teacher=True, augment=["crop"]), UsageError, "without augmentation"),
        (lambda m, d, o: overproof.train(m, d, out=o, precision="8"), UsageError, "train.precision"),
        (lambda m, d, o: overproof.train(m, d, out=o, augment=["crp"]), UnknownNameError, "Did you mean 'crop'"),
        (lambda m, d, o: overproof.train(m, d, out=o, test_data=d.test), UsageError, "bring their own"),
        (lambda m, d, o: overproof.train("mlp", "digits", out=o, data_options={"limit_trian": 3}), UnknownNameError, "Did you mean 'limit_train'"),
        (lambda m, d, o: overproof.train("mlp", "digits", out=o, model_options={"hiden": 3}), UnknownNameError, "Did you mean 'hidden'"),
        (lambda m, d, o: overproof.train("mlp", "digits", out=o, milestones=[100]), UsageError, "milestones"),
    ],
)  # fmt: skip
def test_bad_calls_write_nothing(call, error, message, digits: Splits, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        call(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_hostile_weights_are_not_executed(tmp_path: Path) -> None:
    import os

    run = overproof.train("mlp", "digits", limit_train=100, limit_test=20, epochs=1, out=tmp_path / "r")
    path = run.path / "weights" / "best.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:100])
    with pytest.raises(FolderError, match=r"best\.safetensors is truncated"):
        overproof.load(run.path)
    path.write_bytes(good)
    (run.path / "model.json").write_text('{"spec": {"name": "os:system", "options": {}}}')
    with pytest.raises((FolderError, overproof.OverproofError)):
        overproof.load(run.path)
    witness = tmp_path / "witness"

    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(witness),)

    torch.save({"w": Hostile()}, tmp_path / "w.pt")
    from overproof.models.weights import read_state

    with pytest.raises(FolderError, match="not executed"):
        read_state(tmp_path / "w.pt")
    assert not witness.exists()


def test_shuffled_loader_resumes_to_the_same_bits(digits: Splits, tmp_path: Path) -> None:
    """The order of a user's own DataLoader depends on the run's seed, so an interrupted run meets the same batches."""
    import time

    def go(out: Path, **options: object) -> nn.Module:
        torch.manual_seed(torch.seed() % 1000)
        student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        for parameter in student.parameters():
            nn.init.constant_(parameter, 0.01)
        data = TensorDataset(digits.train.images[:96] / 255, digits.train.labels[:96])
        overproof.train(student, DataLoader(data, batch_size=16, shuffle=True), epochs=3, lr=0.5, out=out, **options)
        return student

    whole = go(tmp_path / "whole")
    from overproof.training import loop

    original, steps = loop.Trainer._step, iter(range(1, 100))

    def stop_at_eight(self: loop.Trainer, batch: object, epoch: int) -> None:
        original(self, batch, epoch)
        if next(steps) == 8:
            self.deadline = time.monotonic()

    loop.Trainer._step = stop_at_eight
    try:
        with pytest.raises(overproof.OverproofError, match="step 8 of 18"):
            go(tmp_path / "cut")
    finally:
        loop.Trainer._step = original
    resumed = go(tmp_path / "cut", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_callers_randomness_goes_on(digits: Splits, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    before = torch.get_rng_state()
    overproof.train(model, digits, epochs=1, out=tmp_path / "s")
    overproof.evaluate(
        model, DataLoader(TensorDataset(digits.test.images / 255, digits.test.labels), batch_size=64, shuffle=True)
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_resume_with_attack_values(digits: Splits, tmp_path: Path) -> None:
    for _ in range(2):
        run = overproof.train(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
            digits,
            epochs=1,
            out=tmp_path / "r",
            resume=True,
            attacks=[overproof.PGD(eps=0.1)],
        )
    assert run.evaluations["test-best"]["attacks"]["pgd"]["eps"] == 0.1


def test_a_folder_has_one_writer(digits: Splits, tmp_path: Path) -> None:
    import fcntl

    run = tmp_path / "r"
    run.mkdir()
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(FolderError, match="Another process is working"):
            overproof.train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits, epochs=1, out=run)


def test_foreign_code_is_run_only_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "strange_module.py").write_text(
        "from torch import nn\ndef net(classes, in_channels, image_size):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from overproof.cli import call

    monkeypatch.chdir(tmp_path)
    quick = ["--data", "digits", "--set", "data.limit_train=100", "--set", "data.limit_test=20", "--epochs", "1"]
    assert call(["train", *quick, "--model", "strange_module:net", "--out", "r", "--trust"]) == 0
    with pytest.raises(overproof.OverproofError, match="trusted=True"):
        overproof.load("r")
    assert overproof.load("r", trusted=True)(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(UsageError, match="--trust"):
        overproof.resume("r")
    assert call(["evaluate", "r", "--attack", "fgsm"]) == 1
    assert call(["evaluate", "r", "--attack", "fgsm", "--trust"]) == 0


def test_csv_logger_writes(digits: Splits, tmp_path: Path) -> None:
    overproof.train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits, epochs=2, loggers=["csv"], out=tmp_path / "r")
    (table,) = (tmp_path / "r" / "csv").rglob("metrics.csv")
    assert "train/loss" in table.read_text().splitlines()[0]
    assert len(table.read_text().splitlines()) >= 3


def test_compiled_networks_train(digits: Splits, tmp_path: Path) -> None:
    """In place, with clean names in the weights; the teacher comes back as it was."""
    teacher = overproof.create_model("mlp", 10, 1, 8)
    student = overproof.create_model("mlp", 10, 1, 8, hidden=(8,))
    import torch._dynamo

    with torch._dynamo.config.patch(suppress_errors=False):
        run = overproof.distill(student, teacher, digits, epochs=1, compile=True, channels_last=True, out=tmp_path / "r")
    assert teacher._compiled_call_impl is None
    assert set(overproof.load(run.path, model=overproof.create_model("mlp", 10, 1, 8, hidden=(8,))).state_dict()) == set(
        student.state_dict()
    )
