"""Noisy image modelling: noise, patches and losses against their formulas, the autoencoder, pre-training and fine-tuning."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import overproof
from overproof import METHODS, Batch, Classifier, Objective, Output, Progress
from overproof.errors import DataError, UsageError
from overproof.losses.denoising import (
    NoiseLevels,
    add_noise,
    kept_patches,
    masked_patches,
    patch_errors,
    patch_statistics,
    patchify,
    unpatchify,
)
from overproof.losses.divergences import cross_entropy
from overproof.methods import nim as nim_file
from overproof.methods import nim_tuning as nim_tuning_file
from overproof.methods.nim import MIM, NIM
from overproof.methods.nim_groups import decay_groups, layer_groups
from overproof.methods.nim_tuning import NIMTuning, shallower
from overproof.models import MODELS, create_model, rebuild
from overproof.models.autoencoder import Pretext, VitAutoencoder, autoencoder_of
from overproof.models.heads import with_new_head
from overproof.models.rebuilding import denoised, inpainted
from overproof.networks import digest, in_mode
from overproof.testing import check_method, small_batch, small_model

NOW = Progress()


def autoencoder(seed: int = 0, *, kind: str = "noise", norm_pix: bool = True, **options: object) -> Classifier:
    """A tiny one for images 1x8x8 and three classes, that claims to have been trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = {"embed_dim": 16, "depth": 2, "decoder_dim": 16, "decoder_depth": 1}
        made = create_model("vit-ae-digits", 3, 1, 8, mean=0.4, std=0.3, **{**sizes, **options})
    made.net.learns(Pretext(kind, norm_pix, 30.0, 120.0) if kind == "noise" else Pretext(kind, norm_pix, 0.75, 0.75))
    return made


