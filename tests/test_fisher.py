"""The input Fisher information against closed forms, against its own other forms, and its estimators against it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import overproof
from overproof import fisher
from overproof.errors import DerivativeError, NoGradientError, UsageError
from overproof.losses import fisher as home
from overproof.losses.derivatives import Transposed, differentiable, pull, pull_each, push_forward
from overproof.losses.fisher_eigen import Solver
from overproof.losses.fisher_trace import Tracer, class_weights
from overproof.models import create_model

K, PIXELS = 4, (1, 2, 3)


def mlp(seed: int = 0, classes: int = K, pixels: int = 6, gain: float = 1.0) -> nn.Sequential:
    """Smooth everywhere, in double precision."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 12), nn.Tanh(), nn.Linear(12, classes)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2.0)
        net[-1].weight.mul_(gain)
    return net


def some(count: int = 5, shape: tuple[int, ...] = PIXELS, seed: int = 1) -> Tensor:
    return torch.rand(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def jacobians(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """J (N, K, D) one row at a time, and p (N, K)."""
    rows = [torch.autograd.functional.jacobian(lambda x: model(x[None])[0], image).flatten(1) for image in images]
    return torch.stack(rows), model(images).softmax(dim=1).detach()


def matrices(model: nn.Module, images: Tensor) -> Tensor:
    """G (N, D, D), as the definition says."""
    j, p = jacobians(model, images)
    scores = j - (p[:, :, None] * j).sum(dim=1, keepdim=True)
    return torch.einsum("nk,nki,nkj->nij", p, scores, scores)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Closed forms


def test_a_linear_softmax() -> None:
    """tr G = sum_k p_k ||W_k - mean_p W||^2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, K)).double()
    p, weight = model(some()).softmax(1).detach(), model[1].weight.detach()
    centred = weight - (p @ weight)[:, None, :]
    expected = (p * centred.square().sum(dim=2)).sum(dim=1)
    torch.testing.assert_close(fisher.trace(model, some()), expected, atol=1e-12, rtol=1e-12)


def test_two_classes() -> None:
    """tr G = lambda_max = p (1 - p) ||W_0 - W_1||^2, along W_0 - W_1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 2)).double()
    way = (model[1].weight[0] - model[1].weight[1]).detach()
    p = model(some()).softmax(1).detach()
    expected = p.prod(dim=1) * way.square().sum()
    values, directions = fisher.leading(model, some())
    for found in (fisher.trace(model, some()), values, fisher.lambda_max(model, some(), estimator="power")):
        torch.testing.assert_close(found, expected, atol=1e-13, rtol=1e-12)
    cosines = (directions.flatten(1) @ (way / way.norm())).abs()
    torch.testing.assert_close(cosines, torch.ones(5, dtype=torch.float64), atol=1e-12, rtol=0)
    assert fisher.spectrum(model, some()).shape == (5, 1)


def test_a_flat_network() -> None:
    model = mlp()
    nn.init.zeros_(model[-1].weight)
    for estimator in ("exact", "power"):
        values, directions = fisher.leading(model, some(), estimator=estimator)
        assert torch.equal(values, torch.zeros_like(values))
        assert torch.equal(directions, torch.zeros_like(directions))
    assert torch.equal(fisher.trace(model, some()), torch.zeros(5, dtype=torch.float64))
    assert not fisher.spectrum(model, some()).any()


# The forms


def form_scores(model: nn.Module, images: Tensor) -> Tensor:
    with differentiable(images) as x:
        log_p = model(x).log_softmax(dim=1)
        squares = [torch.autograd.grad(log_p[:, k].sum(), x, retain_graph=True)[0].flatten(1).square().sum(1) for k in range(K)]
    return (log_p.exp().T * torch.stack(squares)).sum(dim=0).detach()


def form_difference(model: nn.Module, images: Tensor) -> Tensor:
    j, p = jacobians(model, images)
    return (p * j.square().sum(dim=2)).sum(dim=1) - (p[:, :, None] * j).sum(dim=1).square().sum(dim=1)


