"""What a program gives and says: objects of its own, folders it does not name, processes it does not see."""

from __future__ import annotations

import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

import overproof
from overproof.config import resolve
from overproof.data import IterableLoader, StreamLoader
from overproof.errors import DataError, FolderError, UsageError
from overproof.run.environment import free
from overproof.training.checkpoints import load_checkpoint, save_checkpoint
from overproof.training.safety import Interrupted

IMAGES, LABELS = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3


def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


class Named(TensorDataset):
    def __init__(self, *classes: str) -> None:
        super().__init__(IMAGES, LABELS)
        self.classes = list(classes)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# Options that nobody would look at


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 0.1}, "data.validation belongs to data with a name"),
        ({"limit_train": 10}, "data.limit_train belongs to data with a name"),
        ({"split_seed": 1}, "data.split_seed belongs"),
        ({"data_options": {"image_size": 64}}, r"data_options={'image_size': 64} belong to data with a name"),
        ({"model_options": {"widths": (4,)}}, "model_options=.* belong to a registered name"),
        ({"long_tail": 10.0}, "data.long_tail belongs to data with a name"),
    ],
)
def test_options_of_named_things_are_refused_for_objects(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        overproof.train(model(), TensorDataset(IMAGES, LABELS), epochs=1, out="r", **options)
    assert not Path("r").exists()


def test_a_loader_brings_batches_of_its_own() -> None:
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)
    for data in (loader, list(loader)):
        for options in ({"batch_size": 4}, {"workers": 2}):
            with pytest.raises(UsageError, match="the loader brings batches of its own"):
                overproof.train(model(), data, epochs=1, out="r", **options)
    overproof.train(model(), TensorDataset(IMAGES, LABELS), epochs=1, batch_size=4, workers=0, out="r")


def test_a_number_means_the_same_class_in_all_parts() -> None:
    for place in ("validation_data", "test_data"):
        with pytest.raises(DataError, match=rf"{place} has 2 classes \(a, c\), the training images have 3 classes \(a, b, c\)"):
            overproof.train(model(), Named("a", "b", "c"), epochs=1, out="r", **{place: Named("a", "c")})
    overproof.train(
        model(), Named("a", "b", "c"), epochs=1, out="r", validation_data=Named("a", "b", "c"), test_data=(IMAGES, LABELS)
    )


# Folders that are not named


def test_a_run_to_be_continued_has_to_be_named() -> None:
    with pytest.raises(UsageError, match="resume=True continues the run in `out`: say which"):
        overproof.train(model(), (IMAGES, LABELS), epochs=1, resume=True)


def test_processes_started_for_a_run_work_in_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import itertools

    from overproof.run import environment

    def program() -> list[Path]:
        """Two calls, whose folders are made at once, as `claim` does."""
        monkeypatch.setattr(environment, "_calls", itertools.count())
        found = []
        for _ in range(2):
            found.append(free("kd", resume=False))
            found[-1].mkdir(parents=True, exist_ok=True)
        return found

    for number in range(2):
        monkeypatch.delenv(f"{environment.CHOSEN}{number}", raising=False)
    first = program()
    assert first == [Path("runs/kd-1"), Path("runs/kd-2")]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert program() == first  # the same program, started once more for the second process
    monkeypatch.delenv("LOCAL_RANK")
    assert program() == [Path("runs/kd-3"), Path("runs/kd-4")]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(UsageError, match="Under torchrun every process"):
        free("kd", resume=False)
    for number in range(2):
        monkeypatch.delenv(f"{environment.CHOSEN}{number}", raising=False)


# Samplers, and transforms that roll dice


def test_a_loader_that_shares_out_itself_is_refused_and_a_sampler_is_told_the_epoch() -> None:
    data = TensorDataset(IMAGES, LABELS)
    shared = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    with pytest.raises(DataError, match="has a DistributedSampler"):
        IterableLoader(shared, rank=0, world_size=2)
    alone = IterableLoader(DataLoader(data, batch_size=24, sampler=DistributedSampler(data, num_replicas=1, rank=0)))
    orders = [next(alone.batches(epoch)).labels for epoch in (0, 1, 0)]
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])


class Shaken(Dataset[Any]):
    """Each generator that transforms draw from moves the pixels."""

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        amount = torch.rand(()) + random.random() + np.random.rand()
        return IMAGES[row] * amount / 3, int(LABELS[row])


def drawn(epoch: int, start: int = 0, **options: Any) -> dict[int, Tensor]:
    batches = StreamLoader(Shaken(), 4, shuffle=True, drop_last=True, seed=5, **options).batches(epoch, start)
    return {int(index): image for batch in batches for index, image in zip(batch.index, batch.images, strict=True)}


