"""The guarded classifier: composition, storage, evaluation, command line, ordinary image files, report."""

from __future__ import annotations

import copy
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from overproof import PGD, Cache, Guarded, ImageSet, evaluate, evaluate_guarded, load_guarded, predict
from overproof.attacks.randomness import Streams, normal
from overproof.attacks.transfer import Transfer
from overproof.cli import call
from overproof.data import Splits
from overproof.data.decoding import decode
from overproof.data.pictures import find_pictures, read_pictures
from overproof.data.splits import stratified_subset
from overproof.data.streams import StreamSet
from overproof.errors import DataError, FolderError, UsageError
from overproof.evaluation.evaluator import make_attacks
from overproof.folding import Folded, folded
from overproof.guards import GUARDS, Guard, Judgement, load_guards, save_guard
from overproof.guards.base import Place
from overproof.guards.cache_tuning import THETAS
from overproof.guards.detector import Detector
from overproof.guards.storage import load_guard
from overproof.models import create_model
from overproof.networks import digest
from overproof.run.guard_detection import Beside, _search
from overproof.run.guarding import _fit_cache, fit_guards
from overproof.testing import check_guard, small_batch, small_model


class Dim(Guard):
    """A purifier that darkens images by random amounts."""

    place: ClassVar[Place] = "purifier"

    def __init__(self, *, strength: float = 0.1) -> None:
        super().__init__()
        self.strength = strength
        self.register_buffer("factor", torch.zeros(0, dtype=torch.double))

    def fit(self, model: nn.Module, images: Tensor, labels: Tensor) -> Self:
        self.factor = torch.ones(3, dtype=torch.double) * (1 - self.strength)
        self.remember(model)
        return self

    def forward(self, model: nn.Module, images: Tensor, streams: Streams | None = None) -> Tensor:
        self.require_fitted()
        amount = normal(images[:, 0, 0, 0].detach(), Streams.of(streams, images)).abs().clamp(max=1) * self.strength
        return images * (self.factor[0].to(images) - amount[:, None, None, None])

    def describe(self) -> dict[str, Any]:
        return {"strength": self.strength}


class Bright(Guard):
    """A detector of bright images, with noise."""

    place: ClassVar[Place] = "detector"

    def __init__(self, *, limit: float = 0.5) -> None:
        super().__init__()
        self.limit = limit

    def fit(self, model: nn.Module, images: Tensor, labels: Tensor) -> Self:
        self.remember(model)
        return self

    def forward(self, model: nn.Module, images: Tensor, streams: Streams | None = None) -> Judgement:
        self.require_fitted()
        light = images.flatten(1).mean(dim=1)
        score = light + 0.05 * normal(light, Streams.of(streams, images))
        return Judgement(score, score > self.limit, {"light": light})

    def describe(self) -> dict[str, Any]:
        return {"limit": self.limit}


def setting() -> tuple[nn.Module, Tensor, Tensor]:
    model, images = small_model().double().eval(), small_batch(40).images.double()
    with torch.no_grad():
        model[-1].bias -= model(images).mean(dim=0)  # all classes occur, and their boundaries are near
    return model, images, model(images).argmax(dim=1)


def whole() -> tuple[Guarded, Tensor, Tensor]:
    model, images, labels = setting()
    guards = {guard.place: guard.fit(model, images, labels) for guard in (Cache(layers=("2",)), Dim(), Bright())}
    return Guarded(model, **guards), images, labels


# Composition.


QUICK = {"nim": {"epochs": 2}, "purifier-small": {"epochs": 2}}  # guards that train something, but need not train it well


@pytest.mark.parametrize("name", GUARDS.names())
def test_every_registered_guard_keeps_the_contract(name: str) -> None:
    check_guard(partial(GUARDS.get(name).load(), **QUICK.get(name, {})))


@pytest.mark.parametrize("kind", [Dim, Bright])
def test_guards_of_others_keep_the_contract(kind: type[Guard]) -> None:
    check_guard(kind)


