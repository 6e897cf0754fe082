"""Several processes judge one set as one would; the command line, run folders and foreign weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch import Tensor, nn

import overproof
from overproof import console, create_model
from overproof.attacks import PGD
from overproof.attacks.base import BudgetAttack
from overproof.attacks.randomness import uniform
from overproof.cli import call
from overproof.data import ImageSet, StreamSet, load_data
from overproof.errors import DataError, FolderError, OverproofError
from overproof.evaluation import Evaluation, evaluate
from overproof.evaluation.sharing import Group
from overproof.folder import RunFolder, plain

QUICK = ["--data", "digits", "--set", "data.limit_train=200", "--set", "data.limit_test=60", "--epochs", "1"]


class Guess(BudgetAttack):
    """Uniform noise."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: Any = None) -> Tensor:
        return (images + uniform(images, generator, -self.eps, self.eps)).clamp(0, 1)


class Items(torch.utils.data.Dataset):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.images[row], int(self.labels[row])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()


def cases() -> dict[str, Any]:
    """Sets of every kind, with sizes that do not divide, and one smaller than the number of processes."""
    model = network()
    torch.manual_seed(1)
    images = torch.rand(33, 1, 8, 8)
    labels = model(images).argmax(1)
    labels[0] = (labels[0] + 1) % 4
    items = Items(images, labels)
    return {
        "images": ImageSet(images, labels, classes=4).subset(torch.randperm(33)),
        "pair": (images, labels),
        "dataset": items,
        "stream": StreamSet(items, labels=labels, classes=4),
        "batches": list(zip(images.split(7), labels.split(7), strict=True)),
        "one": ImageSet(images[1:2], labels[1:2], classes=4),
    }


def judged(data: Any, **options: Any) -> Evaluation:
    attacks = {"guess": Guess(eps=0.4), "pgd": PGD(eps=0.02, steps=2)}
    return evaluate(network(), data, attacks=attacks, curve=[0.2, 0.4], batch_size=4, sanity=5, **options)


def fake_panel() -> None:
    module = types.ModuleType("overproof.evaluation.sanity")

    def panel(model: nn.Module, images: Tensor, labels: Tensor, threat: Any, **options: Any) -> Any:
        summary = {"suspected": False, "pixels": float(images.double().sum()), "labels": labels.tolist()}
        return types.SimpleNamespace(summary=summary, arrays={})

    module.panel = panel  # type: ignore[attr-defined]
    sys.modules["overproof.evaluation.sanity"] = module