def double(count: int = 4, seed: int = 0, shape: tuple[int, int, int] = (1, 8, 8)) -> Tensor:
    return torch.rand(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# Patches.


@pytest.mark.parametrize(("shape", "size"), [((3, 8, 8), 2), ((1, 6, 9), 3), ((2, 4, 4), 1), ((3, 4, 8), 4)])
def test_patches_come_back_and_lie_in_the_documented_order(shape: tuple[int, int, int], size: int) -> None:
    images = torch.arange(2.0 * shape[0] * shape[1] * shape[2]).view(2, *shape)
    patches = patchify(images, size)
    assert patches.shape == (2, shape[1] * shape[2] // size**2, size**2 * shape[0])
    assert torch.equal(unpatchify(patches, size, shape), images)
    across = shape[2] // size
    for place in range(patches.shape[1]):
        top, left = size * (place // across), size * (place % across)
        window = images[1, :, top : top + size, left : left + size]
        assert torch.equal(patches[1, place], window.permute(1, 2, 0).flatten())


def test_patches_that_do_not_fit_are_named() -> None:
    with pytest.raises(DataError, match="Patches of 3 pixels do not fit images of 8 x 8"):
        patchify(torch.zeros(1, 1, 8, 8), 3)


def test_patch_statistics_are_unbiased() -> None:
    patches = patchify(double(), 2)
    mean, scale = patch_statistics(patches)
    biased = (patches - mean).square().mean(dim=-1, keepdim=True)
    torch.testing.assert_close(scale.square() - 1e-6, biased * 4 / 3, atol=1e-14, rtol=0)


# Noise.


def test_noise_has_the_level_of_its_image_in_grey_levels() -> None:
    torch.manual_seed(0)
    images, sigma = torch.rand(4, 1, 100, 100, dtype=torch.float64), torch.tensor([0.0, 20.0, 75.0, 140.0], dtype=torch.float64)
    found = add_noise(images, sigma, torch.randn_like(images)) - images
    assert torch.equal(found[0], torch.zeros_like(found[0]))
    torch.testing.assert_close(found.flatten(1).std(dim=1), sigma / 255, rtol=0.02, atol=0)
    assert float(add_noise(images, 140.0, torch.randn_like(images)).max()) > 1  # it is not clamped
    one = add_noise(images[:1], 70.0, torch.ones_like(images[:1]))
    torch.testing.assert_close(one, images[:1] + 70 / 255)


def test_levels_have_mean_75_and_deviation_15() -> None:
    """Torch counts Gamma laws in rates: a scale handed over as a rate would give a mean of 8.3."""
    torch.manual_seed(0)
    drawn = NoiseLevels().draw(torch.zeros(10_000, 1, 2, 2))
    assert drawn.shape == (10_000,)
    assert float(drawn.mean()) == pytest.approx(75, abs=0.5)
    assert float(drawn.std()) == pytest.approx(15, abs=0.5)
    assert NoiseLevels().span == (30.0, 120.0)
    assert NoiseLevels(shape=1.0, scale=1.0).span == (0.0, 4.0)
    flat = NoiseLevels(law="uniform", high=30.0)
    drawn = flat.draw(torch.zeros(10_000, 1, 1, 1, dtype=torch.float64))
    assert drawn.dtype == torch.float64
    assert float(drawn.min()) >= 0
    assert 29 < float(drawn.max()) <= 30
    assert float(drawn.mean()) == pytest.approx(15, abs=0.5)
    assert flat.span == (0.0, 30.0)
    fixed = NoiseLevels(law="fixed", sigma=40.0)
    assert fixed.draw(torch.zeros(3, 1, 1, 1)).tolist() == [40.0] * 3
    assert fixed.span == (40.0, 40.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"law": "pink"}, "noise='pink'"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"high": -1.0}, "high=-1.0"),
        ({"high": math.inf}, "finite"),
    ],
)
def test_bad_noise_is_named(options: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        NoiseLevels(**options)


# The loss.


def test_saying_the_truth_costs_nothing_and_rebuilds_the_image() -> None:
    images = double()
    truth = patchify(images, 2)
    mean, scale = patch_statistics(truth)
    said = (truth - mean) / scale
    assert float(patch_errors(said, images, 2, norm_pix=True).max()) < 1e-24
    torch.testing.assert_close(unpatchify(said * scale + mean, 2, (1, 8, 8)), images, atol=1e-12, rtol=0)
    assert float(patch_errors(truth, images, 2, norm_pix=False).max()) == 0


def test_scaled_truth_knows_neither_brightness_nor_contrast() -> None:
    images, said = double(), double(seed=1)
    before = patch_errors(patchify(said, 2), images, 2, norm_pix=True)
    factors, shifts = torch.rand(4, 16, 1, dtype=torch.float64) + 0.5, torch.randn(4, 16, 1, dtype=torch.float64)
    other = unpatchify(patchify(images, 2) * factors + shifts, 2, (1, 8, 8))
    torch.testing.assert_close(patch_errors(patchify(said, 2), other, 2, norm_pix=True), before, rtol=1e-2, atol=1e-3)
    assert not torch.allclose(patch_errors(patchify(said, 2), other, 2, norm_pix=False), before, rtol=0.1)


def test_the_loss_is_the_plain_mean_over_all_patches() -> None:
    model, batch = autoencoder().double(), small_batch(6)
    images = batch.images.double()
    objective = NIM(model, noise="fixed", sigma=50.0, probe=False)
    torch.manual_seed(5)
    found = objective(Batch(images, batch.labels, batch.index), NOW)
    torch.manual_seed(5)
    noisy = images + 50 / 255 * torch.randn_like(images)
    net, clean = model.net, (images - model.normalize.mean) / model.normalize.std
    said = net.decoder(net.tokens((noisy - model.normalize.mean) / model.normalize.std))
    truth = F.unfold(clean, 2, stride=2).transpose(1, 2)
    truth = (truth - truth.mean(-1, keepdim=True)) / (truth.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = torch.stack([(said[n, token] - truth[n, token]).square().mean() for n in range(6) for token in range(16)])
    torch.testing.assert_close(found.losses["nim"], expected.mean(), rtol=1e-12, atol=0)
    assert set(found.losses) == {"nim"}
    assert float(found.logs["noise level"]) == 50
    torch.testing.assert_close(
        found.logits, net.classify(net.tokens((noisy - 0.4) / model.normalize.std)), rtol=1e-6, atol=1e-6
    )


def test_every_image_gets_a_level_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[torch.Tensor] = []
    for module in (nim_file, nim_tuning_file):
        monkeypatch.setattr(
            module, "add_noise", lambda images, sigma, unit: drawn.append(sigma) or add_noise(images, sigma, unit)
        )
    batch = small_batch(6)
    NIM(autoencoder())(batch, NOW)
    NIMTuning(autoencoder(1), autoencoder(2)).shown(batch.images)
    for sigma in drawn:
        assert sigma.shape == (6,)
        assert len(set(sigma.tolist())) == 6
    assert len(drawn) == 2


def test_half_precision_has_levels_too() -> None:
    for kind in (torch.float16, torch.bfloat16):
        levels = NoiseLevels().draw(torch.zeros(500, 1, 1, 1, dtype=kind))
        assert levels.dtype == kind
        assert 70 < float(levels.float().mean()) < 80


def test_compiled_is_what_is_called() -> None:
    objective = NIM(autoencoder())
    parts, called = objective.compiled(), set()
    for part in parts:
        part.register_forward_hook(lambda module, *_: called.add(module))
    objective(small_batch(2), NOW)
    assert called == set(parts) != set()
    tuning = NIMTuning(autoencoder(1), autoencoder(2))
    assert tuning.compiled()[0] is tuning.student
    assert set(tuning.compiled()[1:]) == set(autoencoder_of(tuning.teacher).all_blocks())


def test_the_masked_loss_looks_at_masked_patches_alone() -> None:
    model, batch = autoencoder(kind="mask").double(), small_batch(5)
    images = batch.images.double()
    objective = MIM(model, ratio=0.75, probe=False, norm_pix=False)
    torch.manual_seed(5)
    found = objective(Batch(images, batch.labels, batch.index), NOW).losses["mim"]
    torch.manual_seed(5)
    kept = torch.rand(5, 16).argsort(dim=1)[:, :4]
    clean = (images - model.normalize.mean) / model.normalize.std
    said = model.net.said(model.net.tokens(clean, kept), kept)
    errors = (said - patchify(clean, 2)).square().mean(dim=-1)
    hidden = [[token for token in range(16) if token not in kept[n].tolist()] for n in range(5)]
    assert all(len(tokens) == 12 for tokens in hidden)
    expected = torch.stack([errors[n, tokens].mean() for n, tokens in enumerate(hidden)]).mean()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_masked_patches_are_not_seen() -> None:
    net, images, other = autoencoder().double().net, double(), double(seed=1)
    kept = kept_patches(torch.rand(4, 16), 0.5)
    assert kept.shape == (4, 8)
    masked = masked_patches(kept, 16)
    assert masked.sum(dim=1).tolist() == [8] * 4
    assert masked.gather(1, kept).sum() == 0
    changed = unpatchify(torch.where(masked[:, :, None] > 0, patchify(other, 2), patchify(images, 2)), 2, (1, 8, 8))
    assert torch.equal(net.tokens(images, kept), net.tokens(changed, kept))
    assert not torch.equal(net.tokens(images), net.tokens(changed))
    whole = torch.arange(16).expand(4, -1)
    torch.testing.assert_close(net.said(net.tokens(images, whole), whole), net.said(net.tokens(images)))
    assert kept_patches(torch.rand(2, 16), 0.99).shape == (2, 1)


# The probe, and what the optimiser gets.


def test_the_probe_leaves_no_trace_in_the_autoencoder() -> None:
    gradients = []
    for probe in (True, False):
        model = autoencoder()
        objective = NIM(model, probe=probe)
        torch.manual_seed(0)
        sum(objective(small_batch(8), NOW).losses.values()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    head = {name for name in gradients[0] if name.startswith(("net.fc_norm", "net.head"))}
    assert all(gradients[0][name] is not None for name in head)
    assert all(gradients[1][name] is None for name in head)
    for name in gradients[0].keys() - head - {"net.decoder.mask_token"}:
        assert torch.equal(gradients[0][name], gradients[1][name]), name
    assert gradients[0]["net.decoder.mask_token"] is None


@pytest.mark.parametrize(
    "build",
    [
        lambda s: NIM(s, probe=False),
        lambda s: NIM(s, noise="uniform", norm_pix=False),
        lambda s: MIM(s, ratio=0.5, probe=False),
    ],
)
def test_pre_training_keeps_the_contract_with_every_option(build) -> None:
    check_method(build, teacher=False, network=autoencoder)


@pytest.mark.parametrize(
    "options", [{"on_original": True}, {"no_denoising": True}, {"high": 0.0, "drop_path": 0.0}, {"layer_decay": 1.0}]
)
def test_fine_tuning_keeps_the_contract_with_every_option(options: dict) -> None:
    check_method(lambda s, t: NIMTuning(s, t, **options), network=autoencoder)


def test_fine_tuning_behind_a_masked_autoencoder_keeps_the_contract() -> None:
    check_method(NIMTuning, network=lambda seed: autoencoder(seed, kind="mask"))


def test_vectors_do_not_decay_and_layers_learn_slower_towards_the_pixels() -> None:
    model = with_new_head(autoencoder(), 3)
    named = dict(model.named_parameters())
    plain = decay_groups(named.items(), betas=(0.9, 0.95))
    assert {p.dim() for p in plain[1]["params"]} == {1}
    assert plain[1]["weight_decay"] == 0.0
    assert "weight_decay" not in plain[0]
    assert plain[0]["betas"] == plain[1]["betas"] == (0.9, 0.95)
    assert sum(len(group["params"]) for group in plain) == len(named)
    groups = layer_groups(named.items(), 2, 0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    expected = {
        "net.cls": 1 / 8,
        "net.embed.weight": 1 / 8,
        "net.blocks.0.attn.qkv.weight": 1 / 4,
        "net.blocks.1.norm1.bias": 1 / 2,
    }
    assert not any(id(named["net.cls"]) == id(p) for g in groups if "weight_decay" not in g for p in g["params"])
    expected |= {"net.fc_norm.weight": 1.0, "net.head.bias": 1.0}
    assert {name: scale[id(named[name])] for name in expected} == expected
    assert len(scale) == len(named)
    ours = NIM(autoencoder(), probe=False).groups()
    assert not {id(p) for p in ours[0]["params"]} & {id(p) for p in autoencoder().parameters()}
    cnn = NIMTuning(small_model(), autoencoder())
    assert {group["lr_scale"] for group in cnn.groups()} == {1.0}


class HalfStill(Objective):
    """Cross-entropy that leaves the first layer where it is."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)

    def groups(self, phase: str = "train") -> list[dict]:
        first, *others = self.trainable(phase)
        return [{"params": [first], "lr_scale": 0.0}, {"params": others}]

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        logits = self.student(batch.images)
        return Output({"ce": cross_entropy(logits, batch.labels).mean()}, logits)


def test_the_loop_heeds_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS._entries, "half-still", METHODS.get("ce").__class__("half-still", HalfStill))
    batch = small_batch(32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))
    before = copy.deepcopy(model.state_dict())
    run = overproof.train(
        model, (batch.images, batch.labels), method="half-still", epochs=2, batch_size=16, weight_decay=0.0, out=tmp_path / "r"
    )
    after = run.model.state_dict()
    assert torch.equal(after["1.weight"], before["1.weight"])
    assert not torch.equal(after["3.weight"], before["3.weight"])


# The network.


def test_a_classifier_sheds_the_decoder(tmp_path: Path) -> None:
    model = autoencoder(kind="noise")
    made = with_new_head(model, 5)
    assert isinstance(made.net, VitAutoencoder)
    assert made.net.decoder is None
    assert model.net.decoder is not None
    assert made.spec["classes"] == 5
    assert made.spec["options"]["decoder_depth"] == 0
    again = rebuild(json.loads(json.dumps(made.spec)))
    again.load_state_dict(made.state_dict())
    assert digest(again) == digest(made)
    images = small_batch(3).images
    assert torch.equal(again(images), made(images))
    with pytest.raises(UsageError, match="has no decoder"):
        autoencoder_of(made)
    with pytest.raises(UsageError, match=r"This Sequential is no autoencoder.*vit-ae-digits"):
        autoencoder_of(small_model())
    assert autoencoder_of(model.net) is model.net


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patch_size": 3}, "patch_size=3 does not divide image_size=8"),
        ({"embed_dim": 18, "num_heads": 3}, "embed_dim=18 must be a multiple of 4 and of its 3 heads"),
        ({"decoder_dim": 12, "decoder_heads": 5}, "decoder_dim=12"),
        ({"depth": 0}, "depth=0"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        create_model("vit-ae-digits", 10, 1, 8, **options)


def test_other_images_are_refused() -> None:
    with pytest.raises(DataError, match=r"reads images of shape \(1, 8, 8\), not \(1, 12, 12\)"):
        autoencoder()(torch.rand(2, 1, 12, 12))


@pytest.mark.parametrize(("name", "size", "count"), [("vit-ae-b16", 224, 111_907_840), ("vit-ae-l16", 224, 329_541_888)])
def test_the_large_presets_are_the_published_autoencoders(name: str, size: int, count: int) -> None:
    """Parameters of the published masked autoencoders, whose positions count though they do not learn; ours has a head beside."""
    with torch.device("meta"):
        net = MODELS.create(name, 2, 3, size)
    beside = sum(p.numel() for part in (net.fc_norm, net.head) for p in part.parameters())
    positions = net.positions.numel() + net.decoder.positions.numel()
    assert sum(p.numel() for p in net.parameters()) - beside + positions == count


def test_the_pretext_travels_with_the_weights() -> None:
    model, other = autoencoder(), create_model("vit-ae-digits", 3, 1, 8, embed_dim=16, depth=2, decoder_dim=16, decoder_depth=1)
    assert other.net.pretext == Pretext()
    MIM(model, ratio=0.5, norm_pix=False)
    other.load_state_dict(model.state_dict())
    assert other.net.pretext == Pretext("mask", False, 0.5, 0.5)
    NIM(model, noise="uniform", high=150.0)
    assert model.double().net.pretext == Pretext("noise", True, 0.0, 150.0)


def test_what_cannot_be_pre_trained_is_named() -> None:
    with pytest.raises(UsageError, match="is no autoencoder"):
        NIM(small_model())
    with pytest.raises(UsageError, match="norm_pix needs patches of two pixels or more"):
        NIM(create_model("vit-ae-digits", 3, 1, 4, patch_size=1))
    NIM(create_model("vit-ae-digits", 3, 1, 4, patch_size=1), norm_pix=False)
    NIM(create_model("vit-ae-digits", 3, 3, 4, patch_size=1))
    for ratio in (0.0, 1.0, 0.01):
        with pytest.raises(UsageError, match=f"ratio={ratio}"):
            MIM(autoencoder(), ratio=ratio)


# Rebuilding.


def test_a_rebuilt_image_is_the_formula() -> None:
    model, images, noisy = autoencoder().double().eval(), double(), double(seed=1) * 2 - 0.5
    net, (mean, std) = model.net, (model.normalize.mean, model.normalize.std)
    said = net.decoder(net.tokens((noisy - mean) / std))
    mu, scale = patch_statistics(patchify((images - mean) / std, 2))
    expected = (unpatchify(said * scale + mu, 2, (1, 8, 8)) * std + mean).clamp(0, 1)
    assert torch.equal(denoised(model, noisy, images), expected)
    bare = (unpatchify(said, 2, (1, 8, 8)) * std + mean).clamp(0, 1)
    assert torch.equal(denoised(model, noisy, None), bare)
    flat = torch.full_like(images, 0.3)  # an even patch comes back as its own mean, whatever the decoder says
    torch.testing.assert_close(denoised(model, noisy, flat), flat, atol=0.02, rtol=0)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_guessing_leaves_what_was_seen(norm_pix: bool) -> None:
    model, images = autoencoder(kind="mask").double().eval(), double()
    kept = kept_patches(torch.rand(4, 16), 0.75)
    found = patchify(inpainted(model, images, kept, norm_pix=norm_pix), 2)
    seen = masked_patches(kept, 16)[:, :, None].expand_as(found) == 0
    torch.testing.assert_close(found[seen], patchify(images, 2)[seen], atol=1e-12, rtol=0)
    net, (mean, std) = model.net, (model.normalize.mean, model.normalize.std)
    said = net.said(net.tokens((images - mean) / std, kept), kept)
    mu, scale = patch_statistics(patchify((images - mean) / std, 2))
    guessed = unpatchify(said * scale + mu if norm_pix else said, 2, (1, 8, 8)) * std + mean
    torch.testing.assert_close(found[~seen], patchify(guessed.clamp(0, 1), 2)[~seen], atol=1e-12, rtol=0)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


# Fine-tuning.


def test_fine_tuning_sees_what_it_says() -> None:
    student, teacher, images = autoencoder(1).eval(), autoencoder(2), small_batch(6).images
    before = copy.deepcopy(teacher.state_dict())
    assert torch.equal(NIMTuning(student, teacher, on_original=True).shown(images), images)
    noisy = NIMTuning(student, teacher, no_denoising=True, high=200.0).shown(images)
    assert float(noisy.max()) > 1
    rebuilt = NIMTuning(student, teacher).shown(images)
    assert float(rebuilt.min()) >= 0
    assert float(rebuilt.max()) <= 1
    assert not rebuilt.requires_grad
    quiet = NIMTuning(student, teacher, high=0.0).shown(images)
    assert torch.equal(quiet, denoised(teacher, images, images))
    plain = NIMTuning(student, autoencoder(2, norm_pix=False), high=0.0).shown(images)
    assert torch.equal(plain, denoised(teacher, images, None))
    loud = NIMTuning(student, teacher, high=100.0)  # statistics come from the image, levels are those of the images
    torch.manual_seed(4)
    seen = loud.shown(images)
    torch.manual_seed(4)
    sigma = 100 * torch.rand(len(images))
    assert torch.equal(seen, denoised(teacher, add_noise(images, sigma, torch.randn_like(images)), images))
    masked = NIMTuning(student, autoencoder(2, kind="mask"), high=0.0).shown(images)
    torch.testing.assert_close(masked, images, atol=1e-6, rtol=0)
    half = NIMTuning(student, autoencoder(2, kind="mask"), high=0.9)
    changed = [float((half.shown(images) - images).abs().mean()) for _ in range(8)]
    assert len(set(changed)) > 4
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_loss_of_fine_tuning_is_smoothed_and_takes_class_weights() -> None:
    student, batch = autoencoder(1).eval(), small_batch(6)
    objective = NIMTuning(student, autoencoder(2), on_original=True, label_smoothing=0.2).eval()
    logits = student(batch.images)
    expected = 0.8 * F.cross_entropy(logits, batch.labels) - 0.2 * logits.log_softmax(dim=1).mean()
    torch.testing.assert_close(objective(batch, NOW).losses["ce"], expected)
    soft = Batch(batch.images, F.one_hot(batch.labels, 3).float(), batch.index)
    torch.testing.assert_close(objective(soft, NOW).losses["ce"], expected)


def test_stochastic_depth_is_borrowed() -> None:
    model = autoencoder(1, depth=4).train()
    batch, known = small_batch(6), digest(model)
    with shallower(model.net, 0.9):
        rates = [block.drop_path1.drop_prob for block in model.net.blocks]
        assert rates == pytest.approx([0.0, 0.3, 0.6, 0.9])
        torch.manual_seed(0)
        first = model(batch.images)
        assert not torch.equal(first, model(batch.images))
    assert digest(model) == known
    objective = NIMTuning(model, autoencoder(2), on_original=True, drop_path=0.9).train()
    losses = [float(objective(batch, NOW).losses["ce"]) for _ in range(2)]
    assert losses[0] != losses[1]
    with in_mode(objective):
        assert float(objective(batch, NOW).losses["ce"]) == float(objective(batch, NOW).losses["ce"])
    assert digest(model) == known


def test_what_cannot_be_fine_tuned_is_named() -> None:
    student, teacher = small_model(), autoencoder()
    fresh = create_model("vit-ae-digits", 3, 1, 8)
    for master, options, words in (
        (small_model(), {}, "is no autoencoder"),
        (fresh, {}, "has learned nothing yet"),
        (teacher, {"high": -1.0}, "high=-1.0"),
        (autoencoder(kind="mask"), {"high": 1.0}, "high=1.0 .* below 1"),
        (autoencoder(kind="mask"), {"no_denoising": True}, "has no noisy images"),
        (teacher, {"on_original": True, "no_denoising": True}, "choose one"),
        (teacher, {"label_smoothing": 1.0}, "label_smoothing=1.0"),
        (teacher, {"drop_path": -0.1}, "drop_path=-0.1"),
        (teacher, {"layer_decay": 0.0}, "layer_decay=0.0"),
    ):
        with pytest.raises(UsageError, match=words):
            NIMTuning(student, master, **options)


def test_training_on_digits_removes_noise(digits: overproof.Splits) -> None:
    """A few epochs suffice to rebuild held-out images better than the noise leaves them, at every level."""
    torch.manual_seed(0)
    mean, std = digits.train.mean_std()
    sizes = {"embed_dim": 32, "depth": 2, "decoder_dim": 32, "decoder_depth": 1}
    model = create_model("vit-ae-digits", 10, 1, 8, mean=mean, std=std, **sizes)
    objective = NIM(model)
    optimizer = torch.optim.AdamW(objective.groups(), 3e-3, weight_decay=0.05)
    images, labels = digits.train.images.float() / 255, digits.train.labels
    for _ in range(6):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            sum(objective(Batch(images[rows], labels[rows], rows), NOW).losses.values()).backward()
            optimizer.step()
    held = digits.test.images.float() / 255
    for sigma, share in ((35.0, 0.7), (70.0, 0.35), (140.0, 0.2)):
        noisy = add_noise(held, sigma, torch.randn_like(held))
        with torch.no_grad():
            error = float((denoised(model, noisy, held) - held).square().mean())
        assert error < share * float((noisy - held).square().mean()), sigma


@pytest.mark.parametrize("name", ["nim", "mim"])
def test_plain_gradient_descent_is_advised_against(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from overproof.config import resolve
    from overproof.run.prepare import checked

    table = {"verb": "train", "data": {"name": "digits"}, "model": {"name": "vit-ae-digits"}, "method": {"name": name}}
    checked(resolve(table))
    said = capsys.readouterr().err
    assert f"{name} is made for AdamW, and train.optimizer is sgd with lr=0.1" in said
    assert "--set train.optimizer=adamw" in said
    checked(resolve(table, {"train": {"optimizer": "adamw"}}))
    checked(resolve({**table, "model": {"name": "cnn"}, "method": {"name": "ce"}}))
    assert capsys.readouterr().err == ""
