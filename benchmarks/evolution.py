"""A generation of CE-GAN against one of a plain GAN, and against CE-GAN written down straightforwardly.

    python benchmarks/evolution.py [--save]

8 Gaussians, networks of three layers of 128 units, 64 points a batch, 256 by which a child is judged, one step of the discriminator.

The plain GAN has one loss: in a generation it takes one step, and makes the 64 points that its discriminator learns from, no more
(`cegan`, and `straightforward` for the straightforward CE-GAN). `cegan_same_loop` is ours against the loop of the evolution without
anything that evolves: its generator makes 256 points that the discriminator scores, and of which it learns from 64. The straightforward
CE-GAN (`cegan_code`) deep-copies weights and optimiser for every child and runs every loss, imitation and score by itself.

All take turns on the same points with the same random numbers; the median over the turns' ratios is reported. Outcome check, in double
precision: after 20 generations ours and the straightforward code have the same generator and the same discriminator. Ends with one JSON
line; a ratio is our time divided by the other's.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof import console
from overproof.data.toys import ring
from overproof.evolution import CEGAN, Evolution
from overproof.folder import write_json
from overproof.models.generators import make_generator, mlp_critic
from overproof.run.environment import environment

WIDTH, BATCH, JUDGED, RATE, BETAS = 128, 64, 256, 1e-3, (0.5, 0.999)
TURNS, WARM, CHECKED, NEAR = 300, 20, 20, 1e-7
SETTINGS = CEGAN(
    batch_size=BATCH, evaluation_size=JUDGED, discriminator_steps=1, gradient_penalty=0.0, lr=RATE, discriminator_lr=RATE
)
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "heuristic": lambda d: F.softplus(-d).mean(),
    "least-squares": lambda d: (d - 1).square().mean(),
    "minimax": lambda d: -F.softplus(d).mean(),
}
CASES = {
    "cegan": ("ours", "plain"), "cegan_same_loop": ("ours", "loop"), "cegan_code": ("ours", "straightforward"),
    "straightforward": ("straightforward", "plain"),
}  # fmt: skip


def networks(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A generator and a discriminator, always the same."""
    torch.manual_seed(0)
    pair = make_generator("mlp", 2, (2,), width=WIDTH).net, mlp_critic((2,), width=WIDTH)
    for network in pair:
        for layer in network.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
    return pair[0].to(dtype), pair[1].to(dtype)


def noise(count: int, stream: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise (N, 2)."""
    return torch.randn(count, 2, generator=stream, dtype=dtype)


class Ours:
    """The evolution of Overproof."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        network, self.critic = networks(dtype)
        self.evolution = Evolution(SETTINGS, [network], self.critic, draw=lambda n, s: noise(n, s, dtype))

    def generation(self, real: Tensor, stream: torch.Generator) -> None:
        """One generation."""
        self.evolution.generation(real, stream)

    def weights(self) -> Tensor:
        """Of the generator and of the discriminator."""
        return torch.cat([self.evolution.population[0].weights, *(p.detach().flatten() for p in self.critic.parameters())])


class Plain:
    """One loss, `judged` points made and scored in each generation; 0: only those that are learned from, without scores."""

    def __init__(self, judged: int, dtype: torch.dtype = torch.float32) -> None:
        (self.network, self.critic), self.judged, self.dtype = networks(dtype), judged, dtype
        self.of_network = torch.optim.Adam(self.network.parameters(), RATE, BETAS)
        self.of_critic = torch.optim.Adam(self.critic.parameters(), RATE, BETAS)

    def generation(self, real: Tensor, stream: torch.Generator) -> None:
        """One step of both networks."""
        self.of_network.zero_grad()
        LOSSES["heuristic"](self.critic(self.network(noise(BATCH, stream, self.dtype)))).backward()
        self.of_network.step()
        with torch.no_grad():
            made = self.network(noise(self.judged or BATCH, stream, self.dtype))
            if self.judged:
                float(self.critic(made).mean())
        self.learn(real, made[torch.randperm(len(made), generator=stream)[:BATCH]])

    def learn(self, real: Tensor, made: Tensor) -> None:
        """One step of the discriminator."""
        self.of_critic.zero_grad()
        (F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(made)).mean()).backward()
        self.of_critic.step()


