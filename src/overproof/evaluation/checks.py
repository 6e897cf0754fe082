"""What a model whose gradients are masked does not pass."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from overproof.attacks.ascent import differentiable, input_gradient
from overproof.attacks.base import logits_of
from overproof.attacks.eot import Averaged
from overproof.attacks.fgsm import FGSM
from overproof.attacks.noise import Noise
from overproof.attacks.square import Square
from overproof.attacks.transfer import Transfer
from overproof.errors import NoGradientError, UsageError
from overproof.evaluation.trial import Check, Crafter, Trial
from overproof.evaluation.unmasking import Scaled, Smoothed
from overproof.losses.divergences import cross_entropy
from overproof.losses.margins import margin

FLICKER = 1e-4  # of the largest logit: what two forwards of one image may differ by through rounding
STRICT, CLOSE, LENIENT, LOOSE = 0.02, 0.05, 0.10, 0.25  # shares of the images, see `Trial.judge`
BLIND = (
    "Put a BPDA wrapper around the part that rounds or encodes, or rely on attacks without gradients (square, hop-skip-jump)."
)


def run_checks(trial: Trial, source: nn.Module | None, queries: int) -> list[Check]:
    """All checks that can be made; each attack meets only the images that nothing broke before."""
    found = [_determinism(trial), _gradients(trial)]
    if trial.facts["gradients"]:
        found += [check(trial) for check in (_saturation, _losses, _single_step, _more_steps, _growing_radius)]
    return [*found, _black_box(trial, source, queries)]


def _determinism(trial: Trial) -> Check:
    with torch.no_grad():
        one, two = (logits_of(trial.model, trial.images) for _ in range(2))
    same = (one - two).abs().amax(dim=1) <= FLICKER * one.abs().amax(dim=1).clamp(min=1)
    value, more = int((~same).sum()), 0
    if value:
        averaged, holds = Averaged(trial.model, 8), trial.holds
        try:
            trial.breaks("pgd on single answers", Transfer(inner=trial.pgd(10), source=trial.model), model=averaged)
            more = trial.breaks("pgd on the average", trial.pgd(10), model=averaged)
        except NoGradientError:
            pass  # the next check says so
        trial.holds = holds
    bad = f"The model is randomised: attack the average of many answers (EOT); here that broke {more} images that PGD had not."
    return trial.judge(
        "determinism", value, None, "get other logits the second time", good="The model is deterministic.", bad=bad
    )


def _gradients(trial: Trial) -> Check:
    name, facts = "gradients", trial.facts.setdefault("gradients", {})
    try:
        slopes, ce = (_slopes(trial, function) for function in (margin, cross_entropy))
    except NoGradientError:
        bad = f"The logits do not depend differentiably on the images, so gradient attacks do nothing. {BLIND}"
        return trial.judge(name, len(trial.images), STRICT, "give no gradient at all", good="", bad=bad)
    dead, finite = (slopes == 0).all(dim=1), slopes.isfinite().all(dim=1)
    norms = slopes.nan_to_num(0, 0, 0).norm(dim=1).double()
    shares = torch.tensor([0.05, 0.5, 0.95], dtype=norms.dtype, device=norms.device)
    facts |= {
        "norms": dict(zip(("5%", "50%", "95%"), norms.quantile(shares).tolist(), strict=True)),
        "zero_images": int(dead.sum()),
        "zero_images_cross_entropy": int((ce == 0).all(dim=1).sum()),
        "zero_entries": float((slopes == 0).double().mean()),
        "not_finite_images": int((~finite).sum()),
    }
    good = f"The gradient of the margin has a median length of {facts['norms']['50%']:.3g}."
    bad = f"Gradient attacks are blind there, and what they report is no robustness. {BLIND}"
    seen = "have a gradient that is exactly zero or not finite"
    return trial.judge(name, int((dead | ~finite).sum()), STRICT, seen, good=good, bad=bad)


def _slopes(trial: Trial, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    with differentiable(trial.images) as x:
        return input_gradient(function(logits_of(trial.model, x), trial.labels), x).flatten(1)


def _saturation(trial: Trial) -> Check:
    trial.breaks("pgd", trial.pgd())
    with torch.no_grad():
        median = float(-margin(logits_of(trial.model, trial.images), trial.labels).median())
    lost = 0
    if median > 1:  # small logits saturate nothing, and to enlarge them would make cross-entropy another loss
        smaller = Scaled(trial.model, 1 / median)
        lost = trial.breaks("pgd on scaled logits", Transfer(inner=trial.pgd(), source=smaller))
    # A gradient that is zero for every loss is the matter of another check.
    silent = max(trial.facts["gradients"]["zero_images_cross_entropy"] - trial.facts["gradients"]["zero_images"], 0)
    return trial.judge(
        "saturation",
        max(lost, silent),
        LENIENT,
        "have no gradient under cross-entropy, or break under it only with logits scaled down to a median margin of 1",
        good="Cross-entropy is not saturated.",
        bad="Cross-entropy is saturated by large logits: attack with a loss without scale (margin, DLR), such as autoattack.",
    )


def _losses(trial: Trial) -> Check:
    return trial.judge(
        "losses",
        trial.breaks("pgd with margin", trial.pgd(loss="margin")),
        LOOSE,
        "hold under PGD-20 with cross-entropy but break with the margin loss",
        good="Cross-entropy does not mislead; report the stronger of the two all the same.",
        bad="Cross-entropy misleads here: attack with the margin or DLR loss, such as autoattack.",
    )


def _single_step(trial: Trial) -> Check:
    return trial.judge(
        "single step",
        trial.breaks("fgsm", FGSM(eps=trial.threat.eps, norm=trial.norm)),
        STRICT,
        "break under a single step but hold under PGD-20",
        good="Iterating helps, as it should.",
        bad="The loss is too rugged to climb: use random starts, smaller steps and attacks without gradients (square).",
    )


def _more_steps(trial: Trial) -> Check:
    attack = trial.pgd(100, loss="margin", step_size=trial.threat.eps / 10)
    return trial.judge(
        "more steps",
        trial.breaks("pgd-100 with margin", attack, start=1),
        CLOSE,
        "hold under two runs of PGD-20 but break under PGD-100 from a new start",
        good="More steps and starts change little.",
        bad="PGD-20 has not converged: report an attack with more steps and restarts, such as autoattack.",
    )


def _growing_radius(trial: Trial) -> Check:
    holds, count = trial.holds, trial.images[0].numel()
    end = {"Linf": 1.0, "L2": math.sqrt(count), "L1": float(count)}[trial.norm]
    radii, robust = [trial.threat.eps], [float(holds.double().mean())]
    while radii[-1] < end:
        radii.append(min(2 * radii[-1], end))
        # From the image itself: a random start of this size would break any model, also one without gradients.
        trial.breaks(f"pgd at {radii[-1]:.3g}", trial.pgd(eps=radii[-1], loss="margin", random_start=False))
        robust.append(float(trial.holds.double().mean()))
    left, trial.holds = int(trial.holds.sum()), holds
    trial.facts["radii"] = {"eps": radii, "robust": robust}
    return trial.judge(
        "growing radius",
        left,
        STRICT,
        f"hold even at the radius {end:.3g}, where each can become any other",
        good="Robust accuracy falls to zero as the radius grows.",
        bad="No model can be robust there: the gradients do not lead where they should, and smaller radii prove nothing either.",
    )


def _black_box(trial: Trial, source: nn.Module | None, queries: int) -> Check:
    attacks: dict[str, Crafter] = {}
    if source is not None:
        attacks["transfer"] = Transfer(inner=trial.pgd(loss="margin"), source=source)
    attacks["noise"] = Noise(eps=trial.threat.eps, norm=trial.norm)
    with contextlib.suppress(UsageError):  # not every norm has one
        attacks["square"] = Square(eps=trial.threat.eps, norm=trial.norm, queries=queries)
    attacks["blurred gradient"] = Smoothed(threat=trial.threat)
    found: dict[str, int] = {}
    for name, attack in attacks.items():
        if sum(found.values()) <= LENIENT * len(trial.images):  # beyond that nobody will doubt the verdict
            found[name] = trial.breaks(name, attack)
    return trial.judge(
        "black box",
        sum(found.values()),
        STRICT,
        f"hold under every gradient attack but break without gradients ({', '.join(f'{k}: {v}' for k, v in found.items())})",
        good="Gradients find what there is to be found.",
        bad=f"Gradients mislead here. {BLIND}",
    )
