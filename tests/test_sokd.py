"""SoKD: its operations, policy, areas and search against closed forms, enumeration and finite differences."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from overproof.errors import UnknownNameError, UsageError
from overproof.losses.feature_distances import squared_distance
from overproof.methods import METHODS
from overproof.methods.fitnet import FitNet
from overproof.methods.sokd import SoKD
from overproof.methods.sokd_areas import AreaHead, box_shares, cell_weights, count_boxes, find_boxes
from overproof.methods.sokd_operations import OPERATIONS, PAIRS, channel_drop, cutout, noise, rotate, translate_x
from overproof.methods.sokd_policy import Draw, Policy
from overproof.methods.sokd_search import unrolled
from overproof.methods.sokd_views import Step
from overproof.models import create_model
from overproof.testing import check_method, small_batch, small_model
from overproof.types import Batch, Progress

NOW, LATER = Progress(epoch=0), Progress(epoch=99)
AFFINE = ("shear-x", "shear-y", "translate-x", "translate-y", "rotate")


def feature(count: int = 2, channels: int = 4, side: int = 8) -> Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# Operations


@pytest.mark.parametrize("name", AFFINE)
def test_affine_operations_at_zero_and_at_the_middle_level(name: str) -> None:
    """Symmetric ranges: the identity lies at level 0.5."""
    x = feature()
    torch.testing.assert_close(OPERATIONS[name].apply(x, number(0.0), seeded()), x, atol=1e-6, rtol=0)
    torch.testing.assert_close(OPERATIONS[name](x, number(0.5), seeded()), x, atol=1e-6, rtol=0)
    assert float((OPERATIONS[name](x, number(1.0), seeded()) - x).abs().max()) > 0.05


def test_a_shift_by_one_cell() -> None:
    """The normalised width is 2: without the factor level 0.6 would move a 16-cell map by most of its width."""
    x = feature(side=16)
    torch.testing.assert_close(translate_x(x, number(1 / 16), seeded())[..., :-1], x[..., 1:], atol=1e-12, rtol=0)
    for level in (0.0, 1.0):
        kept = (OPERATIONS["translate-x"](x, number(level), seeded()).abs().sum((0, 1, 2)) > 0).sum()
        assert 8 <= int(kept) <= 9


def test_a_quarter_turn() -> None:
    x = feature()
    torch.testing.assert_close(rotate(x, number(90.0), seeded()), x.rot90(-1, (2, 3)), atol=1e-12, rtol=0)
    wide = torch.zeros(1, 1, 4, 12, dtype=torch.float64)
    wide[0, 0, :, 5:7] = 1  # the upright bar of a wide map lies down, as long and as thick as before
    turned = rotate(wide, number(90.0), seeded())
    assert float(turned.sum()) == pytest.approx(8, abs=1e-9)
    assert float(turned[0, 0, 1:3].sum()) == pytest.approx(8, abs=1e-9)


@pytest.mark.parametrize("side", [4, 8, 16])
def test_cutout_is_no_idle_operation_on_small_maps(side: int) -> None:
    x = feature(side=side)
    out = OPERATIONS["cutout"](x, number(1.0), seeded())
    gone = out[0, 0] == 0
    assert int(gone.sum()) == max(1, round(0.2 * side)) ** 2
    assert torch.equal((out == 0), gone.expand_as(out)), "one place for all images and channels"
    assert torch.equal(cutout(x, number(0.0), seeded()), x)
    everything = cutout(x, number(1.0), seeded())
    assert float(everything.abs().max()) == 0


def test_noise_drop_and_shuffle() -> None:
    x = feature(8, 32, 16)
    assert float((noise(x, number(0.1), seeded()) - x).var()) == pytest.approx(0.01, rel=0.02)
    dropped = channel_drop(x, number(0.5), seeded())
    kept = dropped.abs().sum((0, 2, 3)) > 0
    assert 4 < int(kept.sum()) < 28
    assert torch.equal(dropped[:, kept], x[:, kept])
    shuffled = OPERATIONS["channel-shuffle"](x, number(0.0), seeded())
    order = [int((x[0] - channel).abs().sum((1, 2)).argmin()) for channel in shuffled[0]]
    assert sorted(order) == list(range(32))
    assert order != list(range(32))
    assert torch.equal(shuffled, x[:, order])


def test_all_unordered_pairs() -> None:
    assert len(OPERATIONS) == 9
    assert len(PAIRS) == 36
    assert len({frozenset(pair) for pair in PAIRS}) == 36
    with pytest.raises(UsageError, match="subpolicies=1"):
        Policy(1)
    with pytest.raises(UsageError, match="subpolicies=105"):
        Policy(105)


# Policy


def policy(size: int = 4) -> Policy:
    torch.manual_seed(0)
    made = Policy(size).double()
    made.alpha = torch.randn(size, dtype=torch.float64)
    made.beta = torch.rand(size, 2, dtype=torch.float64) * 0.8 + 0.1
    made.magnitude = torch.rand(size, 2, dtype=torch.float64) * 0.3 + 0.7
    return made


def draw_of(bits: tuple[bool, bool], choice: int = 0) -> Draw:
    return Draw(choice, bits, 5, torch.tensor(1.0), torch.ones(2))


def test_straight_through_magnitudes() -> None:
    """The value is that of the operations; an applied operation's magnitude gets the sum of all upstream gradients."""
    made, x = Policy(36).double(), feature()
    choice = PAIRS.index(("cutout", "noise"))
    made.magnitude = torch.full((36, 2), 0.7, dtype=torch.float64)
    for bits in itertools.product((False, True), repeat=2):
        leaves = made.leaves()
        out = made.refine(x, draw_of(bits, choice), leaves)
        by_hand = x
        for j, name in enumerate(PAIRS[choice]):
            by_hand = OPERATIONS[name](by_hand, number(0.7), seeded(5 + j)) if bits[j] else by_hand
        torch.testing.assert_close(out.detach(), by_hand, atol=1e-12, rtol=0)
        if not any(bits):
            assert not out.requires_grad
            continue
        upstream = torch.randn_like(out)
        gradient = torch.autograd.grad((out * upstream).sum(), leaves["magnitude"], allow_unused=True)[0]
        expected = torch.zeros(36, 2, dtype=torch.float64)
        for j in range(2):
            expected[choice, j] = upstream.sum() if bits[j] else 0
        torch.testing.assert_close(gradient if gradient is not None else torch.zeros_like(expected), expected)


