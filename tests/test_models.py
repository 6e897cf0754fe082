from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from overproof.errors import DataError, OverproofError, UnknownNameError, UsageError
from overproof.features import Tap
from overproof.models import MODELS, Classifier, Normalize, as_classifier, create_model, parameters_of, rebuild

# Printed in papers, in the benchmarks' tables or model cards, or known from them by arithmetic: (classes, options) -> count.
PUBLISHED = {
    ("resnet8", 10): 75_290,
    ("resnet14", 10): 172_506,
    ("resnet20", 10): 269_722,
    ("resnet26", 10): 366_938,
    ("resnet20", 100, "projection"): 278_324,
    ("resnet56", 100, "projection"): 861_620,
    ("resnet8x4", 100): 1_233_540,
    ("resnet32x4", 100): 7_433_860,
    ("resnet18", 10): 11_173_962,
    ("resnet34", 10): 21_282_122,
    ("resnet50", 10): 23_520_842,
    ("wrn-16-2", 100): 703_284,
    ("wrn-40-2", 100): 2_255_156,
    ("wrn-28-10", 10): 36_479_194,
    ("wrn-34-10", 10): 46_160_474,
    ("preact-resnet18", 10): 11_172_170,
    ("vgg8", 100): 3_965_028,
    ("vgg13", 100): 9_462_180,
    ("mobilenetv2", 100): 812_836,
    ("shufflenetv1", 100): 949_258,
    ("shufflenetv2", 100): 1_355_528,
}
HUGE = {"wrn-28-10", "wrn-34-10", "resnet34", "resnet50", "vit-ae-b16", "vit-ae-l16"}
EIGHT = ("lenet5", "lenet5-half", "resnet8", "resnet8x4", "wrn-16-1", "vit-tiny", "mlp", "cnn", "vgg8", "mobilenetv2")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("key", PUBLISHED, ids=str)
def test_parameter_counts_are_the_published_ones(key: tuple) -> None:
    options = {"shortcut": key[2]} if len(key) > 2 else {}
    with torch.device("meta"):
        assert parameters_of(MODELS.create(key[0], key[1], 3, 32, **options)) == PUBLISHED[key]


def test_lenet_counts_at_28_pixels() -> None:
    assert parameters_of(create_model("lenet5", 10, 1, 28)) == 61_706
    assert parameters_of(create_model("lenet5-half", 10, 1, 28)) == 15_738


def test_counting_includes_frozen_weights_and_leaves_out_buffers() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).requires_grad_(False)
    assert parameters_of(model) == 3 * 2 + 2 + 4


@pytest.mark.parametrize("name", sorted(set(MODELS.names()) - HUGE))
@pytest.mark.parametrize(("channels", "size"), [(3, 32), (1, 28)])
def test_forward_and_stages(name: str, channels: int, size: int) -> None:
    model = create_model(name, 7, channels, size).eval()
    images = torch.rand(2, channels, size, size)
    assert len(model.stages) == len(model.preact_stages) >= 2
    logits, features = Tap(model, {*model.stages, *model.preact_stages, model.penultimate})(images)
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    vector = features[model.penultimate]
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    torch.testing.assert_close(last(vector), logits)
    shapes = [features[stage].shape for stage in model.stages]
    assert shapes == [features[stage].shape for stage in model.preact_stages]
    sides = [shape[-1] for shape in shapes if len(shape) == 4]
    assert sides == sorted(sides, reverse=True)
    assert not sides or sides[-1] < sides[0]


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "vgg8", "shufflenetv1", "shufflenetv2", "cnn", "lenet5", "mlp"])
def test_stage_is_relu_of_its_preactivation(name: str) -> None:
    model = create_model(name, 5, 3, 32).eval()
    _, features = Tap(model, model.stages + model.preact_stages)(torch.rand(2, 3, 32, 32))
    for stage, before in zip(model.stages, model.preact_stages, strict=True):
        assert (features[before] < 0).any()
        assert torch.equal(features[before].relu(), features[stage])


@pytest.mark.parametrize("name", EIGHT)
def test_networks_for_digits_of_eight_pixels(name: str) -> None:
    model = create_model(name, 10, 1, 8)
    logits = model(torch.rand(4, 1, 8, 8))
    logits.square().sum().backward()
    assert logits.shape == (4, 10)
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent


def test_no_activation_works_in_place() -> None:
    for name in set(MODELS.names()) - HUGE:
        with torch.device("meta"):
            net = MODELS.create(name, 10, 3, 32)
        assert not [n for n, m in net.named_modules() if getattr(m, "inplace", False)], name


