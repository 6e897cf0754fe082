from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from overproof.data import (
    DATA,
    DeviceLoader,
    ImageSet,
    IterableLoader,
    Splits,
    StreamLoader,
    StreamSet,
    build_augment,
    load_data,
    make_loader,
    stratified_split,
    stratified_subset,
)
from overproof.data.decoding import decode
from overproof.data.idx import read_idx
from overproof.errors import DataError, UnknownNameError, UsageError

SHARED = Path(os.environ.get("OVERPROOF_SHARED", Path(__file__).parents[2] / "shared" / "data"))


def some(count: int = 50, classes: int = 5, channels: int = 3, size: int = 6) -> ImageSet:
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, channels, size, size), generator=g, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % classes, classes=classes, name="some")


def png(array: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def picture(value: int, size: int = 6, channels: int = 3) -> np.ndarray:
    return np.full((size, size, channels) if channels == 3 else (size, size), value, dtype=np.uint8)


def write_parquet(path: Path, images: list, labels: list, names: list[str] | None = None, columns=("image", "label")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": i, "path": None} if isinstance(i, bytes) else {"bytes": None, "path": i} for i in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({columns[0]: pa.array(rows, kind), columns[1]: pa.array(labels)})
    if names:
        note = {"info": {"features": {columns[1]: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(note)})
    pq.write_table(table, path)
    return path


def write_folder(top: Path, parts: tuple[str, ...] = ("train", "test"), count: int = 4) -> Path:
    for part in parts:
        for number, name in enumerate(("cat", "dog")):
            (top / part / name).mkdir(parents=True)
            for k in range(count):
                (top / part / name / f"{k}.png").write_bytes(png(picture(100 * number + k)))
    return top


# ---- registry -------------------------------------------------------------------------------------------------------


def test_the_table_of_sources_needs_no_torch():
    code = "import sys; from overproof.data import DATA; assert 'digits' in DATA; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})


def test_every_source_can_be_loaded_and_has_a_summary():
    for entry in DATA.entries():
        assert callable(entry.load())
        assert entry.summary
        assert entry.options() or entry.name == "none"


# ---- image sets -----------------------------------------------------------------------------------------------------


def test_image_set_knows_its_shape_and_statistics():
    images = torch.zeros(4, 2, 1, 3, 3, dtype=torch.uint8)[:, 0]
    images[:2] = 255
    data = ImageSet(images, torch.tensor([0, 1, 2, 0]))
    assert (data.channels, data.image_size, data.classes, len(data)) == (1, 3, ("0", "1", "2"), 4)
    mean, std = data.mean_std()
    assert mean == pytest.approx((0.5,))
    assert std == pytest.approx((0.5,))
    assert some().mean_std()[0] == pytest.approx((some().images / 255).mean(dim=(0, 2, 3)).tolist(), abs=1e-6)


def test_subset_keeps_positions_and_checks_nothing_away():
    part = some().subset([7, 3]).subset([1])
    assert part.index.tolist() == [3]
    assert torch.equal(part.images[0], some().images[3])
    assert part.classes == some().classes


def test_images_need_not_be_square_until_a_model_asks():
    data = ImageSet(torch.zeros(2, 1, 4, 6, dtype=torch.uint8), torch.tensor([0, 1]))
    assert data.shape == (1, 4, 6)
    with pytest.raises(DataError, match="4 high and 6 wide.*image_size"):
        _ = data.image_size


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(0, dtype=torch.long), "is empty"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int32), torch.tensor([0, 1]), "torch.int32; expected uint8"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), "unsqueeze"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.tensor([0, 1]), r"permute\(0, 3, 1, 2\)"),
        (torch.zeros(2, 2, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), "2 channels; expected 1 or 3"),
        (torch.full((2, 3, 4, 4), 200.0), torch.tensor([0, 1]), "200 to 200.*divide by 255"),
        (torch.full((2, 3, 4, 4), -1.5), torch.tensor([0, 1]), "-1.5.*Classifier"),
        (torch.zeros(2, 3, 4, 4), torch.tensor([0, 3]), "image 1 has the label 3; expected 0 to 1"),
        (torch.zeros(2, 3, 4, 4), torch.tensor([0, -1]), "image 1 has the label -1"),
        (torch.zeros(2, 3, 4, 4), torch.tensor([0.0, 1.0]), "float32 of shape .2,.; expected int64"),
        (torch.zeros(2, 3, 4, 4), torch.tensor([0]), "2 images, but 1 labels"),
    ],
)
def test_wrong_pixels_and_labels_are_named(images, labels, message):
    with pytest.raises(DataError, match=message):
        ImageSet(images, labels, classes=2)


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_pixels_that_are_no_numbers_are_named_with_their_row(value, kind):
    images = torch.rand(5, 1, 4, 4)
    images[3, 0, 2, 1] = value
    with pytest.raises(DataError, match=f"image 3 holds .*{kind}"):
        ImageSet(images, torch.zeros(5, dtype=torch.long))