def test_search_reaches_every_part_of_the_chosen_pair_and_keeps_the_value() -> None:
    made, x = policy(36), feature(channels=32, side=16)
    for seed in range(6):
        torch.manual_seed(seed)
        leaves = made.leaves()
        draw = made.draw(leaves)
        out = made.refine(x, draw, leaves, search=True)
        torch.testing.assert_close(out.detach(), made.refine(x, draw, leaves).detach(), atol=1e-12, rtol=0)
        slopes = torch.autograd.grad((out * torch.randn_like(out)).sum(), list(leaves.values()), allow_unused=True)
        found = dict(zip(leaves, slopes, strict=True))
        if any(draw.bits):
            assert float(found["alpha"].abs().sum()) > 0
        others = torch.arange(36) != draw.choice
        assert float(found["beta"][others].abs().sum()) == 0
        assert float(found["beta"][draw.choice].abs().min()) > 0


def test_randomness_of_operations_is_replayed() -> None:
    """Otherwise a difference of two evaluations of one step would be noise."""
    made, x = Policy(36).double(), feature()
    for choice in range(36):
        first, second = (made.refine(x, draw_of((True, True), choice), made.leaves()) for _ in range(2))
        assert torch.equal(first, second)


def test_samples_have_the_policys_probabilities() -> None:
    made = policy()
    torch.manual_seed(0)
    draws = [made.draw({n: getattr(made, n) for n in ("alpha", "beta", "magnitude")}) for _ in range(3000)]
    share = torch.bincount(torch.tensor([d.choice for d in draws]), minlength=4) / len(draws)
    error = 4 * (share * (1 - share) / len(draws)).sqrt() + 1e-3
    assert bool(((share - made.alpha.softmax(0)).abs() < error).all())
    for choice in range(4):
        bits = torch.tensor([d.bits for d in draws if d.choice == choice], dtype=torch.float64)
        assert bool(((bits.mean(0) - made.beta[choice]).abs() < 4 * 0.5 / math.sqrt(len(bits))).all())
    for d in draws[:200]:
        assert all(bool(weight > 0.5) == bit for weight, bit in zip(d.bit_weights, d.bits, strict=True))