def test_pad_shortcut_is_subsampling_and_zeros() -> None:
    net = MODELS.create("resnet8", 10, 3, 8)
    maps = torch.rand(2, 16, 8, 8)
    short = net.layer2[0].shortcut(maps)
    assert torch.equal(short[:, :16], maps[:, :, ::2, ::2])
    assert not short[:, 16:].any()


def test_grouped_convolutions_of_shufflenet_see_all_groups() -> None:
    from overproof.models.blocks import shuffle

    maps = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert shuffle(maps, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]


def test_options_are_checked() -> None:
    assert parameters_of(create_model("mlp", 10, 1, 8, hidden=[32])) == 64 * 32 + 32 + 32 * 10 + 10
    assert create_model("cnn", 10, 1, 8, widths=[4, 8]).stages == ("net.layers.0", "net.layers.1")
    for name, options in [
        ("mlp", {"hidden": (0,)}),
        ("cnn", {"widths": ()}),
        ("cnn", {"width": (4,)}),
        ("resnet8", {"shortcut": "none"}),
        ("wrn-16-1", {"dropout": 1.0}),
        ("vit-tiny", {"patch_size": 3}),
        ("mobilenetv2", {"expansion": 0}),
    ]:
        with pytest.raises(UsageError):
            create_model(name, 10, 1, 8, **options)


@pytest.mark.parametrize("sizes", [(1, 3, 32), (10, 0, 32), (10, 3, 0)])
def test_impossible_sizes(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="must be at least"):
        create_model("cnn", *sizes)


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="'resnet20'"):
        create_model("resnet-20", 10)
    with pytest.raises(UnknownNameError, match="'resnet18'"):
        create_model("timm:resnet_18", 10)
    with pytest.raises(UnknownNameError, match="'resnet18'"):
        create_model("torchvision:resnet_18", 10)


def test_normalisation_is_exact() -> None:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    images = torch.rand(2, 3, 4, 4)
    normalize = Normalize(mean, std)
    assert normalize.mean.shape == normalize.std.shape == (1, 3, 1, 1)
    assert set(normalize.state_dict()) == {"mean", "std"}
    for c in range(3):
        assert torch.equal(normalize(images)[:, c], (images[:, c] - torch.tensor(mean[c])) / torch.tensor(std[c]))
    assert torch.equal(Normalize()(images), images)
    assert torch.equal(Normalize(0.5, 0.25)(images), (images - 0.5) / 0.25)


@pytest.mark.parametrize(
    "bad",
    [
        {"std": 0.0},
        {"std": (0.2, -1)},
        {"mean": float("nan")},
        {"mean": (0.1, 0.2), "std": (1, 1, 1)},
        {"mean": 125, "std": 50},
    ],
)
def test_unusable_normalisation(bad: dict) -> None:
    with pytest.raises(UsageError, match="Normalisation"):
        Normalize(**bad)


def test_classifier_says_what_is_wrong_with_images() -> None:
    model = create_model("cnn", 10, 3, 8)
    with pytest.raises(DataError, match=r"1 channels.*built for 3.*in_channels=1"):
        model(torch.rand(2, 1, 8, 8))
    with pytest.raises(DataError, match=r"\(3, 8, 8\)"):
        model(torch.rand(3, 8, 8))
    with pytest.raises(DataError, match="uint8"):
        model(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_classifier_compiles_in_one_graph() -> None:
    model = create_model("cnn", 10, 1, 8, mean=0.3, std=0.2).eval()
    images = torch.rand(2, 1, 8, 8)
    expected = model(images)
    model.compile(backend="eager", fullgraph=True)
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet8", {"shortcut": "projection"}),
        ("mlp", {"hidden": (16,)}),
        ("vit-tiny", {"depth": 2}),
        ("timm:resnet10t", {}),
        ("torchvision:squeezenet1_1", {}),
    ],
)
def test_rebuilding_from_spec(name: str, options: dict) -> None:
    model = create_model(name, 5, 1, 32, mean=0.3, std=(0.2,), **options).eval()
    spec = json.loads(json.dumps(model.spec))
    other = rebuild(spec)
    assert other.spec == model.spec
    assert torch.equal(other.normalize.mean, model.normalize.mean)
    other.load_state_dict(model.state_dict())
    images = torch.rand(2, 1, 32, 32)
    assert torch.equal(other.eval()(images), model(images))


def test_broken_or_dangerous_specs() -> None:
    spec = create_model("timm:resnet10t", 5, 3, 32).spec
    with pytest.raises(OverproofError, match="not complete"):
        rebuild({"name": "resnet8"})
    with pytest.raises(OverproofError, match="checkpoint_path"):
        rebuild({**spec, "options": {"checkpoint_path": "x.pt"}})