def form_variance(model: nn.Module, images: Tensor) -> Tensor:
    j, p = jacobians(model, images)
    return (p * (j - (p[:, :, None] * j).sum(dim=1, keepdim=True)).square().sum(dim=2)).sum(dim=1)


def form_hellinger(model: nn.Module, images: Tensor) -> Tensor:
    roots = nn.Sequential(model, nn.Softmax(dim=1))
    rows = [torch.autograd.functional.jacobian(lambda x: roots(x[None])[0].sqrt(), image) for image in images]
    return 4 * torch.stack([row.square().sum() for row in rows])


@pytest.mark.parametrize("form", [form_scores, form_difference, form_variance, form_hellinger])
def test_all_forms_of_the_trace(form: Callable[[nn.Module, Tensor], Tensor]) -> None:
    for at_once in (False, True):
        found = Tracer(at_once=at_once)(mlp(), some())[0]
        torch.testing.assert_close(found, form(mlp(), some()), atol=1e-10, rtol=1e-10)


def test_rank_and_eigenvalues() -> None:
    """G has rank K - 1, and the K x K matrix its eigenvalues and eigenvectors."""
    g = matrices(mlp(), some())
    values, vectors = torch.linalg.eigh(g)
    assert torch.linalg.matrix_rank(g).tolist() == [K - 1] * 5
    torch.testing.assert_close(fisher.spectrum(mlp(), some()), values.flip(1)[:, : K - 1], atol=1e-12, rtol=1e-9)
    found, directions = fisher.leading(mlp(), some())
    torch.testing.assert_close(found, values[:, -1], atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(fisher.lambda_max(mlp(), some()), found, atol=0, rtol=0)
    cosines = (directions.flatten(1) * vectors[:, :, -1]).sum(dim=1).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=1e-9, rtol=0)
    torch.testing.assert_close(fisher.spectrum(mlp(), some()).sum(dim=1), fisher.trace(mlp(), some()), atol=1e-12, rtol=1e-9)


def test_it_is_the_curvature_of_the_divergence() -> None:
    model, images = mlp(), some()
    small = 1e-4 * torch.randn(images.shape, dtype=torch.float64, generator=seeded())
    here, there = (model(x).log_softmax(dim=1).detach() for x in (images, images + small))
    divergence = (here.exp() * (here - there)).sum(dim=1)
    quadratic = torch.einsum("ni,nij,nj->n", small.flatten(1), matrices(model, images), small.flatten(1)) / 2
    torch.testing.assert_close(divergence / quadratic, torch.ones_like(divergence), atol=1e-3, rtol=0)


def test_bounds_and_invariances() -> None:
    model, images = mlp(), some(20)
    trace, largest = fisher.trace(model, images), fisher.lambda_max(model, images)
    assert bool((largest <= trace * (1 + 1e-12)).all())
    assert bool((trace <= (K - 1) * largest * (1 + 1e-12)).all())

    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x) + x.sum(dim=(1, 2, 3))[:, None] * 7

    torch.testing.assert_close(fisher.trace(Shifted(), images), trace, atol=1e-9, rtol=1e-9)
    mixing = torch.randn(6, 6, dtype=torch.float64, generator=seeded())

    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model((x.flatten(1) @ mixing.T).view_as(x))

    at = (images.flatten(1) @ mixing.T).view_as(images)
    torch.testing.assert_close(matrices(Mixed(), images[:2]), mixing.T @ matrices(model, at[:2]) @ mixing)
    traces = torch.einsum("nij,jk,ik->n", matrices(model, at[:2]), mixing, mixing)
    torch.testing.assert_close(fisher.trace(Mixed(), images[:2]), traces)
    scaled = nn.Sequential(nn.Flatten(), nn.Identity(), model[1:])
    scaled[1].forward = lambda x: x / 255  # pixels of 0..255
    torch.testing.assert_close(fisher.trace(scaled, 255 * images), trace / 255**2, atol=0, rtol=1e-9)