class Straightforward(Plain):
    """CE-GAN: a deep copy of network and optimiser, and passes of its own, for everything."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(JUDGED, dtype)
        self.state: dict[str, Any] = {}

    def generation(self, real: Tensor, stream: torch.Generator) -> None:
        """Mutate, judge, cross, judge, select, learn."""
        first, second, small = (noise(n, stream, self.dtype) for n in (JUDGED, JUDGED, BATCH))
        children = [
            self.child(self.network, self.state, lambda net, loss=loss: loss(self.critic(net(small))), first)
            for loss in LOSSES.values()
        ]
        pairs = [(a, b) for i, a in enumerate(children) for b in children[i + 1 :]]
        a, b = max(pairs, key=lambda pair: pair[0]["score"] + pair[1]["score"])
        a, b = (a, b) if a["score"] >= b["score"] else (b, a)
        better = (a["values"] - b["values"] > 0)[:, None]
        target = torch.where(better, a["images"], b["images"])
        children.append(self.child(a["network"], a["state"], lambda net: F.mse_loss(net(first), target), second))
        best = max(children, key=lambda child: child["score"])
        self.network, self.state = best["network"], best["state"]
        self.learn(real, best["images"][torch.randperm(JUDGED, generator=stream)[:BATCH]])

    def child(
        self, parent: nn.Module, state: dict[str, Any], loss: Callable[[nn.Module], Tensor], judged: Tensor
    ) -> dict[str, Any]:
        """A copy of the parent after one step, with what it makes and what that is worth."""
        network = copy.deepcopy(parent)
        optimizer = torch.optim.Adam(network.parameters(), RATE, BETAS)
        if state:
            optimizer.load_state_dict(copy.deepcopy(state))
        optimizer.zero_grad()
        loss(network).backward()
        optimizer.step()
        with torch.no_grad():
            images = network(judged)
            values = self.critic(images)
        made = {"network": network, "state": optimizer.state_dict(), "images": images, "values": values}
        return {**made, "score": float(values.mean())}

    def weights(self) -> Tensor:
        """Of the generator and of the discriminator."""
        return torch.cat([p.detach().flatten() for net in (self.network, self.critic) for p in net.parameters()])


def same_outcome() -> bool:
    """Whether ours and the straightforward code go the same way."""
    rivals, law = (Ours(torch.float64), Straightforward(torch.float64)), ring()
    for turn in range(CHECKED):
        real = law.draw(BATCH, torch.Generator().manual_seed(turn)).double()
        for rival in rivals:
            rival.generation(real, torch.Generator().manual_seed(1000 + turn))
    return torch.allclose(rivals[0].weights(), rivals[1].weights(), atol=NEAR, rtol=0)


def measure() -> dict[str, list[float]]:
    """Seconds of each turn by rival."""
    rivals = {"ours": Ours(), "plain": Plain(0), "loop": Plain(JUDGED), "straightforward": Straightforward()}
    law, order = ring(), list(rivals)
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(TURNS + WARM):
        real = law.draw(BATCH, torch.Generator().manual_seed(turn))
        for name in order:
            stream = torch.Generator().manual_seed(turn)
            begun = time.perf_counter()
            rivals[name].generation(real, stream)
            seconds[name].append(time.perf_counter() - begun)
        order = order[1:] + order[:1]
    return {name: values[WARM:] for name, values in seconds.items()}


def main() -> None:
    """Measure, print a table and the JSON line."""
    console.set_quiet(True)
    torch.set_num_threads(1)
    seconds = measure()
    ratios = {case: [a / b for a, b in zip(*(seconds[name] for name in pair), strict=True)] for case, pair in CASES.items()}
    median = {case: statistics.median(values) for case, values in ratios.items()}
    error = {case: statistics.stdev(values) / len(values) ** 0.5 for case, values in ratios.items()}
    equal = same_outcome()
    about = f"8 Gaussians, width {WIDTH}, batch {BATCH}, judged by {JUDGED}; one thread, median of {TURNS} turns"
    print(f"A generation of CE-GAN, {about}")
    for name, values in seconds.items():
        print(f"{name:16} {1000 * statistics.median(values):8.2f} ms")
    for case, value in median.items():
        print(f"{case:16} {value:8.3f} ± {error[case]:.3f}")
    line = {"name": "evolution", "ratios": {case: round(value, 4) for case, value in median.items()}, "equal": equal}
    if "--save" in sys.argv:
        what = (
            f"A generation of CE-GAN against one of a plain GAN (cegan), against a GAN that makes and scores as many points as a child "
            f"is judged by (cegan_same_loop), and against straightforward CE-GAN (cegan_code), which stands at `straightforward` times "
            f"the plain GAN: {about}."
        )
        spread = {case: round(value, 4) for case, value in error.items()}
        facts = {"about": what, "spread": spread, "environment": {**environment("cpu"), "command": "", "platform": ""}}
        write_json(Path("results/bench-evolution.json"), {**line, **facts})
    print(json.dumps(line))


if __name__ == "__main__":
    main()