def test_timm_transformer_takes_the_image_size() -> None:
    model = create_model("timm:vit_tiny_patch16_224", 5, 3, 32, depth=1)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 5)
    with pytest.raises(UsageError, match="does not take these options"):
        create_model("timm:resnet10t", 5, colour="red")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "convnext_tiny", "vit_b_16", "swin_t", "squeezenet1_0"])
def test_torchvision_heads_are_replaced(name: str) -> None:
    import torchvision

    from overproof.models.foreign import replace_head

    with torch.device("meta"):
        net = torchvision.models.get_model(name)
        replace_head(net, 7)
        fresh = torchvision.models.get_model(name, num_classes=7)
    assert parameters_of(net) == parameters_of(fresh)


def test_torchvision_reads_grey_images() -> None:
    assert create_model("torchvision:resnet18", 5, 1, 32)(torch.rand(2, 1, 32, 32)).shape == (2, 5)
    with pytest.raises(UsageError, match="3 channels, not 1"):
        create_model("torchvision:resnet18", 5, 1, 32, pretrained=True)


def test_pretrained_statistics_and_missing_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm
    import torchvision

    build = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **kw: build(name, pretrained=False, **kw))
    model = create_model("timm:resnet10t", 5, pretrained=True)
    assert model.normalize.mean.flatten().tolist() == pytest.approx(list(model.net.pretrained_cfg["mean"]))
    assert create_model("timm:resnet10t", 5).normalize.mean.flatten().tolist() == [0, 0, 0]

    def offline(*args: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(torchvision.models, "get_model", offline)
    for name in ("timm:resnet10t", "torchvision:resnet18"):
        with pytest.raises(OverproofError, match=rf"{name}.*no route to host.*pretrained=False"):
            create_model(name, 5, pretrained=True)
    with pytest.raises(UsageError, match="no pretrained weights"):
        create_model("resnet8", 5, pretrained=True)


def test_callable_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(num_classes: int, *, width: int = 4) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

    module = types.ModuleType("users_networks")
    module.build, module.number = build, lambda: 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "users_networks", module)
    model = create_model("users_networks:build", 6, mean=0.5, width=8)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 6)
    assert model.spec is not None
    with pytest.raises(OverproofError, match=r"model=\.\.\."):
        rebuild(model.spec)
    other = rebuild(model.spec, trusted=True)
    other.load_state_dict(model.state_dict())
    for name, problem in [
        ("users_networks:buidl", "could not be imported"),
        ("no_such_package:build", "could not be imported"),
        ("users_networks:number", "must return a torch.nn.Module"),
    ]:
        with pytest.raises(UsageError, match=problem):
            create_model(name, 6)


def test_rebuilding_does_not_import_untrusted_modules() -> None:
    spec = {**create_model("cnn", 2, 1, 8).spec, "name": "antigravity:fly"}
    with pytest.raises(OverproofError, match="trusted=True"):
        rebuild(spec)
    assert "antigravity" not in sys.modules


def test_wrapping_happens_once() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    wrapped = as_classifier(net, mean=0.5)
    images = torch.rand(2, 3, 2, 2)
    assert as_classifier(wrapped) is wrapped
    assert torch.equal(wrapped(images), net(images - 0.5))
    assert torch.equal(as_classifier(net)(images), net(images))
    assert wrapped.spec is None
    with pytest.raises(UsageError, match="normalises its images already"):
        as_classifier(wrapped, std=0.5)


def test_foreign_attributes_called_stages_are_not_published() -> None:
    net = nn.Sequential(nn.Flatten())
    net.stages = nn.ModuleList()
    assert not hasattr(Classifier(net), "stages")


def test_the_table_is_read_without_torch() -> None:
    code = (
        "import sys; from overproof.models import MODELS; names = MODELS.names(); "
        "assert all(e.summary for e in MODELS.entries()); assert 'wrn-40-2' in names; "
        "assert not {'torch', 'timm', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_entry_loads_and_takes_the_three_sizes() -> None:
    for entry in MODELS.entries():
        assert entry.positional() == ("classes", "in_channels", "image_size"), entry.name
        entry.options()


def test_same_seed_same_network() -> None:
    first, second = (torch.manual_seed(3) and create_model("resnet8", 10) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("size", [1, 7, 8, 28])
def test_a_cnn_without_pooling_tells_places_apart(size: int) -> None:
    pooled, placed = (create_model("cnn", 5, 1, size, widths=[2, 4, 6], pooled=pooled).eval() for pooled in (True, False))
    assert (pooled.net.fc.in_features, placed.net.fc.in_features) == (6, 6 * ((size + 3) // 4) ** 2)
    assert placed(torch.rand(3, 1, size, size)).shape == (3, 5)
