"""SoKD's policy: which pair of operations refines the teacher's features, how probably each, and how strongly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.methods.processes import mean_over_processes
from overproof.methods.sokd_operations import OPERATIONS, PAIRS

EDGE = 1e-6
NAMES = ("alpha", "beta", "magnitude")


@dataclass(frozen=True)
class Draw:
    """One sampled refinement, the same for every feature and every evaluation of a step.

    Args:
        choice: number of the sub-policy.
        bits: whether each of its two operations is applied.
        seed: of the operations' own randomness, replayed at every use.
        choice_weight, bit_weights: relaxed samples, 0-d and (2,), that carry the gradient to alpha and beta.
    """

    choice: int
    bits: tuple[bool, bool]
    seed: int
    choice_weight: Tensor
    bit_weights: Tensor


class Policy(nn.Module):
    """Sub-policies with choice weights alpha (S,), probabilities beta (S, 2) and magnitudes (S, 2), and their Adam.

    They are buffers: the student's optimiser does not touch them, and checkpoints hold them with Adam's moments.

    Args:
        size: number S of sub-policies, 2 to 36; below 36 they are drawn at random.
        temperature: of the relaxed samples, positive.
        lr, betas, weight_decay: of Adam.

    Raises:
        UsageError: another number of sub-policies, or temperature or lr not positive.
    """

    alpha: Tensor
    beta: Tensor
    magnitude: Tensor
    pairs: Tensor
    steps: Tensor
    baseline: Tensor

    def __init__(
        self,
        size: int,
        *,
        temperature: float = 0.5,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.5, 0.999),
        weight_decay: float = 1e-3,
    ) -> None:
        super().__init__()
        if not 2 <= size <= len(PAIRS):
            raise UsageError(
                f"sokd: subpolicies={size}: a policy chooses among 2 to {len(PAIRS)} pairs of the {len(OPERATIONS)} operations."
            )
        if temperature <= 0 or lr <= 0:
            raise UsageError(f"sokd: needs a positive temperature and policy_lr, not {temperature} and {lr}.")
        self.temperature, self.lr, self.betas, self.weight_decay = temperature, lr, betas, weight_decay
        chosen = torch.arange(size) if size == len(PAIRS) else torch.randperm(len(PAIRS))[:size].sort().values
        values = {
            "alpha": torch.full((size,), 1e-3),
            "beta": torch.full((size, 2), 0.5),
            "magnitude": torch.full((size, 2), 0.5),
        }
        for name, value in values.items():
            self.register_buffer(name, value)
            for moment in ("first", "second"):
                self.register_buffer(f"{moment}_{name}", torch.zeros_like(value))
        self.register_buffer("pairs", chosen)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("baseline", torch.zeros(()))

    def leaves(self) -> dict[str, Tensor]:
        """The three tensors as leaves that gradients can be taken with respect to."""
        return {name: getattr(self, name).detach().clone().requires_grad_() for name in NAMES}

    def draw(self, leaves: dict[str, Tensor]) -> Draw:
        """A sub-policy by Gumbel-softmax, and its bits by relaxed Bernoulli samples, straight-through."""
        logit = leaves["beta"].clamp(EDGE, 1 - EDGE).logit()
        # The ends are left out: log(0) would be infinite.
        u, w = (torch.rand_like(tensor).clamp(EDGE, 1 - EDGE) for tensor in (logit, leaves["alpha"]))
        gumbel = leaves["alpha"].log_softmax(dim=0) - (-w.log()).log()
        z = logit + u.logit()
        choice = int(gumbel.argmax())
        soft_bits = (z[choice] / self.temperature).sigmoid()
        first, second = (z[choice] > 0).tolist()
        weight = (gumbel / self.temperature).softmax(dim=0)[choice]
        seed = int(torch.randint(2**31, ()))
        return Draw(choice, (first, second), seed, weight, soft_bits)

    def refine(self, feature: Tensor, draw: Draw, leaves: dict[str, Tensor], *, search: bool = False) -> Tensor:
        """The feature with the drawn operations applied, exactly; gradients are straight-through.

        With F~ the result, d/d magnitude_j = sum of the upstream gradient for an applied operation, else 0. With `search`
        gradients also reach beta (through what operation j changes) and alpha (through what the pair changes).

        Args:
            feature: the teacher's map (N, C, H, W).
            draw: the sampled refinement.
            leaves: what gradients are taken with respect to.
            search: give gradients to alpha and beta, which executes operations that are not applied, too.
        """
        levels = leaves["magnitude"][draw.choice]
        path = torch.zeros_like(feature)
        refined = feature.detach()
        for j, name in enumerate(PAIRS[int(self.pairs[draw.choice])]):
            if not (draw.bits[j] or search):
                continue
            generator = torch.Generator(feature.device).manual_seed(draw.seed + j)
            changed = OPERATIONS[name](refined, levels[j].detach(), generator)
            if search:
                path = path + _through(draw.bit_weights[j]) * (changed - refined)
            if draw.bits[j]:
                path, refined = path + _through(levels[j]), changed
        if search:
            # The weights of all sub-policies sum to 1, so what they share (the untouched feature) has no gradient.
            path = path + _through(draw.choice_weight) * (refined - feature.detach())
        return refined + path

    def reinforce(self, draw: Draw, reward: Tensor) -> dict[str, Tensor]:
        """Score-function gradients of -reward: -(r - b) d/d(alpha, beta) log p(choice, bits), of the chosen sub-policy alone."""
        advantage = (reward - self.baseline).detach()
        common = mean_over_processes(reward.detach())  # all processes keep the same baseline
        self.baseline = torch.where(self.steps > 0, 0.9 * self.baseline + 0.1 * common, common)
        chosen = torch.zeros_like(self.alpha)
        chosen[draw.choice] = 1
        bits = torch.tensor(draw.bits, dtype=self.beta.dtype, device=self.beta.device)
        probability = self.beta[draw.choice].clamp(EDGE, 1 - EDGE)
        scores = torch.zeros_like(self.beta)
        scores[draw.choice] = bits / probability - (1 - bits) / (1 - probability)
        return {"alpha": -advantage * (chosen - self.alpha.softmax(dim=0)), "beta": -advantage * scores}

    @torch.no_grad()
    def update(self, gradients: dict[str, Tensor]) -> None:
        """One step of Adam; of several processes on their mean gradient. Probabilities and magnitudes stay in [0, 1]."""
        self.steps = self.steps + 1
        first, second = self.betas
        for name in NAMES:
            value: Tensor = getattr(self, name)
            gradient = mean_over_processes(gradients[name]) + self.weight_decay * value
            m = first * getattr(self, f"first_{name}") + (1 - first) * gradient
            v = second * getattr(self, f"second_{name}") + (1 - second) * gradient.square()
            setattr(self, f"first_{name}", m)
            setattr(self, f"second_{name}", v)
            step = m / (1 - first**self.steps) / ((v / (1 - second**self.steps)).sqrt() + 1e-8)
            value = value - self.lr * step
            setattr(self, name, value if name == "alpha" else value.clamp(0, 1))

    def names(self) -> list[tuple[str, str]]:
        """The two operations of each sub-policy."""
        return [PAIRS[i] for i in self.pairs.tolist()]

    def figures(self) -> dict[str, Tensor]:
        """By operation: how often a draw applies it on average, and its mean magnitude, 0-d tensors."""
        names = sorted({name for pair in self.names() for name in pair}, key=list(OPERATIONS).index)
        which = torch.tensor(
            [[names.index(name) for name in pair] for pair in self.names()], device=self.alpha.device
        ).flatten()
        share = self.alpha.softmax(dim=0)[:, None].expand_as(self.beta)
        drawn, applied, levels = (
            value.new_zeros(len(names)).index_add(0, which, value.flatten())
            for value in (share, share * self.beta, share * self.magnitude)
        )
        columns = {"applied per draw": applied, "magnitude": levels / drawn.clamp_min(EDGE)}
        return {f"{kind}/{name}": value[i] for kind, value in columns.items() for i, name in enumerate(names)}

    def table(self) -> list[dict[str, Any]]:
        """A plain row for each sub-policy, the most probable first: operations, weight, probabilities, magnitudes."""
        columns: Sequence[Any] = (self.alpha.softmax(dim=0).tolist(), self.beta.tolist(), self.magnitude.tolist())
        rows = zip(self.names(), *columns, strict=True)
        found = [{"operations": list(n), "weight": w, "probabilities": b, "magnitudes": m} for n, w, b, m in rows]
        return sorted(found, key=lambda row: -row["weight"])


def _through(value: Tensor) -> Tensor:
    """Zero, with the gradient of `value`."""
    return value - value.detach()
