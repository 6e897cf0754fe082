"""Long tails, parts held out of the test set, and subgroups from columns and side files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from overproof.cli import call
from overproof.config import resolve
from overproof.data import DATA, Attribute, ImageSet, StreamSet, load_data, long_tailed
from overproof.data.attributes import attributes_of, with_side_file
from overproof.errors import DataError, UnknownNameError, UsageError
from overproof.folder import RunFolder
from overproof.registry import Entry
from overproof.run.prepare import data_of


def images_of(count: int, **about: Any) -> ImageSet:
    """Random grey images of three classes."""
    pixels = torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageSet(pixels, torch.arange(count) % 3, classes=3, **about)


# Long tails


def test_the_long_tail_of_cifar() -> None:
    labels = torch.arange(10).repeat_interleave(5000)
    counts = torch.bincount(labels[long_tailed(labels, 100)]).tolist()
    assert counts == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert torch.bincount(labels[long_tailed(labels, 1)]).tolist() == [5000] * 10


def test_a_longer_tail_is_part_of_a_shorter_one_and_every_class_stays() -> None:
    labels = torch.randint(0, 6, (600,), generator=torch.Generator().manual_seed(1))
    short, long = long_tailed(labels, 10), long_tailed(labels, 1000)
    assert {*long.tolist()} < {*short.tolist()}
    assert long.tolist() == sorted(long.tolist())
    assert torch.bincount(labels[long])[-1] == 1
    assert long_tailed(labels, 10).tolist() == short.tolist()
    assert long_tailed(labels, 10, seed=1).tolist() != short.tolist()
    few = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 1, 2])  # an unbalanced set loses no class and gains nothing
    assert torch.bincount(few[long_tailed(few, 2)]).tolist() == [1, 5, 1]
    with pytest.raises(UsageError, match="ratio is 0.5; give a number of at least 1"):
        long_tailed(labels, 0.5)


def test_only_the_training_images_are_thinned_out() -> None:
    plain, thin = load_data("digits", validation=0.3), load_data("digits", validation=0.3, long_tail=30)
    assert thin.validation.index.tolist() == plain.validation.index.tolist()
    assert thin.test.index.tolist() == plain.test.index.tolist()
    assert {*thin.train.index.tolist()} < {*plain.train.index.tolist()}
    counts = torch.bincount(thin.train.labels)
    most = int(torch.bincount(plain.train.labels).max())
    assert counts.tolist() == [min(int(most * 30 ** (-c / 9)), int((plain.train.labels == c).sum())) for c in range(10)]
    assert len(load_data("digits", long_tail=30, limit_train=50).train) == 50


def test_holding_out_of_the_test_part() -> None:
    half = load_data("digits", validation=0.5, validation_from="test")
    whole = load_data("digits", validation=0)
    assert half.train.index.tolist() == whole.train.index.tolist()
    together = torch.cat([half.validation.index, half.test.index]).sort().values
    assert together.tolist() == whole.test.index.sort().values.tolist()
    balance = torch.bincount(half.validation.labels) - torch.bincount(half.test.labels)
    assert int(balance.abs().max()) <= 1


def test_the_command_line_and_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = [
        "train",
        "--data",
        "digits",
        "--long-tail",
        "20",
        "--set",
        "data.limit_test=30",
        "--epochs",
        "1",
        "--model",
        "mlp",
        "--out",
        "a",
    ]
    assert call(command) == 0
    folder = RunFolder("a")
    assert folder.config["data"]["long_tail"] == 20
    counts = folder.data["counts"]["train"]
    assert counts == torch.bincount(data_of(resolve(folder.config)).train.labels).tolist()
    assert counts[0] > 15 * counts[9]
    assert call([*command[:4], "0.5", *command[5:-1], "b"]) == 2
    with pytest.raises(UsageError, match="data.validation_from = 'train '|data.validation_from"):
        resolve({"data": {"validation_from": "both"}})


# Attributes of parts


def test_attributes_number_all_parts_alike_and_in_order() -> None:
    made = attributes_of("size", {"train": ["10", " 2", None], "test": [2, "big"]}, "here")
    assert made["train"].names == made["test"].names == ("2", "10", "big")
    assert made["train"].numbers.tolist() == [1, 0, -1]
    assert made["test"].numbers.tolist() == [0, 2]
    with pytest.raises(DataError, match="'x' takes 1001 different values"):
        attributes_of("x", {"train": range(1001)}, "here")


@pytest.mark.parametrize("kind", ["memory", "stream"])
def test_sets_carry_their_subgroups_along(kind: str) -> None:
    images = images_of(9)
    if kind == "stream":
        images = StreamSet(
            [(image, int(label)) for image, label in zip(images.images, images.labels, strict=True)], labels=images.labels
        )
    assert images.groups is None
    named = images.with_attribute(Attribute("camera", ("a", "b"), torch.tensor([0, 1] * 5)))
    assert images.groups is None  # the set itself stays as it was
    part = named.subset([8, 1, 2]).subset([0, 1])
    assert part.groups.tolist() == [0, 1]
    assert part.attribute.name == "camera"
    with pytest.raises(DataError, match="2 of the 9 images have no 'camera', the first is the one at position 7"):
        images.with_attribute(Attribute("camera", ("a", "b"), torch.tensor([0, 1] * 3 + [0])))
    with pytest.raises(DataError, match="1 of the 9 images have no 'camera', the first is the one at position 4"):
        images.with_attribute(Attribute("camera", ("a", "b"), torch.tensor([0, 1, 0, 1, -1, 0, 0, 0, 0])))


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def table(count: int, camera: list[Any]) -> pa.Table:
    rows = [{"bytes": png(i), "path": f"{i}.png"} for i in range(count)]
    return pa.table({"image": rows, "label": [i % 2 for i in range(count)], "camera": camera})


def test_a_column_of_a_parquet_set(tmp_path: Path) -> None:
    pq.write_table(table(6, ["old", "new", "old", "new", "old", "old"]), tmp_path / "train-0.parquet")
    pq.write_table(table(2, ["new", "old"]), tmp_path / "test-0.parquet")
    data = load_data(f"parquet:{tmp_path}", validation=0, attribute="camera")
    assert data.train.attribute.names == ("new", "old")
    assert data.train.groups.tolist() == [1, 0, 1, 0, 1, 1]
    assert data.test.groups.tolist() == [0, 1]
    assert load_data(f"parquet:{tmp_path}", validation=0).train.attribute is None
    held = load_data(f"parquet:{tmp_path}", validation=0.34, attribute="camera")
    assert held.validation.groups.tolist() == [[1, 0, 1, 0, 1, 1][i] for i in held.validation.index.tolist()]
    with pytest.raises(DataError, match=r"no column 'lens'; it has .*camera \(string\).*attribute=\.\.\."):
        load_data(f"parquet:{tmp_path}", attribute="lens")
    pq.write_table(table(2, ["new", None]), tmp_path / "test-0.parquet")
    with pytest.raises(DataError, match="row 1 has no 'camera'"):
        load_data(f"parquet:{tmp_path}", attribute="camera")
    streamed = load_data(f"parquet:{tmp_path}", validation=0, attribute="label", memory_limit=10_000)
    assert streamed.train.attribute.names == ("0", "1")  # the label itself may be the attribute
    with pytest.raises(UsageError, match=r"digits has no columns. Name a CSV file.*data.attribute_file"):
        load_data("digits", attribute="camera")


def side(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", "utf-8-sig")
    return path


def test_a_side_file_by_position(tmp_path: Path) -> None:
    parts = {"train": images_of(6).subset([5, 0, 3]), "test": images_of(2)}
    by_index = side(tmp_path / "a.csv", "part,index,camera", "train,2,x", "test,1,y", "train,0,y", "test,0,x", "train,1,y")
    found = with_side_file(parts, by_index)
    assert found["train"].groups.tolist() == [1, 1, 0]  # the third image of the part, wherever it was in its source
    assert found["test"].groups.tolist() == [0, 1]
    assert parts["train"].attribute is None
    in_order = side(tmp_path / "b.csv", "camera, part ,lens", "y,train,1", "y,train,2", "x,train,1", "x,test,1", "y,test,1")
    assert with_side_file(parts, in_order, "camera")["train"].groups.tolist() == [1, 1, 0]
    alone = side(tmp_path / "c.csv", "camera", "y", "y", "x")
    assert with_side_file({"train": parts["train"]}, alone)["train"].groups.tolist() == [1, 1, 0]


BY_PART = ("part,index,camera", "train,0,x", "train,1,y", "train,2,x", "test,0,x", "test,1,y")


@pytest.mark.parametrize(
    ("lines", "column", "message"),
    [
        (("camera",), None, "has no rows"),
        (("part,index", "train,0"), None, "no column that could be an attribute"),
        (("part,a,b", "train,1,1"), None, r"the columns a, b\. Name the one"),
        (BY_PART, "lens", "the columns camera but no 'lens'"),
        (("camera", "x", "y"), None, "neither a column 'file' nor a column 'part'.*parts train, test"),
        ((*BY_PART, "val,0,x"), None, "line 7: the data have no part 'val'; they have train, test"),
        (BY_PART[:-1], None, "1 of the 2 images of the test part have no row, the first is number 1"),
        ((*BY_PART, "test,2,x"), None, r"line 7 is about image 2 of the test part, which has 2 images \(0 to 1\)"),
        ((*BY_PART, "test,one,x"), None, "line 7 is about image one"),
        ((*BY_PART, "test,1,x"), None, "line 7: a second row for image 1 of the test part"),
        ((*BY_PART[:-1], "test,1, "), None, "line 6: there is no 'camera'"),
        (("part,camera", "train,x", "train,y", "test,x", "test,y"), None, "1 of the 3 images of the train part have no row"),
        (("file,camera", "a.png,x"), None, "have no names. Use the columns part and index"),
    ],
)
def test_side_files_that_do_not_match_are_named(
    tmp_path: Path, lines: tuple[str, ...], column: str | None, message: str
) -> None:
    parts = {"train": images_of(3), "test": images_of(2)}
    path = side(tmp_path / "side.csv", *lines)
    with pytest.raises(DataError, match=message) as caught:
        with_side_file(parts, path, column)
    assert "side.csv" in str(caught.value)


def test_side_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.csv cannot be read as CSV"):
        with_side_file({"train": images_of(3)}, tmp_path / "nowhere.csv")
    (tmp_path / "odd.csv").write_bytes(b"camera\n\xff\xfe\n")
    with pytest.raises(DataError, match="cannot be read as CSV"):
        with_side_file({"train": images_of(3)}, tmp_path / "odd.csv")


def test_a_side_file_of_a_folder(tmp_path: Path) -> None:
    top = tmp_path / "faces"
    for part, count in (("train", 3), ("test", 2)):
        for name in ("ann", "bob"):
            (top / part / name).mkdir(parents=True)
            for i in range(count):
                (top / part / name / f"{i}.png").write_bytes(png(10 * i))
    files = [f"{part}/{name}/{i}.png" for part, n in (("train", 3), ("test", 2)) for name in ("ann", "bob") for i in range(n)]
    lines = [f"{name},{'old' if i % 2 else 'new'},7" for i, name in enumerate(files)]
    path = side(tmp_path / "side.csv", "file,camera,lens", *reversed(lines))
    data = load_data(f"folder:{top}", validation=0, attribute="camera", attribute_file=path)
    assert data.train.groups.tolist() == [0, 1, 0, 1, 0, 1]
    assert data.test.groups.tolist() == [0, 1, 0, 1]
    assert data.train.subset([1]).files == data.train.files
    with pytest.raises(DataError, match=r"1 of the 6 images of the train part have no row, such as 'train/ann/0.png'"):
        load_data(f"folder:{top}", attribute="camera", attribute_file=side(path, "file,camera,lens", *lines[1:]))
    with pytest.raises(DataError, match="line 12: a second row for the file 'train/ann/0.png'"):
        load_data(f"folder:{top}", attribute="camera", attribute_file=side(path, "file,camera,lens", *lines, "./" + lines[0]))
    more = side(path, "file,camera,lens", *lines, "gone.png,x,7")
    with pytest.warns(UserWarning, match="1 of its 11 rows are about files that are not there"):
        load_data(f"folder:{top}", validation=0, attribute="camera", attribute_file=more)
    (top / "train/ann/0.png").write_bytes(b"broken")
    with pytest.warns(UserWarning, match="left out 1"):
        left = load_data(
            f"folder:{top}",
            validation=0,
            on_error="skip",
            attribute="camera",
            attribute_file=side(path, "file,camera,lens", *lines),
        )
    assert left.train.groups.tolist() == [1, 0, 1, 0, 1]


def test_positions_of_a_set_with_unreadable_images() -> None:
    """Rows are counted over all images of a part, those that could not be read too."""
    part = images_of(3, index=torch.tensor([0, 2, 3]), skipped=("row 1",))
    assert part.with_attribute(Attribute("a", ("x", "y"), torch.tensor([0, -1, 1, 0]))).groups.tolist() == [0, 1, 0]


def test_a_user_source_with_a_side_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"train": images_of(6), "test": images_of(3)}
    monkeypatch.setitem(DATA._entries, "always-the-same", Entry("always-the-same", lambda: held))
    path = side(tmp_path / "s.csv", "part,camera", *["train,x"] * 6, *["test,x"] * 3)
    assert load_data("always-the-same", validation=0, attribute_file=path).train.groups.tolist() == [0] * 6
    assert held["train"].attribute is None
    with pytest.raises(UnknownNameError, match="atribute"):
        load_data("digits", atribute="x")
