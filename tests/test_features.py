from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from overproof.errors import OverproofError, UnknownNameError
from overproof.features import Tap, penultimate, stages
from overproof.models import Classifier, create_model

NAMES = ("net.layers.0", "net.layers.1.2:input", "net.fc:input")


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return create_model("cnn", 5, 1, 8).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_reads_outputs_and_inputs(model: Classifier, images: Tensor) -> None:
    output, features = Tap(model, NAMES)(images)
    assert tuple(features) == NAMES
    assert torch.equal(output, model(images))
    assert torch.equal(features["net.layers.0"], model.net.layers[0](model.normalize(images)))
    assert torch.equal(features["net.layers.1.2:input"], model.net.layers[1][:2](features["net.layers.0"]))
    assert torch.equal(model.net.fc(features["net.fc:input"]), output)


def test_gradients_flow_through_features(model: Classifier, images: Tensor) -> None:
    _, features = Tap(model, NAMES)(images)
    features["net.layers.0"].sum().backward()
    assert model.net.layers[0][0].weight.grad is not None
    assert model.net.fc.weight.grad is None


def test_records_only_its_own_calls(model: Classifier, images: Tensor) -> None:
    tap, other = Tap(model, NAMES), Tap(model, NAMES[:1])
    model(images)
    assert tap._store.features is None
    _, first = tap(images)
    kept = {name: value.clone() for name, value in first.items()}
    model(images * 0)
    _, alone = other(images * 0)
    assert set(alone) == set(NAMES[:1])
    assert all(torch.equal(first[name], kept[name]) for name in NAMES)


def test_reentrant(images: Tensor) -> None:
    class Attacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.tap = nn.Flatten(), None

        def forward(self, images: Tensor, again: bool = True) -> Tensor:
            if again:
                _, self.inner = self.tap(images + 1, again=False)
            return self.layer(images)

    net = Attacked()
    net.tap = Tap(net, ["layer"])
    _, features = net.tap(images)
    assert torch.equal(features["layer"], images.flatten(1))
    assert torch.equal(net.inner["layer"], images.flatten(1) + 1)


def test_survives_exceptions(model: Classifier, images: Tensor) -> None:
    tap = Tap(model, NAMES)
    with pytest.raises(RuntimeError):
        tap(images.double())
    assert tap._store.features is None
    assert set(tap(images)[1]) == set(NAMES)