def test_one_image_or_many() -> None:
    model, images = mlp(), some(6)
    tools = (fisher.trace, fisher.lambda_max, fisher.spectrum, lambda m, x: fisher.lambda_max(m, x, estimator="power"))
    for tool in tools:
        alone = torch.cat([tool(model, image[None]) for image in images])
        torch.testing.assert_close(tool(model, images), alone, atol=1e-12, rtol=1e-9)


def test_large_sets_are_cut_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, seen = mlp(), some(7), []
    whole = fisher.trace(model, images), fisher.spectrum(model, images), *fisher.leading(model, images)
    monkeypatch.setattr(home, "ROOM", 2 * K * 6)
    model.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    parts = fisher.trace(model, images), fisher.spectrum(model, images), *fisher.leading(model, images)
    assert set(seen) == {1, 2}
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)
    assert len(fisher.trace(model, images[:0])) == 0


# The estimators


def copies(count: int = 20_000) -> Tensor:
    return some(1).expand(count, -1, -1, -1).contiguous()


@pytest.mark.parametrize("estimator", ["label", "rademacher", "hutchinson", "fd-kl"])
def test_estimators_are_right_on_average(estimator: Any) -> None:
    model = mlp()
    exact = float(fisher.trace(model, some(1)))
    found = torch.cat([
        fisher.trace(model, copies(), estimator=estimator, generator=seeded(n), step=0.01) for n in range(10)
    ])  # fmt: skip
    assert float(found.std()) > 0.05 * exact, "a constant is no estimate"
    assert float(found.mean()) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("estimator", ["rademacher", "hutchinson", "fd-kl", "label"])
def test_gradients_of_estimators_are_right_on_average(estimator: Any) -> None:
    """Of label sampling the gradient is that with detached probabilities, and no other."""
    model = mlp()
    weights = list(model.parameters())

    def gradient(values: Tensor) -> Tensor:
        found = torch.autograd.grad(values.mean(), weights, allow_unused=True)
        return torch.cat(
            [torch.zeros_like(w).flatten() if g is None else g.flatten() for w, g in zip(weights, found, strict=True)]
        )

    def exact(detach_p: bool) -> Tensor:
        return gradient(Tracer(detach_p=detach_p)(model, some(1), create_graph=True)[0])

    one = Tracer(estimator=estimator, step=0.01, generator=seeded(3))
    draws = torch.stack([gradient(one(model, copies(2500), create_graph=True)[0]) for _ in range(40)])
    error = draws.std(dim=0) / 40**0.5
    scale = float(exact(False).norm())
    distance = {which: (draws.mean(dim=0) - exact(which)).abs() for which in (False, True)}
    right = estimator == "label"
    assert bool((distance[right] <= 5 * error + 1e-3 * scale).all())
    assert float(distance[not right].norm()) > 0.05 * scale


def test_detached_weights_in_the_rademacher_estimate() -> None:
    model = mlp()
    weight = model[-1].weight
    expected = torch.autograd.grad(Tracer(detach_p=True)(model, some(1), create_graph=True)[0].sum(), weight)[0]
    one = Tracer(estimator="rademacher", detach_p=True, generator=seeded(5))
    found = torch.autograd.grad(one(model, copies(50_000), create_graph=True)[0].mean(), weight)[0]
    assert float((found - expected).norm() / expected.norm()) < 0.03


def test_draws_are_averaged_and_repeatable() -> None:
    model = mlp()
    for estimator in ("label", "rademacher", "hutchinson", "fd-kl"):
        single, many = (
            fisher.trace(model, copies(2000), estimator=estimator, draws=n, generator=seeded(1), step=0.01) for n in (1, 9)
        )
        assert 2 < float(single.std() / many.std()) < 4.5, estimator
        again = fisher.trace(model, copies(2000), estimator=estimator, draws=9, generator=seeded(1), step=0.01)
        assert torch.equal(many, again)