def worker(rank: int, size: int, place: str) -> None:
    torch.set_num_threads(1)
    console.set_quiet(True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=size)
    fake_panel()
    for name, data in cases().items():
        result = judged(data)
        np.savez(f"{place}/{name}-{rank}.npz", **result.samples)
        Path(f"{place}/{name}-{rank}.json").write_text(json.dumps(plain(result.summary)))
        np.savez(f"{place}/{name}-{rank}-gallery.npz", **result.gallery)
    messages = []
    bad = [(torch.rand(2, 1, 8, 8), torch.tensor([0, 3])), (torch.rand(2, 1, 8, 8), torch.tensor([0, 9]))]
    for broken in (ImageSet(*(torch.cat(parts) for parts in zip(*bad, strict=True))), []):
        try:
            judged(broken)
        except OverproofError as error:
            messages.append(f"{type(error).__name__}: {error}")
    Path(f"{place}/errors-{rank}.json").write_text(json.dumps(messages))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found."""
    place = tmp_path_factory.mktemp("two")
    mp.spawn(worker, (2, str(place)), nprocs=2)
    return place


@pytest.mark.parametrize("name", ["images", "pair", "dataset", "stream", "batches", "one"])
def test_two_processes_find_what_one_finds(name: str, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "overproof.evaluation.sanity", None)
    fake_panel()
    alone = judged(cases()[name])
    assert alone.summary["samples"] == (1 if name == "one" else 33)
    timed = {"seconds", "latency_ms"}
    for rank in (0, 1):
        with np.load(shared / f"{name}-{rank}.npz") as rows:
            assert set(rows.files) == set(alone.samples)
            for column, values in alone.samples.items():
                close = np.testing.assert_allclose if values.dtype.kind == "f" else np.testing.assert_array_equal
                close(rows[column], values, **({"rtol": 1e-5} if values.dtype.kind == "f" else {}), err_msg=column)
        with np.load(shared / f"{name}-{rank}-gallery.npz") as pictures:
            assert pictures["label"].tolist() == alone.gallery["label"].tolist()
            np.testing.assert_array_equal(pictures["clean"], alone.gallery["clean"])
        summary = json.loads((shared / f"{name}-{rank}.json").read_text())
        expected = json.loads(json.dumps(plain(alone.summary)))
        for key in set(expected) - timed - {"attacks", "sanity", "nll", "ece"}:
            assert summary[key] == expected[key], key
        for attack, facts in expected["attacks"].items():
            skipped = {"seconds", "mean_size"}
            assert {k: v for k, v in summary["attacks"][attack].items() if k not in skipped} == {
                k: v for k, v in facts.items() if k not in skipped
            }
        assert summary["sanity"]["pixels"] == pytest.approx(expected["sanity"]["pixels"])
        assert summary["sanity"]["labels"] == expected["sanity"]["labels"]
        assert len(summary["sanity"]["labels"]) == (1 if name == "one" else 5)
    one, other = (json.loads((shared / f"{name}-{rank}.json").read_text()) for rank in (0, 1))
    assert one == other


def test_an_error_in_one_process_ends_all(shared: Path) -> None:
    first, second = (json.loads((shared / f"errors-{rank}.json").read_text()) for rank in (0, 1))
    assert "Process 1 of the evaluation failed" in first[0]
    assert "Label 9 does not exist" in first[0]
    assert "DataError: Label 9 does not exist" in second[0]
    assert "gave no batch" in first[1]


@pytest.mark.parametrize("count", [0, 1, 5, 8, 1001])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_slices_cover_everything_once(count: int, size: int) -> None:
    rows = [row for rank in range(size) for row in range(count)[Group(rank, size).slice(count)]]
    assert rows == list(range(count))
    lengths = [len(range(count)[Group(rank, size).slice(count)]) for rank in range(size)]
    assert max(lengths) - min(lengths) <= 1
    assert lengths[0] > 0 or not count


# Run folders and the command line


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def out(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out))


def in_a_new_process(*arguments: str, before: tuple[str, ...] = ()) -> str:
    Path("main.py").write_text("from overproof.cli import main; main()")
    command = [sys.executable, *before, "main.py", *arguments]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_devices_and_torchrun_give_the_same_figures(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["train", *QUICK, "--model", "mlp", "--out", "r"]) == 0
    command = ["evaluate", "r", "--attack", "pgd", "--eps", "0.1", "--sanity", "0", "--json"]
    capsys.readouterr()
    assert call([*command, "--name", "alone"]) == 0
    alone = out(capsys)
    two = json.loads(in_a_new_process(*command, "--devices", "2", "--name", "two"))
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    run = json.loads(in_a_new_process(*command, "--name", "torchrun", before=launcher))
    for key in ("clean", "worst_case", "passes", "per_class"):
        assert alone[key] == two[key] == run[key]
    assert not list(Path("r/evaluations").glob(".partial*"))
    rows = [RunFolder("r").arrays(name)["pgd/robust"] for name in ("alone", "two", "torchrun")]
    assert rows[0].tolist() == rows[1].tolist() == rows[2].tolist()


@pytest.mark.slow
def test_training_on_two_devices_shares_the_judging(here: Path) -> None:
    shared = [
        "train",
        *QUICK,
        "--model",
        "mlp",
        "--attack",
        "fgsm",
        "--set",
        "attack.eps=0.1",
        "--set",
        "train.accelerator=cpu",
    ]
    in_a_new_process(*shared, "--devices", "2", "--out", "two")
    folder = RunFolder("two")
    assert folder.status["state"] == "done"
    rows, summary = folder.arrays("test-best"), folder.evaluations["test-best"]
    assert rows["index"].tolist() == sorted(set(rows["index"].tolist()))
    assert len(rows["index"]) == summary["samples"] == 60
    alone = evaluate(overproof.load("two"), "digits", attacks={"fgsm": {"attack": "fgsm", "eps": 0.1}}, sanity=0)
    known = dict(zip(alone.samples["index"].tolist(), alone.samples["fgsm/robust"].tolist(), strict=True))
    assert rows["fgsm/robust"].tolist() == [known[index] for index in rows["index"].tolist()]


PLUGIN = """
from dataclasses import dataclass
from pathlib import Path
from overproof.attacks import ATTACKS, FGSM