# ---- splits ---------------------------------------------------------------------------------------------------------


def test_split_is_stratified_disjoint_ordered_and_repeatable():
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 10)[torch.randperm(160, generator=torch.Generator().manual_seed(1))]
    train, held = stratified_split(labels, 0.2, seed=3)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(160))
    assert labels[held].bincount().tolist() == [20, 10, 2]
    assert train.equal(train.sort().values)
    assert held.equal(held.sort().values)
    assert stratified_split(labels, 0.2, seed=3)[1].equal(held)
    assert not stratified_split(labels, 0.2, seed=4)[1].equal(held)


def test_a_class_keeps_an_image_to_train_on():
    train, held = stratified_split(torch.tensor([0, 0, 0, 0, 1, 2, 2]), 0.9)
    assert set(torch.tensor([0, 0, 0, 0, 1, 2, 2])[train].tolist()) == {0, 1, 2}
    assert 4 not in held.tolist()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 0.001])
def test_impossible_shares_are_refused(fraction):
    with pytest.raises(UsageError, match=r"hold(ing)? out"):
        stratified_split(torch.arange(10) % 2, fraction)


def test_subset_has_every_class_in_proportion():
    labels = torch.tensor([0] * 900 + [1] * 95 + [2] * 5)
    rows = stratified_subset(labels, 100)
    assert len(rows.unique()) == 100
    assert (labels[rows].bincount() - torch.tensor([90, 9.5, 0.5])).abs().max() <= 1
    assert set(labels[stratified_subset(labels, 3)].tolist()) == {0, 1, 2}


def test_parts_must_fit_together():
    with pytest.raises(DataError, match="test part"):
        Splits(some(), None, some(size=8))
    with pytest.raises(DataError, match="other classes"):
        Splits(some(), some(classes=4), some())


# ---- loaders in memory ----------------------------------------------------------------------------------------------


def batches(loader, epoch=0, start=0):
    return list(loader.batches(epoch, start))


def same(left, right) -> bool:
    pairs = zip(left, right, strict=True)
    return all(a.images.equal(b.images) and a.labels.equal(b.labels) and a.index.equal(b.index) for a, b in pairs)


def test_batches_are_floats_with_labels_and_positions():
    data = some().subset(torch.arange(10, 33))
    loader = DeviceLoader(data, 5)
    found = batches(loader)
    assert len(loader) == len(found) == 5
    assert [len(b) for b in found] == [5, 5, 5, 5, 3]
    assert torch.cat([b.index for b in found]).tolist() == list(range(10, 33))
    assert torch.cat([b.images for b in found]).equal(data.images / 255)
    assert found[0].images.dtype == torch.float32


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        torch.rand(3)  # the global generator must not matter
        loader = DeviceLoader(some(), 7, shuffle=True, seed=seed)
        return torch.cat([b.index for b in loader.batches(epoch)]).tolist()

    assert order(0, 0) == order(0, 0)
    assert sorted(order(0, 0)) == list(range(50))
    assert len({tuple(order(s, e)) for s in range(3) for e in range(3)}) == 9


@pytest.mark.parametrize("start", [0, 1, 4])
def test_an_epoch_resumes_exactly(start):
    augment = build_augment(["crop:1", "flip", "cutout:2", "mixup:0.5"], classes=5)
    make = lambda: DeviceLoader(some(), 8, shuffle=True, seed=5, augment=augment)  # noqa: E731
    whole, tail = batches(make(), epoch=2), batches(make(), epoch=2, start=start)
    assert same(whole[start:], tail)
    assert not whole[0].images.equal(batches(make(), epoch=3)[0].images)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_see_what_one_would(world):
    together = batches(DeviceLoader(some(), 4 * world, shuffle=True, seed=1))
    ranks = [batches(DeviceLoader(some(), 4, shuffle=True, seed=1, rank=r, world_size=world)) for r in range(world)]
    for number, batch in enumerate(together):
        parts = [rank[number] for rank in ranks if number < len(rank)]
        assert torch.cat([p.index for p in parts]).equal(batch.index)
        assert torch.cat([p.images for p in parts]).equal(batch.images)


def test_dropping_the_last_batch_gives_equal_steps():
    loaders = [DeviceLoader(some(), 7, shuffle=True, drop_last=True, rank=r, world_size=3) for r in range(3)]
    assert [len(loader) for loader in loaders] == [2, 2, 2]
    assert all(len(b) == 7 for loader in loaders for b in batches(loader))
    with pytest.raises(UsageError, match="lower batch_size to 16"):
        DeviceLoader(some(), 20, drop_last=True, world_size=3)


