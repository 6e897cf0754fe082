"""Pools of images that a generator has made, from which a student learns again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from overproof.networks import device_of, in_mode


class Pool(nn.Module):
    """Earlier images with the teacher's logits; when it is full, the oldest make room.

    Args:
        size: number of images.
        shape: of an image.
        teacher: tells how many classes there are.
    """

    images: Tensor
    logits: Tensor
    used: Tensor

    def __init__(self, size: int, shape: tuple[int, ...], teacher: nn.Module) -> None:
        super().__init__()
        classes = said_of_black(teacher, shape).shape[1]
        self.register_buffer("images", torch.zeros(size, *shape))
        self.register_buffer("logits", torch.zeros(size, classes))
        self.register_buffer("used", torch.zeros((), dtype=torch.long))

    def recall(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` of the images at random with their logits; fewer as long as there are not so many."""
        filled = min(int(self.used), len(self.images))
        rows = torch.randint(max(filled, 1), (min(count, filled),), device=self.images.device)
        return self.images[rows], self.logits[rows]

    def keep(self, images: Tensor, logits: Tensor) -> None:
        """Take in new ones."""
        images, logits = images[-len(self.images) :], logits[-len(self.images) :]
        places = (self.used + torch.arange(len(images), device=images.device)) % len(self.images)
        self.images[places], self.logits[places] = images.to(self.images.dtype), logits.to(self.logits.dtype)
        self.used += len(images)


def said_of_black(teacher: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The teacher's logits of a black image, (1, K), in eval mode."""
    kind = next((p.dtype for p in teacher.parameters()), torch.float32)
    with in_mode(teacher), torch.no_grad():
        logits: Tensor = teacher(torch.zeros(1, *shape, dtype=kind, device=device_of(teacher)))
    return logits


class BytePool(nn.Module):
    """Earlier images as bytes; when it is full, the oldest make room.

    Args:
        size: number of images.
        shape: of an image.
    """

    images: Tensor
    used: Tensor

    def __init__(self, size: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("images", torch.zeros(size, *shape, dtype=torch.uint8))
        self.register_buffer("used", torch.zeros((), dtype=torch.long))

    def recall(self, count: int) -> Tensor:
        """`count` of the images at random, with replacement, in [0, 1]; there must be some."""
        rows = torch.randint(min(int(self.used), len(self.images)), (count,), device=self.images.device)
        return self.images[rows].to(torch.get_default_dtype()) / 255

    def keep(self, images: Tensor) -> None:
        """Take in new ones, cut off at 0 and 1."""
        kept = (images[-len(self.images) :].clamp(0, 1) * 255).round().to(torch.uint8)
        places = (self.used + torch.arange(len(kept), device=kept.device)) % len(self.images)
        self.images[places] = kept
        self.used += len(kept)
