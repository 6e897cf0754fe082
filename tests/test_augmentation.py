from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from overproof.data import Augment, CutMix, Cutout, HorizontalFlip, Mixup, RandAugment, RandomCrop, build_augment
from overproof.errors import UnknownNameError, UsageError

ALL = ["crop", "flip", "cutout:8", "randaugment:2:9", "mixup:0.2", "cutmix:1.0"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(32, 3, 12, 10, generator=generator(9))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.arange(32) % 4


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_shape_range_and_repeatability(name, channels, images, labels):
    images = images[:, :channels]
    before, state = images.clone(), torch.get_rng_state()
    augment = build_augment([name], classes=4)
    found, weights = augment(images, labels, generator(1))
    again, _ = augment(images, labels, generator(1))
    other, _ = augment(images, labels, generator(2))
    assert found.shape == images.shape
    assert found.dtype == torch.float32
    assert found.min() >= 0
    assert found.max() <= 1
    assert found.equal(again)
    assert not found.equal(other)
    assert images.equal(before)
    assert torch.get_rng_state().equal(state)
    assert weights.shape == ((32, 4) if augment.mixes else (32,))


@pytest.mark.parametrize(("padding", "fill"), [(4, 0.0), (2, 0.5), (0, 0.0)])
def test_crop_is_the_slicing_loop(images, labels, padding, fill):
    found, same = RandomCrop(padding, fill)(images, labels, generator(3))
    draw = generator(3)
    top, left = (torch.randint(2 * padding + 1, (32,), generator=draw).tolist() for _ in range(2))
    padded = F.pad(images, [padding] * 4, value=fill)
    expected = [padded[i, :, top[i] : top[i] + 12, left[i] : left[i] + 10] for i in range(32)]
    assert found.equal(torch.stack(expected))
    assert same is labels
    assert padding == 0 or len(set(top)) > 1


def test_flip_mirrors_some_and_leaves_the_rest(images, labels):
    found, _ = HorizontalFlip()(images, labels, generator())
    kinds = [0 if f.equal(i) else 1 if f.equal(i.flip(2)) else 2 for f, i in zip(found, images, strict=True)]
    assert set(kinds) == {0, 1}
    assert HorizontalFlip(1.0)(images, labels, generator())[0].equal(images.flip(3))
    assert HorizontalFlip(0.0)(images, labels, generator())[0].equal(images)


def test_cutout_blanks_one_square_and_nothing_else(labels):
    ones = torch.ones(400, 2, 9, 9)
    found, _ = Cutout(3)(ones, labels, generator())
    assert found[:, 0].equal(found[:, 1])
    rows, columns = ((found[:, 0] == 0).any(dim=d).sum(dim=1) for d in (2, 1))
    assert (found[:, 0] == 0).sum(dim=(1, 2)).equal(rows * columns)
    assert set(rows.tolist()) == set(columns.tolist()) == {2, 3}  # less than the side only at the border
    assert (found.mean(dim=0) < 1).all()
    assert Cutout(40, fill=0.5)(ones, labels, generator())[0].eq(0.5).all()


def test_cutout_of_even_size_can_be_cut_off_by_half(labels):
    found, _ = Cutout(4)(torch.ones(400, 1, 9, 9), labels, generator())
    assert set((found[:, 0] == 0).any(dim=2).sum(dim=1).tolist()) == {2, 3, 4}


def test_randaugment_changes_images_one_by_one(images, labels):
    one = images[:1].expand(16, -1, -1, -1)
    found, same = RandAugment(2, 9)(one, labels[:16], generator())
    assert len({tuple(f.flatten().tolist()) for f in found}) > 8
    assert same.equal(labels[:16])
    assert (found * 255 - (found * 255).round()).abs().max() < 1e-4


def test_randaugment_leaves_other_generators_alone(images, labels):
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    RandAugment()(images, labels, generator())
    assert torch.rand(3).equal(expected)


def test_mixup_is_the_formula(images, labels):
    found, weights = Mixup(1.0, 4)(images, labels, generator(5))
    assert weights.sum(dim=1).allclose(torch.ones(32))
    # every image is share * own + (1 - share) * other, with the share that the labels tell
    share = weights[torch.arange(32), labels].min()
    blended = [(f - share * i) / (1 - share) for f, i in zip(found, images, strict=True)]
    others = [min(range(32), key=lambda k, b=b: (images[k] - b).abs().max().item()) for b in blended]
    assert sorted(others) == list(range(32))
    expected = share * F.one_hot(labels, 4) + (1 - share) * F.one_hot(labels[others], 4)
    assert weights.allclose(expected, atol=1e-5)
    assert found.allclose(share * images + (1 - share) * images[others], atol=1e-5)


def test_mixup_draws_its_share_from_beta(labels):
    eye = torch.eye(2)[:, :, None, None].expand(-1, -1, 4, 4)
    shares = []
    for seed in range(400):
        weights = Mixup(0.4, 2)(eye, torch.tensor([0, 1]), generator(seed))[1]
        shares.append(weights.max().item())
    draws = torch.distributions.Beta(0.4, 0.4).sample((20_000,))
    draws = torch.where(
        torch.rand(20_000) < 0.5, torch.maximum(draws, 1 - draws), torch.ones(())
    )  # half the pairs are identities
    assert sum(shares) / 400 == pytest.approx(draws.mean().item(), abs=0.02)


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_pastes_one_box_and_weighs_by_area(seed):
    values = torch.linspace(0, 1, 16)
    images = values[:, None, None, None].expand(16, 1, 12, 10)
    found, weights = CutMix(1.0, 16)(images, torch.arange(16), generator(seed))
    foreign = (found != images).squeeze(1)
    box = foreign.any(dim=0)
    share = 1 - box.float().mean()
    assert box.sum() == box.any(dim=1).sum() * box.any(dim=0).sum()
    for i in range(16):
        assert not foreign[i].any() or foreign[i].equal(box)  # an image that is its own partner shows no box
        other = int((values - found[i, 0][foreign[i]][0]).abs().argmin()) if foreign[i].any() else i
        own, others = (F.one_hot(torch.tensor(k), 16) for k in (i, other))
        assert weights[i].allclose(share * own + (1 - share) * others, atol=1e-5)


def test_cutmix_boxes_differ_and_cover_about_the_share_drawn(labels):
    images = torch.arange(64.0)[:, None, None, None].expand(64, 1, 16, 16) / 64
    areas = []
    for seed in range(200):
        found, _ = CutMix(1.0, 64)(images, torch.arange(64), generator(seed))
        areas.append((found != images).any(dim=0).float().mean().item())
    # 1 - lambda is uniform, but boxes are cut off at the border, on average to about two thirds
    assert 0.2 < sum(areas) / 200 < 0.4
    assert len(set(areas)) > 50


def test_steps_follow_each_other_with_one_generator(images, labels):
    chain, one = build_augment("crop:2:0.5, flip:0.3,cutout:3"), generator(7)
    expected = images
    for step in (RandomCrop(2, 0.5), HorizontalFlip(0.3), Cutout(3)):
        expected, _ = step(expected, labels, one)
    assert isinstance(chain, Augment)
    assert chain.steps == (RandomCrop(2, 0.5), HorizontalFlip(0.3), Cutout(3))
    assert chain(images, labels, generator(7))[0].equal(expected)


def test_mixing_twice_keeps_weights_that_sum_to_one(images, labels):
    _, weights = build_augment(["mixup:1", "cutmix:1"], classes=4)(images, labels, generator())
    assert weights.sum(dim=1).allclose(torch.ones(32))
    assert weights.min() >= 0


@pytest.mark.parametrize("names", [None, [], "none", "", ["none"]])
def test_nothing_is_none(names):
    assert build_augment(names) is None


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("croop", UnknownNameError, "'crop'"),
        ("cutout", UsageError, "cutout:SIZE"),
        ("flip:0.5:1", UsageError, "flip:P"),
        ("flip:often", UsageError, "often"),
        ("flip:2", UsageError, r"in \[0, 1\]"),
        ("crop:-1", UsageError, "padding is -1"),
        ("crop:4:7", UsageError, "fill is 7"),
        ("cutout:0", UsageError, "at least 1"),
        ("randaugment:0", UsageError, "at least 1"),
        ("randaugment:2:40", UsageError, "0 to 30"),
        ("mixup:0", UsageError, "above 0"),
    ],
)
def test_wrong_names_and_values(name, error, message):
    with pytest.raises(error, match=message):
        build_augment([name], classes=4)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixing_needs_the_number_of_classes(name):
    with pytest.raises(UsageError, match="number of classes"):
        build_augment([name])