def test_no_image_is_lost_or_doubled_when_the_last_batch_is_tiny():
    loaders = [DeviceLoader(some(count=33), 4, rank=r, world_size=4) for r in range(4)]
    seen = [i for loader in loaders for b in batches(loader) for i in b.index.tolist()]
    assert sorted(seen) == list(range(33))
    assert [len(loader) for loader in loaders] == [len(batches(loader)) for loader in loaders]


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 4, "rank": 2, "world_size": 2}])
def test_impossible_sizes_are_refused(options):
    with pytest.raises(UsageError):
        DeviceLoader(some(), **options)


# ---- streams --------------------------------------------------------------------------------------------------------


class Pictures(torch.utils.data.Dataset):
    """What users bring: PIL images, arrays or tensors."""

    def __init__(self, data: ImageSet, kind: str) -> None:
        self.data, self.kind = data, kind

    def __len__(self):
        return len(self.data)

    def __getitem__(self, row):
        image, label = self.data.images[row], int(self.data.labels[row])
        array = image.permute(1, 2, 0).numpy()
        return {"pil": Image.fromarray(array), "array": array, "uint8": image, "float": image / 255}[self.kind], label


@pytest.mark.parametrize("kind", ["pil", "array", "uint8", "float"])
def test_a_users_dataset_gives_the_same_batches_as_memory(kind):
    options = {"shuffle": True, "seed": 3, "augment": build_augment("crop:1,flip"), "rank": 1, "world_size": 2}
    expected = batches(DeviceLoader(some(), 6, **options), epoch=1)
    loader = make_loader(Pictures(some(), kind), 6, **options)
    assert isinstance(loader, StreamLoader)
    assert len(loader) == len(expected)
    assert same(batches(loader, epoch=1), expected)
    assert same(batches(loader, epoch=1, start=2), expected[2:])


def test_worker_processes_change_nothing():
    state = torch.get_rng_state()
    with_workers = batches(StreamLoader(Pictures(some(), "pil"), 8, shuffle=True, num_workers=2))
    assert torch.get_rng_state().equal(state)
    assert same(with_workers, batches(DeviceLoader(some(), 8, shuffle=True)))


def test_stream_set_knows_what_an_image_set_knows():
    memory, stream = some(), StreamSet(Pictures(some(), "uint8"), classes=5, name="stream")
    assert (stream.shape, stream.classes, stream.image_size) == (memory.shape, memory.classes, 6)
    assert stream.labels.equal(memory.labels)
    assert stream.mean_std()[0] == pytest.approx(memory.mean_std()[0])
    part = stream.subset([40, 2, 9])
    assert part.subset([2, 0]).index.tolist() == [9, 40]
    assert same(batches(StreamLoader(part, 2, num_workers=0)), batches(DeviceLoader(memory.subset([40, 2, 9]), 2)))


def test_wrong_items_of_a_dataset_are_named():
    images = torch.rand(6, 3, 4, 4)
    images[4] *= 200
    with pytest.raises(DataError, match=r"batch 2: pixels run.*divide by 255"):
        batches(make_loader(TensorDataset(images, torch.zeros(6, dtype=torch.long)), 2))
    with pytest.raises(DataError, match=r"batch 1: image 0 has the label 2; expected 0 to 1"):
        batches(make_loader(TensorDataset(torch.rand(6, 3, 4, 4), torch.arange(6)), 2, classes=2))
    with pytest.raises(DataError, match=r"Item 0 .*expected \(image, label\)"):
        batches(make_loader(TensorDataset(torch.rand(2, 3, 4, 4)), 2))
    with pytest.raises(DataError, match=r"Item 0 .*expected a class number"):
        batches(make_loader(TensorDataset(torch.rand(2, 3, 4, 4), torch.rand(2)), 2))


# ---- iterables ------------------------------------------------------------------------------------------------------


def test_a_data_loader_is_taken_as_it_is():
    data = TensorDataset(some().images / 255, some().labels)
    loader = make_loader(DataLoader(data, batch_size=8), 999, classes=5)
    assert isinstance(loader, IterableLoader)
    assert len(loader) == 7
    assert same(batches(loader), batches(DeviceLoader(some(), 8)))
    assert same(batches(loader, start=5), batches(DeviceLoader(some(), 8), start=5))