def test_the_step_of_the_finite_difference() -> None:
    """0.4 / sqrt(pixels) unless said otherwise, and not too fine for half precision."""
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def __init__(self, half: bool) -> None:
            super().__init__()
            self.half = half

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            logits = x.flatten(1)[:, :3]
            return logits.bfloat16() if self.half else logits

    images = torch.zeros(4, 1, 100, 100)
    for half, step, expected in ((False, None, 0.004), (False, 0.3, 0.3), (True, None, 0.02), (True, 0.3, 0.3)):
        seen.clear()
        fisher.trace(Spy(half), images, estimator="fd-kl", step=step, generator=seeded())
        assert float((seen[-1] - seen[-2]).std()) == pytest.approx(expected, rel=0.02)


# Gradients


def test_gradcheck_of_the_exact_penalty() -> None:
    model, images = mlp(), some(2)
    weights = {name: value.detach().requires_grad_() for name, value in model.named_parameters()}

    class Called(nn.Module):
        def __init__(self, values: dict[str, Tensor]) -> None:
            super().__init__()
            self.values = values

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.functional_call(model, self.values, x)

    def penalty(*values: Tensor) -> Tensor:
        return Tracer()(Called(dict(zip(weights, values, strict=True))), images, create_graph=True)[0]

    def largest(*values: Tensor) -> Tensor:
        return Solver(estimator="exact")(Called(dict(zip(weights, values, strict=True))), images, create_graph=True).values

    assert torch.autograd.gradcheck(penalty, tuple(weights.values()))
    assert torch.autograd.gradcheck(largest, tuple(weights.values()))


def test_nothing_is_kept_unless_asked_for() -> None:
    model = mlp()
    for estimator in ("exact", "label", "rademacher", "hutchinson", "fd-kl"):
        values, logits = Tracer(estimator=estimator)(model, some())
        assert not values.requires_grad
        assert not logits.requires_grad
    assert not fisher.lambda_max(model, some()).requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_the_caller_may_have_switched_gradients_off(switch: Callable[[], Any]) -> None:
    model, images = mlp(), some()
    expected = fisher.trace(model, images), fisher.lambda_max(model, images), fisher.spectrum(model, images)
    with switch():
        found = [tool(model, images.clone()) for tool in (fisher.trace, fisher.lambda_max, fisher.spectrum)]
        hutchinson = fisher.trace(model, images.clone(), estimator="hutchinson", draws=500, generator=seeded())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(hutchinson, expected[0], rtol=0.3, atol=0)


@pytest.mark.parametrize("switch", [nullcontext, torch.no_grad, torch.inference_mode])
def test_many_images_go_through_a_copy_that_answers_alike(switch: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, K)
    ).double()
    net[1].running_var.uniform_(0.5, 2.0)
    net, images = net.eval(), torch.rand(home.WORTHWHILE + 1, 1, 5, 5, dtype=torch.float64, generator=seeded())
    tools = (fisher.trace, fisher.lambda_max, fisher.spectrum)
    expected = [torch.cat([tool(net, image) for image in images.split(1)]) for tool in tools]
    made: list[Any] = []
    original = home.folded
    monkeypatch.setattr(home, "folded", lambda *given: made.append(original(*given)) or made[-1])
    with switch():
        found = [tool(net, images.clone()) for tool in tools]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert len(made) == len(tools)
    assert all(copied is not net and copied.folds for copied in made)
    assert isinstance(net[1], nn.BatchNorm2d)
    assert all(parameter.requires_grad for parameter in net.parameters())


# Products and iteration


def test_products_with_the_jacobian() -> None:
    model, images = mlp(), some()
    j = jacobians(model, images)[0]
    u, w = some(seed=4), torch.randn(5, K, dtype=torch.float64, generator=seeded())
    with differentiable(images) as x:
        logits = model(x)
        torch.testing.assert_close(pull(logits, x, w).flatten(1), torch.einsum("nk,nkd->nd", w, j))
        torch.testing.assert_close(Transposed(logits, x).push(u), torch.einsum("nkd,nd->nk", j, u.flatten(1)))
        both = pull_each(logits, x, torch.stack([w, 2 * w]), at_once=True)
        torch.testing.assert_close(both, pull_each(logits, x, torch.stack([w, 2 * w]), at_once=False))
    logits, changes = push_forward(model, images, u)
    torch.testing.assert_close(changes, torch.einsum("nkd,nd->nk", j, u.flatten(1)))
    torch.testing.assert_close(logits, model(images))


