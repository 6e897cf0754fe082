"""Purifiers: the knob, its gradients and its dice; the small one; files, evaluation, command line, report."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import overproof
from overproof import PGD, Classifier, Guarded, ImageSet, RunFolder, console, evaluate_guarded, fit_guards, load_guarded
from overproof.attacks import APGD, EOT, FAB, FGSM, AutoAttack, Square, Transfer, WorstCase
from overproof.attacks.combined import patient
from overproof.attacks.eot import Averaged
from overproof.attacks.randomness import Streams, normal
from overproof.cli import call
from overproof.errors import DataError, FolderError, UsageError
from overproof.guards import NIMPurifier, Purifier, SmallPurifier, load_guards, save_guard
from overproof.guards.purifier_small import Residual
from overproof.guards.storage import describe_guards, load_guard
from overproof.losses.denoising import patchify
from overproof.models import create_model
from overproof.models.autoencoder import Pretext, autoencoder_of
from overproof.models.rebuilding import denoised
from overproof.report.purifier import curve_text, level_rows
from overproof.run.purifying import check_levels, levels_of, shown
from overproof.testing import check_guard, small_batch, small_model


def autoencoder(seed: int = 0, *, kind: str = "noise", norm_pix: bool = True, channels: int = 1) -> Classifier:
    """A tiny one that claims to have been trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {"embed_dim": 16, "depth": 2, "decoder_dim": 16, "decoder_depth": 1}
        made = create_model("vit-ae-digits", 2, channels, 8, mean=0.4, std=0.3, **sizes)
    made.net.learns(Pretext(kind, norm_pix, 30.0, 120.0) if kind == "noise" else Pretext(kind, norm_pix, 0.75, 0.75))
    return made


def setting() -> tuple[nn.Module, Tensor, Tensor]:
    """In double precision; all classes occur."""
    model, images = small_model().double().eval(), small_batch(24).images.double()
    with torch.no_grad():
        model[-1].bias -= model(images).mean(dim=0)
    return model, images, model(images).argmax(dim=1)


def fitted(kind: str = "noise", norm_pix: bool = True, **options: Any) -> tuple[Guarded, Tensor, Tensor]:
    model, images, labels = setting()
    purifier = NIMPurifier(**options).fit(model, images, labels, autoencoder=autoencoder(kind=kind, norm_pix=norm_pix))
    return Guarded(model, purifier=purifier), images, labels


def streams(count: int, name: str = "test") -> Streams:
    return Streams.named(torch.arange(count), name)


# The contract, with every option.


@pytest.mark.parametrize("options", [{"stats": "noisy"}, {"stats": "none", "sigma": 0.0}, {"draws": 3, "sigma": "off"}])
def test_the_purifier_keeps_the_contract_with_every_option(options: dict) -> None:
    check_guard(lambda: NIMPurifier(epochs=1, batch_size=100, lr=1e-2, seed=3, **options))


class FromPretraining(NIMPurifier):
    """With a masked autoencoder that is there already."""

    def fit(self, model: nn.Module, images: Tensor, labels: Tensor, **more: Any) -> NIMPurifier:
        return super().fit(model, images, labels, autoencoder=autoencoder(kind="mask"))


def test_a_masked_autoencoder_keeps_the_contract() -> None:
    check_guard(lambda: FromPretraining(sigma=0.5))


# The knob.


@pytest.mark.parametrize("sigma", ["off", -1.0, -70])
def test_off_is_the_model_bit_for_bit(sigma: Any) -> None:
    guarded, images, _ = fitted()
    expected = guarded.model(images)
    for found in (guarded(images, sigma=sigma), guarded(images, sigma=sigma, draws=5)):
        assert torch.equal(found.logits, expected)
        assert torch.equal(found.parts["purified"], images)
    assert torch.equal(guarded.logits_model(sigma=sigma)(images), expected)
    always, images, _ = fitted(sigma=sigma)
    assert torch.equal(always(images).logits, always.model(images))
    assert not torch.equal(always(images, sigma=0).logits, always.model(images))  # level 0 still rebuilds