def test_an_iterable_without_length_has_no_len():
    class Endless:
        def __iter__(self):
            return iter([(torch.zeros(2, 1, 3, 3), torch.tensor([0, 1]))] * 2)

    loader = make_loader(Endless(), 2)
    assert not hasattr(loader, "__len__")
    assert len(batches(loader)) == 2


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((torch.full((2, 3, 4, 4), 2.5), torch.tensor([0, 1])), "batch 1: pixels run from 2.5 to 2.5"),
        ((torch.randn(9, 3, 4, 4), torch.zeros(9, dtype=torch.long)), r"put the normalisation into the model"),
        ((torch.full((2, 3, 4, 4), float("nan")), torch.tensor([0, 1])), "batch 1: image 0 holds NaN"),
        ((torch.zeros(2, 3, 4), torch.tensor([0, 1])), r"batch 1: images have shape \(2, 3, 4\)"),
        ((torch.zeros(2, 5, 4, 4), torch.tensor([0, 1])), "5 channels"),
        ((torch.zeros(2, 3, 4, 4), torch.tensor([0, 7])), "batch 1: image 1 has the label 7; expected 0 to 2"),
        ((torch.zeros(2, 3, 4, 4), torch.tensor([0])), "2 images, but 1 labels"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(2, 3)), "expected int64"),
        ({"image": 1}, "batch 1 is dict"),
        ((torch.zeros(3, 4, 4), 1), "DataLoader first"),
    ],
)
def test_wrong_batches_are_named(item, message):
    good = (torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))
    with pytest.raises(DataError, match=message):
        batches(IterableLoader([good, item], classes=3))


def test_an_iterable_that_is_empty_or_used_up_is_an_error():
    with pytest.raises(DataError, match="gave no batch"):
        batches(IterableLoader([]))
    loader = make_loader(iter([(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))]), 2)
    assert len(batches(loader)) == 1
    with pytest.raises(DataError, match="used up"):
        batches(loader, epoch=1)


def test_make_loader_takes_tensors_and_loaders_and_refuses_the_rest():
    pair = make_loader((some().images, some().labels), 8)
    assert isinstance(pair, DeviceLoader)
    assert make_loader(pair, 8) is pair
    with pytest.raises(UsageError, match="cannot be made from int"):
        make_loader(3, 8)


# ---- named sources --------------------------------------------------------------------------------------------------


def test_digits():
    data = load_data("digits")
    assert (data.channels, data.image_size, len(data.classes), data.name) == (1, 8, 10, "digits")
    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    assert len(data.test) == pytest.approx(1797 / 4, abs=5)
    assert int(data.train.images.max()) == 255
    everywhere = torch.cat([part.index for part in (data.train, data.validation, data.test)])
    assert sorted(everywhere.tolist()) == list(range(1797))
    other = load_data("digits", seed=1)
    assert other.test.index.equal(data.test.index)
    assert not other.train.index.equal(data.train.index)


def test_digits_have_the_grey_levels_of_scikit_learn():
    from sklearn.datasets import load_digits

    test = load_data("digits").test
    raw = torch.from_numpy(load_digits().images)[test.index]
    assert (test.images[:, 0] / 255.0 * 16 - raw).abs().max() < 0.04


def test_limits_and_no_validation():
    data = load_data("digits", limit_train=100, limit_test=50, validation=0)
    assert (len(data.train), data.validation, len(data.test)) == (100, None, 50)
    assert len(data.train.labels.unique()) == 10
    assert torch.equal(load_data("digits", limit_train=100, validation=0).train.index, data.train.index)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("digit", {}, UnknownNameError, "'digits'"),
        ("digits", {"image_sise": 3}, UnknownNameError, "image_sise"),
        ("digits:x", {}, UsageError, "nothing after a colon"),
        ("folder", {}, UsageError, "folder:DIRECTORY"),
        ("digits", {"test": 0.2}, UsageError, "leave out data.test"),
        ("digits", {"validation": 1.5}, UsageError, "1.5"),
        ("digits", {"limit_train": 0}, UsageError, "at least 1"),
        ("parquet:/no/such/place", {}, DataError, "not a folder"),
        ("folder:/no/such/place", {}, DataError, "not a folder"),
    ],
)
def test_wrong_names_and_options(name, options, error, message):
    with pytest.raises(error, match=message):
        load_data(name, **options)


@pytest.mark.parametrize("name", ["mnist", "kmnist", "cifar10", "cifar100", "svhn", "stl10", "gtsrb"])
def test_a_set_that_is_not_there_says_what_to_put_where(name, tmp_path, monkeypatch):
    monkeypatch.setattr("overproof.data.idx.SYSTEM", tmp_path / "system")
    with pytest.raises(DataError, match="parquet:DIR") as caught:
        load_data(name, root=tmp_path, download=False)
    assert str(tmp_path) in str(caught.value)


