"""Can a robust figure be believed? Checks that a model with masked gradients does not pass."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from overproof.attacks.base import predictions
from overproof.attacks.threats import L1, L2, Linf, Threat
from overproof.errors import UsageError
from overproof.evaluation.checks import run_checks
from overproof.evaluation.surface import loss_surface
from overproof.evaluation.trial import Trial
from overproof.networks import full_precision, in_mode

PICTURES = 4


@dataclass(frozen=True)
class Panel:
    """The sanity panel of a model.

    Attributes:
        summary: "suspected", "samples", "threat", "eps", "checks" (see `Check`), "broken" (images by attack), "gradients",
            "radii"; as written to JSON.
        arrays: the loss surface of a few images, see `loss_surface`.
    """

    summary: dict[str, Any]
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def suspected(self) -> bool:
        """Whether a check failed: masked gradients suspected."""
        return bool(self.summary["suspected"])


def panel(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    *,
    seed: int = 0,
    source: nn.Module | None = None,
    queries: int = 200,
) -> Panel:
    """Check that gradient attacks on `model` find what there is to be found.

    An image counts against the model if an attack breaks it where another, that should be at least as strong, did not. Of n
    images 1 + 2 % of n are tolerated; 5 % where attacks rightly differ a little, 10 % and 25 % where losses are compared.

    Each attack meets only images that nothing broke before. The sum, in runs of PGD-20 over all images (20 passes forward and
    20 backward each): 0.5 to 3 where nearly all images break, 7 to 15 where most hold, up to 20 for a masked model. The surface
    adds 2,500 single images forward.

    Args:
        model: images in [0, 1] -> logits (N, K); left as it was.
        images: (n, C, H, W), up to some 128; those that the model gets wrong are left out.
        labels: true classes (n,).
        threat: Linf, L2 or L1 with a finite radius above 0.
        seed: of all random draws.
        source: another model of the same classes from which attacks are transferred.
        queries: of the Square attack.

    Raises:
        UsageError: another threat.
    """
    if not isinstance(threat, Linf | L2 | L1) or not 0 < threat.eps < math.inf:
        raise UsageError(f"The sanity panel needs a ball such as Linf(8/255), L2(0.5) or L1(12), not {threat!r}.")
    with torch.inference_mode(False), in_mode(model), full_precision(images.device), _own_randomness(images.device, seed):
        right = predictions(model, images) == labels
        trial = Trial(model, images[right], labels[right], threat, seed)
        checks = run_checks(trial, source, queries) if bool(right.any()) else []
        few = slice(0, PICTURES)
        arrays = loss_surface(model, trial.images[few], trial.labels[few], threat, seed=seed) if checks else {}
    summary = {
        "suspected": not all(check.passed for check in checks),
        "samples": len(trial.images),
        "threat": type(threat).__name__,
        "eps": threat.eps,
        "checks": [asdict(check) for check in checks],
        "broken": {name: int(mask.sum()) for name, mask in trial.broken.items()},
        **trial.facts,
    }
    return Panel(summary, arrays)


@contextlib.contextmanager
def _own_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """A model that draws from the global generators draws the same each time, and leaves them as they were."""
    gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if gpu else []):
        torch.default_generator.manual_seed(seed)
        if gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