def test_certain_probabilities_are_drawn_and_stay_finite() -> None:
    made = Policy(4)
    made.beta = torch.tensor([[0.0, 1.0]] * 4)
    for _ in range(200):
        draw = made.draw(made.leaves())
        assert draw.bits == (False, True)
        assert bool(torch.isfinite(draw.bit_weights).all() and torch.isfinite(draw.choice_weight))


def resampled(made: Policy, draw: Draw, noise_of: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """RELAX's conditional samples given the draw: the reference that the shortcut makes superfluous."""
    p, theta = made.alpha.softmax(0), made.beta[draw.choice]
    first = -(-uniform[draw.choice].log()).log()
    categorical = -(-uniform.log() / p - uniform[draw.choice].log()).log()
    categorical[draw.choice] = first
    bits = torch.tensor(draw.bits)
    v = torch.where(bits, noise_of * theta + 1 - theta, noise_of * (1 - theta))
    return categorical, theta.logit() + v.logit()


def test_conditional_samples_agree_with_their_draw() -> None:
    made = policy()
    torch.manual_seed(1)
    for _ in range(500):
        draw = made.draw(made.leaves())
        uniform, noise_of = (torch.rand(n, dtype=torch.float64).clamp(1e-6, 1 - 1e-6) for n in (4, 2))
        categorical, logits = resampled(made, draw, noise_of, uniform)
        assert int(categorical.argmax()) == draw.choice
        assert [bool(z > 0) for z in logits] == list(draw.bits)


def test_the_estimator_is_unbiased() -> None:
    """All S 2^O outcomes enumerated, a random reward for each; a mean over draws within four standard errors."""
    made = policy()
    rewards = torch.randn(4, 2, 2, dtype=torch.float64) * 2 + 1
    alpha, beta = (getattr(made, n).clone().requires_grad_() for n in ("alpha", "beta"))
    p, total = alpha.softmax(0), 0.0
    for k, a, b in itertools.product(range(4), range(2), range(2)):
        chance = p[k] * (beta[k, 0] if a else 1 - beta[k, 0]) * (beta[k, 1] if b else 1 - beta[k, 1])
        total = total - chance * rewards[k, a, b]
    exact = torch.autograd.grad(total, [alpha, beta])
    torch.manual_seed(2)
    plain = {n: getattr(made, n) for n in ("alpha", "beta", "magnitude")}
    made.steps = made.steps + 1
    found: list[list[Tensor]] = [[], []]
    for _ in range(3000):
        draw = made.draw(plain)
        gradients = made.reinforce(draw, rewards[draw.choice, int(draw.bits[0]), int(draw.bits[1])])
        for store, name in zip(found, ("alpha", "beta"), strict=True):
            store.append(gradients[name])
    for store, truth in zip(found, exact, strict=True):
        samples = torch.stack(store)
        error = samples.std(0) / math.sqrt(len(samples))
        assert bool(((samples.mean(0) - truth).abs() < 4 * error + 1e-9).all()), (samples.mean(0), truth)


def test_scores_of_subpolicies_that_did_not_run_are_left_out() -> None:
    made = policy()
    gradients = made.reinforce(draw_of((True, False), 2), number(1.5))
    others = torch.arange(4) != 2
    assert float(gradients["beta"][others].abs().sum()) == 0
    torch.testing.assert_close(gradients["beta"][2], -1.5 * torch.stack([1 / made.beta[2, 0], -1 / (1 - made.beta[2, 1])]))
    expected = -1.5 * (torch.eye(4, dtype=torch.float64)[2] - made.alpha.softmax(0))
    torch.testing.assert_close(gradients["alpha"], expected)


def test_policy_steps_are_adams() -> None:
    made = Policy(4, lr=0.01).double()
    reference = [getattr(made, n).clone().requires_grad_() for n in ("alpha", "beta", "magnitude")]
    adam = torch.optim.Adam(reference, lr=0.01, betas=(0.5, 0.999), weight_decay=1e-3)
    for step in range(5):
        torch.manual_seed(step)
        gradients = {n: torch.randn_like(r) for n, r in zip(("alpha", "beta", "magnitude"), reference, strict=True)}
        for r, g in zip(reference, gradients.values(), strict=True):
            r.grad = g.clone()
        adam.step()
        made.update(gradients)
    for name, r in zip(("alpha", "beta", "magnitude"), reference, strict=True):
        torch.testing.assert_close(getattr(made, name), r.detach(), atol=1e-6, rtol=0)


# Areas


def test_boxes_by_a_loop() -> None:
    torch.manual_seed(0)
    head = AreaHead(4, 3).double()
    x = torch.randn(3, 4, 7, 9, dtype=torch.float64) * 4
    areas = head(x)
    areas = areas.detach()
    assert float(areas[:, :3].min()) >= 0.5
    assert float(areas[:, 3:].min()) >= 0
    count = 5
    counts = count_boxes(find_boxes(areas, count), (7, 9))
    for n in range(3):
        heat = areas[n, :3].detach()
        scores = []
        for c, y, x_ in itertools.product(range(3), range(7), range(9)):
            near = heat[c, max(0, y - 1) : y + 2, max(0, x_ - 1) : x_ + 2].max()
            scores.append((float(heat[c, y, x_]) if float(heat[c, y, x_]) >= float(near) else 0.0, -((c * 7 + y) * 9 + x_)))
        expected = torch.zeros(7, 9, dtype=torch.long)
        ranked = sorted(scores, reverse=True)[:count]
        if len({s for s, _ in ranked}) < count:  # ties are broken by torch as it likes
            continue
        for _, position in ranked:
            y, x_ = divmod(-position % 63, 9)
            wide, high, dx, dy = (float(v) for v in areas[n, 3:, y, x_].detach())
            x1, x2 = (int(min(max(x_ + dx + side * wide / 2, 0), 8)) for side in (-1, 1))
            y1, y2 = (int(min(max(y + dy + side * high / 2, 0), 6)) for side in (-1, 1))
            expected[y1 : y2 + 1, x1 : x2 + 1] += 1
        assert torch.equal(counts[n, 0], expected)


def test_weights_of_overlapping_boxes() -> None:
    """One box over all: the plain mean. P equal boxes: P times (sum), P^2 times (square), once (union)."""
    ours, theirs = feature(side=4), feature(side=4).flip(0)
    plain = squared_distance(ours, theirs)
    full = torch.tensor([0, 0, 3, 3]).expand(2, 1, 4)
    for copies, overlap, factor in ((1, "sum", 1), (3, "sum", 3), (3, "square", 9), (3, "union", 1)):
        counts = count_boxes(full.expand(2, copies, 4), (4, 4)).double()
        torch.testing.assert_close(squared_distance(ours, theirs, weights=cell_weights(counts, overlap)), factor * plain)


def test_boxes_of_a_dead_head_have_a_smallest_size() -> None:
    """Dead ReLUs: heat 1/2 everywhere and size 0; single cells are left unless a smallest box is asked for."""
    areas = torch.cat([torch.full((1, 2, 6, 6), 0.5), torch.zeros(1, 4, 6, 6)], dim=1)
    assert int((count_boxes(find_boxes(areas, 4), (6, 6)) > 0).sum()) == 4
    boxes = find_boxes(areas, 4, smallest=1 / 3)
    assert bool((boxes[..., 2] - boxes[..., 0] >= 1).all())


# The method


def build(**options: object) -> tuple[SoKD, Batch]:
    torch.manual_seed(0)
    networks = create_model("cnn", 3, 1, 16, widths=(6, 8)), create_model("cnn", 3, 1, 16, widths=(8, 12))
    return SoKD(*networks, **options).train(), small_batch(6, shape=(1, 16, 16))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"search": "unrolled"},
        {"search": "unrolled", "search_images": "same"},
        {"base": "at"},
        {"base": "reviewkd"},
        {"base": "crd", "search": "unrolled"},
        {"base": "kd"},
        {"base": "dkd"},
        {"areas": 0},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "defaults",
)
def test_contract(options: dict[str, object]) -> None:
    check_method(lambda student, teacher: SoKD(student, teacher, **options))


