"""Evolving generators against their formulas."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof.errors import NonFiniteLossError, UnknownNameError, UsageError
from overproof.evolution import CEGAN, EGAN, EVOLUTIONS, GAN, IEGAN, Evolution
from overproof.evolution.crossover import couples, cross, pull_to_second, second_wins
from overproof.evolution.discriminator import train_discriminator
from overproof.evolution.fitness import FITNESS, logits_of
from overproof.evolution.individual import Adam, Individual, Species, coupled, row
from overproof.evolution.mutation import mutate
from overproof.evolution.selection import select, shares
from overproof.losses.adversarial import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, gradient_penalty

LATENT = 3
THREE = ("heuristic", "least-squares", "minimax")


def generator(seed: int = 0, *, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(LATENT, 8), *middle, nn.Tanh(), nn.Linear(8, 2)).double()


def critic(seed: int = 1, *, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    middle = [nn.BatchNorm1d(6)] if norm else []
    return nn.Sequential(nn.Linear(2, 6), *middle, nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0)).double()


def noise(count: int, seed: int = 2) -> Tensor:
    return torch.randn(count, LATENT, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(count: int, stream: torch.Generator) -> Tensor:
    return torch.randn(count, LATENT, generator=stream, dtype=torch.float64)


def real(count: int, seed: int = 3) -> Tensor:
    return 2 + torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stream(seed: int = 4) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def evolution(settings: CEGAN, **nets: Any) -> Evolution:
    networks = [generator(i, norm=nets.get("norm", False)) for i in range(settings.population)]
    return Evolution(settings, networks, nets.get("critic") or critic(), draw=draw)


def judged(species: Species, network: nn.Module, z: Tensor, opponent: nn.Module) -> Individual:
    found = FITNESS["logit"](CEGAN(), opponent, real(0), stream())([species.images(species.individual(network), z)])
    return found[0]


# ---- losses


@pytest.mark.parametrize("name", GENERATOR_LOSSES)
def test_slopes_are_the_gradients_and_stay_finite(name: str) -> None:
    loss = GENERATOR_LOSSES[name]
    d = torch.cat([torch.linspace(-6, 6, 50, dtype=torch.float64), torch.tensor([-20.0, 20.0, -800.0, 800.0]).double()])
    d.requires_grad_()
    r = torch.linspace(2, -2, len(d), dtype=torch.float64)
    value = loss.value(d, r)
    (slope,) = torch.autograd.grad(value.sum(), d)
    torch.testing.assert_close(loss.slope(d.detach(), r), slope, atol=1e-12, rtol=1e-9)
    assert value.isfinite().all()
    assert slope.isfinite().all()


def test_losses_have_the_published_values() -> None:
    d, r = torch.tensor([-1.0, 0.0, 2.0]).double(), torch.tensor([0.5, -0.5, 1.0]).double()
    p = d.sigmoid()
    wanted = {
        "minimax": (1 - p).log(),
        "heuristic": -p.log(),
        "least-squares": (d - 1) ** 2,
        "least-squares-sigmoid": (p - 1) ** 2,
        "wgan": -d,
        "relativistic": -(d - r).sigmoid().log(),
    }
    assert wanted.keys() == GENERATOR_LOSSES.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(GENERATOR_LOSSES[name].value(d, r), value)
    of_critic = {
        "vanilla": -r.sigmoid().log() - (1 - p).log(),
        "least-squares": (r - 1) ** 2 + d**2,
        "wgan": d - r,
        "relativistic": -(r - d).sigmoid().log(),
    }
    assert of_critic.keys() == DISCRIMINATOR_LOSSES.keys()
    for name, value in of_critic.items():
        torch.testing.assert_close(DISCRIMINATOR_LOSSES[name](d, r), value)


def test_minimax_and_heuristic_share_a_direction() -> None:
    """Equal slopes at p = 1/2; elsewhere their ratio is p to 1 - p."""
    d = torch.tensor([0.0, -3.0, 1.5]).double()
    minimax, heuristic = (GENERATOR_LOSSES[name].slope(d, d) for name in ("minimax", "heuristic"))
    assert float(minimax[0]) == float(heuristic[0]) == -0.5
    torch.testing.assert_close(minimax / heuristic, d.sigmoid() / (1 - d.sigmoid()))


def test_gradient_penalty_of_a_linear_discriminator() -> None:
    weight = torch.tensor([[3.0, 4.0]]).double()
    found = gradient_penalty(lambda x: (x @ weight.T).flatten() + 7, real(5))
    torch.testing.assert_close(found, torch.full((5,), 16.0).double())


def test_gradient_penalty_reaches_the_weights_and_survives_a_flat_discriminator() -> None:
    flat = nn.Linear(2, 1).double()
    nn.init.zeros_(flat.weight)
    gradient_penalty(lambda x: flat(x).flatten(), real(4)).mean().backward()
    assert flat.weight.grad is not None
    assert flat.weight.grad.isfinite().all()


# ---- individuals


def test_adam_is_torchs() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(7).double(), torch.randn(5, 7).double()
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], 0.01, (0.5, 0.9))
    ours = Individual(start.clone(), (torch.zeros_like(start), torch.zeros_like(start)))
    adam = Adam(0.01, (0.5, 0.9))
    for gradient in gradients:
        theirs.grad = gradient.clone()
        optimizer.step()
        weights, first, second = adam(ours, gradient[None])
        ours = Individual(weights[0], (first[0], second[0]), ours.steps + 1)
    torch.testing.assert_close(ours.weights, theirs.detach(), atol=1e-15, rtol=1e-14)


@pytest.mark.parametrize("norm", [False, True])
def test_an_individual_is_its_network(norm: bool) -> None:
    network, other = generator(0, norm=norm), generator(5, norm=norm)
    species, z = Species(copy.deepcopy(network), Adam()), noise(6)
    made = species.images(species.individual(other), z)
    torch.testing.assert_close(made.images, other.train()(z).detach(), atol=1e-15, rtol=1e-14)
    for (_, ours), theirs in zip(sorted(made.buffers.items()), sorted(dict(other.named_buffers()).items()), strict=True):
        torch.testing.assert_close(ours, theirs[1])
    species.fill(made)
    torch.testing.assert_close(species.network.eval()(z), other.eval()(z), atol=1e-15, rtol=1e-14)


@pytest.mark.parametrize("head", [(), (nn.Tanh(), nn.Unflatten(1, (1, 2)))])
def test_stacked_children_are_what_each_gives_alone(head: tuple[nn.Module, ...]) -> None:
    networks = [nn.Sequential(*generator(seed), *head) for seed in range(3)]
    species, z = Species(networks[0], Adam()), noise(7)
    assert species.dense
    some = [species.individual(network) for network in networks]
    for network, found in zip(networks, species.all_images(some, z), strict=True):
        torch.testing.assert_close(found.images, network(z).detach(), atol=1e-14, rtol=1e-12)
    assert not Species(generator(norm=True), Adam()).dense
    assert not Species(nn.Sequential(nn.Linear(3, 2, bias=False)), Adam()).dense


def test_coupling_is_seen() -> None:
    assert not coupled(critic())
    assert coupled(critic(norm=True))
    assert not coupled(critic(norm=True).eval())
    assert coupled(nn.Sequential(nn.Dropout()))


# ---- mutation


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("losses", [THREE, ("wgan", "relativistic", "least-squares-sigmoid")])
def test_one_forward_gives_what_separate_ones_give(norm: bool, losses: tuple[str, ...]) -> None:
    """Also with batch statistics in both networks, and after a step that has left moments."""
    opponent, z = critic(norm=norm).train(), noise(16)
    against = opponent(real(16)).detach()
    species = Species(generator(norm=norm), Adam(0.01, (0.5, 0.9)))
    parent = species.individual(generator(0, norm=norm))
    (parent,) = mutate(species, parent, noise(16, 9), critic=opponent, losses=["heuristic"])
    children = mutate(species, parent, z, critic=opponent, losses=losses, real=against)
    assert [child.origin for child in children] == list(losses)
    for child in children:
        network = generator(0, norm=norm).train()
        optimizer = torch.optim.Adam(network.parameters(), 0.01, (0.5, 0.9))
        for first, name, some in ((True, "heuristic", noise(16, 9)), (False, child.origin, z)):
            optimizer.zero_grad()
            logits = opponent(network(some))
            GENERATOR_LOSSES[name].value(logits, logits.detach() if first else against).mean().backward()
            optimizer.step()
        wanted = torch.cat([p.detach().flatten() for p in network.parameters()])
        # What normalisation takes out again has no gradient but rounding, which Adam divides by as little.
        torch.testing.assert_close(child.weights, wanted, atol=1e-8 if norm else 1e-12, rtol=1e-10)
        assert child.steps == 2
        for name, buffer in network.named_buffers():
            torch.testing.assert_close(child.buffers[name], buffer)


def test_one_pass_serves_all_mutations() -> None:
    passes = []
    opponent, network = critic(), generator()
    opponent.register_forward_hook(lambda *_: passes.append("critic"))
    network.register_forward_hook(lambda *_: passes.append("generator"))
    species = Species(network, Adam())
    mutate(species, species.individual(network), noise(4), critic=opponent, losses=THREE)
    assert sorted(passes) == ["critic", "generator"]


def test_variation_leaves_parents_and_discriminator_alone() -> None:
    opponent, z = critic(), noise(12)
    before = copy.deepcopy(opponent.state_dict())
    species = Species(generator(), Adam(0.1))
    parent = judged(species, generator(0), z, opponent)
    kept = parent.weights.clone()
    children = mutate(species, parent, z, critic=opponent, losses=THREE)
    other = judged(species, generator(7), z, opponent)
    child = cross(species, parent, other, z)
    assert torch.equal(parent.weights, kept)
    assert not any(torch.equal(c.weights, kept) for c in (*children, child))
    assert torch.equal(parent.moments[0], torch.zeros_like(kept))
    assert all(p.grad is None for p in opponent.parameters())
    assert all(torch.equal(value, before[name]) for name, value in opponent.state_dict().items())


# ---- crossover


def linear_pair(z: Tensor, values: tuple[Tensor, Tensor]) -> tuple[Species, Individual, Individual]:
    torch.manual_seed(5)
    nets = [nn.Linear(LATENT, 4, bias=False).double() for _ in range(2)]
    species = Species(copy.deepcopy(nets[0]), Adam())
    a, b = (
        replace(species.images(species.individual(n), z), values=v, score=float(v.mean()))
        for n, v in zip(nets, values, strict=True)
    )
    return species, a, b


def test_crossover_gradient_of_linear_generators() -> None:
    """dW = (2/MP) sum over the noise where the second wins of (W_a - W_b) z z^T."""
    z = noise(10)
    values = torch.linspace(-1, 1, 10).double(), torch.zeros(10).double()
    species, a, b = linear_pair(z, values)
    found, _ = pull_to_second(species, a, b, z)
    wa, wb, won = a.weights.view(4, LATENT), b.weights.view(4, LATENT), values[0] <= 0
    assert 0 < int(won.sum()) < 10
    wanted = (2 / (10 * 4)) * (wa - wb) @ z[won].T @ z[won]
    torch.testing.assert_close(found.view(4, LATENT), wanted, atol=1e-14, rtol=1e-12)


def test_crossover_converges_to_a_parent_that_wins_everywhere() -> None:
    z = noise(4000)
    species, a, b = linear_pair(z, (torch.zeros(4000).double(), torch.ones(4000).double()))
    weights = a.weights
    for _ in range(60):
        now = replace(species.images(replace(a, weights=weights), z), values=a.values)
        weights = weights - 1.5 * pull_to_second(species, now, b, z)[0]
    torch.testing.assert_close(weights, b.weights, atol=1e-6, rtol=0)


def test_a_child_of_a_parent_that_wins_everywhere_is_that_parent() -> None:
    z = noise(9)
    species, a, b = linear_pair(z, (torch.ones(9).double(), torch.zeros(9).double()))
    child = cross(species, a, b, z)
    assert torch.equal(child.weights, a.weights)
    assert child.origin == "crossover"
    moving = replace(a, moments=(torch.ones_like(a.weights), torch.ones_like(a.weights)), steps=3)
    assert not torch.equal(cross(species, moving, b, z).weights, a.weights)  # inherited moments carry it on


def test_ties_go_to_the_second_and_every_noise_counts_once() -> None:
    z = noise(8)
    species, a, b = linear_pair(z, (torch.zeros(8).double(), torch.zeros(8).double()))
    assert second_wins(a, b).all()
    mixed = replace(a, values=torch.tensor([0.0, 0.5, 1.0, -1.0, 2.0, 0.2, 0.3, -0.1]).double())
    assert second_wins(mixed, b).tolist() == [True, False, False, True, False, False, False, True]
    assert second_wins(mixed, b, margin=0.5).tolist() == [True, True, False, True, False, True, True, True]
    whole = pull_to_second(species, replace(a, values=a.values - 1), b, z)[0]
    parts = [pull_to_second(species, mixed, b, z)[0]]
    swapped = replace(mixed, values=torch.where(second_wins(mixed, b), 1.0, -1.0).double())
    parts.append(pull_to_second(species, swapped, b, z)[0])
    torch.testing.assert_close(parts[0] + parts[1], whole, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("norm", [False, True])
def test_crossover_of_a_part_equals_that_of_the_whole(norm: bool) -> None:
    opponent, z = critic(), noise(20)
    species = Species(generator(norm=norm), Adam())
    a, b = (judged(species, generator(seed, norm=norm), z, opponent) for seed in (0, 7))
    a = replace(a, values=a.values - (a.values - b.values).median())  # about even
    learns = second_wins(a, b)
    assert 0 < int(learns.sum()) < 20
    found, _ = pull_to_second(species, a, b, z)
    leaves = species.leaves(a)
    images, _ = species.run(leaves, a.buffers, z)
    target = torch.where(learns[:, None], b.images, a.images)
    wanted = row(torch.autograd.grad((images - target).square().mean(), leaves))
    torch.testing.assert_close(found, wanted, atol=1e-14, rtol=1e-10)


def test_crossover_runs_the_second_parents_noise_alone() -> None:
    z, seen = noise(20), []
    network = generator()
    species = Species(network, Adam())
    a, b = (judged(species, generator(seed), z, critic()) for seed in (0, 7))
    a = replace(a, values=a.values - (a.values - b.values).median())
    network.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    cross(species, a, b, z)
    assert seen == [int(second_wins(a, b).sum())]
    assert 0 < seen[0] < 20


def test_couples_are_the_fittest_pairs() -> None:
    a, b, c = (
        Individual(torch.zeros(1), (torch.zeros(1), torch.zeros(1)), origin=o, score=s)
        for o, s in zip("abc", (1, 5, 3), strict=True)
    )
    assert [(x.origin, y.origin) for x, y in couples([a, b, c], 3)] == [("b", "c"), ("b", "a"), ("c", "a")]
    assert len(couples([a, b, c], 1)) == 1


# ---- fitness


def individuals(count: int, size: int) -> list[Individual]:
    species = Species(generator(), Adam())
    return [species.images(species.individual(generator(seed)), noise(size)) for seed in range(count)]


def test_logit_fitness() -> None:
    opponent, some = critic(norm=True).train(), individuals(2, 9)
    for before, after in zip(some, FITNESS["logit"](CEGAN(), opponent, real(0), stream())(some), strict=True):
        logits = opponent(before.images).detach()  # each child by the statistics of its own batch
        torch.testing.assert_close(after.values, logits)
        assert after.score == pytest.approx(float(logits.mean()), abs=1e-12)


def test_children_are_judged_together_where_that_is_the_same() -> None:
    batches, calls = [real(4), real(6, 8)], []
    for norm, expected in ((False, 1), (True, 2)):
        opponent = critic(norm=norm).train()
        wanted = [opponent(batch) for batch in batches]
        opponent.register_forward_hook(lambda *_: calls.append(1))
        calls.clear()
        for ours, theirs in zip(logits_of(opponent, batches), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=1e-12)
        assert len(calls) == expected


def test_judging_with_running_statistics() -> None:
    opponent, (child,) = critic(norm=True).train(), individuals(1, 9)
    opponent(real(30))
    (after,) = FITNESS["logit"](CEGAN(judge_eval=True), opponent, real(0), stream())([child])
    assert opponent.training
    assert opponent[1].training
    torch.testing.assert_close(after.values, opponent.eval()(child.images).detach())


def test_slope_fitness_of_a_linear_discriminator() -> None:
    """grad = (mean -(1 - p_r) x_r + mean p_f x_f, mean -(1 - p_r) + mean p_f)."""
    opponent = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)).double()
    (child,), x_r = individuals(1, 12), real(12)
    (after,) = FITNESS["egan"](EGAN(fitness_weight=0.3), opponent, x_r, stream())([child])
    x_f = child.images
    p_r, p_f = opponent(x_r).detach().sigmoid(), opponent(x_f).detach().sigmoid()
    slope = (-(1 - p_r)[:, None] * x_r).mean(0) + (p_f[:, None] * x_f).mean(0)
    bias = -(1 - p_r).mean() + p_f.mean()
    wanted = p_f.mean() - 0.3 * (slope.square().sum() + bias**2).sqrt().log()
    assert after.score == pytest.approx(float(wanted), abs=1e-12)
    torch.testing.assert_close(after.values, p_f)


def test_the_real_half_is_computed_once() -> None:
    opponent, sizes = critic(), []
    fitness = FITNESS["egan"](EGAN(), opponent, real(5), stream())
    opponent.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    fitness(individuals(3, 9))
    fitness(individuals(1, 9))
    assert sizes == [5, 9, 9, 9, 9]


def test_slope_fitness_of_a_settled_discriminator_is_finite() -> None:
    opponent = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)).double()
    nn.init.zeros_(opponent[0].weight)
    nn.init.zeros_(opponent[0].bias)
    some = real(6)
    child = replace(individuals(1, 6)[0], images=some)
    (after,) = FITNESS["egan"](EGAN(), opponent, some, stream())([child])
    assert math.isfinite(after.score)


def test_diversity_fitness() -> None:
    opponent, (child,) = critic(), individuals(1, 10)
    settings = IEGAN(fitness_weight=2.0, crossover_weight=0.5)
    (after,) = FITNESS["iegan"](settings, opponent, real(0), stream(6))([child])
    again, apart = stream(6), []
    for _ in range(5):
        order = torch.randperm(10, generator=again).tolist()
        apart.append([float((child.images[i] - child.images[j]).abs().mean()) for i, j in enumerate(order)])
    e, logits = torch.tensor(apart).double().mean(0), opponent(child.images).detach()
    torch.testing.assert_close(after.values, logits + 0.5 * e, atol=1e-7, rtol=0)
    assert after.score == pytest.approx(float((logits + 2 * e).mean()), abs=1e-7)
    alike = replace(child, images=child.images[:1].expand(10, -1))
    (flat,) = FITNESS["iegan"](settings, opponent, real(0), stream(6))([alike])
    assert flat.score == pytest.approx(float(opponent(alike.images).detach().mean()), abs=1e-12)


# ---- selection


def scored(*scores: float) -> list[Individual]:
    nothing = torch.zeros(1)
    return [Individual(nothing, (nothing, nothing), origin=f"o{i}", score=s) for i, s in enumerate(scores)]


def test_selection_and_its_bookkeeping() -> None:
    pool = scored(1.0, 3.0, math.nan, 2.0, 3.0)
    assert [s.origin for s in select(pool, 3, stream=stream())] == ["o1", "o4", "o3"]
    assert select(pool, 5, stream=stream())[-1].origin == "o2"
    drawn = {select(pool, 1, at_random=True, stream=stream(seed))[0].origin for seed in range(40)}
    assert drawn == {f"o{i}" for i in range(5)}
    found = shares(select(pool, 3, stream=stream()), [p.origin for p in pool])
    assert found == {"o0": 0.0, "o1": 1 / 3, "o2": 0.0, "o3": 1 / 3, "o4": 1 / 3}


@pytest.mark.parametrize(
    "settings",
    [
        CEGAN(population=2, crossovers=3, batch_size=4, evaluation_size=8),
        CEGAN(population=2, crossovers=9, candidates="crossover", batch_size=4, evaluation_size=8, gradient_penalty=0),
        CEGAN(keep_parents=True, common_noise=True, selection="random", batch_size=4, evaluation_size=8),
        EGAN(population=3, batch_size=4, evaluation_size=8, crossovers=2),
        IEGAN(batch_size=4, evaluation_size=8, judge_eval=True),
        CEGAN(mutations=("wgan", "relativistic"), discriminator_loss="wgan", batch_size=4, evaluation_size=8),
        GAN(batch_size=4, discriminator_loss="relativistic", mutations=("relativistic",)),
        GAN(batch_size=4, discriminator_loss="least-squares", mutations=("least-squares",), gradient_penalty=0.0),
    ],
    ids=lambda s: f"{type(s).__name__}-{s.fitness}-{s.candidates}-{s.discriminator_loss}",
)
@pytest.mark.parametrize("norm", [False, True])
def test_shares_sum_to_one_in_every_generation(settings: CEGAN, norm: bool) -> None:
    one = evolution(settings, norm=norm, critic=critic(norm=norm))
    for number in range(3):
        before = [p.detach().clone() for p in one.critic.parameters()]
        found = one.generation(real(settings.real, number), stream(number))
        chosen = {k: v for k, v in found.items() if k.startswith("selected/")}
        assert sum(chosen.values()) == pytest.approx(1)
        assert chosen.keys() == {f"selected/{name}" for name in settings.origins}
        assert len(one.population) == settings.population
        assert math.isfinite(found["fitness"])
        assert torch.isfinite(found["discriminator"])
        assert any(not torch.equal(a, b) for a, b in zip(before, one.critic.parameters(), strict=True))
        assert all(member.images is None for member in one.population)


def test_the_champion_never_gets_worse_before_a_fixed_discriminator() -> None:
    settings = CEGAN(keep_parents=True, common_noise=True, population=2, batch_size=8, evaluation_size=32, lr=0.05)
    one, scores = evolution(settings), []
    for _ in range(12):
        same = stream(11)  # the same noise in every generation
        fitness = FITNESS["logit"](settings, one.critic, real(0), same)
        one.population = select(one.breed(real(settings.learned), fitness, same), 2, stream=same)
        scores.append(one.population[0].score)
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(scores))
    assert scores[-1] > scores[0]


# ---- discriminator, generation


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("penalty", [0.0, 3.0])
def test_discriminator_steps_against_a_loop(norm: bool, penalty: float) -> None:
    ours, x_r, x_f = critic(norm=norm).train(), real(12), real(12, 8) - 2
    theirs = copy.deepcopy(ours)
    optimizers = [torch.optim.Adam(net.parameters(), 0.01, (0.5, 0.9)) for net in (ours, theirs)]
    mean = train_discriminator(ours, optimizers[0], x_r, x_f, loss="vanilla", penalty=penalty, batch_size=4, stream=stream(6))
    again, losses = stream(6), []
    for i in range(0, 12, 4):
        r, x = x_r[i : i + 4], x_f[i : i + 4]
        loss = F.softplus(-theirs(r)).mean() + F.softplus(theirs(x)).mean()
        losses.append(float(loss.detach()))
        if penalty:
            u = torch.rand(4, generator=again, dtype=torch.float64)[:, None]
            between = (u * x + (1 - u) * r).requires_grad_()
            slope = torch.autograd.grad(theirs(between).sum(), between, create_graph=True)[0]
            loss = loss + penalty * (slope.norm(dim=1) - 1).square().mean()
        optimizers[1].zero_grad()
        loss.backward()
        optimizers[1].step()
    assert float(mean) == pytest.approx(sum(losses) / 3, abs=1e-12)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7 if norm else 1e-12, rtol=1e-10)


@pytest.mark.parametrize("loss", ["heuristic", "minimax"])
def test_a_single_loss_without_crossover_is_a_plain_gan(loss: str) -> None:
    settings = GAN(mutations=(loss,), batch_size=8, discriminator_steps=2, gradient_penalty=0.0, lr=0.01, discriminator_lr=0.02)
    one = evolution(settings)
    network, opponent = generator(0).train(), critic().train()
    for_g = torch.optim.Adam(network.parameters(), 0.01, (0.5, 0.999))
    for_d = torch.optim.Adam(opponent.parameters(), 0.02, (0.5, 0.999))
    for number in range(20):
        some, drawn = real(16, number), stream(number)
        one.generation(some, stream(number))
        z, small = draw(16, drawn), draw(8, drawn)
        for_g.zero_grad()
        GENERATOR_LOSSES[loss].value(opponent(network(small)), some).mean().backward()
        for_g.step()
        fakes = network(z).detach()[torch.randperm(16, generator=drawn)]
        for r, x in zip(some.split(8), fakes.split(8), strict=True):
            for_d.zero_grad()
            (F.softplus(-opponent(r)).mean() + F.softplus(opponent(x)).mean()).backward()
            for_d.step()
    ours, theirs = (torch.cat([p.detach().flatten() for p in net.parameters()]) for net in (one.champion(), network))
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-8)
    for a, b in zip(one.critic.parameters(), opponent.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def plain_generation(
    settings: CEGAN, network: nn.Module, state: dict[str, Any], opponent: nn.Module, for_d: Any, some: Tensor, drawn: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """CE-GAN written down without a thought for cost: a copy and a pass of its own for everything."""
    noise_1, noise_2 = draw(settings.judged, drawn), draw(settings.judged, drawn)
    small, children = draw(settings.batch_size, drawn), []

    def child_of(net: nn.Module, moments: dict[str, Any], loss: Callable[[nn.Module], Tensor]) -> tuple[nn.Module, Any]:
        made = copy.deepcopy(net)
        optimizer = torch.optim.Adam(made.parameters(), settings.lr, settings.betas)
        if moments:
            optimizer.load_state_dict(copy.deepcopy(moments))
        optimizer.zero_grad()
        loss(made).backward()
        optimizer.step()
        return made, optimizer.state_dict()

    for name in settings.mutations:
        made = child_of(network, state, lambda net, n=name: GENERATOR_LOSSES[n].value(opponent(net(small)), some).mean())
        images = made[0](noise_1).detach()
        children.append((*made, images, opponent(images).detach()))
    pairs = [(a, b) for i, a in enumerate(children) for b in children[i + 1 :]]
    a, b = max(pairs, key=lambda pair: float(pair[0][3].mean() + pair[1][3].mean()))
    a, b = (a, b) if a[3].mean() >= b[3].mean() else (b, a)
    target = torch.where((a[3] - b[3] > 0)[:, None], a[2], b[2])
    made = child_of(a[0], a[1], lambda net: (net(noise_1) - target).square().mean())
    images = made[0](noise_2).detach()
    children.append((*made, images, opponent(images).detach()))
    best = max(children, key=lambda child: float(child[3].mean()))
    fakes = best[2][torch.randperm(settings.judged, generator=drawn)[: settings.learned]]
    for r, x in zip(some.split(settings.batch_size), fakes.split(settings.batch_size), strict=True):
        for_d.zero_grad()
        (F.softplus(-opponent(r)).mean() + F.softplus(opponent(x)).mean()).backward()
        for_d.step()
    return best[0], best[1]


def test_a_generation_is_what_the_plain_code_gives() -> None:
    settings = CEGAN(batch_size=8, evaluation_size=24, gradient_penalty=0.0, lr=0.02, discriminator_lr=0.02)
    one, network, opponent = evolution(settings), generator(0), critic()
    for_d = torch.optim.Adam(opponent.parameters(), 0.02, settings.betas)
    state: dict[str, Any] = {}
    chosen = set()
    for number in range(25):
        some = real(settings.real, number)
        found = one.generation(some, stream(number))
        chosen |= {name for name, share in found.items() if name.startswith("selected/") and share}
        network, state = plain_generation(settings, network, state, opponent, for_d, some, stream(number))
    wanted = torch.cat([p.detach().flatten() for p in network.parameters()])
    torch.testing.assert_close(one.population[0].weights, wanted, atol=1e-9, rtol=1e-7)
    assert len(chosen) > 1


def test_state_comes_back_to_the_same_bits() -> None:
    settings = CEGAN(population=2, batch_size=4, evaluation_size=8)
    one, other = (evolution(settings, norm=True, critic=critic(norm=True)) for _ in range(2))
    for number in range(3):
        one.generation(real(settings.real, number), stream(number))
    other.load(copy.deepcopy(one.state()))
    for evolving in (one, other):
        evolving.generation(real(settings.real, 9), stream(9))
    for a, b in zip(one.population, other.population, strict=True):
        assert torch.equal(a.weights, b.weights)
        assert all(torch.equal(a.buffers[name], b.buffers[name]) for name in a.buffers)
    assert all(torch.equal(a, b) for a, b in zip(one.critic.parameters(), other.critic.parameters(), strict=True))


def test_survivors_own_their_memory() -> None:
    one = evolution(CEGAN(batch_size=4, evaluation_size=8))
    one.generation(real(12), stream())
    member = one.population[0]
    assert member.weights.untyped_storage().nbytes() == member.weights.numel() * 8


# ---- what is refused


def test_registered_evolutions() -> None:
    assert EVOLUTIONS.names() == ["cegan", "egan", "gan", "iegan"]
    assert EVOLUTIONS.create("gan", mutations=["minimax"]) == GAN(mutations=("minimax",))
    assert EVOLUTIONS.get("egan").load()().crosses == 0
    assert CEGAN(crossovers=99).crosses == 3
    assert CEGAN(batch_size=100, population=2).judged == 256
    assert CEGAN(batch_size=300, population=2).judged == 450
    assert EGAN().real == 96 + 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mutations": ("heuristic",)}, "needs two mutated children to cross, but population=1 and 1 mutation give 1"),
        ({"mutations": ()}, "name at least one loss, and each once"),
        ({"mutations": ("wgan", "wgan")}, "each once"),
        ({"candidates": "crossover", "population": 2}, "leaves 1 children .of 15 pairs. for population=2"),
        ({"candidates": "crossover", "crossovers": 0}, "leaves 0 children"),
        ({"discriminator_loss": "wgan", "gradient_penalty": 0.0}, "unbounded without gradient_penalty"),
        ({"population": 0}, "population=0 must be at least 1"),
        ({"fitness_weight": -1.0}, "fitness_weight=-1.0 must be at least 0"),
        ({"lr": 0.0}, "must be above 0"),
        ({"betas": (0.5, 1.0)}, r"in \[0, 1\)"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CEGAN(**options)


@pytest.mark.parametrize("key", ["fitness", "candidates", "selection", "discriminator_loss"])
def test_unknown_choices_are_named(key: str) -> None:
    with pytest.raises(UnknownNameError, match="nonsense"):
        CEGAN(**{key: "nonsense"})


def test_an_unknown_mutation_is_named() -> None:
    with pytest.raises(UnknownNameError, match="Unknown mutation 'minmax'. Did you mean 'minimax'"):
        CEGAN(mutations=("minmax",), crossovers=0)


def test_networks_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match="population=2, but 1 generator"):
        Evolution(CEGAN(population=2), [generator()], critic(), draw=draw)
    with pytest.raises(UsageError, match=r"cannot take the generator's images \(2,\)"):
        Evolution(CEGAN(), [generator()], nn.Linear(5, 1).double(), draw=draw)
    with pytest.raises(UsageError, match=r"gives \(2, 1\) for two images"):
        Evolution(CEGAN(), [generator()], nn.Linear(2, 1).double(), draw=draw)
    with pytest.raises(UsageError, match="batch_size=1 images, judged by 3, and a network that normalises over its batch"):
        Evolution(GAN(batch_size=1), [generator()], critic(norm=True), draw=draw)
    with pytest.raises(UsageError, match="batch_size=4 images, judged by 1, and"):
        Evolution(GAN(batch_size=4, population=4, discriminator_steps=1), [generator()] * 4, critic(norm=True), draw=draw)
    Evolution(GAN(batch_size=1), [generator()], critic(), draw=draw)
    with pytest.raises(UsageError, match="takes 96 real images, not 5"):
        evolution(CEGAN()).generation(real(5), stream())


def test_divergence_is_an_error() -> None:
    opponent = critic()
    one = evolution(CEGAN(batch_size=4, evaluation_size=8), critic=opponent)
    nn.init.constant_(opponent[0].bias, math.nan)
    with pytest.raises(NonFiniteLossError, match="training has diverged"):
        one.generation(real(12), stream())


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(2, 4)), nn.ReLU(), nn.Linear(4, 2)),
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 4)), nn.ReLU(), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (2, 2)), nn.Linear(2, 1), nn.Flatten()),
    ],
)
def test_only_plain_matrices_are_stacked(network: nn.Sequential) -> None:
    species = Species(network, Adam(lr=1e-3, betas=(0.5, 0.999)))
    individuals = [species.individual(network) for _ in range(2)]
    noise = torch.randn(5, 2)
    for made in species.all_images(individuals, noise):
        assert made.images is not None
        torch.testing.assert_close(made.images, network(noise).detach(), atol=1e-5, rtol=1e-4)
