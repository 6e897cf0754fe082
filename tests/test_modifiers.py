"""Sets changed on the way in: what every change does to pixels, and who may ask for it."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from overproof.data import DATA, Attribute, ImageSet, load_data
from overproof.data.corruptions import STRENGTHS, corrupted
from overproof.data.domains import blotchy, coloured, edges, in_colour, inverted, sketch, textured
from overproof.data.load import read_parts
from overproof.data.modifiers import MODIFIERS, Modifier, modify, split_name
from overproof.data.steps import RandomCrop, cut
from overproof.data.streams import StreamSet
from overproof.errors import DataError, UnknownNameError, UsageError
from overproof.registry import Entry


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grey(count: int = 5, side: int = 6) -> torch.Tensor:
    return torch.rand(count, 1, side, side, generator=drawn(9))


def no_other(name: str) -> dict[str, ImageSet]:
    raise AssertionError(f"{name} was read")


def test_names() -> None:
    assert split_name("mnist") == ("mnist", ())
    assert split_name("mnist+color+noise:3") == ("mnist", (Modifier("color"), Modifier("noise", "3")))
    assert split_name("parquet:a/b+c") == ("parquet:a/b+c", ())
    assert split_name("folder:x+colorful") == ("folder:x+colorful", ())
    base, (change,) = split_name("digits+mixed:color,textured:parquet:d+e")
    assert (base, str(change)) == ("digits", "mixed:color,textured:parquet:d+e")


def test_a_folder_with_a_plus_in_its_name_is_itself(tmp_path: Path) -> None:
    top = f"folder:{tmp_path}/cats"
    blur, noise = Modifier("blur"), Modifier("noise", "3")
    assert split_name(f"{top}+blur+noise:3") == (top, (blur, noise))
    (tmp_path / "cats+blur").mkdir()
    assert split_name(f"{top}+blur") == (f"{top}+blur", ())
    assert split_name(f"{top}+blur+noise:3") == (f"{top}+blur", (noise,))
    assert split_name(f"{top}/+blur") == (f"{top}/", (blur,))
    assert split_name(f"{top}+sketch") == (top, (Modifier("sketch"),))


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("digits+colour", UnknownNameError, "color"),
        ("digits+color:3", UsageError, "takes nothing after a colon"),
        ("digits+noise:6", UsageError, r"1 \(mild\) to 5"),
        ("digits+textured", UsageError, "textured:cifar10"),
        ("digits+mixed:color,mixed:sketch", UsageError, "cannot be one of them"),
        ("digits+mixed", UnknownNameError, "change of a data set ''"),
    ],
)
def test_wrong_names_say_what_is_right(name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        split_name(name)


def test_every_change_reads_digits_and_stays_in_range() -> None:
    for name in MODIFIERS:
        text = {"textured": "textured:digits", "mixed": "mixed:color,inverted"}.get(name, name)
        parts = read_parts(f"digits+{text}", None, {})
        plain = read_parts("digits", None, {})
        times = 3 if name == "mixed" else 1
        for part, images in parts.items():
            assert images.images.dtype == torch.uint8
            assert len(images) == times * len(plain[part])
            assert torch.equal(images.labels, plain[part].labels.repeat(times))
            assert images.channels == (1 if name in ("inverted", "edges", "sketch", *STRENGTHS) else 3)
        assert parts["train"].name == f"digits+{text}"


def test_a_change_belongs_to_the_image_whoever_reads_the_set() -> None:
    one, other = load_data("digits+color", seed=0), load_data("digits+color", seed=1, limit_test=50)
    places = {int(index): row for row, index in enumerate(one.test.index)}
    rows = [places[int(index)] for index in other.test.index]
    assert torch.equal(one.test.images[rows], other.test.images)
    again = load_data("digits+rgb+color").test  # three equal channels are grey
    assert torch.equal(again.images, one.test.images)
    assert not torch.equal(load_data("digits+blobs").test.images, one.test.images)


def test_mixed_is_the_set_in_colour_and_then_under_each_change() -> None:
    parts = {
        name: read_parts(f"digits+{name}", None, {})["test"].images for name in ("mixed:color,sketch", "rgb", "color", "sketch")
    }
    rgb, color, lines = parts["mixed:color,sketch"].chunk(3)
    assert torch.equal(rgb, parts["rgb"])
    assert torch.equal(color, parts["color"])
    assert torch.equal(lines, parts["sketch"].expand(-1, 3, -1, -1))


def test_coloured_ground() -> None:
    images = torch.tensor([0.0, 0.25, 1.0]).view(1, 1, 1, 3).expand(4, 1, 3, 3)
    found = coloured(images, drawn())
    ground = found[:, :, 0, 0]
    assert (ground < 0.75).all()
    assert len({tuple(colour.tolist()) for colour in ground}) == 4
    torch.testing.assert_close(found[:, :, :, 1], (0.25 + 0.75 * ground)[:, :, None].expand(-1, -1, 3))
    assert torch.equal(found[:, :, :, 2], torch.ones(4, 3, 3))
    with pytest.raises(DataError, match="made for grey images"):
        coloured(torch.rand(2, 3, 4, 4), drawn())


def test_textured_ground_is_the_difference_to_a_window_of_a_picture() -> None:
    pictures = (torch.arange(2 * 3 * 9 * 9) % 251).view(2, 3, 9, 9).to(torch.uint8)
    figure = grey(3, 6)
    found = textured(figure, drawn(), pictures)
    windows = (pictures.float() / 255).unfold(2, 6, 1).unfold(3, 6, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 6, 6)
    for image, x in zip(found, figure, strict=True):
        assert ((windows - x).abs() - image).abs().flatten(1).amax(1).min() < 1e-6
    black = textured(torch.zeros(3, 1, 6, 6), drawn(), torch.full((1, 1, 2, 2), 51, dtype=torch.uint8))  # enlarged first
    torch.testing.assert_close(black, torch.full((3, 3, 6, 6), 0.2))


def test_blobs_inverted_and_colour() -> None:
    found = blotchy(torch.cat([torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)]), drawn())
    assert (found[0] >= 0.4).all()
    assert found[0].std() > 0.02
    assert not found[1].any()
    assert torch.equal(inverted(grey(), drawn()), 1 - grey())
    assert torch.equal(in_colour(grey(), drawn())[:, 2:], grey())


def test_edges_of_a_step_lie_beside_it() -> None:
    step = torch.zeros(1, 1, 6, 6)
    step[..., 3:] = 0.5
    found = edges(step, drawn())
    expected = torch.zeros(6)
    expected[2:4] = 1
    torch.testing.assert_close(found[0, 0], expected.expand(6, 6))
    assert torch.equal(sketch(step, drawn()), 1 - found)
    assert not edges(torch.full((1, 3, 5, 5), 0.3), drawn()).any()


def test_corruptions_in_closed_form() -> None:
    flat = torch.full((2, 3, 40, 40), 0.5)
    for severity, std in enumerate(STRENGTHS["noise"], start=1):
        noise = corrupted(flat, "noise", severity, drawn()) - flat
        assert noise.std() == pytest.approx(std, rel=0.03)
        assert (
            torch.equal(corrupted(flat, "blur", severity, drawn()), flat)
            or (corrupted(flat, "blur", severity, drawn()) - flat).abs().max() < 1e-6
        )
    images = torch.rand(2, 3, 8, 8, generator=drawn())
    faded = corrupted(images, "contrast", 3, drawn())
    mean = images.mean(dim=(2, 3))
    torch.testing.assert_close(faded.mean(dim=(2, 3)), mean)
    torch.testing.assert_close(faded.std(dim=(2, 3)), 0.4 * images.std(dim=(2, 3)))


def test_blur_is_the_gaussian() -> None:
    point = torch.zeros(1, 1, 15, 15)
    point[0, 0, 7, 7] = 1
    found = corrupted(point, "blur", 5, drawn())[0, 0]  # a standard deviation of one pixel
    assert found.sum() == pytest.approx(1, abs=1e-5)
    assert float(found[7, 8] / found[7, 7]) == pytest.approx(math.exp(-0.5), rel=1e-5)
    assert float(found[8, 8] / found[7, 7]) == pytest.approx(math.exp(-1), rel=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_what_a_file_gives_back(channels: int) -> None:
    images = torch.rand(2, channels, 16, 16, generator=drawn())
    found = corrupted(images, "jpeg", 2, drawn())
    buffer, array = io.BytesIO(), (images[1] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(array if channels == 3 else array[:, :, 0]).save(buffer, "JPEG", quality=65)
    expected = torch.from_numpy(np.array(Image.open(buffer))).view(16, 16, channels).permute(2, 0, 1).float() / 255
    torch.testing.assert_close(found[1], expected)


def test_corruptions_grow_with_severity() -> None:
    images = load_data("digits").test.images[:100].float() / 255
    for kind in STRENGTHS:
        change = [float((corrupted(images, kind, severity, drawn()) - images).square().mean()) for severity in range(1, 6)]
        assert change == sorted(change), kind
        assert change[-1] > 1.2 * change[0], kind
    with pytest.raises(UnknownNameError, match="noise"):
        corrupted(images, "nois", 1, drawn())
    with pytest.raises(UsageError, match="The severity of blur is 0"):
        corrupted(images, "blur", 0, drawn())


def test_sets_that_do_not_fit_into_memory_are_refused() -> None:
    stream = StreamSet(torch.utils.data.TensorDataset(torch.rand(4, 1, 6, 6), torch.arange(4)), classes=4, name="huge")
    with pytest.raises(DataError, match=r"huge\+color: sets that are changed are held in memory"):
        modify(stream, Modifier("color"), part="test", read=no_other)


def test_training_and_test_part_of_a_change_differ() -> None:
    images = ImageSet(grey(), torch.arange(5))
    train, test = (modify(images, Modifier("color"), part=part, read=no_other).images for part in ("train", "test"))
    assert not torch.equal(train, test)
    assert torch.equal(train, modify(images, Modifier("color"), part="train", read=no_other).images)


def test_random_crop_cuts_windows() -> None:
    images = torch.arange(2 * 3 * 25.0).view(2, 3, 5, 5)
    found = cut(images, torch.tensor([0, 2]), torch.tensor([1, 3]), (3, 2))
    assert torch.equal(found[0], images[0, :, 0:3, 1:3])
    assert torch.equal(found[1], images[1, :, 2:5, 3:5])
    crop, _ = RandomCrop(0)(images, torch.zeros(2), drawn())
    assert torch.equal(crop, images)


def apart(name: str, **how: object) -> dict[str, list[int]]:
    """What the images of each part were made from; in no two parts the same, and each under all changes alike often."""
    data = load_data(name, **how)
    found = {part: getattr(data, part).origin.tolist() for part in ("train", "validation", "test")}
    sets = [set(origin) for origin in found.values()]
    assert len(set.union(*sets)) == sum(map(len, sets)), "a picture is on two sides"
    for origin in found.values():
        assert len({origin.count(one) for one in origin}) == 1
    return found


def test_no_picture_of_a_mixed_set_is_held_out_and_trained_on() -> None:
    plain, mixed = apart("digits"), apart("digits+mixed:color,blobs")
    assert mixed == {part: origin * 3 for part, origin in plain.items()}  # the same pictures as without a change
    assert apart("digits+mixed:color+noise:1")["validation"] == plain["validation"] * 2
    images = load_data("digits+mixed:color,blobs", validation=0.2)
    indices = [getattr(images, part).index for part in ("train", "validation")]
    assert len(torch.cat(indices).unique()) == 3 * 1347  # rows of tables stay apart all the same
    assert apart("digits+mixed:color", long_tail=10)["train"] == apart("digits", long_tail=10)["train"] * 2
    assert apart("digits+mixed:color", validation=0.5, validation_from="test")["test"]


def test_a_mixed_set_without_a_test_part(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"train": read_parts("digits", None, {})["train"]}
    monkeypatch.setitem(DATA._entries, "single", Entry("single", lambda: whole))
    found = apart("single+mixed:color,sketch", test=0.2, validation=0.2)
    assert found == {part: origin * 3 for part, origin in apart("single", test=0.2, validation=0.2).items()}


def test_limits_of_a_mixed_set_choose_pictures() -> None:
    found = load_data("digits+mixed:color,blobs", limit_train=301, limit_test=2)
    assert (len(found.train), len(found.validation), len(found.test)) == (300, 2, 2)
    assert torch.equal(found.train.origin, load_data("digits", limit_train=100).train.index.repeat(3))
    assert len(load_data("digits", limit_train=301).train) == 301
    with pytest.raises(UsageError, match="A subset of 0 images"):
        load_data("digits+mixed:color", limit_train=0)
    with pytest.raises(DataError, match="5 images, but 2 positions in `origin`"):
        ImageSet(grey(), torch.arange(5), origin=torch.arange(2))


def test_subgroups_files_and_gaps_survive_every_change() -> None:
    images = ImageSet(
        grey(),
        torch.arange(5),
        index=torch.tensor([6, 0, 2, 3, 4]),
        skipped=("gone.png",),
        files=[f"{i}.png" for i in range(7)],
    ).with_attribute(Attribute("camera", ("a", "b"), torch.tensor([0, -1, 1, 0, 1, -1, 1])))
    for text, times in (("noise:2", 1), ("color", 1), ("mixed:inverted,sketch", 3)):
        found = modify(images, Modifier.parse(text), part="train", read=no_other)
        assert found.groups.tolist() == [1, 0, 1, 0, 1] * times
        assert found.attribute.name == "camera"
        assert found.skipped == ("gone.png",)
        assert [found.files[i] for i in found.index] == ["6.png", "0.png", "2.png", "3.png", "4.png"] * times
        assert found.origin.tolist() == images.index.tolist() * times
        assert found.subset([1, len(found) - 1]).groups.tolist() == [0, 1]
    assert images.name == "images"  # the set itself stays as it was
    assert images.channels == 1


def test_a_run_is_trained_on_a_changed_set(tmp_path) -> None:
    import overproof

    run = overproof.train("cnn", "digits+mixed:color", epochs=1, limit_train=100, limit_test=40, out=tmp_path / "run")
    assert run.folder.config["data"]["name"] == "digits+mixed:color"
    assert run.model(torch.rand(1, 3, 8, 8)).shape == (1, 10)
    with pytest.raises(UnknownNameError, match="change of a data set"):
        overproof.train("cnn", "digits+colur", out=tmp_path / "other")