@pytest.mark.parametrize("base", ["vid", "sp", "rkd", "dist", "logit-standard"])
def test_every_base(base: str) -> None:
    objective, batch = build(base=base)
    output = objective(batch, NOW)
    sum(output.losses.values()).backward()
    assert all(bool(v.isfinite()) for v in output.losses.values())
    assert any(name.startswith(base) for name in output.losses)
    assert "fitnet" in output.losses


def test_without_refinement_and_areas_it_is_the_base() -> None:
    """beta = 0 and the whole map: FitNet with the weight of the areas, gradients and all."""
    torch.manual_seed(0)
    networks = [create_model("cnn", 3, 1, 16, widths=w) for w in ((6, 8), (8, 12))]
    plugged = SoKD(*copy.deepcopy(networks), areas=0, search_epochs=0).train()
    plugged.policy.beta = torch.zeros_like(plugged.policy.beta)
    plain = FitNet(*copy.deepcopy(networks), weight=1000.0).train()
    plain.regressors.load_state_dict(plugged.parts[0].regressors.state_dict())
    batch = small_batch(6, shape=(1, 16, 16))
    first, second = (sum(o(batch, NOW).losses.values()) for o in (plugged, plain))
    torch.testing.assert_close(first, second)
    first.backward()
    second.backward()
    for (name, p), q in zip(plain.named_parameters(), plugged.parts[0].parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_identical_features_have_no_distance() -> None:
    objective, _batch = build()
    x = torch.rand(2, 12, 8, 8)
    head = AreaHead(12, 3)
    objective.head = head
    weights, terms = objective._find_areas(x, x, 0)
    assert float(terms["sokd-areas"].detach()) == 0
    assert float(squared_distance(x, x, weights=weights).max()) == 0
    a, b = torch.rand(2, 2, 12, 8, 8)
    torch.testing.assert_close(objective._find_areas(a, b, 0)[1]["sokd-areas"], objective._find_areas(b, a, 0)[1]["sokd-areas"])


@pytest.mark.parametrize("search", ["first-order", "unrolled"])
def test_the_policy_learns_in_its_epochs_and_is_then_frozen(search: str) -> None:
    objective, batch = build(search=search, search_epochs=2, base="fitnet")
    state = {n: v.clone() for n, v in objective.policy.state_dict().items()}
    objective(batch, Progress(epoch=1))
    assert int(objective.policy.steps) == 1
    assert any(
        not torch.equal(v, state[n]) for n, v in objective.policy.state_dict().items() if n in ("alpha", "beta", "magnitude")
    )
    state = {n: v.clone() for n, v in objective.policy.state_dict().items()}
    torch.manual_seed(3)
    values = [float(objective(batch, Progress(epoch=2)).losses["fitnet"].detach()) for _ in range(6)]
    assert all(torch.equal(v, state[n]) for n, v in objective.policy.state_dict().items())
    assert len(set(values)) > 1, "sampling goes on after the search"
    assert all(name in objective.trained_state() for name in ("policy.alpha", "policy.first_alpha", "policy.steps"))


def test_policy_is_no_business_of_the_optimiser() -> None:
    objective, _ = build()
    trained = {id(p) for p in objective.trainable()}
    assert not any(id(t) in trained for t in objective.policy.buffers())
    assert not list(objective.policy.parameters())


def test_looking_ahead_leaves_no_trace() -> None:
    """Statistics, memories, gradients and weights: as if only the training step had run."""
    searching, batch = build(search="unrolled", base="crd", base_options={"samples": 6})
    before = {n: v.clone() for n, v in searching.state_dict().items()}
    step = Step(searching.policy.draw(leaves := searching.policy.leaves()), leaves, searching.teach(batch), attached=True)
    searching._look_ahead(batch, NOW, step)
    after = searching.state_dict()
    assert all(torch.equal(value, after[n]) for n, value in before.items() if n != "policy.baseline")
    assert all(p.grad is None for p in searching.parameters())
    assert not searching.teacher.training
    assert searching.student.training


def test_first_order_search_rewards_what_is_near() -> None:
    """Where the student equals the teacher, refinement only harms: its probability falls (the trap of this mode)."""
    made = Policy(36, lr=0.02).double()
    x = feature()
    torch.manual_seed(0)
    for _ in range(150):
        leaves = made.leaves()
        out = made.refine(x, made.draw(leaves), leaves, search=True)
        loss = (out - x).square().mean() / 2
        slopes = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        made.update({n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, slopes, strict=True)})
    assert float(made.beta.mean()) < 0.4
    weight = {name: sum(w for w, pair in zip(made.alpha.tolist(), PAIRS, strict=True) if name in pair) for name in OPERATIONS}
    assert set(sorted(weight, key=weight.get)[:2]) == {"channel-shuffle", "channel-drop"}, "they change the most"


