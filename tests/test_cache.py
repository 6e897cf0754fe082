"""The cache: closed forms, invariants, compressions, and what it does to a mediocre network."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from overproof import PGD, Cache, Guarded, Splits, create_model
from overproof.errors import DataError, OverproofError, UnknownNameError, UsageError
from overproof.guards.cache_items import clustered, stored
from overproof.guards.cache_keys import PRESETS, KeyReader, choose_layers
from overproof.guards.cache_tuning import LAMS, THETAS, best_of
from overproof.guards.cache_votes import evidence_of_all, evidence_of_nearest, nearest, sweep, sweep_nearest
from overproof.networks import in_mode
from overproof.testing import check_guard, small_batch, small_model

CLASSES, LENGTH = 3, 5


def pixels(classes: int = CLASSES, length: int = LENGTH, seed: int = 0) -> nn.Sequential:
    """A linear classifier whose layer "1" shows the pixels themselves, so that keys are images scaled to length one."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(length, classes)).double().eval()


def rows(vectors: Any) -> Tensor:
    """Vectors (N, d) as images (N, 1, 1, d)."""
    return torch.as_tensor(vectors, dtype=torch.double)[:, None, None, :]


def plain(**options: Any) -> Cache:
    return Cache(**{"layers": ("1",), "mirror": False, "dtype": "float64", **options})


def setting(count: int = 23, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Images with labels for a cache, and images to ask it about."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, 1, LENGTH, generator=generator, dtype=torch.double)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return images, labels, torch.rand(6, 1, 1, LENGTH, generator=generator, dtype=torch.double)


def shares(cache: Cache, model: nn.Module, images: Tensor) -> Tensor:
    """p_cache."""
    return cache(model, images).parts["cache"].exp()


def straightforward(images: Tensor, labels: Tensor, queries: Tensor, theta: float) -> Tensor:
    """softmax(theta K q) V."""
    keys, asked = (nn.functional.normalize(x.flatten(1), dim=1) for x in (images, queries))
    return (theta * asked @ keys.T).softmax(dim=1) @ nn.functional.one_hot(labels, CLASSES).double()


# Closed forms.


def test_two_orthonormal_keys_vote_by_a_sigmoid() -> None:
    model = pixels(2, 2)
    cache = plain(theta=7.0, lam=1.0).fit(model, rows([[1, 0], [0, 1]]), torch.tensor([0, 1]))
    angles = torch.linspace(0, math.pi / 2, 9, dtype=torch.double)
    queries = rows(torch.stack([angles.cos(), angles.sin()], dim=1))
    assert torch.allclose(shares(cache, model, queries)[:, 0], (7 * (angles.cos() - angles.sin())).sigmoid(), atol=1e-12)


def test_theta_zero_gives_the_class_frequencies_and_infinity_the_nearest_neighbour() -> None:
    model, (images, labels, queries) = pixels(), setting()
    cache = plain(lam=1.0).fit(model, images, labels)
    cache.theta = 0.0
    frequencies = torch.bincount(labels, minlength=CLASSES) / len(labels)
    assert torch.allclose(shares(cache, model, queries), frequencies.double().expand(6, -1), atol=1e-12)
    cache.theta = 1e6
    near = labels[
        (nn.functional.normalize(queries.flatten(1), dim=1) @ nn.functional.normalize(images.flatten(1), dim=1).T).argmax(1)
    ]
    assert torch.allclose(shares(cache, model, queries), nn.functional.one_hot(near, CLASSES).double(), atol=1e-12)


def test_one_item_decides_alone() -> None:
    model, (images, _, queries) = pixels(), setting()
    cache = plain(lam=1.0).fit(model, images[:1], torch.tensor([2]))
    answer = cache(model, queries)
    assert torch.equal(answer.logits.float().exp(), nn.functional.one_hot(torch.full((6,), 2), CLASSES).float())
    assert bool(answer.logits.isfinite().all())


@pytest.mark.parametrize("theta", [0.0, 1.0, 80.0])
def test_votes_are_the_softmax_of_similarities_times_labels(theta: float) -> None:
    model, (images, labels, queries) = pixels(), setting()
    cache = plain(theta=theta).fit(model, images, labels)
    assert torch.allclose(shares(cache, model, queries), straightforward(images, labels, queries, theta), atol=1e-12)


def test_a_class_in_between_may_be_empty() -> None:
    model, (images, labels, queries) = pixels(), setting()
    labels = labels.where(labels != 1, 2)
    for block in (4, 1000):
        cache = plain(theta=9.0, block=block).fit(model, images, labels)
        assert torch.allclose(shares(cache, model, queries), straightforward(images, labels, queries, 9.0), atol=1e-12)


def test_copies_order_and_scale_of_items_change_nothing() -> None:
    model, (images, labels, queries) = pixels(), setting()
    expected = shares(plain().fit(model, images, labels), model, queries)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(3))
    scales = torch.linspace(0.05, 1, len(images), dtype=torch.double)[:, None, None, None]
    for changed in (
        (torch.cat([images, images]), torch.cat([labels, labels])),
        (images[order], labels[order]),
        (images * scales, labels),
    ):
        assert torch.allclose(shares(plain().fit(model, *changed), model, queries), expected, atol=1e-12)