@dataclass(frozen=True, kw_only=True)
class Stops(FGSM):
    def __call__(self, *given, **named):
        place = Path("calls")
        calls = int(place.read_text()) if place.exists() else 0
        place.write_text(str(calls + 1))
        if calls == 2:
            raise KeyboardInterrupt
        return super().__call__(*given, **named)

ATTACKS.add("stops", Stops, summary="is stopped at its third call")
"""


def test_interrupted_commands_go_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("plugin.py").write_text(PLUGIN)
    assert call(["train", *QUICK, "--model", "mlp", "--out", "r"]) == 0
    command = ["evaluate", "r", "--plugin", "plugin.py", "--attack", "stops", "--eps", "0.1", "--sanity", "0"]
    command += ["--set", "evaluation.batch_size=3", "--json"]
    capsys.readouterr()
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        call(command)
    assert Path("r/evaluations/.partial-test-stops.npz").exists()
    capsys.readouterr()
    assert call(command) == 0
    captured = capsys.readouterr()
    assert "going on with the evaluation" in captured.err
    attacked = json.loads(captured.out)["attacks"]["stops"]["success_denominator"]
    batches = -(-attacked // 3)
    assert int(Path("calls").read_text()) == batches + 1, "two calls were known, one was stopped"
    assert [path.name for path in Path("r/evaluations").glob(".*")] == []


def test_a_run_stopped_while_it_is_judged_goes_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("plugin.py").write_text(PLUGIN)
    command = ["train", *QUICK, "--plugin", "plugin.py", "--model", "mlp", "--attack", "stops", "--out", "r"]
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        call([*command, "--set", "evaluation.batch_size=3", "--set", "attack.eps=0.01"])
    assert RunFolder("r").status["state"] == "interrupted"
    assert list(Path("r/evaluations").glob(".partial*"))
    assert call(["resume", "r", "--plugin", "plugin.py"]) == 0
    assert "going on with the evaluation" in capsys.readouterr().err
    assert {"test-best", "test-last"} == set(RunFolder("r").evaluations)
    assert not list(Path("r/evaluations").glob(".*"))


def test_transfer_and_short_forms(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a", "0"), ("b", "1")):
        assert call(["train", *QUICK, "--model", "mlp", "--seed", seed, "--out", name]) == 0
    capsys.readouterr()
    command = [
        "evaluate",
        "a",
        "--attack",
        "pgd",
        "--attack",
        "fgsm:eps=0.01",
        "--eps",
        "1/10",
        "--norm",
        "L2",
        "--sanity",
        "0",
    ]
    assert call([*command, "--transfer-from", "b", "--json"]) == 0
    attacks = out(capsys)["attacks"]
    assert [(facts["threat"], facts["eps"]) for facts in attacks.values()] == [("L2", 0.1), ("L2", 0.01), ("L2", 0.1)]
    assert list(attacks)[-1] == "transfer"
    assert attacks["transfer"]["robust"] >= attacks["pgd"]["robust"]
    assert attacks["transfer"]["passes"]["backward"] == 0, "the attacked model is never asked"
    for wrong, message in (
        (["evaluate", "a", "--eps", "0.1"], "--eps and --norm need an --attack"),
        (["evaluate", "a", "--transfer-from", "b"], "--transfer-from needs an attack"),
        (["evaluate", "a", "--attack", "pgd", "--eps", "much"], "--eps"),
        (["evaluate", "a", "--mean", "0.5"], "--mean and --std belong to --model"),
    ):
        assert call(wrong) == 2
        assert message in capsys.readouterr().err


def plainly(name: str) -> nn.Module:
    torch.manual_seed(3)
    return create_model(name, 10, 1, 8).net


@pytest.mark.parametrize("wrapped", ["", "module.", "model.", "module.model.", "_orig_mod."])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "net", "model_state_dict"])
def test_public_checkpoints_are_unwrapped(
    wrapped: str, key: str | None, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state: dict[str, Any] = {f"{wrapped}{name}": value for name, value in plainly("mlp").state_dict().items()}
    state |= {"normalizer.new_mean": torch.zeros(3), "mu": torch.zeros(3)} if wrapped else {}
    torch.save({key: state, "epoch": 3} if key else state, "public.pt")
    command = [
        "evaluate",
        "--model",
        "mlp",
        "--weights",
        "public.pt",
        "--data",
        "digits",
        "--set",
        "data.limit_test=50",
        "--json",
    ]
    assert call([*command, "--mean", "0.3", "--std", "0.4"]) == 0
    captured = capsys.readouterr()
    assert ("--mean and --std" in captured.err) == bool(wrapped)
    model = nn.Sequential(Shifted(), plainly("mlp")).eval()
    expected = evaluate(model, load_data("digits", limit_test=50).test).summary
    found = json.loads(captured.out)
    assert found["samples"] == 50
    assert found["nll"] == pytest.approx(expected["nll"], abs=1e-5)


class Shifted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.3) / 0.4


def test_weights_fill_the_right_layers(here: Path) -> None:
    from overproof.models.weights import fill_foreign, read_state

    net = plainly("resnet8")
    for prefix in ("", "model.", "module.model."):
        state = {f"{prefix}{name}": value for name, value in net.state_dict().items()}
        state |= (
            {f"{prefix[:-6]}attacker.model.{name}": value + 1 for name, value in net.state_dict().items()} if prefix else {}
        )
        torch.save(state, "public.pt")
        model = create_model("resnet8", 10, 1, 8)
        fill_foreign(model, read_state("public.pt"), Path("public.pt"))
        assert all(torch.equal(value, net.state_dict()[name]) for name, value in model.net.state_dict().items())
    whole = create_model("resnet8", 10, 1, 8, mean=0.2, std=0.3)
    save_file(whole.state_dict(), "ours.safetensors")
    model = create_model("resnet8", 10, 1, 8)
    fill_foreign(model, read_state("ours.safetensors"), Path("ours.safetensors"))
    assert float(model.normalize.mean) == pytest.approx(0.2)
    with pytest.raises(FolderError, match="does not fit the model"):
        fill_foreign(create_model("mlp", 10, 1, 8), read_state("ours.safetensors"), Path("ours.safetensors"))


def test_models_of_everybody_on_a_folder_of_images(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for number in range(4):
            place = here / "pets" / "test" / name / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(place)
            (here / "pets" / "train" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
                here / "pets" / "train" / name / f"{number}.png"
            )
    Path("mymodels.py").write_text(
        "from torch import nn\ndef small(classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(768, classes))\n"
    )
    sys.path.insert(0, str(here))
    try:
        shared = ["--data", "folder:pets", "--attack", "pgd", "--eps", "8/255", "--sanity", "0", "--json"]
        for name in ("mymodels:small", "timm:resnet10t", "torchvision:mobilenet_v3_small"):
            torch.manual_seed(0)
            weights: list[str] = []
            if ":" in name and not name.startswith("mymodels"):
                save_file(create_model(name, 2, 3, 16).net.state_dict(), "w.safetensors")
                weights = ["--weights", "w.safetensors"]
            assert call(["evaluate", "--model", name, *weights, *shared]) == 0, capsys.readouterr().err
            summary = out(capsys)
            assert summary["samples"] == 8
            assert summary["attacks"]["pgd"]["eps"] == 8 / 255
    finally:
        sys.path.remove(str(here))


def test_an_empty_set_is_refused_everywhere() -> None:
    with pytest.raises(DataError):
        evaluate(network(), [])
