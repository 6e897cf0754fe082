"""The loop: resumes bit for bit, averages right, stops at the first bad loss, and agrees with a bare loop."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import overproof
from overproof.config import TrainConfig, resolve
from overproof.errors import FolderError, NonFiniteLossError
from overproof.folder import RunFolder
from overproof.run.execute import execute, resume
from overproof.training.safety import Interrupted
from overproof.training.schedules import learning_rate

SMALL = {
    "data": {"name": "digits", "limit_train": 400, "limit_test": 100, "augment": ["crop:1"]},
    "model": {"name": "cnn", "widths": [4, 8, 8]},
    "train": {"epochs": 2, "batch_size": 32, "lr": 0.05},
}


def weights(run: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / "weights" / f"{which}.safetensors")


def assert_same(first: Path, second: Path) -> None:
    for which in ("last", "best"):
        a, b = weights(first, which), weights(second, which)
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), f"{which} {name} differs"
    old, new = (RunFolder(p).metrics for p in (first, second))
    for record in (*old, *new):
        record.pop("seconds")
        record.pop("images_per_second")
    assert old == new


def test_same_seed_same_bits_and_another_seed_not(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        execute(resolve(SMALL, {"seed": seed}), tmp_path / name)
    assert_same(tmp_path / "a", tmp_path / "b")
    first, other = weights(tmp_path / "a"), weights(tmp_path / "c")
    assert any(not torch.equal(first[n], other[n]) for n in first if first[n].is_floating_point())


def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL ten times, at moments drawn anew, then resume to the end: bit-identical weights and metrics every time."""
    recipe = tmp_path / "run.toml"
    recipe.write_text(
        '[data]\nname="digits"\nlimit_train=600\nlimit_test=60\naugment=["crop:1","cutout:2"]\n[model]\nname="cnn"\nwidths=[4,8,8]\n'
        '[method]\nname="pgd-at"\neps=0.1\nstep_size=0.05\nsteps=2\n[train]\nepochs=12\nbatch_size=16\nlr=0.05\naveraging="ema"\n'
        "checkpoint_seconds=0\nvalidation_steps=2\n"
    )
    config = resolve(overproof.folder.read_toml(recipe))
    execute(config, tmp_path / "whole")
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from overproof.config import resolve; from overproof.folder import read_toml\n"
        "from overproof.run.execute import execute\n"
        "execute(resolve(read_toml(__import__('pathlib').Path(sys.argv[1]))), sys.argv[2], resume=True)"
    )
    moments, kills = random.Random(0), 0
    for _attempt in range(60):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(recipe), str(tmp_path / "killed")], stderr=subprocess.PIPE, text=True
        )
        if kills == 10:
            assert process.wait(300) == 0, process.stderr.read()
            break
        _wait_until_training(tmp_path / "killed", process)
        time.sleep(moments.uniform(0, 0.15))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait(60)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stderr.read()
    assert kills == 10, f"training finished after {kills} kills in {_attempt + 1} attempts: too quick for the test"
    assert_same(tmp_path / "whole", tmp_path / "killed")
    assert RunFolder(tmp_path / "killed").status["state"] == "done"


def _wait_until_training(run: Path, process: subprocess.Popen[str]) -> None:
    """Until this process has written its first checkpoint (or died)."""
    begun, path = time.time(), run / "checkpoint.pt"
    while process.poll() is None and time.time() - begun < 60:
        if path.exists() and path.stat().st_mtime > begun:
            return
        time.sleep(0.002)