@pytest.mark.parametrize("options", [{}, {"stats": "noisy"}, {"norm_pix": False}])
def test_a_purified_image_is_the_formula(options: dict) -> None:
    guarded, images, _ = fitted(**options)
    purifier = guarded.purifier
    noisy = images + 105 / 255 * normal(images, streams(24))
    source = None if options.get("norm_pix") is False else noisy if options else images
    expected = denoised(purifier.autoencoder, noisy, source)
    found = purifier(guarded.model, images, streams(24), sigma=105)
    assert torch.equal(found, expected)
    assert 0 <= float(found.min()) < float(found.max()) <= 1
    assert torch.equal(purifier.noisy(images, 105.0, streams(24)), noisy)
    assert not torch.equal(purifier(guarded.model, images, streams(24), sigma=70), found)
    assert torch.equal(purifier(guarded.model, images, streams(24)), purifier(guarded.model, images, streams(24), sigma=70.0))
    verdict = guarded(images, streams(24), sigma=105)
    again = purifier(guarded.model, images, streams(24).fork(0), sigma=105)
    assert torch.equal(verdict.parts["purified"], again)
    assert torch.equal(verdict.logits, guarded.model(again))


def test_an_autoencoder_that_changes_nothing_leaves_the_clamped_noise() -> None:
    guarded, images, _ = fitted(norm_pix=False)
    net = autoencoder_of(guarded.purifier.autoencoder)
    net.tokens = lambda given, kept=None: patchify(given, 2)
    net.said = lambda tokens, kept=None: tokens
    noisy = images + 70 / 255 * normal(images, streams(24).fork(0))
    verdict = guarded(images, streams(24))
    torch.testing.assert_close(verdict.parts["purified"], noisy.clamp(0, 1), atol=1e-12, rtol=0)
    torch.testing.assert_close(verdict.logits, guarded.model(noisy.clamp(0, 1)), atol=1e-10, rtol=0)


