"""What a method learned beside the student, kept with the run."""

from __future__ import annotations

import torch

from overproof.data import Splits, make_loader
from overproof.folder import RunFolder, write_arrays, write_json
from overproof.methods.objective import Objective
from overproof.networks import device_of, in_mode
from overproof.run.prepare import UserData
from overproof.types import Batch

SHOWN = 8  # images


def keep_learned(objective: Objective, data: Splits | UserData, folder: RunFolder) -> None:
    """Write method.json with what the method tells of itself, and method.npz with what it shows on a few held-out images."""
    facts = objective.describe()
    if not facts:
        return
    write_json(folder.path / "method.json", facts)
    held_out = next(part for part in (data.test, data.validation, data.train) if part is not None)
    # Shuffled, always in the same way: a folder's images are sorted by class.
    batch = next(iter(make_loader(held_out, SHOWN, shuffle=True, device=device_of(objective.student)).batches(0)))
    few = Batch(batch.images[:SHOWN], batch.labels[:SHOWN], batch.index[:SHOWN])  # a loader of the user's has its own batches
    with in_mode(objective), torch.no_grad():
        pictures = objective.illustrate(few)
    if pictures:
        write_arrays(folder.path / "method.npz", {name: value.float().cpu().numpy() for name, value in pictures.items()})