def test_lambda_zero_is_the_network_bit_for_bit_and_one_ignores_its_head() -> None:
    model, (images, labels, queries) = pixels(), setting()
    cache = plain(lam=0.0).fit(model, images, labels)
    assert torch.equal(Guarded(model, cache=cache)(queries).probabilities, model(queries).softmax(dim=1))
    cache.lam = 1.0
    alone = cache(model, queries).logits
    with torch.no_grad():
        model[2].weight.mul_(-3)
    assert torch.equal(cache(model, queries).logits, alone)


def test_the_mixture_is_one_of_probabilities_and_between_both() -> None:
    model, (images, labels, queries) = pixels(), setting()
    cache = plain(theta=20.0, lam=0.3).fit(model, images, labels)
    answer = cache(model, queries)
    network, own = model(queries).softmax(dim=1), straightforward(images, labels, queries, 20.0)
    assert torch.allclose(answer.logits.exp(), 0.7 * network + 0.3 * own, atol=1e-12)
    assert torch.allclose(answer.logits.exp().sum(dim=1), torch.ones(6, dtype=torch.double), atol=1e-12)
    low, high = torch.minimum(network, own), torch.maximum(network, own)
    assert bool(((answer.logits.exp() >= low - 1e-12) & (answer.logits.exp() <= high + 1e-12)).all())
    assert torch.allclose(answer.parts["network"].exp(), network, atol=1e-12)


@pytest.mark.parametrize("block", [1, 3, 7, 1000])
def test_blocks_give_what_all_at_once_gives(block: int) -> None:
    model, (images, labels, queries) = pixels(), setting()
    queries.requires_grad_()
    whole, parts = (plain(block=size, lam=1.0).fit(model, images, labels) for size in (1000, block))
    assert torch.allclose(parts(model, queries).logits, whole(model, queries).logits, atol=1e-12)
    grads = [torch.autograd.grad(c(model, queries).logits[:, 1].sum(), queries)[0] for c in (whole, parts)]
    assert torch.allclose(*grads, atol=1e-12)


def test_gradient_is_the_closed_form_and_passes_gradcheck() -> None:
    model, (images, labels, _) = pixels(), setting()
    items, theta = plain().fit(model, images, labels).items, 11.0
    query = nn.functional.normalize(torch.rand(4, LENGTH, dtype=torch.double), dim=1).requires_grad_()
    votes = evidence_of_all(query, items, theta, 4).softmax(dim=1)
    values = nn.functional.one_hot(items.labels, CLASSES).double()
    weights = (theta * query.detach() @ items.keys.T).softmax(dim=1)
    for label in range(CLASSES):
        found = torch.autograd.grad(votes[:, label].sum(), query, retain_graph=True)[0]
        hit = (weights * values[:, label]) @ items.keys
        expected = theta * (hit - votes[:, label, None].detach() * (weights @ items.keys))
        assert torch.allclose(found, expected, atol=1e-10)
    assert torch.autograd.gradcheck(lambda q: evidence_of_all(q, items, theta, 5), (query,))
    assert torch.autograd.gradcheck(lambda q: evidence_of_nearest(q, items, theta, 5, 7)[0].exp(), (query,))


def test_float32_with_theta_90_on_its_own_key_is_finite() -> None:
    model, (images, labels, _) = pixels().float(), setting()
    images = images.float()
    cache = Cache(layers=("1",), mirror=False, theta=90.0, lam=1.0).fit(model, images, labels)
    asked = images[:5].clone().requires_grad_()
    logits = cache(model, asked).logits
    gradient = torch.autograd.grad(logits.gather(1, labels[:5, None]).sum(), asked)[0]
    assert bool(logits.isfinite().all())
    assert bool(gradient.isfinite().all())
    assert bool((gradient.flatten(1).abs().amax(dim=1) > 0).all())


def test_memory_of_a_query_does_not_grow_with_the_cache() -> None:
    class Largest(TorchFunctionMode):
        size = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                Largest.size = max(Largest.size, out.numel())
            return out

    model = pixels()
    images, labels, queries = setting(1000)
    cache = plain(block=32, lam=1.0).fit(model, images, labels)
    queries = queries.repeat(20, 1, 1, 1).requires_grad_()
    assert len(queries) * len(images) == 120_000
    with Largest():
        logits = cache(model, queries).logits
        torch.autograd.grad(logits[:, 0].sum(), queries)
    assert 120 * 16 < Largest.size <= 120 * 32


# Fewer items, smaller keys.