def test_a_failed_download_says_why(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network here")

    monkeypatch.setattr("overproof.data.idx.SYSTEM", tmp_path / "system")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    for name in ("fashion-mnist", "svhn"):
        with pytest.raises(DataError, match=r"could not be fetched \(.*\)\. Put"):
            load_data(name, root=tmp_path)


def test_sets_of_torchvision_become_image_sets(tmp_path, monkeypatch):
    import torchvision.datasets

    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)

    class Fake:
        def __init__(self, root, *, train=None, split=None, download):
            self.classes, self.targets = ["a", "b", "c"], [0, 1, 2] * 2
            self.labels = np.array(self.targets, dtype=np.uint8)
            self.data = pixels if split is None else pixels.transpose(0, 3, 1, 2)

    for family in ("CIFAR10", "CIFAR100", "SVHN", "STL10"):
        monkeypatch.setattr(torchvision.datasets, family, Fake)
        data = load_data(family.lower(), root=tmp_path, validation=None)
        assert data.train.images.equal(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        assert data.test.labels.tolist() == [0, 1, 2] * 2
        assert len(data.classes) == (3 if family.startswith("CIFAR") else 10)


def test_gtsrb_is_resized(tmp_path):
    base = tmp_path / "gtsrb"
    for number in range(43):
        (base / f"GTSRB/Training/{number:05}").mkdir(parents=True)
        (base / f"GTSRB/Training/{number:05}/0.ppm").write_bytes(png(picture(number, size=20 + number), "PPM"))
    (base / "GTSRB/Final_Test/Images").mkdir(parents=True)
    (base / "GTSRB/Final_Test/Images/00000.ppm").write_bytes(png(picture(99), "PPM"))
    (base / "GT-final_test.csv").write_text("Filename;Width;ClassId\n00000.ppm;6;14\n")
    data = load_data("gtsrb", root=tmp_path, download=False, validation=None, image_size=16)
    assert (data.image_size, data.channels, len(data.classes)) == (16, 3, 43)
    assert data.train.images[:, 0, 8, 8].tolist() == list(range(43)) == data.train.labels.tolist()
    assert data.classes[int(data.test.labels[0])] == "Stop"
    (base / "GTSRB/Final_Test/Images/00000.ppm").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"00000.ppm"):
        load_data("gtsrb", root=tmp_path, download=False)


# ---- IDX ------------------------------------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray, packed: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.with_name(path.name + ".gz" * packed).write_bytes(gzip.compress(data) if packed else data)


def write_mnist(top: Path, packed: bool = False) -> None:
    for prefix, count in (("train", 20), ("t10k", 10)):
        images = np.arange(count)[:, None, None] * np.ones((1, 4, 4))
        write_idx(top / f"{prefix}-images-idx3-ubyte", images, packed)
        write_idx(top / f"{prefix}-labels-idx1-ubyte", np.arange(count) % 10, packed)


@pytest.mark.parametrize(("place", "packed"), [("", False), ("MNIST/raw", True), ("mnist", True)])
def test_idx_files_are_found_packed_or_not(tmp_path, place, packed):
    write_mnist(tmp_path / place, packed)
    data = load_data("mnist", root=tmp_path, validation=None, download=False)
    assert (len(data.train), len(data.test), data.image_size, data.channels) == (20, 10, 4, 1)
    assert data.test.images[:, 0, 0, 0].tolist() == list(range(10))
    assert data.test.labels.tolist() == list(range(10))