# The search


def test_shortcut_is_the_central_difference_on_a_linear_student() -> None:
    """alpha: -(L(theta + R v) - L(theta - R v)) / 2R times the score; magnitudes: +(2 lambda / D) sum of q delta."""
    made, size = Policy(36).double(), (3, 4, 6, 6)
    generator = seeded(4)
    inputs, target, q = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (size, size, (3, 1, 6, 6)))
    q, weight = q.abs(), 7.0
    draw = draw_of((False, True), PAIRS.index(("cutout", "noise")))
    leaves = made.leaves()

    def inner(parameters: dict[str, Tensor]) -> Tensor:
        refined = made.refine(target, draw, leaves)
        return weight * squared_distance(parameters["w"].view(1, 4, 1, 1) * inputs, refined, weights=q).mean()

    def outer(parameters: dict[str, Tensor]) -> Tensor:
        return (parameters["w"].view(1, 4, 1, 1) * inputs.flip(0)).tanh().sum()

    theta = {"w": torch.randn(4, generator=generator, dtype=torch.float64)}
    here = theta["w"].clone().requires_grad_()
    slope = torch.autograd.grad(inner({"w": here}), here)[0]
    ahead = (here - 0.01 * (slope + 5e-4 * here)).detach().requires_grad_()
    v = torch.autograd.grad(outer({"w": ahead}), ahead)[0]
    radius = 0.01 / float(v.norm())
    with torch.no_grad():
        difference = (inner({"w": here + radius * v}) - inner({"w": here - radius * v})) / (2 * radius)
    found = unrolled(made, draw, leaves, theta, inner=inner, outer=outer, step=0.01, decay=5e-4)
    score = torch.eye(36, dtype=torch.float64)[draw.choice] - made.alpha.softmax(0)
    torch.testing.assert_close(found["alpha"], -difference * score, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(
        found["beta"][draw.choice], -difference * torch.tensor([-2.0, 2.0], dtype=torch.float64), rtol=1e-4, atol=1e-12
    )
    delta = v.view(1, 4, 1, 1) * inputs
    expected = 2 * weight / target.numel() * (q * delta).sum()
    torch.testing.assert_close(found["magnitude"][draw.choice, 1], expected)
    assert float(found["magnitude"].abs().sum()) == pytest.approx(abs(float(expected)))


def test_shortcut_is_the_central_difference_on_networks() -> None:
    """A fresh copy of the whole method at theta +- R v, as the straightforward procedure does it."""
    torch.manual_seed(0)
    objective, batch = build(search="unrolled", search_images="same", areas=0)
    objective, batch = objective.double().eval(), Batch(batch.images.double(), batch.labels, batch.index)
    # A kink of a ReLU between the two evaluations would spoil the difference.
    for module in objective.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus())
    leaves = objective.policy.leaves()
    step = Step(draw_of((True, True), 3), leaves, objective.teach(batch), attached=True)
    found = objective._look_ahead(batch, NOW, step)

    def loss_of(method: SoKD) -> Tensor:
        method._step = step
        return torch.stack(list(method(batch, NOW, "search").losses.values())).sum()

    here = [p for p in objective.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(loss_of(objective), here, allow_unused=True)
    slopes = [torch.zeros_like(p) if g is None else g for p, g in zip(here, slopes, strict=True)]

    def moved(by: list[Tensor], scale: float) -> SoKD:
        objective._step = None
        other = copy.deepcopy(objective)
        with torch.no_grad():
            for p, d in zip((p for p in other.parameters() if p.requires_grad), by, strict=True):
                p += scale * d
        return other

    ahead = moved([g + 5e-4 * p.detach() for g, p in zip(slopes, here, strict=True)], -0.01)
    parameters = [p for p in ahead.parameters() if p.requires_grad]
    v = torch.autograd.grad(loss_of(ahead), parameters, allow_unused=True)
    v = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, v, strict=True)]
    radius = 1e-3 / math.sqrt(sum(float(d.square().sum()) for d in v))
    with torch.no_grad():
        difference = (loss_of(moved(v, radius)) - loss_of(moved(v, -radius))) / (2 * radius)
    score = torch.eye(36, dtype=torch.float64)[3] - objective.policy.alpha.softmax(0)
    torch.testing.assert_close(found["alpha"], -difference * score, rtol=1e-4, atol=1e-12)