def test_deadline_interrupts_and_resume_finishes(tmp_path: Path) -> None:
    execute(resolve(SMALL), tmp_path / "whole")
    with pytest.raises(Interrupted, match="Stopped at step 1 of"):
        execute(resolve(SMALL), tmp_path / "cut", deadline=0.0)
    assert RunFolder(tmp_path / "cut").status["state"] == "interrupted"
    resume(tmp_path / "cut")
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    ("number", "at"), [(signal.SIGINT, 5), (signal.SIGTERM, 5), (signal.SIGINT, 10), (signal.SIGINT, 11), (signal.SIGINT, 12)]
)
def test_a_signal_leaves_a_resumable_run(
    tmp_path: Path, number: signal.Signals, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an epoch, and before, at and after its last step (an epoch has 11)."""
    from overproof.training import loop

    original = loop.Trainer._step

    def step(self: loop.Trainer, batch: object, epoch: int) -> None:
        original(self, batch, epoch)
        if self.step == at:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(loop.Trainer, "_step", step)
    with pytest.raises(Interrupted, match=f"step {at} of 2"):
        execute(resolve(SMALL), tmp_path / "cut")
    monkeypatch.setattr(loop.Trainer, "_step", original)
    execute(resolve(SMALL), tmp_path / "whole")
    resume(tmp_path / "cut")
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_non_finite_loss_names_step_terms_and_checkpoint(tmp_path: Path) -> None:
    config = resolve(SMALL, {"train": {"lr": 1e30}})
    with pytest.raises(NonFiniteLossError, match=r"step \d+: ce = (nan|inf).*checkpoint\.pt.*train\.lr"):
        execute(config, tmp_path / "bad")
    assert RunFolder(tmp_path / "bad").status["state"] == "failed"
    assert torch.load(tmp_path / "bad" / "checkpoint.pt", weights_only=True)["step"] == 0


def test_damaged_checkpoint_is_named_and_not_executed(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        execute(resolve(SMALL), tmp_path / "run", deadline=0.0)
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(FolderError, match=r"checkpoint\.pt is damaged"):
        resume(tmp_path / "run")
    witness = tmp_path / "witness"

    class Hostile:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(witness),)

    torch.save({"step": Hostile()}, path)
    with pytest.raises(FolderError, match="not executed"):
        resume(tmp_path / "run")
    assert not witness.exists()


def test_disk_full_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from overproof.training import checkpoints

    with pytest.raises(Interrupted):
        execute(resolve(SMALL), tmp_path / "run", deadline=0.0)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(FolderError, match="No space is left on the disk.*overproof resume"):
        resume(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*partial"))
    monkeypatch.undo()
    resume(tmp_path / "run")


def test_schedules() -> None:
    def at(step: int, **options: object) -> float:
        return learning_rate(TrainConfig(lr=1.0, epochs=10, **options), step, 100)

    assert at(0) == 1.0
    assert at(50) == pytest.approx(0.5)
    assert at(99) == pytest.approx((1 + torch.cos(torch.tensor(0.99 * torch.pi))).item() / 2, rel=1e-4)
    assert [at(s, schedule="multi-step") for s in (0, 49, 50, 74, 75)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert at(30, schedule="one-cycle") == pytest.approx(1.0)
    assert at(0, schedule="one-cycle") == pytest.approx(1 / 25)
    assert at(100, schedule="one-cycle") == pytest.approx(1e-4)
    assert [at(s, schedule="constant", warmup=2.0) for s in (0, 9, 19, 20)] == pytest.approx([1 / 20, 0.5, 1, 1])


@pytest.mark.parametrize(("averaging", "option"), [("ema", {"ema_decay": 0.5}), ("swa", {"swa_start": 0.0})])
def test_averaged_weights_are_the_formula(
    tmp_path: Path, averaging: str, option: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from overproof.training import loop

    seen: list[torch.Tensor] = []
    original = loop.Trainer._average

    def record(self: loop.Trainer) -> None:
        seen.append(self.objective.student.net.fc.weight.detach().clone())
        original(self)

    monkeypatch.setattr(loop.Trainer, "_average", record)
    table = {"train": {"averaging": averaging, "epochs": 1, **option}}
    run = execute(resolve(SMALL, {"data": {"validation": 0.0}}, table), tmp_path / "run")
    expected = seen[0]
    for weight in seen[1:]:
        expected = 0.5 * expected + 0.5 * weight if averaging == "ema" else expected
    if averaging == "swa":
        expected = torch.stack(seen).mean(0)
    torch.testing.assert_close(weights(run.path)["net.fc.weight"], expected, atol=1e-6, rtol=1e-5)


def test_matches_a_bare_loop(tmp_path: Path) -> None:
    """Our KD run and a dozen plain lines end with the same weights."""
    from overproof.data import make_loader
    from overproof.losses.divergences import kl_divergence

    data = overproof.load_data("digits", limit_train=300, seed=0)
    torch.manual_seed(0)
    teacher = overproof.create_model("mlp", 10, 1, 8)
    student, twin = overproof.create_model("mlp", 10, 1, 8, hidden=(16,)), overproof.create_model("mlp", 10, 1, 8, hidden=(16,))
    twin.load_state_dict(student.state_dict())
    overproof.distill(
        student, teacher, data, out=tmp_path / "run", epochs=2, batch_size=32, lr=0.1, validation_limit=10, seed=3
    )
    optimizer = torch.optim.SGD(twin.parameters(), 0.1, 0.9, weight_decay=5e-4)
    loader = make_loader(data.train, 32, shuffle=True, seed=3, drop_last=True)
    step, total, teacher_before = 0, 2 * len(loader), [p.clone() for p in teacher.parameters()]
    for epoch in range(2):
        for batch in loader.batches(epoch):
            optimizer.param_groups[0]["lr"] = learning_rate(TrainConfig(lr=0.1, epochs=2), step, total)
            logits = twin(batch.images)
            with torch.no_grad():
                target = teacher(batch.images)
            loss = 0.1 * torch.nn.functional.cross_entropy(logits, batch.labels)
            loss = loss + 0.9 * 16 * kl_divergence(target, logits, temperature=4).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    last = weights(tmp_path / "run")
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(last[name], value, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(teacher_before, teacher.parameters(), strict=True))
    assert all(p.requires_grad for p in teacher.parameters()), "the user's teacher came back frozen"


@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_other_precisions_train(tmp_path: Path, precision: str) -> None:
    run = execute(
        resolve(SMALL, {"train": {"precision": precision, "clip": 1.0, "optimizer": "adamw", "lr": 0.02, "epochs": 8}}),
        tmp_path / "run",
    )
    assert run.evaluations["test-best"]["clean"] > 0.3
    assert all(v.dtype == torch.float32 for v in weights(run.path).values() if v.is_floating_point())


def test_metrics_are_json_lines_with_every_term(tmp_path: Path) -> None:
    run = execute(resolve(SMALL, {"method": {"name": "trades", "eps": 0.1, "steps": 2}}), tmp_path / "run")
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert {"loss", "accuracy", "ce", "trades"} <= set(lines[0]["train"])
    assert {"clean", "robust", "loss"} == set(lines[0]["validation"])
    assert run.evaluations["test-best"]["attacks"].keys() == {"pgd-20"}
    assert run.evaluations["test-best"]["attacks"]["pgd-20"]["eps"] == 0.1