def test_the_environment_names_the_root(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    monkeypatch.setenv("OVERPROOF_DATA", str(tmp_path))
    assert len(load_data("mnist", validation=None, download=False).train) == 20


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\x08",
        b"hello, this is text",
        struct.pack(">HBBI", 0, 8, 1, 5) + b"abc",
        struct.pack(">HBBI", 0, 8, 1, 2) + b"abc",
        struct.pack(">HBB4I", 0, 8, 4, *[2**32 - 1] * 4) + b"abc",
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_idx_files_are_refused(tmp_path, content, packed):
    path = tmp_path / ("x.gz" if packed else "x")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(DataError, match="damaged"):
        read_idx(path)


def test_a_truncated_gzip_is_refused(tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(struct.pack(">HBBI", 0, 8, 1, 500) + os.urandom(500))[:-200])
    with pytest.raises(DataError, match="damaged"):
        read_idx(path)


@pytest.mark.skipif(not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="dataset-fashion-mnist not installed")
def test_fashion_mnist_of_debian(tmp_path):
    data = load_data("fashion-mnist", root=tmp_path, download=False, limit_test=1000)
    assert (len(data.train), len(data.validation), len(data.test)) == (54000, 1000, 1000)
    assert data.classes[9] == "Ankle boot"
    assert data.train.mean_std()[0][0] == pytest.approx(0.286, abs=0.005)
    assert data.train.labels.bincount().tolist() == [5400] * 10


# ---- Parquet --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_parquet(tmp_path):
    for part, count in (("train", 12), ("test", 6)):
        images = [png(picture(10 * k)) for k in range(count)]
        write_parquet(tmp_path / f"data/{part}-0.parquet", images, [k % 3 for k in range(count)], ["ant", "bee", "cow"])
    return tmp_path


def test_parquet_gives_pixels_labels_and_class_names(small_parquet):
    data = load_data(f"parquet:{small_parquet}", validation=None)
    assert data.classes == ("ant", "bee", "cow")
    assert data.train.images[:, 0, 0, 0].tolist() == [10 * k for k in range(12)]
    assert data.train.labels.tolist() == [0, 1, 2] * 4
    assert (len(data.test), data.channels, data.image_size) == (6, 3, 6)


def test_parquet_of_several_files_with_other_names_and_word_labels(tmp_path):
    for number in range(2):
        images = [png(picture(k, channels=1)) for k in (number, 10 + number)]
        write_parquet(tmp_path / f"part{number}.parquet", images, ["dog", "cat"], columns=("img", "what"))
    options = {"image_column": "img", "label_column": "what", "validation": None}
    with pytest.raises(DataError, match="no test part.*data.test=0.2"):
        load_data(f"parquet:{tmp_path}", **options)
    data = load_data(f"parquet:{tmp_path}", test=0.5, **options)
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.test), data.channels) == (2, 2, 1)
    with pytest.raises(DataError, match=r"no column 'image'; it has img .*image_column"):
        load_data(f"parquet:{tmp_path}", test=0.5)


def test_parquet_uses_its_own_validation_part(small_parquet):
    write_parquet(small_parquet / "data/validation-0.parquet", [png(picture(7))] * 3, [0, 1, 2], ["ant", "bee", "cow"])
    data = load_data(f"parquet:{small_parquet}")
    assert (len(data.train), len(data.validation)) == (12, 3)


def test_a_corrupt_row_is_named_or_left_out(small_parquet):
    images = [png(picture(10 * k)) for k in range(8)]
    images[2], images[5] = b"no image", images[5][:50]
    path = write_parquet(small_parquet / "data/train-0.parquet", images, [k % 3 for k in range(8)], ["ant", "bee", "cow"])
    with pytest.raises(DataError, match=r"(?s)2 of its 8 images.*row 2 of .*row 5 of .*--set data.on_error=skip"):
        load_data(f"parquet:{small_parquet}")
    with pytest.warns(UserWarning, match="left out 2 of 8 images.*row 2 of .*row 5 of"):
        data = load_data(f"parquet:{small_parquet}", on_error="skip", validation=None)
    assert data.train.skipped == (f"row 2 of {path}", f"row 5 of {path}")
    assert data.train.index.tolist() == [0, 1, 3, 4, 6, 7]
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 10, 30, 40, 60, 70]
    assert data.train.labels.tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(("labels", "message"), [([0, None], "row 1 has no label"), ([0, 9], "image 1 has the label 9")])
def test_wrong_labels_in_parquet_are_named(small_parquet, labels, message):
    write_parquet(small_parquet / "data/train-0.parquet", [png(picture(1))] * 2, labels, ["ant", "bee", "cow"])
    with pytest.raises(DataError, match=message):
        load_data(f"parquet:{small_parquet}")


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", "a/../../secret.png"])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_paths_in_parquet_stay_inside(tmp_path, path, on_error):
    (tmp_path / "secret.png").write_bytes(png(picture(3)))
    inside = tmp_path / "set"
    write_parquet(inside / "train-0.parquet", [png(picture(1)), path], [0, 1])
    write_parquet(inside / "test-0.parquet", [png(picture(1))] * 2, [0, 1])
    with pytest.raises(DataError, match="refused"):
        load_data(f"parquet:{inside}", validation=None, on_error=on_error)
    (inside / "near.png").write_bytes(png(picture(9)))
    write_parquet(inside / "train-0.parquet", ["near.png"] * 2, [0, 1])
    assert int(load_data(f"parquet:{inside}", validation=None).train.images.max()) == 9


def test_files_that_are_no_parquet_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds no Parquet files"):
        load_data(f"parquet:{tmp_path}")
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        load_data(f"parquet:{tmp_path}")