def test_halves_are_held_back_from_each_other() -> None:
    """The loss one step ahead is not taken on the images of that step."""
    objective, batch = build(search="unrolled", areas=0)
    seen: list[Tensor] = []
    objective.student.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    objective(batch, NOW)
    assert [len(x) for x in seen] == [3, 3, 6]
    assert torch.equal(torch.cat(seen[:2]), batch.images)
    one = Batch(batch.images[:1], batch.labels[:1], batch.index[:1])
    assert bool(sum(objective.eval().train()(one, NOW).losses.values()).isfinite())


def test_compiled_networks_search_in_first_order() -> None:
    objective, batch = build(search="unrolled")
    objective.student.compile(backend="eager")
    with pytest.raises(UsageError, match="train.compile=false"):
        objective(batch, NOW)


def test_teacher_runs_once_a_step() -> None:
    for search in ("first-order", "unrolled"):
        objective, batch = build(search=search, base="crd")
        calls = []
        objective.teacher.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        objective(batch, NOW)
        assert len(calls) == 1


# Plugging in


def test_vectors_are_pooled_from_refined_maps() -> None:
    objective, batch = build(base="rkd", search_epochs=0)  # nothing but drops and noise, always
    objective.policy.beta = torch.ones_like(objective.policy.beta)
    objective.policy.alpha = torch.where(torch.arange(36) == PAIRS.index(("noise", "channel-drop")), 50.0, 0.0)
    objective.policy.magnitude = torch.ones_like(objective.policy.magnitude)
    heard: list[Tensor] = []
    part = objective.parts[0]
    compare = part.compare
    part.compare = lambda view, *rest: heard.append(view.teacher_features[0]) or compare(view, *rest)
    objective(batch, LATER)
    plain = objective.teach(batch).features["net.fc:input"]
    assert int((heard[0].abs().sum(0) == 0).sum()) > 0, "no channel was dropped before pooling"
    assert not torch.allclose(heard[0], plain)