def test_a_guard_that_breaks_the_contract_is_found() -> None:
    class Forgetful(Bright):
        def forward(self, model: nn.Module, images: Tensor, streams: Streams | None = None) -> Judgement:
            return super().forward(model, images, None)

    with pytest.raises(AssertionError, match="the same streams gave another 'score'"):
        check_guard(Forgetful)

    class Meddler(Bright):
        def fit(self, model: nn.Module, images: Tensor, labels: Tensor) -> Self:
            with torch.no_grad():
                next(model.parameters()).add_(1)
            return super().fit(model, images, labels)

    with pytest.raises(AssertionError, match="the guard changed"):
        check_guard(Meddler)

    class Eager(Bright):
        def require_fitted(self) -> None:
            return None

    with pytest.raises(AssertionError, match="not fitted answered"):
        check_guard(Eager)

    class Crowd(Bright):
        def forward(self, model: nn.Module, images: Tensor, streams: Streams | None = None) -> Judgement:
            judged = super().forward(model, images, streams)
            return Judgement(judged.score - judged.score.mean(), judged.rejected)

    with pytest.raises(AssertionError, match="depends on its batch"):
        check_guard(Crowd)


def test_a_verdict_joins_all_guards() -> None:
    guarded, images, _ = whole()
    streams = Streams.named(torch.arange(40), "test")
    verdict = guarded(images, streams)
    purified = guarded.purifier(guarded.model, images, streams.fork(0))
    assert torch.equal(verdict.parts["purified"], purified)
    answer = guarded.cache(guarded.model, purified)
    assert torch.equal(verdict.logits, answer.logits)
    assert torch.equal(verdict.probabilities, answer.logits.softmax(dim=1))
    judged = guarded.detector(guarded.model, purified, streams.fork(1))
    assert torch.equal(verdict.score, judged.score)
    assert torch.equal(verdict.rejected, judged.rejected)
    assert 0 < int(judged.rejected.sum()) < 40
    assert {"cache/network", "cache/cache", "detector/light", "purified"} == set(verdict.parts)


def test_a_batch_gives_what_its_images_give() -> None:
    guarded, images, _ = whole()
    streams = Streams.named(torch.arange(40), "test")
    verdict = guarded(images, streams)
    for row in (0, 7, 39):
        alone = guarded(images[row : row + 1], streams.rows(torch.tensor([row])))
        assert torch.allclose(alone.probabilities, verdict.probabilities[row : row + 1], atol=1e-10)
        assert torch.allclose(alone.score, verdict.score[row : row + 1], atol=1e-10)
    assert not torch.equal(guarded(images, streams.fork(3)).score, verdict.score)


def test_gradients_pass_the_purifier_and_the_cache() -> None:
    guarded, images, labels = whole()
    asked = images[:4].clone().requires_grad_()
    streams = Streams.named(torch.arange(4), "test")

    def loss(x: Tensor) -> Tensor:
        return guarded(x, streams).logits.gather(1, labels[:4, None]).sum()

    gradient = torch.autograd.grad(loss(asked), asked)[0].detach()
    step = 1e-6 * torch.randn(asked.shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    change = float((loss(images[:4] + step) - loss(images[:4] - step)).detach()) / 2
    assert change == pytest.approx(float((gradient * step).sum()), rel=1e-4)


def test_without_a_detector_nobody_is_rejected() -> None:
    model, images, labels = setting()
    guarded = Guarded(model, cache=Cache(layers=("2",)).fit(model, images, labels))
    before = torch.random.get_rng_state()
    verdict = guarded(images)
    assert torch.equal(torch.random.get_rng_state(), before)  # nobody rolls dice
    assert not bool(verdict.rejected.any())
    assert float(verdict.score.abs().max()) == 0
    assert torch.equal(guarded.logits_model()(images), verdict.logits)


def test_what_does_not_fit_together_is_refused() -> None:
    model, images, labels = setting()
    cache, detector = Cache(layers=("2",)).fit(model, images, labels), Bright().fit(model, images, labels)
    with pytest.raises(UsageError, match="without a guard is the model"):
        Guarded(model)
    with pytest.raises(UsageError, match=r"Guarded\(cache=Bright\(...\)\): that guard belongs elsewhere: detector=..."):
        Guarded(model, cache=detector)
    with pytest.raises(UsageError, match="belongs elsewhere"):
        Guarded(model, detector=small_model())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"not fitted yet: cache.fit\(model, images, labels\) comes first"):
        Guarded(model, cache=Cache())
    with pytest.raises(UsageError, match="fitted for another model"):
        Guarded(small_model(1).double(), cache=cache)
    with pytest.raises(UsageError, match="structure or precision"):
        Guarded(small_model(0), cache=cache)
    assert digest(small_model(0)) == digest(small_model(0)) != digest(small_model(1))
    Guarded(model.train(), cache=cache, detector=detector)  # modes are no part of a model