def test_an_operator_that_cannot_be_vectorised(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.autograd.grad

    def refusing(*arguments: Any, **options: Any) -> Any:
        if options.get("is_grads_batched"):
            raise RuntimeError("Batching rule not implemented for aten::whatever. We could not generate a fallback.")
        return real(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", refusing)
    found = Tracer(at_once=True)(mlp(), some())[0]
    monkeypatch.undo()
    torch.testing.assert_close(found, fisher.trace(mlp(), some()))


def test_power_iteration_climbs_to_the_largest_eigenvalue() -> None:
    model, images = mlp(), some(20)
    exact = fisher.spectrum(model, images)
    climb = torch.stack([fisher.lambda_max(model, images, estimator="power", steps=n, tolerance=0) for n in range(1, 51)])
    assert bool((climb[1:] >= climb[:-1] * (1 - 1e-12)).all()), "Rayleigh quotients of a power iteration never fall"
    assert bool((climb <= exact[:, 0] * (1 + 1e-9)).all())
    apart = exact[:, 1] / exact[:, 0] < 0.9
    assert int(apart.sum()) > 10
    torch.testing.assert_close(climb[-1][apart], exact[apart, 0], rtol=1e-4, atol=0)
    assert bool((climb[0] < exact[:, 0] * (1 - 1e-6)).any()), "one step is not enough, so the test above says something"


def test_power_iteration_stops_by_itself_and_starts_where_it_is_told() -> None:
    model, images = mlp(), some(8)
    exact = Solver(estimator="exact")(model, images)
    early = Solver(estimator="power", steps=1000, tolerance=1e-6)(model, images)
    torch.testing.assert_close(early.values, exact.values, rtol=1e-3, atol=0)
    warm = Solver(estimator="power", steps=1)(model, images, start=exact.classes)
    torch.testing.assert_close(warm.values, exact.values, rtol=1e-9, atol=0)
    half = exact.classes.clone()
    half[::2] = 0  # unknown: begins anew
    mixed, cold = (Solver(estimator="power", steps=1)(model, images, start=start).values for start in (half, None))
    torch.testing.assert_close(mixed[1::2], exact.values[1::2], rtol=1e-9, atol=0)
    torch.testing.assert_close(mixed[::2], cold[::2], rtol=1e-9, atol=0)
    assert not torch.allclose(cold, exact.values, rtol=1e-6)


def test_class_vectors_are_the_eigenvector_in_class_space() -> None:
    """||J^T w||^2 with w made of q is lambda, and its direction u."""
    for solver in (Solver(estimator="exact"), Solver(estimator="power", steps=400, tolerance=0)):
        model, images = mlp(), some()
        found = solver(model, images)
        with differentiable(images) as x:
            logits = model(x)
            pulled = pull(logits, x, class_weights(logits, found.classes)).flatten(1)
        torch.testing.assert_close(pulled.square().sum(dim=1), found.values, rtol=1e-5, atol=0)
        cosines = (pulled * found.directions.flatten(1)).sum(dim=1).abs() / pulled.norm(dim=1)
        torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gain", [10.0, 40.0, 1000.0])
@pytest.mark.parametrize("estimator", ["exact", "power"])
def test_sure_networks_in_single_precision(gain: float, estimator: Any) -> None:
    """A direction is found where probabilities round to 0 and 1: the same as double precision finds."""
    model, images = mlp(gain=gain), some(20)
    _, expected = fisher.leading(model, images)
    _, found = fisher.leading(mlp(gain=gain).float(), images.float(), estimator=estimator, steps=100, tolerance=0)
    spread = fisher.spectrum(model, images)
    clear = spread[:, 1] < 0.5 * spread[:, 0] if gain < 1000 else torch.ones(20, dtype=torch.bool)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.ones(20), rtol=1e-5, atol=0)
    cosines = (found.double() * expected).flatten(1).sum(dim=1).abs()[clear]
    assert float((cosines > 0.999).double().mean()) > 0.8
    trace, exact = fisher.trace(mlp(gain=gain).float(), images.float()), fisher.trace(model, images)
    seen = exact > 1e-30
    torch.testing.assert_close(trace[seen].double(), exact[seen], rtol=1e-3, atol=0)


# What is refused


class Attention(nn.Module):
    """Its fast kernel has no forward-mode derivative, and no derivative of the derivative."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(6, K)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(len(x), 1, 2, 3)
        return self.net(nn.functional.scaled_dot_product_attention(rows, rows, rows).flatten(1))


KERNEL = "_scaled_dot_product_flash_attention_for_cpu"


def test_an_operator_without_forward_mode_is_named() -> None:
    with pytest.raises(DerivativeError, match=f"{KERNEL}.*rademacher") as caught:
        fisher.trace(Attention(), some().float(), estimator="hutchinson")
    assert KERNEL in caught.value.operator
    for estimator in ("exact", "rademacher", "fd-kl"):
        assert bool((fisher.trace(Attention(), some().float(), estimator=estimator) > 0).all())


def test_an_operator_that_is_differentiated_only_once_is_named() -> None:
    with pytest.raises(DerivativeError, match=f'{KERNEL}_backward.*estimator="exact"'):
        fisher.lambda_max(Attention(), some().float(), estimator="power")
    assert bool((fisher.lambda_max(Attention(), some().float()) > 0).all())


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def test_functions_of_the_user_are_named_as_such() -> None:
    model = mlp()

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(Once.apply(x))

    with pytest.raises(DerivativeError, match=r"custom autograd\.Function"):
        fisher.trace(Own(), some(), estimator="hutchinson")
    with pytest.raises(DerivativeError, match="once_differentiable"):
        fisher.lambda_max(Own(), some(), estimator="power")
    torch.testing.assert_close(fisher.trace(Own(), some()), 4 * fisher.trace(model, 2 * some()))


class Roots(nn.Module):
    """Its gradient is infinite where a pixel is 0."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Linear(6, K).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.flatten(1).sqrt())


@pytest.mark.parametrize("estimator", ["exact", "power"])
def test_where_the_gradient_breaks_down_nothing_is_flat(estimator: Any) -> None:
    images = some()
    images[1].flatten()[2], images[2] = 0.0, 0.0
    images[1] = images[1].clamp(min=0)
    images[1, 0, 0, 0] = 0.0
    values = fisher.lambda_max(Roots(), images, estimator=estimator)
    spectrum, trace = fisher.spectrum(Roots(), images), fisher.trace(Roots(), images)
    for found in (values, spectrum.sum(dim=1), trace):
        assert found.isnan().tolist() == [False, True, True, *[False] * (len(images) - 3)]
    assert bool(fisher.leading(Roots(), images, estimator=estimator)[1].isfinite().all())


def test_beyond_many_classes_attention_is_served_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asked for the iteration that its kernel refuses, so the exact form steps in."""
    from overproof.losses import fisher_eigen

    model, images = create_model("vit-tiny", K, 1, 8).double().eval(), torch.rand(2, 1, 8, 8, dtype=torch.float64)
    expected = fisher.lambda_max(model, images)
    monkeypatch.setattr(fisher_eigen, "MANY", 1)
    torch.testing.assert_close(fisher.lambda_max(model, images), expected, rtol=1e-3, atol=0)


def test_measuring_in_train_mode_moves_no_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(6, K)).double().train()
    before = copy.deepcopy(model.state_dict())
    for tool in (fisher.trace, fisher.lambda_max, fisher.spectrum):
        tool(model, some(), batch_statistics=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_errors_are_not_disguised() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        fisher.trace(mlp(), some(shape=(1, 2, 2)))
    assert not isinstance(caught.value, DerivativeError)


def test_a_batch_that_is_normalised_as_a_whole_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(6, K)).double()
    for tool in (fisher.trace, fisher.lambda_max, fisher.spectrum, fisher.leading):
        with pytest.raises(UsageError, match=r"layer '1' \(BatchNorm2d\).*batch_statistics=True"):
            tool(model, some())
    for tool in (fisher.trace, fisher.lambda_max, fisher.spectrum):
        assert bool((tool(model, some(), batch_statistics=True) > 0).all())
    assert bool((fisher.trace(model.eval(), some()) > 0).all())
    forgetful = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(6, K)).double().eval()
    with pytest.raises(UsageError, match="layer '0'.*It keeps no others"):
        fisher.trace(forgetful, some())
    assert bool((fisher.trace(forgetful, some(), batch_statistics=True) > 0).all())


class Rolling(nn.Module):
    """Dropout that no layer tells of."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


@pytest.mark.parametrize("dropout", [nn.Dropout(0.5), Rolling()], ids=["layer", "function"])
def test_both_answers_of_a_finite_difference_have_the_same_masks(dropout: nn.Module) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 40), dropout, nn.Linear(40, K)).double()
    torch.manual_seed(3)
    apart = fisher.trace(model, some(), estimator="fd-kl", draws=40, generator=seeded())
    still = fisher.trace(model.eval(), some(), estimator="fd-kl", draws=40, generator=seeded())
    assert float(apart.max()) < 20 * float(still.max()), "two masks differ by far more than two images"
    assert bool(fisher.trace(model, some(), estimator="hutchinson").isfinite().all())
    assert bool(fisher.trace(model.eval(), some(), estimator="fd-kl").isfinite().all())