def test_the_nearest_items_alone_are_bounded() -> None:
    model, (images, labels, queries) = pixels(), setting(200)
    exact = shares(plain(theta=60.0).fit(model, images, labels), model, queries)
    for count in (3, 20, 120, 200, 500):
        cache = plain(theta=60.0, top_k=count).fit(model, images, labels)
        answer = cache(model, queries)
        change = 0.5 * (answer.parts["cache"].exp() - exact).abs().sum(dim=1)
        bound = answer.parts["bound"]
        assert bool((change <= bound + 1e-9).all())
        near, _ = nearest(nn.functional.normalize(queries.flatten(1), dim=1), cache.items, count, 7)
        simple = (len(images) - near.shape[1]) * (-60 * (near[:, 0] - near[:, -1])).exp()
        assert bool((bound <= simple.clamp(max=1) + 1e-12).all())
        if count >= len(images):
            assert torch.allclose(answer.parts["cache"].exp(), exact, atol=1e-12)
            assert float(bound.max()) == 0
    assert float(bound.max()) == 0


@pytest.mark.parametrize("centres", [None, 4])
def test_the_bound_is_what_is_left_out_at_the_least_similarity_kept(centres: int | None) -> None:
    model, (images, labels, queries) = pixels(), setting(60)
    cache = plain(theta=12.0, top_k=5, centres=centres).fit(model, images, labels)
    counts = cache.items.weights.double().exp() if centres else torch.ones(60, dtype=torch.double)
    assert counts.sum() == pytest.approx(60)
    similarity = nn.functional.normalize(queries.flatten(1), dim=1) @ cache.items.keys.T
    near, rows_ = similarity.topk(5, dim=1)
    kept = (counts[rows_] * (12 * near).exp()).sum(dim=1)
    expected = (60 - counts[rows_].sum(dim=1)) * (12 * near[:, -1]).exp() / kept
    assert torch.allclose(cache(model, queries).parts["bound"], expected.clamp(max=1), rtol=1e-6)
    cache.theta = 200.0
    kept = (counts[rows_] * (200 * near).exp()).sum(dim=1)
    expected = (60 - counts[rows_].sum(dim=1)) * (200 * near[:, -1]).exp() / kept
    assert float(expected.min()) < 1
    assert torch.allclose(cache(model, queries).parts["bound"], expected.clamp(max=1), rtol=1e-6)


def test_gradient_of_the_nearest_items_is_that_of_all_if_all_are_near() -> None:
    model, (images, labels, queries) = pixels(), setting()
    queries.requires_grad_()
    caches = [plain(lam=1.0, theta=9.0, top_k=count, centres=4).fit(model, images, labels) for count in (None, 100)]
    grads = [torch.autograd.grad(cache(model, queries).logits[:, 0].sum(), queries)[0] for cache in caches]
    assert torch.allclose(*grads, atol=1e-10)
    assert float(grads[0].abs().max()) > 0


def test_a_class_without_near_items_has_a_finite_logit() -> None:
    model, images, labels = pixels(), rows([[1, 0, 0, 0, 0.0], [1, 0.1, 0, 0, 0], [0, 0, 0, 0, 1]]), torch.tensor([0, 0, 1])
    cache = plain(top_k=2, lam=1.0).fit(model, images, labels)
    query = images[:1].clone().requires_grad_()
    logits = cache(model, query).logits
    assert logits[0, 1:].tolist() == [-200.0, -200.0]
    assert bool(torch.autograd.grad(logits.sum(), query)[0].isfinite().all())


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("float16", 5e-4), ("bfloat16", 4e-3), ("int8", 8e-3)])
def test_smaller_keys_stay_near_and_take_their_share_of_memory(dtype: Any, bound: float) -> None:
    keys = nn.functional.normalize(torch.randn(40, 64, dtype=torch.double), dim=1)
    kept, scales = stored(keys, dtype)
    assert kept.dtype == getattr(torch, dtype)
    assert len(scales) == (40 if dtype == "int8" else 0)
    model, (images, labels, queries) = pixels(), setting(100)
    cache = plain(dtype=dtype, theta=10.0).fit(model, images, labels)
    near = shares(cache, model, queries)
    assert torch.allclose(near, straightforward(images, labels, queries, 10.0), atol=10 * bound)
    asked = nn.functional.normalize(images.flatten(1), dim=1)
    assert float((cache.items.take(slice(None), torch.double) - asked[labels.argsort(stable=True)]).abs().max()) <= bound
    assert cache.keys.element_size() == {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}[dtype]


def test_centres_stand_for_what_is_alike() -> None:
    model = pixels()
    images, labels, queries = setting(9)
    labels = torch.arange(9) % CLASSES
    many, copies = images.repeat(5, 1, 1, 1), labels.repeat(5)
    cache = plain(centres=3, theta=30.0).fit(model, many, copies)
    assert len(cache.items) == 9
    assert cache.items.weights.exp().sum() == pytest.approx(45)
    assert torch.allclose(shares(cache, model, queries), straightforward(images, labels, queries, 30.0), atol=1e-6)
    whole = plain(centres=100, theta=30.0).fit(model, many, copies)
    assert torch.allclose(shares(whole, model, queries), straightforward(many, copies, queries, 30.0), atol=1e-12)


