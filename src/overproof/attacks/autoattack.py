"""AutoAttack: a fixed set of strong attacks, so that figures can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from overproof.attacks.apgd import APGD
from overproof.attacks.base import Attack, BudgetAttack
from overproof.attacks.combined import one_after_another
from overproof.attacks.eot import EOT
from overproof.attacks.fab import FAB
from overproof.attacks.square import Square
from overproof.errors import UsageError

Version = Literal["standard", "fast", "quick", "rand"]


@dataclass(frozen=True, kw_only=True)
class AutoAttack(BudgetAttack):
    """The worst case of APGD-CE, targeted APGD-DLR, targeted FAB and Square, each on the images that still hold.

    "standard" has the semantics of the reference: APGD-CE with 100 steps; APGD on the targeted DLR loss, nine targets of 100
    steps; FAB, nine targets of 100 steps; Square with 5,000 queries. An image leaves as soon as it is misclassified, which
    cannot change the verdict.

    "fast" asks the attack that decides nearly every image first and lets the others confirm. Its stop rules: APGD-CE gets 20
    steps; targeted APGD tries nine targets for 10 steps, the three nearest to success for 25 more and the nearest for 75
    more; FAB gets the three most likely targets and 20 steps; Square gets 500 queries.

    "quick" is for watching a training: APGD-CE with 20 steps and targeted APGD with three targets of 20 steps.

    "rand" is for models that roll dice: APGD-CE and APGD-DLR with 100 steps on the average over `samples` passes.

    Args:
        eps, norm: see `BudgetAttack`; the standard figures are Linf 8/255 and L2 0.5 on CIFAR-10.
        version: which set.
        samples: forward passes per step of "rand".
        early_stop: of its APGD members, see `APGD`; off where dice are rolled and one success may be luck. FAB and Square know no other
            way than to stop.

    Raises:
        UsageError: `targeted` (the set is untargeted), or an unknown version.

    Reference: Croce and Hein, ICML 2020, arXiv 2003.01690.

    Differences from the paper: "fast" and "quick" are ours. Square's L1 form is not part of ours: under L1 the set ends with
    FAB. With fewer than four classes the difference of the two logits stands for the targeted DLR.
    """

    version: Version = "standard"
    samples: int = 20
    early_stop: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targeted:
            raise UsageError("AutoAttack is untargeted; its members try targets of their own. Use apgd with targeted=true.")
        if self.version not in ("standard", "fast", "quick", "rand"):
            raise UsageError(f"AutoAttack(version={self.version!r}): choose standard, fast, quick or rand.")

    @property
    def members(self) -> dict[str, Attack]:
        """The attacks by name, in order."""
        eps, norm, apgd = self.eps, self.norm, partial(APGD, eps=self.eps, norm=self.norm, early_stop=self.early_stop)
        if self.version == "rand":
            return {
                "apgd-ce": EOT(inner=apgd(loss="ce"), samples=self.samples),
                "apgd-dlr": EOT(inner=apgd(loss="dlr"), samples=self.samples),
            }
        if self.version == "quick":
            return {
                "apgd-ce": apgd(steps=20),
                "apgd-t": apgd(loss="dlr-targeted", targets=3, steps=20),
            }
        fast = self.version == "fast"
        screen = ((10, 9), (25, 3), (75, 1)) if fast else ()
        members: dict[str, Attack] = {
            "apgd-ce": apgd(steps=20 if fast else 100),
            "apgd-t": apgd(loss="dlr-targeted", targets=9, steps=100, screen=screen),
            "fab-t": FAB(eps=eps, norm=norm, targets=3 if fast else 9, steps=20 if fast else 100),
        }
        if norm != "L1":
            members["square"] = Square(eps=eps, norm=norm, queries=500 if fast else 5000)
        return members

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial images."""
        return one_after_another(self.members, model, images, labels, generator)