def test_attacks_and_evaluations_take_it_as_a_classifier() -> None:
    model, images, labels = setting()
    guarded = Guarded(model, cache=Cache(layers=("2",), lam=0.7, theta=20.0).fit(model, images, labels))
    through, images = guarded.logits_model(), small_batch(40, seed=9).images.double()
    truth = through(images).argmax(dim=1)
    found = PGD(eps=0.2)(through, images, truth, torch.Generator().manual_seed(0))
    around = PGD(eps=0.2)(model, images, truth, torch.Generator().manual_seed(0))
    robust = [float((through(x).argmax(dim=1) == truth).double().mean()) for x in (found, around)]
    assert robust[0] < robust[1]
    result = evaluate(through.float(), (images.float(), truth), attacks={"pgd": PGD(eps=0.2)}, sanity=8)
    assert result.clean == 1.0
    assert result.robust["pgd"] <= robust[1]


def test_the_folded_copy_of_a_guarded_network_shares_the_keys() -> None:
    model = create_model("cnn", 3, 1, 8).eval()
    batch = small_batch(20)
    guarded = Guarded(model, cache=Cache().fit(model, batch.images, batch.labels))
    quick = folded(copy.deepcopy(guarded).logits_model(), batch.images)
    assert isinstance(quick, Folded)
    assert quick.net.guarded.cache.keys.data_ptr() == guarded.cache.keys.data_ptr()
    assert torch.allclose(quick(batch.images), guarded.logits_model()(batch.images), atol=1e-3)


# Storage.


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "int8", "centres": 3}, {"dtype": "bfloat16", "top_k": 4, "layers": ("2", "6:input")}, {"lam": 1.0}],
)
def test_a_saved_cache_comes_back(tmp_path: Path, options: dict[str, Any]) -> None:
    model, images, labels = setting()
    cache = Cache(**options).fit(model, images, labels)
    path = save_guard(cache, tmp_path, classes=["a", "b", "c"])
    assert sorted(p.name for p in path.parent.iterdir()) == ["cache.json", "cache.safetensors"]
    loaded = load_guards(tmp_path)["cache"]
    assert loaded.options() == cache.options()
    assert loaded.facts == cache.facts
    assert torch.equal(loaded(model, images).logits, cache(model, images).logits)
    assert torch.equal(loaded.marks, cache.marks)
    facts = json.loads(path.read_text())
    assert facts["about"]["classes"] == ["a", "b", "c"]
    assert facts["description"]["items"] == len(cache.items)