def test_last_of_several_calls_is_kept(images: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.unused = nn.Flatten(), nn.Identity()

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(images) + self.layer(images * 2)

    net = Twice()
    assert torch.equal(Tap(net, ["layer"])(images)[1]["layer"], images.flatten(1) * 2)
    with pytest.raises(OverproofError, match="does not call the layer 'unused'"):
        Tap(net, ["unused"])(images)


def test_layers_without_tensors_are_refused(images: Tensor) -> None:
    class Pair(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return images, images

    with pytest.raises(OverproofError, match="gives tuple"):
        Tap(nn.Sequential(Pair()), ["0"])(images)


def test_features_of_in_place_networks_are_not_overwritten(images: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)).eval()
    _, features = Tap(net, ["1", "2:input", "2"])(images)
    before = net[:2](images)
    assert (before < 0).any()
    assert torch.equal(features["1"], before)
    assert torch.equal(features["2:input"], before)
    assert torch.equal(features["2"], before.relu())


def test_unknown_layers_offer_the_nearest(model: Classifier) -> None:
    with pytest.raises(UnknownNameError, match=r"'net\.layers\.2'"):
        Tap(model, ["net.layer.2"])


def test_a_tap_in_a_module_adds_no_parameters(model: Classifier) -> None:
    holder = nn.Module()
    holder.student = model
    holder.tap = Tap(model, NAMES)
    assert len(list(holder.parameters())) == len(list(model.parameters()))
    assert set(holder.state_dict()) == {f"student.{name}" for name in model.state_dict()}


def test_copies_read_their_own_network(model: Classifier, images: Tensor) -> None:
    holder = nn.Module()
    holder.student, holder.tap = model, Tap(model, NAMES)
    for other in (copy.deepcopy(holder), pickle.loads(pickle.dumps(holder))):
        with torch.no_grad():
            other.student.net.layers[0][1].bias.add_(1)
        _, features = other.tap(images)
        assert torch.equal(features["net.layers.0"], other.student.net.layers[0](images))
        assert not torch.equal(features["net.layers.0"], holder.tap(images)[1]["net.layers.0"])


def test_hooks_go_with_the_tap(model: Classifier, images: Tensor) -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    tap = Tap(model, NAMES)
    assert hooks() == len(NAMES)
    del tap
    gc.collect()
    assert hooks() == 0
    tap = Tap(model, NAMES)
    tap.close()
    assert hooks() == 0


@pytest.mark.parametrize("late", [False, True], ids=["tap, then compile", "compile and run, then tap"])
def test_compiled_in_place(model: Classifier, images: Tensor, late: bool) -> None:
    reference = Tap(copy.deepcopy(model), NAMES)
    tap = None if late else Tap(model, NAMES)
    model.compile(backend="aot_eager", fullgraph=True)
    model(images)
    tap = tap or Tap(model, NAMES)
    for shift in (0.0, 0.1):
        output, features = tap(images + shift)
        expected, wanted = reference(images + shift)
        torch.testing.assert_close(output, expected)
        for name in NAMES:
            torch.testing.assert_close(features[name], wanted[name])
        model(images)
    features["net.layers.0"].sum().backward()
    assert model.net.layers[0][0].weight.grad.abs().sum() > 0


def test_under_distributed_data_parallel(model: Classifier, images: Tensor, tmp_path: Path) -> None:
    class Objective(nn.Module):
        def __init__(self, student: nn.Module) -> None:
            super().__init__()
            self.student = student
            self.tap = Tap(student, NAMES)

        def forward(self, images: Tensor) -> Tensor:
            logits, features = self.tap(images)
            return logits.square().mean() + features["net.layers.0"].mean()

    alone = Objective(copy.deepcopy(model))
    alone(images).backward()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(Objective(model))
        wrapped(images).backward()
        outside = Tap(wrapped, ["module.student.net.layers.0"])
        assert torch.equal(outside(images)[1]["module.student.net.layers.0"], model.net.layers[0](images))
    finally:
        torch.distributed.destroy_process_group()
    for one, two in zip(model.parameters(), alone.student.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_stages_published() -> None:
    model = create_model("resnet8", 10)
    assert stages(model) == ("net.layer1", "net.layer2", "net.layer3")
    assert stages(model.net) == ("layer1", "layer2", "layer3")
    assert penultimate(model) == "net.fc:input"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm:resnet10t", ("act1", "layer1", "layer2", "layer3", "layer4")),
        ("timm:convnext_atto", ("stages.0", "stages.1", "stages.2", "stages.3")),
        ("torchvision:resnet18", ("relu", "layer1", "layer2", "layer3", "layer4")),
    ],
)
def test_stages_of_other_makers(name: str, expected: tuple[str, ...]) -> None:
    model = create_model(name, 5)
    assert stages(model) == tuple(f"net.{name}" for name in expected)
    assert model.training
    _, features = Tap(model, (*stages(model), penultimate(model)))(torch.rand(2, 3, 32, 32))
    sides = [feature.shape[-1] for feature in features.values() if feature.dim() == 4]
    assert sides == sorted(sides, reverse=True)


def test_stages_inside_one_container_and_of_fixed_size() -> None:
    body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU())
    net = nn.Sequential(body, nn.Flatten(), nn.Linear(8 * 14 * 14, 5))
    norm = nn.BatchNorm2d(4)
    body.insert(1, norm)
    assert stages(net) == ("0.2", "0.5")
    assert not norm.running_mean.any()
    assert norm.training
    assert not [m for m in net.modules() if m._forward_hooks]


def test_stages_that_cannot_be_told() -> None:
    with pytest.raises(OverproofError, match=r"children: 0, 1.*Name the layers"):
        stages(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
    with pytest.raises(OverproofError, match="no linear layer"):
        penultimate(nn.Conv2d(1, 1, 1))