def test_k_means_finds_clusters_and_names_a_member_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    middle = torch.eye(4, dtype=torch.double).repeat_interleave(25, dim=0)
    keys = nn.functional.normalize(middle + 0.05 * torch.randn(100, 4, generator=generator, dtype=torch.double), dim=1)
    best = max(
        (clustered(keys, 4, torch.Generator().manual_seed(seed)) for seed in range(5)),
        key=lambda c: float((keys @ c[0].T).amax(1).sum()),
    )
    centres, weights, members = best
    assert sorted((centres @ torch.eye(4, dtype=torch.double)).argmax(dim=1).tolist()) == [0, 1, 2, 3]
    assert torch.allclose(weights.exp(), torch.full((4,), 25.0, dtype=torch.double))
    assert bool((keys[members] @ centres.T).diagonal().ge(0.99).all())
    assert torch.allclose(centres.norm(dim=1), torch.ones(4, dtype=torch.double))


def test_a_random_subset_keeps_the_classes_in_proportion() -> None:
    model, (images, _, _) = pixels(), setting(60)
    labels = torch.tensor([0] * 30 + [1] * 20 + [2] * 10)
    cache = plain(limit=12).fit(model, images, labels)
    assert torch.bincount(cache.items.labels).tolist() == [6, 4, 2]
    assert cache.facts["images"] == 12
    assert torch.equal(cache.items.source, plain(limit=12).fit(model, images, labels).items.source)
    assert not torch.equal(cache.items.source, plain(limit=12, seed=1).fit(model, images, labels).items.source)


def test_mirror_images_are_items_too() -> None:
    model, (images, labels, _) = pixels(), setting()
    cache = plain(mirror=True).fit(model, images, labels)
    assert len(cache.items) == 2 * len(images)
    assert int(cache.items.mirrored.sum()) == len(images)
    near = cache.neighbours(model, images[4:5].flip(-1), 1)
    assert (int(near.positions), bool(near.mirrored), int(near.labels)) == (4, True, int(labels[4]))
    with pytest.raises(UsageError, match="are in the cache"):
        cache.check_unseen(images.flip(-1))
    assert float(near.similarity) == pytest.approx(1)


# Features.


def test_joined_layers_have_one_norm_unless_separate() -> None:
    model, batch = small_model().eval(), small_batch(4)
    conv, vector = (KeyReader(model, [name])(batch.images)[1] for name in ("2", "6:input"))
    raw = [model[:3](batch.images).flatten(1), model[:6](batch.images)]
    assert torch.allclose(conv, raw[0] / raw[0].norm(dim=1, keepdim=True), atol=1e-6)
    both = KeyReader(model, ["2", "6:input"])(batch.images)[1]
    joined = torch.cat(raw, dim=1)
    assert torch.allclose(both, joined / joined.norm(dim=1, keepdim=True), atol=1e-6)
    separate = KeyReader(model, ["2", "6:input"], separate=True)(batch.images)[1]
    assert torch.allclose(separate, torch.cat([conv, vector], dim=1) / math.sqrt(2), atol=1e-6)


def test_pooling_averages_maps() -> None:
    model, batch = small_model().eval(), small_batch(4)
    maps = model[:3](batch.images)
    for side, expected in (
        (1, maps.mean(dim=(2, 3))),
        (2, nn.functional.avg_pool2d(maps, 4).flatten(1)),
        (99, maps.flatten(1)),
    ):
        keys = KeyReader(model, ["2"], pool=side)(batch.images)[1]
        assert torch.allclose(keys, nn.functional.normalize(expected, dim=1), atol=1e-6)


def test_tokens_are_pooled_to_their_mean_or_not_at_all() -> None:
    model = nn.Sequential(nn.Flatten(2), nn.Linear(4, 6), nn.Flatten(), nn.Linear(18, 2))
    images = torch.rand(2, 3, 2, 2)
    tokens = model[:2](images)
    assert torch.allclose(
        KeyReader(model, ["1"], pool=1)(images)[1], nn.functional.normalize(tokens.mean(dim=1), dim=1), atol=1e-6
    )
    with pytest.raises(UsageError, match=r"tokens \(2, 3, 6\); pool=2 must be 1 or None"):
        KeyReader(model, ["1"], pool=2)(images)


@pytest.mark.parametrize(("name", "length"), [("resnet20", 12288), ("resnet32", 12288), ("resnet56", 12288)])
def test_published_layers_of_residual_networks(name: str, length: int) -> None:
    model = create_model(name, 10, 3, 32).eval()
    layers = choose_layers(model, None)
    assert layers == tuple(f"net.{layer}" for layer in PRESETS[name])
    assert choose_layers(model, name) == layers
    features = KeyReader(model, layers)._tap(torch.rand(1, 3, 32, 32))[1]
    assert [tuple(value.shape[1:]) for value in features.values()] == [(64, 8, 8)] * 3
    assert all(bool((value >= 0).all()) for value in features.values())
    assert sum(value[0].numel() for value in features.values()) == length