def test_damaged_guards_are_refused(tmp_path: Path) -> None:
    model, images, labels = setting()
    cache = Cache(layers=("2",)).fit(model, images, labels)
    with pytest.raises(FolderError, match="overproof guard fit"):
        load_guards(tmp_path)
    path = save_guard(cache, tmp_path)
    tensors, whole_file = path.with_suffix(".safetensors"), path.with_suffix(".safetensors").read_bytes()
    for length in (0, 5, 100, len(whole_file) // 2, len(whole_file) - 1):
        tensors.write_bytes(whole_file[:length])
        with pytest.raises(FolderError, match="truncated"):
            load_guard(path)
    text = path.read_text()
    save_guard(cache, tmp_path)
    path.write_text(text)
    with pytest.raises(FolderError, match="come from different fits"):
        load_guard(path)
    path = save_guard(cache, tmp_path)
    good = json.loads(path.read_text())
    for changed, words in (
        ({**good, "guard": "pickle"}, "Unknown guard 'pickle'"),
        ({**good, "options": {"theta": "warm"}}, "theta"),
        ({**good, "options": {"colour": 1}}, "colour"),
        ({"guard": "cache"}, "does not describe a guard"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(FolderError, match=words):
            load_guard(path)
    tensors.unlink()
    path.write_text(json.dumps(good))
    with pytest.raises(FolderError, match="no such file"):
        load_guard(path)


def test_only_what_can_come_back_is_saved(tmp_path: Path) -> None:
    model, images, labels = setting()
    with pytest.raises(UsageError, match="not fitted"):
        save_guard(Cache(), tmp_path)
    with pytest.raises(UsageError, match="Bright is not registered"):
        save_guard(Bright().fit(model, images, labels), tmp_path)
    cache = Cache(layers=("2",)).fit(model, images, labels)
    save_guard(cache, tmp_path)
    save_guard(cache, tmp_path, "other")
    with pytest.raises(FolderError, match="two guards for the place of the cache"):
        load_guards(tmp_path)
    state = cache.state()
    state.pop("labels")
    with pytest.raises(FolderError, match="too many or missing: labels"):
        Cache().restore(state, cache.facts)


# Evaluation.


def test_an_evaluation_shows_both_sides() -> None:
    model, images, labels = setting()
    model, images = model.float(), images.float()
    guarded = Guarded(model, cache=Cache(layers=("2",), lam=1.0, theta=30.0).fit(model, images, labels))
    others = small_batch(60, seed=7).images
    data = ImageSet(others, model(others).argmax(dim=1), classes=3)
    result = evaluate_guarded(guarded, data, attacks={"pgd": PGD(eps=0.08)}, sanity=0)
    table = result.summary["guard"]
    assert set(result.summary["attacks"]) == {"pgd", "pgd-transfer"} == set(table["attacks"])
    assert table["clean_without"] == 1.0
    assert table["clean"] == result.clean < 1.0
    assert table["clean_rejected"] == 0
    bare = evaluate(model, data, attacks={"pgd": PGD(eps=0.08, early_stop=False)}, sanity=0).summary["attacks"]["pgd"][
        "success_rate"
    ]
    for name, facts in table["attacks"].items():
        assert facts["without"] == bare
        assert facts["wrong_and_not_rejected"] == result.summary["attacks"][name]["success_rate"]
        assert facts["detected"] is None
        assert facts["transfer"] is (name == "pgd-transfer")
    assert table["attacks"]["pgd"]["wrong_and_not_rejected"] >= table["attacks"]["pgd-transfer"]["wrong_and_not_rejected"]
    assert table["strongest"] == "pgd"
    assert table["guards"] == ["cache"]
    with pytest.raises(UsageError, match="40 of these 40 images are in the cache"):
        evaluate_guarded(guarded, ImageSet(images, labels), attacks=())


class Watching(nn.Module):
    """A network that counts how many images it was asked about with a gradient."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.climbed = net, 0

    def forward(self, images: Tensor) -> Tensor:
        self.climbed += len(images) if images.requires_grad else 0
        logits: Tensor = self.net(images)
        return logits


def test_images_made_on_the_bare_model_go_on_where_that_errs() -> None:
    model, images, labels = setting()
    watched = Watching(model.float())
    guarded = Guarded(watched, cache=Cache(layers=("net.2",), lam=1.0, theta=30.0).fit(watched, images.float(), labels))
    others = small_batch(30, seed=7).images
    answers = model(others).argmax(dim=1)
    attack = PGD(eps=0.3, steps=4)
    transfer = Transfer(inner=attack, source=watched)
    watched.climbed = 0
    transfer(guarded.logits_model(), others, (answers + 1) % 3)
    assert watched.climbed == 4 * 30, "the source is wrong everywhere from the beginning, and is climbed all the same"
    watched.climbed = 0
    attack(watched, others, (answers + 1) % 3)
    assert watched.climbed == 0


@pytest.mark.parametrize("options", [{"top_k": 2}, {"gradient": False}])
def test_a_cache_without_a_gradient_is_attacked_by_way_of_all_its_items(options: dict[str, Any]) -> None:
    model, images, labels = setting()
    model, images = model.float(), images.float()
    whole = Cache(layers=("2",), lam=1.0, theta=60.0).fit(model, images, labels)
    part = Cache(layers=("2",), lam=1.0, theta=60.0, **options).fit(model, images, labels)
    others = small_batch(60, seed=7).images
    points = others.clone().requires_grad_()
    asked = Guarded(model, cache=part).logits_model()(points)
    assert torch.equal(asked, Guarded(model, cache=whole).logits_model()(points))
    with torch.no_grad():
        judged = Guarded(model, cache=part).logits_model()(points)
    assert torch.equal(judged, part(model, others).logits)
    data = ImageSet(others, model(others).argmax(dim=1), classes=3)
    passed = {}
    for name, cache in (("whole", whole), ("part", part)):
        found = evaluate_guarded(Guarded(model, cache=cache), data, attacks={"pgd": PGD(eps=0.08)}, sanity=0)
        passed[name] = found.summary["guard"]["attacks"]["pgd"]["wrong_and_not_rejected"]
        assert found.summary["guard"]["caution"] is None
    assert passed["whole"] > 0.3
    assert passed["part"] > passed["whole"] - 0.1


def test_an_attack_that_found_no_gradient_tells_nothing() -> None:
    model, images, labels = setting()
    model, images = model.float(), images.float()

    class Mute(Cache):
        def smoothly(self, model: nn.Module, images: Tensor, streams: Streams | None = None) -> Any:
            return self(model, images.detach())

    cache = Mute(layers=("2",), gradient=False).fit(model, images, labels)
    others = small_batch(60, seed=7).images
    data = ImageSet(others, model(others).argmax(dim=1), classes=3)
    detector = Detector(fpr=0.3, criteria=("noise",)).fit(model, images.repeat(4, 1, 1, 1), labels.repeat(4))
    for guarded in (Guarded(model, cache=cache), Guarded(model, cache=cache, detector=detector)):
        table = evaluate_guarded(guarded, data, attacks={"pgd": PGD(eps=0.08)}, sanity=0).summary["guard"]
        assert table["attacks"]["pgd"]["wrong_and_not_rejected"] is None
        assert table["strongest"] != "pgd"


def test_behind_a_random_purifier_the_seed_decides_about_the_detector_too() -> None:
    model, images, labels = setting()
    model, images = model.float(), images.float()
    purifier = Dim(strength=0.3).fit(model, images, labels)
    detector = Detector(fpr=0.3, criteria=("noise",)).fit(model, images.repeat(4, 1, 1, 1), labels.repeat(4))
    others = small_batch(40, seed=7).images
    data = ImageSet(others, model(others).argmax(dim=1), classes=3)
    guarded = Guarded(model, purifier=purifier, detector=detector)
    before = torch.get_rng_state()
    told = []
    for _ in range(2):
        found = evaluate_guarded(guarded, data, attacks={"pgd": PGD(eps=0.05, steps=2)}, sanity=0)
        told.append(found.summary["detection"])
        torch.rand(3)
    assert told[0] == told[1]
    assert set(found.gallery) & {"natural-rejected", "attacked-rejected", "attacked-passed"}
    torch.set_rng_state(before)


# Ordinary image files.


def gradient(mode: str = "RGB", size: tuple[int, int] = (12, 8)) -> Image.Image:
    """Dark on the left, bright on the right, red growing downwards."""
    width, height = size
    across = np.tile(np.linspace(0, 255, width), (height, 1))
    down = np.tile(np.linspace(0, 255, height)[:, None], (1, width))
    return Image.fromarray(np.stack([down, across, across], axis=2).astype(np.uint8)).convert(mode)


def pixels(path: Path, channels: int, side: int) -> torch.Tensor:
    return torch.from_numpy(decode(path, channels=channels, image_size=side).copy())


def test_pictures_of_any_mode_become_the_same_picture(tmp_path: Path) -> None:
    plain = gradient("L", (8, 8))
    plain.save(tmp_path / "a.png")
    expected = torch.from_numpy(np.array(plain))[None]
    assert torch.equal(pixels(tmp_path / "a.png", 1, 8), expected)
    assert torch.equal(pixels(tmp_path / "a.png", 3, 8), expected.expand(3, -1, -1))
    for mode, name in (("RGB", "b.png"), ("P", "c.gif"), ("LA", "d.png"), ("RGBA", "e.png"), ("CMYK", "f.tif"), ("1", "g.png")):
        plain.convert(mode).save(tmp_path / name)
        found = pixels(tmp_path / name, 1, 8).float()
        assert found.shape == (1, 8, 8)
        if mode != "1":
            assert float((found - expected).abs().max()) <= 2, mode
    sixteen = Image.fromarray(np.array(plain).astype(np.uint16) * 257)
    sixteen.save(tmp_path / "h.png")
    assert torch.equal(pixels(tmp_path / "h.png", 1, 8), expected)
    assert torch.equal(pixels(tmp_path / "h.png", 3, 8), expected.expand(3, -1, -1))


def test_transparency_lies_on_white_and_exif_is_followed(tmp_path: Path) -> None:
    picture = gradient("RGBA", (4, 4))
    picture.putalpha(0)
    picture.save(tmp_path / "clear.png")
    assert bool((pixels(tmp_path / "clear.png", 3, 4) == 255).all())
    palette = gradient("P", (4, 4))
    palette.putpixel((0, 0), 5)
    palette.save(tmp_path / "palette.png", transparency=5)
    assert pixels(tmp_path / "palette.png", 3, 4)[:, 0, 0].tolist() == [255, 255, 255]
    upright = gradient("RGB", (8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter, clockwise
    upright.rotate(90).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(pixels(tmp_path / "turned.png", 3, 8), torch.from_numpy(np.array(upright)).permute(2, 0, 1))


def test_pictures_of_any_size_are_squared_and_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    gradient(size=(31, 17)).save(tmp_path / "wide.jpg")
    assert pixels(tmp_path / "wide.jpg", 3, 8).shape == (3, 8, 8)
    Image.fromarray(np.random.default_rng(0).random((5, 5)).astype(np.float32)).save(tmp_path / "real.tif")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "broken.png").write_bytes(b"no image at all")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    paths = find_pictures([tmp_path])
    assert [path.name for path in paths] == ["real.tif", "broken.png", "wide.jpg"]
    found = {picture.path.name: picture for picture in read_pictures(paths, channels=1, side=8)}
    assert "no known range" in found["real.tif"].problem
    assert "UnidentifiedImageError" in found["broken.png"].problem
    assert found["broken.png"].pixels is None
    assert found["wide.jpg"].problem == ""
    with pytest.raises(DataError, match="does not exist"):
        find_pictures([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="There is no image in"):
        find_pictures([tmp_path / "empty"])


# From the command line.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with a cache."""
    place = tmp_path_factory.mktemp("runs") / "net"
    command = ["train", "--data", "digits", "--model", "cnn", "--epochs", "2", "--out", str(place)]
    assert call([*command, "--set", "data.limit_train=400", "--set", "data.limit_test=60"]) == 0
    assert call(["guard", "fit", str(place), "--cache", "--set", "cache.mirror=false"]) == 0
    return place


def out(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_fitting_from_the_command_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert call(["guard", "fit", str(run), "--cache", "--set", "cache.mirror=false", "--json"]) == 0
    found = out(capsys)["cache"]
    assert found["images"] == 400 + 60  # trained on, and then the validation part
    assert found["tuning"]["images"] == 60
    assert found["theta"] == found["tuning"]["theta"]
    guarded = load_guarded(run)
    assert guarded.cache.facts["layers"] == ["net.layers.1", "net.layers.2"]
    assert guarded.cache.mirror is False
    arrays = dict(np.load(run / "guards" / "cache.npz"))
    assert arrays["neighbours"].shape[:2] == (8, 5)
    assert (
        call(["guard", "fit", str(run), "--cache", "--no-tune", "--layers", "layers.2", "--set", "cache.lam=1", "--json"]) == 0
    )
    again = out(capsys)["cache"]
    assert (again["theta"], again["lam"], again["layers"]) == (80.0, 1.0, ["net.layers.2"])
    assert "tuning" not in again


def test_what_cannot_be_fitted(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, words in (
        ([str(run)], 2, "known are cache, detector"),
        ([str(run), "--cache", "--set", "cache.colour=1"], 2, "colour"),
        (
            [str(run), "--cache", "--set", "detector.draws=2"],
            2,
            "belongs to the detector, which is not to be fitted; say --detector too",
        ),
        ([str(run), "--cache", "--layers", "nowhere"], 2, "layer"),
        ([str(run), "--cache", "--fpr", "0.1"], 2, "say --detector too"),
        ([str(tmp_path / "none"), "--cache"], 1, "not a run folder"),
    ):
        assert call(["guard", "fit", *arguments]) == code, arguments
        assert words in capsys.readouterr().err
    with pytest.raises(UsageError, match="no validation part, which the detector needs"):
        fit_guards(run, {"detector": {}}, overrides=["data.validation=0"])


def test_evaluating_and_reporting_behind_guards(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["guard", "fit", str(run), "--cache", "--set", "cache.mirror=false"]) == 0
    capsys.readouterr()
    command = ["evaluate", str(run), "--guarded", "--attack", "pgd:eps=0.1,steps=5", "--sanity", "0"]
    assert call(command) == 0
    text = capsys.readouterr().out
    assert "60 images behind cache" in text
    assert "made without the guards" in text
    assert "strongest: pgd" in text
    assert call([*command, "--json"]) == 0
    summary = out(capsys)
    assert summary["name"] == "guarded-test-pgd_eps_0.1_steps_5"
    assert summary["guard"]["guards"] == ["cache"]
    assert summary["protocol"]["guards"]["cache"]["items"] == len(load_guarded(run).cache.items)
    assert len(list((run / "evaluations").glob("guarded-*.json"))) == 1  # the same measurement again
    for others in (["--curve", "0.1"], ["--teacher", str(run)], ["--devices", "1"]):
        assert call([*command, *others]) == 2
    assert call(["evaluate", str(run), "--guarded", "--split", "train"]) == 2
    assert "are in the cache" in capsys.readouterr().err
    assert call(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    for words in (
        "Why it says so",
        "Accuracy over the share of the cache",
        "Behind cache",
        "through the guards",
        "on the bare model",
    ):
        assert words in page, words


def test_cache_and_detector_together(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = str(shutil.copytree(run, tmp_path / "net"))
    command = [
        "guard",
        "fit",
        net,
        "--detector",
        "--fpr",
        "0.3",
        "--set",
        'detector.criteria=["noise"]',
        "--set",
        "data.limit_test=400",
    ]
    assert call(command) == 0
    text = capsys.readouterr().out
    assert "detector: fpr 0.3" in text
    assert "  noise: threshold" in text
    assert (
        call(["evaluate", net, "--guarded", "--attack", "pgd:eps=0.1,steps=3", "--limit", "40", "--sanity", "0", "--json"]) == 0
    )
    summary = out(capsys)
    table, detection = summary["guard"], summary["detection"]
    assert table["guards"] == ["cache", "detector"]
    name = "pgd:eps=0.1,steps=3"
    assert set(table["attacks"]) == {name, f"{name}-transfer", f"{name}-segment-search"}
    for attack, facts in table["attacks"].items():
        assert facts["wrong_and_not_rejected"] == detection["attacks"][attack]["wrong_and_not_rejected"]
    assert table["clean_rejected"] == detection["clean_rejected"]
    assert table["strongest"] == max(table["attacks"], key=lambda key: table["attacks"][key]["wrong_and_not_rejected"])
    assert detection["over_steps"]["steps"][0] == 0
    assert call(["report", net]) == 0
    page = (Path(net) / "report.html").read_text()
    assert 'id="detection"' in page
    assert "Images of the strongest attack, wrong and" in page
    rows = predict(net, [_written(tmp_path)], guarded=True)
    assert rows[0].verdict in ("accepted", "rejected")
    assert rows[0].score == predict(net, [_written(tmp_path)], guarded=True)[0].score
    gradient("L", (30, 20)).save(tmp_path / "another.png")
    assert rows[0].score == predict(net, [tmp_path / "another.png", _written(tmp_path)], guarded=True)[1].score


def _written(folder: Path) -> Path:
    gradient("L", (20, 30)).save(folder / "one.png")
    return folder / "one.png"


def test_predicting_image_files(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from overproof.data import load_data

    test = load_data("digits").test
    for row in range(3):
        Image.fromarray(test.images[row, 0].numpy()).resize((40, 40)).convert("RGBA").save(tmp_path / f"{row}.png")
    (tmp_path / "broken.png").write_bytes(b"?")
    rows = predict(run, tmp_path, guarded=True)
    assert [Path(row.file).name for row in rows] == ["0.png", "1.png", "2.png", "broken.png"]
    guarded = load_guarded(run)
    for row in rows[:3]:
        image = pixels(Path(row.file), 1, 8)
        with torch.no_grad():
            verdict = guarded(image[None].float() / 255)
        assert row.label == str(int(verdict.probabilities.argmax()))
        assert row.probability == pytest.approx(float(verdict.probabilities.max()), abs=1e-4)
        assert (row.score, row.verdict, row.problem) == (0.0, "accepted", None)
    assert rows[3].label is None
    assert call(["predict", str(run), str(tmp_path), "--json"]) == 0
    captured = capsys.readouterr().out.splitlines()
    lines = [json.loads(line) for line in captured]
    assert len(lines) == 4
    assert set(lines[0]) == {"file", "label", "probability"}
    assert set(lines[3]) == {"file", "problem"}
    assert call(["predict", str(run), str(tmp_path / "0.png"), "--guarded"]) == 0
    assert "accepted" in capsys.readouterr().out
    assert call(["predict", str(run), str(tmp_path / "broken.png")]) == 1
    captured_now = capsys.readouterr()
    assert "skipped" in captured_now.out
    assert "None of these 1 files could be read" in captured_now.err


def test_guards_of_other_weights_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    path = run / "weights" / "best.safetensors"
    before = path.read_bytes()
    state = load_file(path)
    state["net.fc.bias"] += 1
    save_file(state, path)
    try:
        with pytest.raises(UsageError, match="fitted for another model"):
            load_guarded(run)
    finally:
        path.write_bytes(before)
    load_guarded(run)


def test_listing_and_showing_guards(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["list", "guards"]) == 0
    assert "cache" in capsys.readouterr().out
    assert call(["show", "cache"]) == 0
    text = capsys.readouterr().out
    assert "theta = 80.0" in text
    assert "Orhan" in text


# What is measured is what is deployed.


class Watched(Detector):
    """A detector that remembers what it was shown."""

    def forward(self, model: nn.Module, images: Tensor, streams: Streams | None = None) -> Judgement:
        self.shown = images.detach().clone()
        return super().forward(model, images, streams)


def test_the_detector_is_shown_what_the_purifier_leaves() -> None:
    model, images, labels = setting()
    purifier = Dim().fit(model, images, labels)
    detector = Watched(fpr=0.3, criteria=("noise",)).fit(model, images.repeat(4, 1, 1, 1), labels.repeat(4))
    guarded = Guarded(model, purifier=purifier, detector=detector)
    streams = Streams.named(torch.arange(len(images)), 0)
    deployed = guarded(images, streams)
    shown = detector.shown
    judge = Beside(guarded, detector)
    measured = judge(guarded.logits_model(), images, Streams.named(torch.arange(len(images)), 0))
    assert torch.equal(shown, deployed.parts["purified"])
    assert not torch.equal(shown, images)
    assert torch.equal(measured.score, deployed.score)
    assert torch.equal(measured.rejected, deployed.rejected)


def test_a_detector_of_another_kind_is_refused_before_any_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overproof.run.guard_evaluation.evaluate", lambda *given, **options: pytest.fail("attacked already"))
    model, images, labels = setting()
    guarded = Guarded(model, detector=Bright().fit(model, images, labels))
    with pytest.raises(UsageError, match="detector Bright"):
        evaluate_guarded(guarded, (images.float(), labels), attacks=["pgd"])


@pytest.mark.parametrize("kind", ["images", "loader"])
def test_images_of_the_cache_are_refused_however_they_come(kind: str) -> None:
    model, images, labels = small_model().eval(), small_batch(40).images, small_batch(40).labels
    guarded = Guarded(model, cache=Cache(layers=("2",)).fit(model, images, labels))
    data = (images, labels) if kind == "images" else [(images[:20], labels[:20]), (images[20:], labels[20:])]
    with pytest.raises(UsageError, match="40 of these 40 images are in the cache"):
        evaluate_guarded(guarded, data)


def test_the_search_has_the_threat_of_the_attack_around_it() -> None:
    worst = make_attacks({"worst": {"attack": "eot", "inner": PGD(eps=0.05, norm="L2"), "samples": 2}})["worst"]
    found = _search(worst, None)
    assert (found.threat.eps, type(found.threat).__name__) == (0.05, "L2")


# Sets that are read as they are needed.


def streamed(digits: Splits, count: int = 60) -> Splits:
    parts = {name: getattr(digits, name) for name in ("train", "validation", "test")}
    sets = {
        name: StreamSet(TensorDataset(part.images[:count], part.labels[:count]), labels=part.labels[:count], classes=10)
        for name, part in parts.items()
    }
    return Splits(**sets)


def test_a_limit_holds_for_streamed_sets(digits: Splits) -> None:
    splits = streamed(digits, 300)
    model = create_model("cnn", 10, 1, 8).eval()
    cache = Cache(limit=50, mirror=False)
    _fit_cache(cache, model, splits, tune=False, given={})
    source = cache.items.source
    assert len(source) == 50
    assert torch.equal(source.sort().values, stratified_subset(splits.train.labels, 50, cache.seed))
    with pytest.raises(UsageError, match="cache.limit"):
        _fit_cache(Cache(centres=2), model, splits, tune=False, given={})


def test_what_was_given_is_not_tuned(digits: Splits) -> None:
    model, chosen = create_model("cnn", 10, 1, 8).eval(), {}
    for given in ({}, {"theta": 33.0}, {"lam": 0.35}, {"theta": 33.0, "lam": 0.35}):
        cache = Cache(mirror=False, **given)
        _fit_cache(cache, model, streamed(digits), tune=True, given=given)
        chosen = {name: getattr(cache, name) for name in given}
        assert chosen == given
        assert cache.theta in ({33.0} if "theta" in given else set(THETAS))


def test_weights_cannot_be_chosen_behind_guards(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["evaluate", str(run), "--guarded", "--which", "last"]) == 2
    assert "--which" in capsys.readouterr().err
    with pytest.raises(UsageError, match="guards belong to the weights"):
        predict(run, [_written(tmp_path)], guarded=True, which="last")