def test_gradients_flow_through_the_noisy_image_and_through_the_statistics() -> None:
    guarded, images, _ = fitted()
    purifier, few = guarded.purifier, 0.3 + 0.4 * images[:3]
    weights = torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unit = 20 / 255 * normal(few, streams(3))

    def value(through_noise: Tensor, through_statistics: Tensor) -> Tensor:
        return (weights * denoised(purifier.autoencoder, through_noise + unit, through_statistics)).sum()

    first, second = few.clone().requires_grad_(), few.clone().requires_grad_()
    parts = torch.autograd.grad(value(first, second), (first, second))
    assert all(float(part.norm()) > 1e-3 for part in parts)
    asked = few.clone().requires_grad_()
    whole = torch.autograd.grad((weights * purifier(guarded.model, asked, streams(3), sigma=20)).sum(), asked)[0]
    torch.testing.assert_close(whole, parts[0] + parts[1], rtol=1e-9, atol=1e-12)
    step = 1e-6 * torch.randn(few.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for part, ends in (
            (parts[0], (value(few + step, few), value(few - step, few))),
            (parts[1], (value(few, few + step), value(few, few - step))),
            (whole, (value(few + step, few + step), value(few - step, few - step))),
        ):
            assert float(ends[0] - ends[1]) / 2 == pytest.approx(float((part * step).sum()), rel=1e-5)


def test_averaged_gradients_lose_their_variance_as_one_over_n() -> None:
    guarded, images, _ = fitted()
    model, draws = guarded.logits_model(), 1024

    def gradients(keys: Streams, count: int) -> Tensor:
        asked = (0.3 + 0.4 * images[:1]).repeat(count, 1, 1, 1).requires_grad_()
        logits = model.guarded.classify(asked, keys)[0]
        return torch.autograd.grad(logits.log_softmax(dim=1)[:, 0].sum(), asked)[0].flatten(1)

    alike = gradients(Streams(torch.full((6,), 7)), 6)
    torch.testing.assert_close(alike.mean(dim=0), alike[0], rtol=1e-10, atol=1e-14)
    found = gradients(streams(draws), draws)
    single = found.var(dim=0).sum()
    for count in (4, 16):
        ratio = float(found.view(draws // count, count, -1).mean(dim=1).var(dim=0).sum() / single * count)
        assert 0.6 < ratio < 1.6, count


def test_draws_average_probabilities_and_share_a_batch() -> None:
    guarded, images, _ = fitted(draws=3)
    verdict = guarded(images, streams(24))
    shares = []
    for draw in range(3):
        seen = guarded.purifier(guarded.model, images, streams(24).fork(0).fork(draw))
        shares.append(guarded.model(seen).softmax(dim=1))
        if draw == 0:
            torch.testing.assert_close(verdict.parts["purified"], seen, atol=1e-12, rtol=0)
    torch.testing.assert_close(verdict.probabilities, torch.stack(shares).mean(dim=0), atol=1e-12, rtol=0)
    for row in (0, 23):
        alone = guarded(images[row : row + 1], streams(24).rows(torch.tensor([row])))
        torch.testing.assert_close(alone.probabilities, verdict.probabilities[row : row + 1], atol=1e-12, rtol=0)
    one = guarded(images, streams(24), draws=1)
    assert torch.equal(one.logits, guarded.model(guarded.purifier(guarded.model, images, streams(24).fork(0))))
    sizes: list[int] = []
    guarded.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    guarded(images, draws=5)
    assert sizes == [5 * 24]


def test_the_attack_on_the_average_takes_its_draws_in_one_batch() -> None:
    guarded, images, labels = fitted()
    sizes: list[int] = []
    guarded.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    Averaged(guarded.logits_model(), 20)(images)
    assert sizes == [20 * 24]
    sizes.clear()
    Averaged(guarded.logits_model(), 100)(images)
    assert sizes == [42 * 24, 42 * 24, 16 * 24]
    sizes.clear()
    Averaged(guarded.logits_model(draws=8), 12)(images)  # eight draws of each of them
    assert sizes == [5 * 8 * 24, 5 * 8 * 24, 2 * 8 * 24]
    sizes.clear()
    Averaged(guarded.model, 3)(images)  # dice of such a model may belong to the batch
    assert sizes == [24] * 3
    torch.testing.assert_close(Averaged(guarded.logits_model(sigma="off"), 7)(images), guarded.model(images).log_softmax(dim=1))
    attack = EOT(inner=PGD(eps=0.1, steps=2), samples=4)
    found = [attack(guarded.logits_model(), images[:4], labels[:4], torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*found)
    assert float((found[0] - images[:4]).abs().max()) <= 0.1 + 1e-9


def test_memory_of_the_average_does_not_grow_with_its_draws() -> None:
    guarded, images, _ = fitted()
    found, kept = [], []
    for rows in (10_000, 48):  # all draws in one pass; two draws in each
        given = images.clone().requires_grad_()
        held = [0]

        def pack(tensor: Tensor, held: list[int] = held) -> Tensor:
            held[0] += tensor.numel()
            return tensor

        with pytest.MonkeyPatch.context() as patched, torch.random.fork_rng(devices=[]):
            patched.setattr("overproof.attacks.eot.ROWS", rows)
            torch.manual_seed(3)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                value = Averaged(guarded.logits_model(), 8)(given)[:, 0].sum()
            found.append(torch.autograd.grad(value, given)[0])
        kept.append(held[0])
    assert kept[1] < 0.1 * kept[0]
    assert all(bool(gradient.abs().sum() > 0) for gradient in found)


def test_passes_made_twice_throw_the_same_dice() -> None:
    guarded, images, _ = fitted()
    given = images[:4].clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patched, torch.random.fork_rng(devices=[]):
        patched.setattr("overproof.attacks.eot.ROWS", 8)
        torch.manual_seed(3)
        value = Averaged(guarded.logits_model(), 6)(given)[:, 0].sum()
        gradient = torch.autograd.grad(value, given)[0]
        torch.manual_seed(3)
        passes = [
            guarded.logits_model()(given.repeat(2, 1, 1, 1)).log_softmax(dim=1).view(2, 4, 3).sum(dim=0) for _ in range(3)
        ]
        plain = torch.stack(passes).sum(dim=0) / 6
    torch.testing.assert_close(value, plain[:, 0].sum(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain[:, 0].sum(), given)[0], atol=1e-12, rtol=1e-9)


# What does not fit.


def test_bad_knobs_are_named() -> None:
    guarded, images, _ = fitted()
    for options, words in (
        ({"draws": 0}, "draws=0: a purifier needs a whole number of draws of its noise, at least one"),
        ({"sigma": math.nan}, "sigma=nan is no level of noise"),
        ({"sigma": "strong"}, "sigma='strong' is no level"),
        ({"stats": "clean"}, "stats='clean'"),
        ({"epochs": 0}, "epochs=0"),
        ({"lr": 0.0}, "lr=0.0"),
    ):
        with pytest.raises(UsageError, match=words):
            NIMPurifier(**options)
    for options, words in (
        ({"draws": 0}, "draws=0"),
        ({"draws": 2.5}, "draws=2.5"),
        ({"draws": "4"}, "draws='4'"),
        ({"sigma": math.inf}, "sigma=inf"),
        ({"sigma": [70, 3]}, r"sigma=\[70, 3\] is no level"),
        ({"sigma": torch.tensor([1.0, 2.0])}, "is no level"),
        ({"sigma": True}, "sigma=True is no level"),
        ({"sigm": 3}, "sigm: what a purifier takes at call time is sigma and draws"),
    ):
        for ask in (lambda **o: guarded(images, **o), guarded.logits_model):
            with pytest.raises(UsageError, match=words):
                ask(**options)
    assert guarded(images[:0]).logits.shape == (0, 3)
    with pytest.raises(UsageError, match=r"shape \(1, 8, 8\) \(channels, height, width\), not \(1, 9, 9\)"):
        guarded.purifier(guarded.model, torch.rand(2, 1, 9, 9))
    with pytest.raises(UsageError, match=r"not \(3, 8, 8\)"):
        guarded.purifier(guarded.model, torch.rand(2, 3, 8, 8))
    with pytest.raises(UsageError, match="not fitted yet: purifier.fit"):
        NIMPurifier()(guarded.model, images)
    from overproof import Cache

    cached = Guarded(guarded.model, cache=Cache(layers=("2",)).fit(guarded.model, images, torch.arange(24) % 3))
    with pytest.raises(UsageError, match=r"Guarded\(sigma\): there is no purifier"):
        cached(images, sigma=3)


def test_a_level_beyond_the_training_warns() -> None:
    guarded, images, _ = fitted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guarded(images, sigma=120)
    with pytest.warns(UserWarning, match=r"sigma=140 is above what the purifier was trained for \(up to 120\)"):
        guarded(images, sigma=140)
    low, images, _ = fitted()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low(images, sigma=5)  # less noise than was trained for is what the knob is there to ask
    assert "low" not in low.purifier.facts
    masked, images, _ = fitted("mask", sigma=0.5)
    with pytest.warns(UserWarning, match=r"up to 0\.75"):
        masked(images, sigma=0.9)
    with pytest.raises(UsageError, match="sigma=1: of a masked autoencoder it is the share"):
        masked(images, sigma=1.0)


def test_a_masked_purifier_says_when_it_is_fitted_that_its_level_does_not_fit() -> None:
    model, images, labels = setting()
    purifier = NIMPurifier()
    with pytest.raises(UsageError, match=r"sigma=70: of a masked autoencoder .*--set nim\.sigma=0\.75"):
        purifier.fit(model, images, labels, autoencoder=autoencoder(kind="mask"))
    assert not purifier.fitted
    guarded, *_ = fitted("mask", sigma=0.5)
    check_levels(guarded, ["off", 0.25])
    with pytest.raises(UsageError, match="sigma=35: of a masked autoencoder"):
        check_levels(guarded, [0.5, 35.0])


def test_a_training_inside_fit_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, labels = setting()
    made: list[Any] = []
    monkeypatch.setattr(
        console.Bar,
        "update",
        lambda bar, done, *_, **__: (made.append((bar.title, done, bar.total)), setattr(bar, "done", done)),
    )
    SmallPurifier(epochs=2, batch_size=12).fit(
        model, images, labels, teacher=NIMPurifier().fit(model, images, labels, autoencoder=autoencoder())
    )
    assert made == [("fitting SmallPurifier", done, 4) for done in (1, 2, 3, 4)]


def test_autoencoders_that_do_not_fit_are_named() -> None:
    model, images, labels = setting()
    fresh = create_model("vit-ae-digits", 2, 1, 8)
    bare = autoencoder().net
    for options, source, words in (
        ({}, autoencoder(channels=3), r"rebuilds images of shape \(3, 8, 8\).*these have \(1, 8, 8\)"),
        ({}, small_model(), "is no autoencoder"),
        ({}, fresh, "has learned nothing yet"),
        ({}, bare, "does not say how to build it again"),
        ({"stats": "none"}, autoencoder(), "stats='none' does not fit .*norm_pix=true: use stats='input'"),
        ({"stats": "input"}, autoencoder(norm_pix=False), "use stats='none'"),
        ({"stats": "noisy"}, autoencoder(kind="mask"), "'mask'"),
    ):
        with pytest.raises(UsageError, match=words):
            NIMPurifier(**options).fit(model, images, labels, autoencoder=source)
    with pytest.raises(DataError, match=r"Move the channels forward"):
        NIMPurifier().fit(model, torch.rand(4, 8, 8, 3), labels[:4], autoencoder=autoencoder(channels=3))
    with pytest.raises(UsageError, match="square images, not 8 x 10"):
        NIMPurifier().fit(model, torch.rand(4, 1, 8, 10), labels[:4])
    with pytest.raises(UsageError, match="does not divide image_size=9"):
        NIMPurifier().fit(model, torch.rand(4, 1, 9, 9), labels[:4])
    with pytest.raises(UsageError, match="is no autoencoder"):
        NIMPurifier(network="mlp").fit(model, images, labels)
    source = autoencoder()
    made = NIMPurifier().fit(model, images, labels, autoencoder=source)
    assert made.autoencoder is not source
    assert next(source.parameters()).requires_grad
    assert next(source.parameters()).dtype == torch.float32
    assert not any(p.requires_grad for p in made.parameters())
    assert not made.train().autoencoder.training


def test_a_purifier_pre_trains_itself(digits: overproof.Splits) -> None:
    few = digits.train.images[:256]
    made = NIMPurifier(epochs=25, batch_size=64, lr=3e-3, network="vit-ae-digits").fit(small_model(), few, torch.zeros(256))
    errors = made.facts["errors"]["sigma 70"]
    assert errors["purified"] < 0.6 * errors["noisy"]


def test_restoring_leaves_the_callers_dice_alone(tmp_path: Path) -> None:
    guarded, _, _ = fitted()
    path = save_guard(guarded.purifier, tmp_path)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    load_guard(path)
    assert torch.equal(torch.rand(2), expected)
    facts = json.loads(path.read_text())
    for key in ("high", "kind", "stats", "shape"):
        path.write_text(json.dumps({**facts, "facts": {k: v for k, v in facts["facts"].items() if k != key}}))
        with pytest.raises(FolderError, match="describe no NIMPurifier"):
            load_guard(path)


# The small one.


def test_the_small_purifier_learns_to_rebuild() -> None:
    """From a teacher that blurs: residual convolutions can learn that, and do not before they are trained."""
    model, images, labels = setting()
    teacher = NIMPurifier().fit(model, images, labels, autoencoder=autoencoder())
    teacher.cleaned = lambda given, noisy, level: nn.functional.avg_pool2d(noisy, 3, 1, 1).clamp(0, 1)
    made = SmallPurifier(epochs=60, batch_size=12, width=8, depth=2, lr=1e-2, sigma=35.0).fit(
        model, images, labels, teacher=teacher
    )
    few = torch.rand(64, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noisy = made.noisy(few, 35.0, streams(64))
    target = teacher.cleaned(few, noisy, 35.0)
    untrained = float((noisy.clamp(0, 1) - target).square().mean())
    assert float((made.cleaned(few, noisy, 35.0) - target).square().mean()) < 0.5 * untrained
    assert made.facts["parameters"] == (5 * 9 * 8 + 8) + (8 * 9 * 4 + 4), "four pixels and the level in, four pixels out"
    assert made.facts["teacher_parameters"] == teacher.facts["parameters"] > 10 * made.facts["parameters"]
    assert made.facts["high"] == 120.0
    assert seen_levels(made, teacher, model, images, labels) > 4
    assert torch.equal(made(model, few, streams(64)), made.cleaned(few, noisy, 35.0))
    assert torch.equal(made(model, few, sigma="off"), few)


def seen_levels(made: SmallPurifier, teacher: NIMPurifier, model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """How many levels of noise the images of one batch had that the small one imitates its teacher on."""
    found: set[float] = set()
    known = teacher.cleaned

    def watched(given: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        found.update(round(float(value), 3) for value in (noisy - given).flatten(1).std(dim=1))
        return known(given, noisy, level)

    teacher.cleaned = watched  # type: ignore[method-assign]
    SmallPurifier(epochs=1, batch_size=12, width=made.width, depth=made.depth).fit(
        model, images[:12], labels[:12], teacher=teacher
    )
    teacher.cleaned = known  # type: ignore[method-assign]
    return len(found - {0.0})


def test_the_small_purifier_takes_images_of_any_size() -> None:
    net = Residual(3, width=4, depth=3)
    nn.init.zeros_(net.layers[-1].weight)
    nn.init.zeros_(net.layers[-1].bias)
    for size in ((8, 8), (7, 10), (9, 5)):
        noisy = torch.rand(2, 3, *size)
        assert torch.equal(net(noisy, 35.0), noisy), "nothing to take away: every pixel comes back to its place"


def test_the_small_purifier_sees_nothing_but_the_noisy_image_and_its_level() -> None:
    torch.manual_seed(0)
    network = Residual(3, width=4, depth=3)
    images, levels = torch.rand(2, 3, 6, 5), torch.tensor([10.0, 200.0])
    together = network(images, levels)
    for row, level in enumerate(levels.tolist()):
        torch.testing.assert_close(network(images[row : row + 1], level), together[row : row + 1])
    assert not torch.equal(network(images, 10.0), network(images, 200.0))
    assert sum(isinstance(layer, nn.Conv2d) for layer in network.modules()) == 3


def test_what_the_small_purifier_cannot_learn_is_named() -> None:
    model, images, labels = setting()
    for options in ({"width": 0}, {"depth": 1}, {"high": 0.0}):
        with pytest.raises(UsageError, match=f"{next(iter(options))}={next(iter(options.values()))}"):
            SmallPurifier(**options)
    masked = NIMPurifier(sigma=0.5).fit(model, images, labels, autoencoder=autoencoder(kind="mask"))
    with pytest.raises(UsageError, match="kind 'mask'"):
        SmallPurifier().fit(model, images, labels, teacher=masked)
    other = NIMPurifier().fit(model, torch.rand(4, 3, 8, 8), labels[:4], autoencoder=autoencoder(channels=3))
    with pytest.raises(UsageError, match=r"needed is one that removes noise from images of shape \(1, 8, 8\)"):
        SmallPurifier().fit(model, images, labels, teacher=other)
    with pytest.raises(UsageError, match="not fitted yet"):
        SmallPurifier().fit(model, images, labels, teacher=NIMPurifier())


# Files.


def test_a_saved_purifier_comes_back(tmp_path: Path) -> None:
    guarded, images, _ = fitted(stats="noisy", sigma=50.0, draws=2)
    path = save_guard(guarded.purifier, tmp_path)
    loaded = load_guards(tmp_path)["purifier"]
    assert loaded.options() == guarded.purifier.options()
    assert loaded.facts == guarded.purifier.facts
    again = Guarded(guarded.model, purifier=loaded)
    assert torch.equal(again(images, streams(24)).logits, guarded(images, streams(24)).logits)
    good = json.loads(path.read_text())
    told = good["description"]
    assert (told["sigma"], told["draws"], told["stats"], told["kind"]) == (50.0, 2, "noisy", "noise")
    assert set(told["errors"]) == {"sigma 35", "sigma 70", "sigma 140"}
    assert told["errors"]["sigma 70"]["noisy"] == pytest.approx((70 / 255) ** 2, rel=0.1)
    spec = good["facts"]["autoencoder"]
    for changed in ({"autoencoder": {**spec, "name": "antigravity:fly"}}, {"autoencoder": 3}, {"shape": [1, 8, 8]}):
        facts = {key: value for key, value in good["facts"].items() if key != "autoencoder"} | changed
        path.write_text(json.dumps({**good, "facts": facts}))
        with pytest.raises(FolderError, match="describe no NIMPurifier"):
            load_guard(path)


# Evaluation.


def test_no_attack_stops_early_on_dice() -> None:
    calm = patient(EOT(inner=PGD(eps=0.1, steps=3, step_size=0.05), samples=4, eps=0.2))
    assert calm.attack == PGD(eps=0.2, steps=3, step_size=0.05, early_stop=False)
    assert calm.samples == 4
    source = small_model()
    assert patient(Transfer(inner="pgd", source=source)).attack.early_stop is False
    assert patient(FGSM(eps=0.1)) == FGSM(eps=0.1)
    assert patient(APGD(eps=0.1)).eps == 0.1
    for version in ("rand", "standard", "fast", "quick"):
        for member in patient(AutoAttack(eps=0.1, version=version)).members.values():
            inner = member.attack if isinstance(member, EOT) else member
            assert isinstance(inner, FAB | Square) or inner.early_stop is False
    worst = patient(WorstCase(attacks=("fgsm", {"attack": "eot", "inner": "pgd"}, AutoAttack(version="rand")), eps=0.2))
    assert {member.threat.eps for member in worst.members.values()} == {0.2}
    assert worst.members["eot"].attack.early_stop is worst.members["autoattack"].early_stop is False


def test_a_lucky_start_does_not_send_an_image_away() -> None:
    """The second pass, a judgement after the first start, calls anything wrong; the other starts are made all the same."""

    class Lucky(nn.Module):
        calls = 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            score = images.flatten(1).mean(dim=1) - (5.0 if self.calls == 2 else 0.0)
            return torch.stack([score, -score], dim=1)

    model, images, labels = Lucky().eval(), torch.full((1, 1, 4, 4), 0.5), torch.zeros(1, dtype=torch.long)
    attack = PGD(eps=0.1, steps=1, step_size=0.05, restarts=4, early_stop=False)
    attack(model, images, labels, torch.Generator().manual_seed(0))
    assert model.calls == 2 * 4  # a step and a judgement each


def test_levels_are_read_and_checked() -> None:
    assert levels_of("off, 0,35.5,") == ["off", 0.0, 35.5]
    with pytest.raises(UsageError, match="--sigma 'much'"):
        levels_of("off,much")
    guarded, *_ = fitted()
    check_levels(guarded, ["off", 3.0])
    with pytest.raises(UsageError, match="sigma=nan"):
        check_levels(guarded, [math.nan])
    model, images, labels = setting()
    from overproof import Cache

    with pytest.raises(UsageError, match="needs a purifier with that knob"):
        check_levels(Guarded(model, cache=Cache(layers=("2",)).fit(model, images, labels)), ["off"])


def test_an_evaluation_turns_the_knob() -> None:
    guarded, images, labels = fitted(sigma=35.0)
    guarded = Guarded(
        guarded.model.float(),
        purifier=NIMPurifier(sigma=35.0).fit(guarded.model.float(), images, labels, autoencoder=autoencoder()),
    )
    data = ImageSet(images.float(), labels, classes=3)
    attacks = {"pgd": PGD(eps=0.1, steps=3, random_start=False)}
    result = evaluate_guarded(guarded, data, attacks=attacks, sanity=0, sigma=["off", 0, 105])
    curve = result.summary["purifier"]
    assert curve["sigma"] == ["off", 0.0, 105.0]
    assert curve["clean"][0] == 1.0  # labels are the bare model's answers
    assert set(curve["attacks"]) == {"pgd", "pgd-transfer"}
    assert curve["attacks"]["pgd"][0] == curve["attacks"]["pgd-transfer"][0]  # off, both are attacks on the bare model
    assert (curve["noisy"][0], curve["purified"][0]) == (None, None)
    assert curve["noisy"][1] == 0
    assert curve["noisy"][2] == pytest.approx((105 / 255) ** 2, rel=0.1)
    assert curve["purified"][2] < curve["noisy"][2]
    assert result.summary["guard"]["guards"] == ["purifier"]
    shown = result.gallery
    count = len(shown["clean"])
    assert shown["noisy"].shape == shown["purified"].shape == shown["clean"].shape == (count, 1, 8, 8)
    assert np.abs(shown["noisy"] / 255 - shown["adversarial"]).mean() > 0.02
    assert shown["bare_prediction"].shape == shown["purified_prediction"].shape == (count,)
    text = curve_text(result.summary)
    assert text.startswith("\n")
    assert "   off   100.00%" in text
    assert curve_text({}) == ""
    assert [row["sigma"] for row in level_rows(result.summary)] == [None, 0.0, 105.0]
    plain = evaluate_guarded(guarded, data, attacks={}, sanity=0)
    assert "purifier" not in plain.summary
    again = evaluate_guarded(guarded, data, attacks=attacks, sanity=0, sigma=["off", 0, 105])
    assert again.summary["purifier"] == curve


# From the command line.


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training, and a classifier fine-tuned behind it."""
    place = tmp_path_factory.mktemp("runs")
    common = [
        "--data",
        "digits",
        "--set",
        "data.limit_train=300",
        "--set",
        "data.limit_test=40",
        "--set",
        "train.optimizer=adamw",
    ]
    sizes = [
        "--set",
        "model.embed_dim=16",
        "--set",
        "model.depth=2",
        "--set",
        "model.decoder_dim=16",
        "--set",
        "model.decoder_depth=1",
    ]
    first = ["train", *common, "--model", "vit-ae-digits", *sizes, "--method", "nim", "--epochs", "3", "--lr", "0.003"]
    assert call([*first, "--out", str(place / "nim")]) == 0
    second = [
        "distill",
        *common,
        "--teacher",
        str(place / "nim"),
        "--set",
        f"model.run={place / 'nim'}",
        "--method",
        "nim-tune",
    ]
    assert call([*second, "--epochs", "2", "--lr", "0.003", "--out", str(place / "net")]) == 0
    return place


def test_the_last_weights_of_a_pre_training_are_the_best(runs: Path) -> None:
    folder = RunFolder(runs / "nim")
    assert folder.status["best_epoch"] == 2
    weights = [(folder.path / "weights" / f"{which}.safetensors").read_bytes() for which in ("best", "last")]
    assert weights[0] == weights[1]
    assert {"nim", "probe", "noise level"} <= set(folder.metrics[-1]["train"])
    assert folder.metrics[-1]["train"]["nim"] < folder.metrics[0]["train"]["nim"]
    assert RunFolder(runs / "net").config["model"]["run"] == str(runs / "nim")
    spec = json.loads((runs / "net" / "model.json").read_text())["spec"]
    assert spec["options"]["decoder_depth"] == 0


def test_from_the_pre_training_to_the_report(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = str(runs / "net")
    assert call(["guard", "fit", net, "--nim", "--pretrained", str(runs / "nim"), "--set", "nim.sigma=50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["nim"]
    assert (found["sigma"], found["high"], found["stats"]) == (50.0, 120.0, "input")
    guarded = load_guarded(net)
    assert isinstance(guarded.purifier, Purifier)
    command = ["evaluate", net, "--guarded", "--attack", "pgd:eps=0.1,steps=2", "--limit", "20", "--sanity", "0"]
    assert call([*command, "--sigma", "off,50"]) == 0
    text = capsys.readouterr().out
    assert "20 images behind purifier" in text
    assert "error: noisy, purified" in text
    assert call(["report", net]) == 0
    page = (runs / "net" / "report.html").read_text()
    for words in ('id="purifier"', "Accuracy over the knob", "On the way through", "with it:"):
        assert words in page, words
    capsys.readouterr()
    assert call(["guard", "fit", net, "--purifier-small", "--set", "purifier-small.epochs=1"]) == 0
    captured = capsys.readouterr()
    assert "purifier-small learns from" in captured.err
    assert "takes the place of the purifier nim" in captured.err
    assert "sigma 70: noisy" in captured.out
    assert isinstance(load_guarded(net).purifier, SmallPurifier)
    assert sorted(path.name for path in (runs / "net" / "guards").iterdir()) == [
        "purifier-small.json",
        "purifier-small.safetensors",
    ]
    with pytest.raises(UsageError, match="learned from a purifier whose place it took"):
        fit_guards(net, {"purifier-small": {"epochs": 1, "width": 4}})
    assert call([*command, "--sigma=-1,50"]) == 0
    assert "   off  " in capsys.readouterr().out
    assert call(["report", net]) == 0
    page = (runs / "net" / "report.html").read_text()
    assert page.count("Accuracy over the knob</h") == 2 or page.count("Accuracy over the knob") >= 4, "one for each purifier"
    assert "purifier: nim, statistics of input" in page
    assert "purifier: small" in page
    fit_guards(net, {"purifier-small": {"epochs": 1, "width": 4}}, pretrained=runs / "nim")
    assert load_guarded(net).purifier.facts["teacher_stats"] == "input"
    fit_guards(net, {"nim": {"epochs": 1}})
    assert load_guarded(net).purifier.facts["high"] == 120.0


def test_a_detector_belongs_to_the_purifier_it_was_fitted_behind(tmp_path: Path) -> None:
    net = tmp_path / "net"
    overproof.train("cnn", "digits", epochs=8, model_options={"widths": (8, 16)}, out=net)
    fit_guards(net, {"detector": {"fpr": 0.2}, "purifier-small": {"epochs": 1, "width": 4}}, overrides=["data.limit_train=600"])
    held = describe_guards(net)
    assert held["detector"]["about"]["behind"] == held["purifier-small"]["stamp"]
    model = load_guarded(net).model
    images = torch.rand(100, 1, 8, 8)
    seen = shown(net, model, images)
    assert (seen - images).abs().mean() > 0.01
    assert torch.equal(seen, shown(net, model, images))
    fit_guards(net, {"purifier-small": {"epochs": 1, "width": 4}}, overrides=["data.limit_train=600"])
    with pytest.raises(UsageError, match="fitted behind another purifier"):
        load_guarded(net)
    for path in (net / "guards").glob("purifier-small.*"):
        path.unlink()
    with pytest.raises(UsageError, match="fitted behind another purifier"):
        load_guarded(net)
    assert shown(net, model, images) is images
    fit_guards(net, {"detector": {"fpr": 0.2}})
    assert load_guarded(net).detector is not None


def test_what_the_command_line_refuses(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = str(runs / "net")
    for arguments, code, words in (
        (["guard", "fit", net, "--nim", "--purifier-small"], 2, "A model has one"),
        (["guard", "fit", net, "--cache", "--pretrained", str(runs / "nim")], 2, "Purifiers named: none"),
        (["guard", "fit", net, "--nim", "--pretrained", net], 2, "has no decoder"),
        (["guard", "fit", net, "--nim", "--pretrained", str(runs / "none")], 1, "not a run folder"),
        (["guard", "fit", net, "--nim", "--set", "nim.draws=0"], 2, "draws=0"),
        (["evaluate", net, "--sigma", "off,70"], 2, "say --guarded too"),
        (
            ["distill", "--data", "digits", "--teacher", net, "--method", "nim-tune", "--out", str(runs / "x")],
            2,
            "has no decoder",
        ),
        (["train", "--data", "digits", "--model", "cnn", "--method", "nim", "--out", str(runs / "x")], 2, "is no autoencoder"),
    ):
        assert call(arguments) == code, arguments
        assert words in capsys.readouterr().err
