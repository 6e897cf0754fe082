"""The detector that turns a weakness into a strength: natural images are firm under noise, and still near another class."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from overproof.attacks.randomness import Streams
from overproof.errors import UsageError
from overproof.guards.base import Guard, Judgement, Place
from overproof.guards.detector_probe import CRITERIA, Criterion, Natural, Probe
from overproof.guards.detector_scores import Goal, Walk
from overproof.guards.detector_thresholds import check_rate, joint_rank, parts_of, suspicion, thresholds_at

FEW = 256  # natural images by which noise and step sizes are chosen


class Detector(Guard):
    """Rejects an image whose answer noise shakes, or which too many gradient steps leave in its class.

    rejected = Delta > t_1 or K_t > t_2 or K_u > t_3, with c the predicted class and

        noise       Delta = ||h(x) - h(x + sigma u)||_1, h = softmax(z), u ~ N(0, I)
        targeted    K_t: steps down the cross-entropy of another class, drawn uniformly, until c is left
        untargeted  K_u: steps down z_c - max_{j != c} z_j, or up the cross-entropy of c, until c is left

    An adversarial image near the boundary shakes; one pushed deep into the wrong class has far to go back. That stops simple attacks
    only: `SegmentSearch` finds points in between that look natural. Never report a detector without that attack.

    The t_i are the r-th smallest of n natural scores, with the least r that rejects at most `fpr` of the natural images by any
    criterion; nothing adversarial is seen. The score of an image is the largest share, over the criteria, of natural images that it
    exceeds; from r / n on it is rejected.

    Args:
        fpr: wanted share of natural images that are rejected, in (0, 1).
        criteria: those that are measured, of "noise", "targeted", "untargeted".
        sigma: standard deviation of the noise in pixel units; None: so strong that 97 % of natural images keep their class.
        draws: values of u that Delta is averaged over, at least 1.
        targeted_step, untargeted_step: step sizes, pixel units per unit of the gradient; None: such that the median natural image
            makes 5 to 10 steps.
        untargeted_loss: "margin", or "ce" for the cross-entropy, whose gradient vanishes where the model is sure of c.
        radius: how far a pixel may go on the way, in [0, 1].
        cap, untargeted_cap: most steps that are counted, at least 1.
        held_out: share of the natural images that is kept from the thresholds and tells the realised rate, in (0, 1).
        stop_early: measure only until the verdict is known. Verdicts are the same; scores are lower bounds, and what was not
            measured is NaN.
        batch_size: images at once while fitting, at least 1.
        seed: of the randomness in `fit`.

    Raises:
        UsageError: an option out of its range.

    Reference: Yu, Hu, Guo, Chao, Weinberger, NeurIPS 2019, arXiv 1910.07629.

    Differences from the paper: thresholds come from natural images alone instead of a search that looks at attacks; noise and step
    sizes are fitted to the model; the untargeted walk goes down the margin unless "ce" is asked for. Where a copy of the model with
    BatchNorm folded into the convolutions gives the same logits, that copy is measured.
    """

    place: ClassVar[Place] = "detector"
    natural: Tensor  # scores (k, n) of the natural images behind the thresholds
    held: Tensor  # scores (k, m) of those held out

    def __init__(
        self,
        *,
        fpr: float = 0.1,
        criteria: tuple[Criterion, ...] = CRITERIA,
        sigma: float | None = None,
        draws: int = 1,
        targeted_step: float | None = None,
        untargeted_step: float | None = None,
        untargeted_loss: Literal["margin", "ce"] = "margin",
        radius: float = 0.5,
        cap: int = 200,
        untargeted_cap: int = 1000,
        held_out: float = 0.25,
        stop_early: bool = False,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.fpr, self.sigma, self.draws, self.held_out = fpr, sigma, draws, held_out
        self.criteria: tuple[Criterion, ...] = tuple(name for name in CRITERIA if name in criteria)
        self.targeted_step, self.untargeted_step, self.untargeted_loss = targeted_step, untargeted_step, untargeted_loss
        self.radius, self.cap, self.untargeted_cap = radius, cap, untargeted_cap
        self.stop_early, self.batch_size, self.seed = stop_early, batch_size, seed
        if sorted(criteria) != sorted(self.criteria) or not criteria:
            raise UsageError(f"Detector(criteria={tuple(criteria)}): name some of {', '.join(CRITERIA)}, each once.")
        self._check_options()
        for name in ("natural", "held"):
            self.register_buffer(name, torch.empty(len(self.criteria), 0))

    def _check_options(self) -> None:
        check_rate(self.fpr)
        if self.untargeted_loss not in ("margin", "ce"):
            raise UsageError(f"Detector(untargeted_loss={self.untargeted_loss!r}): known are margin and ce.")
        if not 0 < self.held_out < 1 or not 0 <= self.radius <= 1:
            given = f"held_out={self.held_out}, radius={self.radius}"
            raise UsageError(f"Detector({given}): held_out must lie in (0, 1), radius in [0, 1].")
        for name in ("draws", "cap", "untargeted_cap", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"Detector({name}={getattr(self, name)}): at least 1.")
        for name in ("sigma", "targeted_step", "untargeted_step"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf or (name == "sigma" and value == 0)):
                raise UsageError(f"Detector({name}={value}): a positive number, or None to have it fitted.")

    @property
    def fitted(self) -> bool:
        """Whether there are thresholds."""
        return "rank" in self.facts

    @property
    def thresholds(self) -> dict[str, float]:
        """t_i by criterion: what is larger is rejected."""
        self.require_fitted()
        return dict(zip(self.criteria, thresholds_at(self.natural, self.facts["rank"]).tolist(), strict=True))

    @property
    def cut(self) -> float:
        """What is rejected has a larger score, what is not a smaller one."""
        self.require_fitted()
        return float((self.facts["rank"] - 0.5) / self.natural.shape[1])

    @property
    def probe(self) -> Probe:
        """The criteria, with the noise and the step sizes that are given or fitted."""
        known = {name: getattr(self, name) or self.facts.get(name) for name in ("targeted_step", "untargeted_step")}
        kinds: dict[str, tuple[Goal, int]] = {
            "targeted": ("targeted", self.cap),
            "untargeted": (self.untargeted_loss, self.untargeted_cap),
        }
        walks: dict[str, Walk] = {}
        for name, (goal, cap) in kinds.items():
            if name in self.criteria:
                walks[name] = Walk(goal=goal, step_size=known[f"{name}_step"] or Walk.step_size, radius=self.radius, cap=cap)
        return Probe(
            sigma=self.facts.get("sigma") if self.sigma is None else self.sigma,
            draws=self.draws,
            noise="noise" in self.criteria,
            walks=walks,
            open_steps=tuple(name for name in walks if not known[f"{name}_step"]),
        )

    def fit(self, model: nn.Module, images: Tensor, labels: Tensor, *, fpr: float | None = None) -> Self:
        """Choose noise, step sizes and thresholds by those images that the model classifies rightly.

        They should be like those to come: neither the model's training images, of which it is too sure, nor those it is judged by.

        Args:
            model: images -> logits (N, K).
            images: natural, (N, C, H, W), floats in [0, 1] or uint8.
            labels: true classes (N,).
            fpr: replaces the option.

        Raises:
            UsageError: too few images for the rate; says how many are needed. Or no step size suits them.
            DataError: other numbers of images and labels, or a model with a single class.
        """
        rate = check_rate(self.fpr if fpr is None else fpr)
        natural = Natural(model, images, batch_size=self.batch_size, seed=self.seed)
        right = natural.right(labels)
        held = parts_of(len(right), len(self.criteria), rate, self.held_out)
        order = right[torch.randperm(len(right), generator=torch.Generator().manual_seed(self.seed))]
        self.facts = {}
        chosen = self.probe.fitted(model, *natural.batch(order[held : held + FEW]), batch_size=self.batch_size)
        self.facts = {f"{name}_step": walk.step_size for name, walk in chosen.walks.items()}
        self.facts |= {"sigma": chosen.sigma} if chosen.noise else {}
        self.held, self.natural = (natural.survey(self.probe, rows) for rows in (order[:held], order[held:]))
        self.remember(model)
        return self._set(rate)

    def set_rate(self, fpr: float) -> Self:
        """Thresholds for another wanted rate, from the natural scores that are known; nothing is measured anew.

        Raises:
            UsageError: not fitted, or too few natural images for the rate.
        """
        self.require_fitted()
        parts_of(self.natural.shape[1] + self.held.shape[1], len(self.criteria), check_rate(fpr), self.held_out)
        return self._set(fpr)

    def only(self, *criteria: Criterion) -> Detector:
        """A detector by some of the criteria, its thresholds chosen anew from the natural scores that are known."""
        self.require_fitted()
        made = Detector(**{**self.options(), "criteria": criteria})
        rows = [self.criteria.index(name) for name in made.criteria]
        made.natural, made.held, made.facts = self.natural[rows], self.held[rows], dict(self.facts)
        return made._set(self.fpr)

    def scores(self, model: nn.Module, images: Tensor, streams: Streams | None = None) -> dict[str, Tensor]:
        """Every criterion of images (N, C, H, W), measured to its end: (N,) by name."""
        return self.probe.measure(model, images, Streams.of(streams, images))

    def forward(self, model: nn.Module, images: Tensor, streams: Streams | None = None) -> Judgement:
        """The verdicts on images (N, C, H, W) in [0, 1], with the scores of each criterion in `parts`.

        "noise" is differentiable in the images.
        """
        self.require_fitted()
        limits = self.thresholds if self.stop_early else None
        parts = self.probe.measure(model, images, Streams.of(streams, images), limits)
        found = torch.stack([parts[name].detach() for name in self.criteria])
        above = suspicion(self.natural, found)
        return Judgement(above / self.natural.shape[1], above >= self.facts["rank"], parts)

    def describe(self) -> dict[str, Any]:
        """Thresholds, medians and shares rejected by criterion, and the realised rate on the natural images held out."""
        self.require_fitted()
        limits, medians = self.thresholds, self.natural.float().median(dim=1).values.tolist()
        alone = {name: float((row > limits[name]).float().mean()) for name, row in zip(self.criteria, self.held, strict=True)}
        return {
            "fpr": self.fpr,
            "realised_fpr": self.facts["held_out_rejected"] / self.held.shape[1],
            "natural_images": self.natural.shape[1],
            "held_out_images": self.held.shape[1],
            "criteria": {
                name: {"threshold": limits[name], "natural_median": median, "rejected_alone": alone[name]}
                for name, median in zip(self.criteria, medians, strict=True)
            },
            **{key: value for key, value in self.facts.items() if key in ("sigma", "targeted_step", "untargeted_step")},
        }

    def _set(self, fpr: float) -> Self:
        self.fpr, rank = fpr, joint_rank(self.natural, fpr)
        rejected = int((suspicion(self.natural, self.held) >= rank).sum())
        self.facts |= {"rank": rank, "held_out_rejected": rejected}
        return self