def test_published_layers_of_dense_and_bottleneck_networks() -> None:
    from torchvision.models import DenseNet, ResNet
    from torchvision.models.resnet import Bottleneck

    dense = DenseNet(growth_rate=4, block_config=(2, 2, 12), num_init_features=8, num_classes=3).eval()
    features = KeyReader(dense, choose_layers(dense, "densenet40"))._tap(torch.rand(1, 3, 64, 64))[1]
    assert [value.shape[1] for value in features.values()] == [8 + 4 * 7, 8 + 4 * 11]
    assert all(bool((value >= 0).all()) for value in features.values())
    bottleneck = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=3).eval()
    features = KeyReader(bottleneck, choose_layers(bottleneck, "resnet50"))._tap(torch.rand(1, 3, 64, 64))[1]
    assert [tuple(value.shape[1:]) for value in features.values()] == [(512, 2, 2)]


def test_other_networks_show_their_last_stages_or_their_last_vector() -> None:
    assert choose_layers(create_model("cnn", 10, 1, 28), None) == ("net.layers.1", "net.layers.2")
    assert choose_layers(small_model(), None) == ("6:input",)
    assert choose_layers(create_model("cnn", 10, 1, 28), ("layers.0", "fc:input")) == ("net.layers.0", "net.fc:input")


def test_layers_that_do_not_exist() -> None:
    model = create_model("cnn", 10, 1, 28)
    with pytest.raises(UsageError, match="no published set of cache layers called 'resnet33'"):
        choose_layers(model, "resnet33")
    with pytest.raises(UsageError, match="nothing to compare"):
        choose_layers(model, ())
    with pytest.raises(UnknownNameError, match="layer"):
        Cache(layers=("layers.7",)).fit(model, torch.rand(2, 1, 28, 28), torch.tensor([0, 1]))


# Fitting, adding, tuning.


def test_contract() -> None:
    check_guard(Cache)
    check_guard(lambda: Cache(layers=("2", "6:input"), top_k=20, dtype="int8", pool=2, separate=True))


def test_fitting_in_parts_is_fitting_at_once() -> None:
    model, (images, labels, queries) = pixels(), setting()
    for options in ({}, {"mirror": True}, {"dtype": "int8"}):
        once = plain(**options).fit(model, images, labels)
        parts = plain(**options).fit(model, images[:10], labels[:10]).add(model, images[10:11], labels[10:11])
        parts.add(model, images[11:], labels[11:])
        assert torch.allclose(shares(parts, model, queries), shares(once, model, queries), atol=1e-12)
        assert sorted(parts.items.source.tolist()) == sorted(once.items.source.tolist())
        assert parts.facts == once.facts
        assert sorted(parts.marks.tolist()) == sorted(once.marks.tolist())


def test_items_added_to_centres_stand_for_themselves() -> None:
    model, (images, labels, queries) = pixels(), setting(60)
    cache = plain(centres=2, lam=1.0, theta=5000.0).fit(model, images, labels)
    before = len(cache.items)
    cache.add(model, queries, torch.tensor([0, 1, 2, 0, 1, 2]))
    assert len(cache.items) == before + 6
    assert cache.items.weights.exp().sum() == pytest.approx(66, rel=1e-6)
    assert cache(model, queries).logits.argmax(dim=1).tolist() == [0, 1, 2, 0, 1, 2]


def test_uint8_images_are_what_their_floats_are() -> None:
    model = small_model().eval()
    images = (small_batch(20).images * 255).round().byte()
    labels = torch.arange(20) % 3
    first, second = (Cache(layers=("2",)).fit(model, x, labels) for x in (images, images.float() / 255))
    assert torch.equal(first.keys, second.keys)
    assert torch.equal(first.marks, second.marks)


def test_tuning_sweeps_the_grid_in_one_pass() -> None:
    model, (images, labels, _) = pixels(), setting(60)
    held, truth, _ = setting(40, seed=9)
    calls: list[int] = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    for options in ({}, {"top_k": 5}, {"centres": 4}):
        cache = plain(**options).fit(model, images, labels)
        calls.clear()
        thetas, lams = (0.0, 3.0, 25.0), (0.0, 0.4, 1.0)
        found = cache.tune(model, held, truth, thetas=thetas, lams=lams)
        assert len(calls) == 1
        assert found["images"] == 40
        assert found["network"] == pytest.approx(float((model(held).argmax(1) == truth).double().mean()))
        for i, theta in enumerate(thetas):
            for j, lam in enumerate(lams):
                cache.theta, cache.lam = theta, lam
                accuracy = float((cache(model, held).logits.argmax(1) == truth).double().mean())
                assert found["mixture"][i][j] == pytest.approx(accuracy), (theta, lam)
            cache.lam = 1.0
            assert found["cache"][i] == pytest.approx(found["mixture"][i][2])
        assert max(map(max, found["mixture"])) == found["mixture"][thetas.index(found["theta"])][lams.index(found["lam"])]