def test_weights_reach_the_spatial_bases_and_add_up() -> None:
    for base in ("at", "vid", "sp", "reviewkd"):
        objective, batch = build(base=base)
        views: list[tuple[Tensor | None, ...]] = []
        part = objective.parts[0]
        compare = part.compare
        part.compare = lambda view, *rest, c=compare, v=views: v.append(view.weights) or c(view, *rest)
        logs = objective(batch, NOW).logs
        spatial = [w for w, place in zip(views[0], part.places, strict=True) if place.spatial]
        assert all(w is not None and float(w.max()) >= 1 for w in spatial)
        assert 0 < float(logs["coverage"]) <= 1


def test_logs_and_description() -> None:
    objective, batch = build()
    logs = objective(batch, NOW).logs
    by_operation = {f"{kind}/{name}" for kind in ("applied per draw", "magnitude") for name in OPERATIONS}
    assert {"coverage", "heat spread", "refined gap", "plain gap"} | by_operation == set(logs)
    assert set(objective(batch, Progress(epoch=99)).logs) == {"coverage", "heat spread", "refined gap", "plain gap"}
    told = objective.describe()
    assert len(told["policy"]) == 36
    assert sum(row["weight"] for row in told["policy"]) == pytest.approx(1)
    assert told["policy"] == sorted(told["policy"], key=lambda row: -row["weight"])
    assert told["adapter_parameters"] == objective.adapter_parameters > 0


def test_figures_by_operation() -> None:
    made = policy(36)
    made.alpha = torch.randn(36, generator=seeded(1))
    made.beta, made.magnitude = torch.rand(36, 2, generator=seeded(2)), torch.rand(36, 2, generator=seeded(3))
    weights, found = made.alpha.softmax(dim=0), made.figures()
    for name in OPERATIONS:
        there = [(s, j) for s, pair in enumerate(made.names()) for j in (0, 1) if pair[j] == name]
        applied = sum(float(weights[s] * made.beta[s, j]) for s, j in there)
        level = sum(float(weights[s] * made.magnitude[s, j]) for s, j in there) / sum(float(weights[s]) for s, _ in there)
        assert float(found[f"applied per draw/{name}"]) == pytest.approx(applied, abs=1e-6)
        assert float(found[f"magnitude/{name}"]) == pytest.approx(level, abs=1e-5)


