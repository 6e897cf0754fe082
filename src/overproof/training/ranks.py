"""What several processes must agree on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from overproof.errors import OverproofError
from overproof.methods.objective import Objective


def compare_ranks(fabric: Any, objective: Objective, step: int, *, kept: nn.Module) -> None:
    """Every process must hold the same parameters; buffers (BatchNorm statistics), also of the model that is kept, come from the first.

    Raises:
        OverproofError: a copy has drifted: it would train on in silence.
    """
    parameters = [p.detach().float() for p in objective.trainable(objective.phases[0])]
    fingerprint = torch.stack([torch.stack([p.sum(), p.square().sum()]) for p in parameters]).flatten()
    everyone = fabric.all_gather(fingerprint).view(fabric.world_size, -1)
    if not bool((everyone == everyone[0]).all()):
        raise OverproofError(
            f"The processes hold different parameters after step {step}. A part of the method escapes gradient averaging: "
            "everything trainable must be a submodule of the objective and be used in its forward."
        )
    for buffer in {id(b): b for net in (objective.student, kept) for b in net.buffers()}.values():
        torch.distributed.broadcast(buffer, src=0)