def test_tuning_keeps_a_cache_alone_and_remembers_what_it_found() -> None:
    model, (images, labels, _) = pixels(), setting(60)
    held, truth, _ = setting(40, seed=9)
    mixed, alone = plain().fit(model, images, labels), plain(lam=1.0).fit(model, images, labels)
    found = mixed.tune(model, held, truth)
    assert (mixed.theta, mixed.lam) == (found["theta"], found["lam"])
    assert mixed.describe()["tuning"] == found
    alone.tune(model, held, truth)
    assert alone.lam == 1.0
    assert alone.theta == found["theta_alone"]
    assert len(THETAS) == len(LAMS) == 37
    pooled = Cache(layers=("2",), pool=1).fit(small_model(), small_batch(9).images, small_batch(9).labels)
    tried = pooled.tune(small_model(), small_batch(9, seed=1).images, small_batch(9, seed=1).labels)["thetas"]
    assert (tried[0], tried[-1]) == (50, 450)
    assert (THETAS[0], THETAS[-1], LAMS[0], LAMS[-1]) == (10, 90, 0.1, pytest.approx(0.9))


def test_of_several_best_pairs_the_middle_is_taken() -> None:
    found = {"mixture": [[0.5, 0.5], [0.5, 0.5], [0.4, 0.5]], "cache": [0.1, 0.2, 0.2], "thetas": [1, 2, 3], "lams": [0.2, 0.6]}
    assert best_of(found, alone=False) == (2, 0.2)
    assert best_of(found, alone=True) == (3, 1.0)


def test_sweeps_agree_with_single_queries() -> None:
    model, (images, labels, queries) = pixels(), setting(50)
    cache = plain(centres=6).fit(model, images, labels)
    asked = nn.functional.normalize(queries.flatten(1), dim=1)
    thetas = (0.0, 5.0, 70.0)
    many, few = sweep(asked, cache.items, thetas, 4), sweep_nearest(asked, cache.items, thetas, 4, 3)
    for i, theta in enumerate(thetas):
        assert torch.allclose(many[i], evidence_of_all(asked, cache.items, theta, 9), atol=1e-12)
        assert torch.allclose(few[i].exp(), evidence_of_nearest(asked, cache.items, theta, 9, 3)[0].exp(), atol=1e-12)


def test_the_model_is_left_as_it_was_and_asked_in_eval_mode() -> None:
    model, batch = small_model().train(), small_batch(12)
    cache = Cache().fit(model, batch.images, batch.labels)
    assert model.training
    asked = cache(model, batch.images).logits
    with in_mode(model):
        assert torch.equal(asked, cache(model, batch.images).logits)


def test_without_gradient_there_is_no_graph() -> None:
    model, (images, labels, queries) = pixels(), setting()
    cache = plain(gradient=False).fit(model, images, labels)
    assert not cache(model, queries.requires_grad_()).logits.requires_grad
    mixture = Guarded(model, cache=cache).logits_model()
    assert mixture(queries).requires_grad  # an attack asks with a gradient, and is not to be blinded
    assert torch.equal(mixture(queries), mixture(queries.detach()))


def test_copies_share_the_keys() -> None:
    model, (images, labels, queries) = pixels(), setting()
    guarded = Guarded(model, cache=plain().fit(model, images, labels))
    twin = copy.deepcopy(guarded)
    assert twin.model is not guarded.model
    assert twin.cache.keys.data_ptr() == guarded.cache.keys.data_ptr()
    assert torch.equal(twin(queries).logits, guarded(queries).logits)
    twin.cache.facts["images"] = 0
    assert guarded.cache.facts["images"] == len(images)


def test_threads_do_not_see_each_others_features() -> None:
    model, (images, labels, _) = pixels(), setting()
    cache = plain().fit(model, images, labels)
    asked = [images[i : i + 1].roll(1, dims=-1) for i in range(8)]
    expected = [cache(model, x).logits for x in asked]

    def many(number: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(cache(model, asked[number]).logits, expected[number]) for _ in range(40))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, range(8)))


def test_positions_go_on_after_a_limit() -> None:
    model, (images, labels, _) = pixels(), setting()
    cache = plain(limit=7).fit(model, images, labels)
    cache.add(model, images.flip(-1), labels)
    assert len(set(cache.items.source.tolist())) == len(cache.items)


def test_tuning_on_another_model_is_refused() -> None:
    model, (images, labels, others) = pixels(), setting()
    cache = plain().fit(model, images, labels)
    with pytest.raises(UsageError, match="fitted for another model"):
        cache.tune(pixels(seed=5), others, labels[: len(others)])


def test_half_precision_after_guarding() -> None:
    model, (images, labels, queries) = pixels(), setting()
    guarded = Guarded(model, cache=plain().fit(model, images, labels))
    exact = guarded(queries).probabilities
    assert torch.allclose(guarded.bfloat16()(queries.bfloat16()).probabilities.double(), exact, atol=0.1)
    cache = guarded.cache
    assert isinstance(cache, Cache)
    assert cache.items.keys is cache.keys
    assert cache.keys.dtype == torch.bfloat16


# Bad input.