def test_transforms_draw_the_same_whoever_asks() -> None:
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[union-attr]
    whole = drawn(0)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    factors = [float(image.mean() / IMAGES[row].mean()) for row, image in whole.items()]
    assert len({round(factor, 4) for factor in factors}) > 20, "all images are moved alike"
    later = drawn(0, start=3)  # as after an interruption
    workers = drawn(0, num_workers=2)
    ranks = {**drawn(0, rank=0, world_size=2), **drawn(0, rank=1, world_size=2)}
    for found in (later, workers, ranks):
        assert found
        assert all(torch.equal(image, whole[row]) for row, image in found.items())
    assert len(later) == len(whole) - 12
    assert not any(torch.equal(image, whole[row]) for row, image in drawn(1).items())


def test_bytes_become_floats_on_the_way() -> None:
    pixels = (IMAGES * 255).round().byte()
    for loader in (IterableLoader([(pixels, LABELS)]), StreamLoader(TensorDataset(pixels, LABELS), 24)):
        batch = next(loader.batches(0))
        torch.testing.assert_close(batch.images, pixels.float() / 255, rtol=0, atol=0)


def test_images_that_find_no_room_travel_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from overproof.data import DeviceLoader, ImageSet, loaders

    whole = DeviceLoader(ImageSet(IMAGES, LABELS), 8, shuffle=True, seed=3)
    monkeypatch.setattr(loaders, "_fits", lambda *_: False)
    away = DeviceLoader(ImageSet(IMAGES, LABELS), 8, shuffle=True, seed=3, device="meta")
    assert away.dataset.images.device.type == "cpu"
    batches = list(away.batches(1))
    assert [(batch.images.device.type, tuple(batch.images.shape)) for batch in batches] == [("meta", (8, 1, 8, 8))] * 3
    away.device = torch.device("cpu")
    for one, other in zip(whole.batches(1), away.batches(1), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.index, other.index)


# Checkpoints


def test_a_run_of_other_epochs_is_not_continued() -> None:
    class Stopping(list[Any]):
        """Stops the run in the second epoch, as a signal would."""

        passes = 0

        def __iter__(self) -> Any:
            Stopping.passes += 1
            if Stopping.passes == 4:  # one pass looks at the first batch, one at the order
                raise KeyboardInterrupt
            return super().__iter__()

    batches = [(IMAGES[k : k + 6], LABELS[k : k + 6]) for k in range(0, 24, 6)]
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        overproof.train(model(), Stopping(batches), epochs=50, out="r")
    assert load_checkpoint(Path("r"))["per_epoch"] == 4  # type: ignore[index]
    with pytest.raises(UsageError, match=r"4 steps an epoch by 1 process\(es\), and now there are 2 by 1"):
        overproof.train(model(), batches[:2], epochs=50, out="r", resume=True)
    overproof.train(model(), batches, epochs=50, out="r", resume=True)


def test_what_changes_no_result_may_change_when_a_run_goes_on() -> None:
    data, how = (IMAGES, LABELS), {"epochs": 2, "batch_size": 8, "test_data": (IMAGES, LABELS)}
    run = overproof.train(model(), data, out="r", evaluation={"batch_size": 5}, **how)
    assert resolve(run.folder.config).evaluation.batch_size == 5
    again = overproof.train(
        model(), data, out="r", evaluation={"batch_size": 7}, workers=1, checkpoint_seconds=5, resume=True, **how
    )
    assert again.evaluations == run.evaluations
    with pytest.raises(FolderError, match=r"another configuration \(train.lr: 0.1 there, 0.2 here\).*Only train.workers"):
        overproof.train(model(), data, out="r", lr=0.2, resume=True, **how)
    with pytest.raises(UsageError, match="made from Python objects"):
        overproof.run.execute.resume("r", overrides=["evaluation.batch_size=3"])
    named = overproof.train("mlp", "digits", epochs=1, limit_train=60, limit_test=20, out="n")
    assert overproof.run.execute.resume("n", overrides=["evaluation.batch_size=3"]).evaluations == named.evaluations
    with pytest.raises(FolderError, match="another configuration"):
        overproof.run.execute.resume("n", overrides=["train.epochs=3"])


def test_a_disk_that_is_full_is_told_as_such(tmp_path: Path) -> None:
    """A real limit, on which torch's writer has words of its own."""
    save_checkpoint(tmp_path, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(FolderError, match="Could not write .*checkpoint.pt: File too large"):
            save_checkpoint(tmp_path, {"step": 2, "weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(tmp_path) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_several_seeds_on_all_devices_want_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    from overproof.folder import RunFolder
    from overproof.run.launch import refuse_in_a_row

    config = resolve({"train": {"devices": "auto"}})
    runs = [(config, RunFolder("a")), (config, RunFolder("b"))]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(UsageError, match="need torchrun"):
        refuse_in_a_row(runs)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refuse_in_a_row(runs)