def test_a_set_that_does_not_fit_is_streamed(small_parquet):
    memory = load_data(f"parquet:{small_parquet}", validation=None).train
    random = np.random.default_rng(0)
    images = [png(random.integers(0, 256, (6, 6, 3), dtype=np.uint8).repeat(30, 0).repeat(30, 1)) for _ in range(12)]
    write_parquet(small_parquet / "data/train-0.parquet", images, memory.labels.tolist(), ["ant", "bee", "cow"])
    write_parquet(small_parquet / "data/test-0.parquet", images, memory.labels.tolist(), ["ant", "bee", "cow"])
    memory = load_data(f"parquet:{small_parquet}", validation=0.25)
    stream = load_data(f"parquet:{small_parquet}", validation=0.25, memory_limit=200_000)
    assert isinstance(stream.train, StreamSet)
    assert stream.train.index.equal(memory.train.index)
    loaders = [make_loader(part.train, 4, shuffle=True, num_workers=0) for part in (memory, stream)]
    assert same(*map(batches, loaders))
    with pytest.raises(DataError, match="memory_limit"):
        load_data(f"parquet:{small_parquet}", memory_limit=1000)


@pytest.mark.parametrize(
    ("name", "channels", "size", "classes"),
    [("mnist", 1, 28, 10), ("cifar10-jpeg", 3, 32, 10), ("gtsrb-32", 3, 32, 43)],
)
def test_real_parquet_sets(name, channels, size, classes, tmp_path):
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set OVERPROOF_SHARED to the folder of development sets")
    file = next(folder.glob("data/test-*.parquet"))
    table = pq.read_table(file).slice(0, 1000)
    for part in ("train", "test"):
        pq.write_table(table, tmp_path / f"{part}.parquet")
    data = load_data(f"parquet:{tmp_path}")
    assert (data.channels, data.image_size, len(data.classes)) == (channels, size, classes)
    assert not data.classes[0].isdigit() or name == "mnist"
    assert data.test.labels.tolist() == table["label"].to_pylist()
    assert 0.02 < data.train.mean_std()[0][0] < 0.98
    assert len(data.train) + len(data.validation) == 1000


# ---- the Hub --------------------------------------------------------------------------------------------------------


def test_the_hub_needs_its_package():
    if importlib.util.find_spec("datasets"):
        pytest.skip("datasets is installed")
    with pytest.raises(UsageError, match=r"pip install overproof\[hub\]"):
        load_data("hub:uoft-cs/cifar10")


def test_the_hub_gives_parts_and_runs_no_code(small_parquet, monkeypatch):
    from types import SimpleNamespace

    asked = {}

    def load_dataset(name, config, **options):
        asked.update(options, name=name)
        read = lambda part: pq.read_table(small_parquet / f"data/{part}-0.parquet")  # noqa: E731
        return {p: SimpleNamespace(data=SimpleNamespace(table=read(p))) for p in ("train", "test")}

    config = SimpleNamespace(HF_CACHE_HOME=str(small_parquet))
    fake = SimpleNamespace(load_dataset=load_dataset, config=config, __version__="3.6.0")
    monkeypatch.setitem(sys.modules, "datasets", fake)
    data = load_data("hub:some/set", revision="abc", validation=None)
    assert asked == {"name": "some/set", "revision": "abc", "trust_remote_code": False}
    assert (data.classes, len(data.train), data.name) == (("ant", "bee", "cow"), 12, "hub:some/set")


# ---- folders --------------------------------------------------------------------------------------------------------


def test_folder_with_and_without_parts(tmp_path):
    top = write_folder(tmp_path, ("train", "test", "val"))
    data = load_data(f"folder:{top}")
    assert (data.classes, len(data.train), len(data.validation), len(data.test)) == (("cat", "dog"), 8, 8, 8)
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 100, 101, 102, 103]
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4
    with pytest.raises(DataError, match=r"data.test=0.2"):
        load_data(f"folder:{top / 'train'}")
    assert len(load_data(f"folder:{top / 'train'}", test=0.25, validation=None).test) == 2


