"""What a method remembers or learns by itself, made the same in all processes; DDP averages gradients only."""

from __future__ import annotations

import torch
from torch import Tensor


def several() -> bool:
    """Whether other processes train with this one."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def everyones(tensor: Tensor) -> Tensor:
    """The rows of all processes, (N_1 + N_2 + ..., ...); `tensor` itself if there is one process."""
    if not several():
        return tensor
    count = torch.tensor([len(tensor)], device=tensor.device)
    counts = [torch.empty_like(count) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(counts, count)
    sizes = [int(size) for size in counts]  # the last batch may be cut unevenly
    room = tensor.new_zeros(max(sizes), *tensor.shape[1:])
    room[: len(tensor)] = tensor
    parts = [torch.empty_like(room) for _ in sizes]
    torch.distributed.all_gather(parts, room)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of all processes; `value` itself if there is one process."""
    if several():
        value = value.clone()
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value