def test_options_out_of_range() -> None:
    for options, words in (
        ({"theta": -1.0}, "theta must be finite"),
        ({"theta": math.inf}, "theta must be finite"),
        ({"lam": 1.5}, "lam lie in"),
        ({"pool": 0}, r"Cache\(pool=0\): at least 1"),
        ({"centres": 0}, "centres=0"),
        ({"limit": 0}, "limit=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"block": 0}, "block=0"),
        ({"dtype": "int4"}, "known are float64, float32, float16, bfloat16, int8"),
        ({"index": "annoy"}, "known are matrix, faiss"),
        ({"index": "faiss"}, "say how many with top_k=50"),
        ({"index": "faiss", "top_k": 5, "dtype": "int8"}, "leave out dtype"),
    ):
        with pytest.raises(UsageError, match=words):
            Cache(**options)


def test_features_without_a_direction_are_refused() -> None:
    model, (images, labels, queries) = pixels(), setting()
    images[7] = 0
    cache = plain()
    with pytest.raises(DataError, match="features of image 7 at 1 are all zero"):
        cache.fit(model, images, labels)
    assert not cache.fitted
    broken = nn.Sequential(nn.Flatten(), nn.Hardtanh(math.nan, math.nan), nn.Linear(LENGTH, CLASSES)).double()
    with pytest.raises(DataError, match="are not finite"):
        plain().fit(broken, queries, labels[:6])
    images[7] = 0.5
    cache.fit(model, images, labels)
    frequencies = torch.bincount(labels, minlength=CLASSES) / len(labels)  # a query without a direction is alike to all
    assert torch.allclose(shares(cache, model, torch.zeros_like(images[:1]))[0], frequencies.double(), atol=1e-9)


def test_another_model_or_another_size_is_refused() -> None:
    model, batch = small_model().eval(), small_batch(9)
    cache = Cache(layers=("2",)).fit(model, batch.images, batch.labels)
    with pytest.raises(UsageError, match=r"keys of length 384, but this model gives 600 for images of shape \(1, 10, 10\)"):
        cache(model, torch.rand(1, 1, 10, 10))
    with pytest.raises(UsageError, match="fitted for another model"):
        cache.check(small_model(1))
    with pytest.raises(UsageError, match="fitted for another model"):
        cache.add(small_model(1), batch.images, batch.labels)
    other = small_model().eval()
    other[-1] = nn.Linear(24, 7)
    with pytest.raises(UsageError, match="a number of classes of 3, but this model gives 7"):
        cache(other, batch.images)


def test_labels_and_images_are_checked() -> None:
    model, (images, labels, _) = pixels(), setting()
    with pytest.raises(DataError, match="label 3; expected 0 to 2"):
        plain().fit(model, images, labels.clamp(min=0).fill_(3))
    with pytest.raises(DataError, match="23 images, but 22 labels"):
        plain().fit(model, images, labels[1:])
    with pytest.raises(DataError, match="pixels run from"):
        plain().fit(model, images * 9, labels)
    with pytest.raises(DataError, match="23 images, but 2 positions"):
        plain().fit(model, images, labels, index=torch.arange(2))
    with pytest.raises(UsageError, match="not fitted yet"):
        plain()(model, images)
    with pytest.raises(UsageError, match="nothing to tune on|at least one"):
        plain().fit(model, images, labels).tune(model, images * 0.9, labels, thetas=())
    with pytest.raises(UsageError, match="lambda in"):
        plain().fit(model, images, labels).tune(model, images * 0.9, labels, lams=(1.2,))


def test_images_of_the_cache_are_refused() -> None:
    model, (images, labels, _) = pixels(), setting(150)
    cache = plain(centres=2).fit(model, images, labels, index=torch.arange(1000, 1150))
    others = setting(150, seed=8)[0]
    assert cache.check_unseen(others) == 0
    with pytest.raises(UsageError, match="150 of these 150 images are in the cache"):
        cache.check_unseen(images)
    with pytest.raises(UsageError, match="20 of these 20 images are in the cache"):
        cache.tune(model, images[:20], labels[:20])
    once = torch.cat([others, images[:1]])
    assert cache.check_unseen(once) == 1
    with pytest.raises(UsageError, match="2 of these 152 images"):
        cache.check_unseen(torch.cat([once, images[1:2]]))
    with pytest.raises(UsageError, match="1 of these 150 images"):
        cache.check_unseen(others, index=torch.cat([torch.arange(149), cache.items.source[:1]]))
    quantised = (images * 255).round().byte()
    with pytest.raises(UsageError, match="150 of these 150"):
        cache.check_unseen(quantised)


# FAISS.


def test_without_faiss_the_index_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    model, (images, labels, _) = pixels(), setting()
    with pytest.raises(OverproofError, match=r"pip install \"overproof\[faiss\]\""):
        Cache(layers=("1",), index="faiss", top_k=5).fit(model, images, labels)


def test_a_flat_index_gives_what_the_matrix_gives() -> None:
    pytest.importorskip("faiss")
    model, (images, labels, queries) = pixels(), setting(200)
    queries.requires_grad_()
    options = {"layers": ("1",), "mirror": False, "top_k": 30, "theta": 20.0, "lam": 1.0}
    matrix = Cache(**options).fit(model, images, labels)
    index = Cache(**options, index="faiss").fit(model, images[:150], labels[:150]).add(model, images[150:], labels[150:])
    assert index.keys.numel() == 0
    found, expected = (cache(model, queries) for cache in (index, matrix))
    assert torch.allclose(found.logits.exp(), expected.logits.exp(), atol=1e-4)
    assert torch.allclose(found.parts["bound"], expected.parts["bound"], atol=1e-4)
    grads = [torch.autograd.grad(answer.logits[:, 1].sum(), queries)[0] for answer in (found, expected)]
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-3)
    near, exact = (cache.neighbours(model, queries.detach(), 3) for cache in (index, matrix))
    assert torch.equal(near.positions, exact.positions)
    again = Cache(**options, index="faiss").restore(index.state(), index.facts)
    assert torch.equal(again(model, queries).logits, found.logits)
    assert torch.equal(copy.deepcopy(again)(model, queries).logits, found.logits)
    damaged = index.state()
    damaged["index_bytes"] = damaged["index_bytes"][:50]
    with pytest.raises(OverproofError, match="damaged"):
        Cache(**options, index="faiss").restore(damaged, index.facts)
    with pytest.raises(UsageError, match="fewer cells"):
        Cache(**options, index="faiss", index_kind="IVF500,Flat").fit(model, images, labels)