def test_folder_resizes_and_finds_the_channels(tmp_path):
    top = write_folder(tmp_path, ("train",))
    (top / "train/cat/0.png").write_bytes(png(picture(0, channels=1)))
    (top / "train/cat/nested").mkdir()
    (top / "train/cat/nested/x.PNG").write_bytes(png(picture(50, size=12)))
    (top / "train/cat/notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"x.PNG has the shape \(3, 12, 12\), but .*image_size"):
        load_data(f"folder:{top}", test=0.5)
    data = load_data(f"folder:{top}", test=0.5, image_size=8, validation=None)
    assert (data.channels, data.image_size, len(data.train) + len(data.test)) == (3, 8, 9)
    grey = load_data(f"folder:{top}", test=0.5, image_size=8, channels=1, validation=None)
    assert grey.channels == 1


def test_grey_stays_grey_until_colour_turns_up(tmp_path):
    for k in range(150):
        path = tmp_path / f"c{k % 2}/{k:03}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(png(picture(k, channels=1)))
    assert load_data(f"folder:{tmp_path}", test=0.5, validation=None).channels == 1
    (tmp_path / "c1/149.png").write_bytes(png(picture(149)))
    data = load_data(f"folder:{tmp_path}", test=0.5, validation=None)
    assert data.channels == 3
    values = torch.cat([data.train.images, data.test.images])
    assert values.amax(dim=(2, 3)).sort(dim=0).values.tolist() == [[k] * 3 for k in range(150)]


def test_a_corrupt_file_is_named_or_left_out(tmp_path):
    top = write_folder(tmp_path)
    (top / "train/dog/1.png").write_bytes(b"")
    (top / "train/cat/0.png").write_bytes(png(picture(9))[:48])
    with pytest.raises(
        DataError, match=r"(?s): 2 of its 8 images cannot be read:\n .*cat.0.png \(.*dog.1.png \(.*--set data.on_error=skip"
    ):
        load_data(f"folder:{top}")
    with pytest.warns(UserWarning, match="left out 2 of 8"):
        data = load_data(f"folder:{top}", on_error="skip", validation=None)
    assert data.train.skipped == (str(top / "train/cat/0.png"), str(top / "train/dog/1.png"))
    assert data.train.images[:, 0, 0, 0].tolist() == [1, 2, 3, 100, 102, 103]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_file_in_a_stream(tmp_path, workers):
    top = write_folder(tmp_path)
    (top / "train/dog/1.png").write_bytes(b"broken")
    stream = load_data(f"folder:{top}", memory_limit=1, validation=None).train
    with pytest.raises(DataError, match=r"dog.1.png is not a readable image"):
        batches(make_loader(stream, 3, num_workers=workers))
    stream = load_data(f"folder:{top}", memory_limit=1, validation=None, on_error="skip").train
    with pytest.warns(UserWarning, match="left out an image.*dog.1.png"):
        found = batches(make_loader(stream, 3, num_workers=workers))
    assert torch.cat([b.index for b in found]).tolist() == [0, 1, 2, 3, 4, 6, 7]
    assert stream.skipped == (str(top / "train/dog/1.png"),)


def test_nothing_readable_is_an_error(tmp_path):
    top = write_folder(tmp_path, ("train",), count=1)
    for path in top.glob("train/*/*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match="none of its 2 images"):
        load_data(f"folder:{top}", test=0.5, on_error="skip")


@pytest.mark.parametrize("kind", ["file", "class", "nested", "part"])
def test_links_out_of_the_folder_are_refused(tmp_path, kind):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "s.png").write_bytes(png(picture(1)))
    top = write_folder(tmp_path / "set")
    link = {"file": "train/cat/link.png", "class": "train/eel", "nested": "train/cat/deep", "part": "val"}[kind]
    (top / link).symlink_to(secret / "s.png" if kind == "file" else secret)
    with pytest.raises(DataError, match="is a link to .*secret"):
        load_data(f"folder:{top}")


def test_a_link_inside_the_folder_is_fine(tmp_path):
    top = write_folder(tmp_path)
    (top / "train/cat/again.png").symlink_to(top / "test/cat/0.png")
    assert len(load_data(f"folder:{top}", validation=None).train) == 9


def test_folders_that_make_no_sense(tmp_path):
    with pytest.raises(DataError, match="holds no folders"):
        load_data(f"folder:{tmp_path}")
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        load_data(f"folder:{tmp_path}")
    top = write_folder(tmp_path / "set")
    (top / "test/emu").mkdir()
    with pytest.raises(DataError, match="'emu' is not among the train classes"):
        load_data(f"folder:{top}")


# ---- decoding -------------------------------------------------------------------------------------------------------


def test_sixteen_bit_grey_keeps_its_upper_bits():
    values = np.array([[0, 255], [256, 65535]], dtype=np.uint16)
    assert decode(png(values)).tolist() == [[[0, 0], [1, 255]]]


def test_folders_follow_exif_and_lay_what_is_transparent_on_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter, clockwise
    upright = np.arange(32, dtype=np.uint8).reshape(4, 8)
    clear = Image.new("RGBA", (8, 4), (9, 9, 9, 0))
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(upright).rotate(90, expand=True).save(tmp_path / part / name / "0.png", exif=exif)
            clear.convert("LA").save(tmp_path / part / name / "1.png")
    data = load_data(f"folder:{tmp_path}", validation=0.0)
    assert torch.equal(data.test.images[0], torch.from_numpy(upright)[None])
    assert data.test.images[1].unique().tolist() == [255]


def test_a_decompression_bomb_is_unreadable(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match="decompression bomb"):
        load_data(f"folder:{write_folder(tmp_path)}")