def test_a_flat_map_is_looked_at_everywhere() -> None:
    flat = torch.full((64, 7, 8, 8), 0.5)
    flat[:, -4:] = 0
    stuck = count_boxes(find_boxes(flat, 8), (8, 8)).sum(dim=0) > 0
    assert int(stuck.sum()) < 32  # without chance all images look at the same few cells
    counts = count_boxes(find_boxes(flat, 8, generator=seeded(1)), (8, 8)).float().mean(dim=0)
    assert counts.shape == (1, 8, 8)
    assert float(counts.min()) > 0  # of 64 images, 8 of 64 cells each
    hot = flat.clone()
    hot[:, 0, 3, 5] = 0.6
    boxes = find_boxes(hot, 1, generator=seeded(1))
    assert (boxes[..., 0] == 5).all()
    assert (boxes[..., 1] == 3).all()
    assert torch.equal(find_boxes(flat, 8, generator=seeded(1)), find_boxes(flat, 8, generator=seeded(1)))


def test_a_dead_head_is_told() -> None:
    objective, batch = build()
    alive = {name: float(value) for name, value in objective(batch, NOW).logs.items()}
    assert not objective.concerns(alive)
    for part in objective.head.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.zeros_(part.weight)
            nn.init.constant_(part.bias, -1.0)
    dead = {name: float(value) for name, value in objective(batch, NOW).logs.items()}
    assert "method.area_loss_weight (now 1000" in objective.concerns(dead)["heat spread"]
    assert not build(areas=0)[0].concerns({})


def test_box_shares_cover_whole_cells() -> None:
    head = AreaHead(4, 3)
    maps = feature(channels=4, side=8).float()
    shares = box_shares(head, maps, 5, smallest=0.25)
    cells = find_boxes(head(maps), 5, smallest=0.25)
    assert torch.equal(shares[..., :2] * 8, cells[..., :2].float())
    assert torch.equal(shares[..., 2:] * 8, cells[..., 2:].float() + 1)
    assert 0 <= float(shares.min()) < float(shares.max()) <= 1


def test_illustration() -> None:
    objective, batch = build()
    with torch.no_grad():
        shown = objective.eval().illustrate(batch)
    assert set(shown) == {"images", "student_boxes", "teacher_boxes"}
    assert shown["student_boxes"].shape == (len(batch), objective.areas, 4)
    without, batch = build(areas=0)
    assert without.illustrate(batch) == {}


def test_resumes_to_the_same_step() -> None:
    objective, batch = build()
    for epoch in range(2):
        objective(batch, Progress(epoch=epoch))
    other, _ = build(subpolicies=36)
    other.load_trained_state(copy.deepcopy(objective.trained_state()))
    for method in (objective, other):
        torch.manual_seed(9)
        method.result = {n: float(v.detach()) for n, v in method(batch, NOW).losses.items()}
    assert objective.result == other.result
    assert torch.equal(objective.policy.alpha, other.policy.alpha)


def test_fewer_pairs_are_drawn_at_random_and_saved() -> None:
    torch.manual_seed(0)
    first, second = Policy(10), Policy(10)
    assert not torch.equal(first.pairs, second.pairs)
    assert len(set(first.names())) == 10
    second.load_state_dict(first.state_dict())
    assert first.names() == second.names()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "fitnot"}, "Did you mean 'fitnet'"),
        ({"base_options": {"wight": 1.0}}, "Did you mean 'weight'"),
        ({"base": "composed"}, "consists of other methods"),
        ({"areas": 257}, r"areas=257 .*16 x 16"),
        ({"areas": -1}, "at least 0"),
        ({"subpolicies": 1}, "subpolicies=1"),
        ({"unroll_step": 0.0}, "unroll_step"),
        ({"policy_lr": 0.0}, "policy_lr"),
        ({"hint_options": {"weight": 1.0}}, "hint_options have no use"),
        ({"base_options": {"student_layers": ("net.layer.1",), "teacher_layers": ("net.layers.1",)}}, "net.layers.1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(**options)


def test_networks_without_maps_are_refused() -> None:
    with pytest.raises(UsageError, match="gives vectors"):
        SoKD(create_model("mlp", 3, 1, 8), create_model("mlp", 3, 1, 8))
    with pytest.raises(UnknownNameError):
        METHODS.create("sokd", small_model(0), small_model(1), bases="fitnet")