def test_an_index_with_cells_finds_nearly_the_same() -> None:
    pytest.importorskip("faiss")
    model, (images, labels, queries) = pixels(), setting(600)
    options = {"layers": ("1",), "mirror": False, "top_k": 50, "theta": 20.0, "lam": 1.0}
    exact = Cache(**options).fit(model, images, labels)(model, queries).logits.exp()
    cache = Cache(**options, index="faiss", index_kind="IVF4,Flat").fit(model, images, labels)
    assert torch.allclose(cache(model, queries).logits.exp(), exact, atol=0.02)


# Real images.


def test_cells_with_too_few_keys_say_so() -> None:
    pytest.importorskip("faiss")
    model, (images, labels, queries) = pixels(), setting(200)
    cache = Cache(layers=("1",), mirror=False, index="faiss", index_kind="IVF8,Flat", top_k=150).fit(model, images, labels)
    cache._index.probes = 1
    cache._index._prepare()
    answer, near = cache(model, queries), cache.neighbours(model, queries, 150)
    assert bool((near.similarity[:, -1] == -2).all()), "no cell holds 150 keys"
    assert bool(answer.logits.isfinite().all())
    assert torch.equal(answer.parts["bound"], torch.ones_like(answer.parts["bound"])), "what lies in other cells is not known"
    few = (near.similarity > -2).sum(dim=1)
    for query in range(len(queries)):
        known = torch.bincount(near.labels[query, : few[query]], minlength=CLASSES) > 0
        assert bool((answer.parts["cache"][query][~known] < -150).all()), "an absent neighbour votes for nobody"


def mediocre(digits: Splits, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A small network that has learned 700 digits for 20 epochs: it leaves something to gain."""
    images, labels = digits.train.images[:700].float() / 255, digits.train.labels[:700]
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(20):
        for part in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
    return model.eval(), (images, labels), (digits.test.images.float() / 255, digits.test.labels)


def accuracy(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(dim=1) == labels).double().mean())


def test_digits_gain_from_a_cache_and_transfer_is_not_robustness(digits: Splits) -> None:
    model, train, (images, labels) = mediocre(digits)
    cache = Cache(layers=("1", "4"), mirror=False, theta=80.0).fit(model, *train)
    mixture = Guarded(model, cache=cache).logits_model().eval()
    bare, mixed = accuracy(model, images, labels), accuracy(mixture, images, labels)
    assert mixed > bare + 0.12
    cache.theta = 10.0
    assert accuracy(mixture, images, labels) < mixed - 0.1  # too flat to be of use
    cache.theta = 70.0
    crafted = PGD(eps=0.05, steps=10, early_stop=False)(model, images, labels, torch.Generator().manual_seed(0))
    transfer = {}
    for lam in (0.0, 0.5, 1.0):
        cache.lam = lam
        transfer[lam] = accuracy(mixture, crafted, labels)
    assert transfer[0.0] + 0.3 < transfer[0.5] <= transfer[1.0]
    few = slice(0, 150)
    through = PGD(eps=0.15, steps=10)(mixture, images[few], labels[few], torch.Generator().manual_seed(0))
    around = PGD(eps=0.15, steps=10, early_stop=False)(model, images[few], labels[few], torch.Generator().manual_seed(0))
    assert accuracy(mixture, through, labels[few]) < 0.3
    assert accuracy(mixture, through, labels[few]) < accuracy(mixture, around, labels[few]) - 0.3  # measured: 0.18 and 0.55


def test_hidden_layers_make_better_keys_than_logits(digits: Splits) -> None:
    model, train, (images, labels) = mediocre(digits)
    found = [accuracy(Guarded(model, cache=Cache(layers=layers, mirror=False).fit(model, *train)).logits_model(), images, labels)
             for layers in (("1", "4"), ("7",))]  # fmt: skip
    assert found[0] > found[1] + 0.07