def test_a_network_without_gradient_says_so() -> None:
    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return mlp()(x.detach())

    for tool in (fisher.trace, fisher.lambda_max, fisher.spectrum):
        with pytest.raises(NoGradientError, match="does not depend differentiably"):
            tool(Rounded(), some())
    with pytest.raises(NoGradientError, match="does not depend differentiably"):
        fisher.trace(Rounded(), some(), estimator="hutchinson")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "monte-carlo"}, "known are exact, rademacher"),
        ({"estimator": "rademacher", "draws": 0}, "draws >= 1"),
        ({"estimator": "fd-kl", "step": 0.0}, "step > 0"),
    ],
)
def test_bad_options_of_the_trace(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fisher.trace(mlp(), some(), **options)


@pytest.mark.parametrize("options", [{"estimator": "lanczos"}, {"steps": 0}, {"tolerance": -1.0}, {"tolerance": math.nan}])
def test_bad_options_of_the_eigenvalue(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="steps >= 1 and tolerance >= 0"):
        fisher.lambda_max(mlp(), some(), **options)


def test_the_module_is_public() -> None:
    assert overproof.fisher is home
    assert {"trace", "lambda_max", "spectrum"} <= set(overproof.fisher.__all__)
    assert "fisher" in overproof.__all__
    assert "fisher" in dir(overproof)


def test_many_classes_are_iterated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 200 classes the default is the iteration."""
    seen: list[int] = []
    real = Solver._power
    monkeypatch.setattr(Solver, "_power", lambda self, *rest: (seen.append(len(rest)), real(self, *rest))[1])
    model = mlp(classes=201)
    found = fisher.lambda_max(model, some(2), steps=300, tolerance=0)
    fisher.lambda_max(mlp(), some(2))
    assert len(seen) == 1
    torch.testing.assert_close(found, fisher.spectrum(model, some(2))[:, 0], rtol=1e-3, atol=0)


def test_a_model_in_train_mode_is_refused_untouched() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for measure in (fisher.trace, fisher.lambda_max, fisher.leading, fisher.spectrum):
        with pytest.raises(UsageError, match="statistics of the batch"):
            measure(model, torch.rand(3, 1, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
