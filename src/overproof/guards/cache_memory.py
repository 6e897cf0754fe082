"""What a cache holds and how it is kept: saved, restored, copied, enlarged, asked for neighbours."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.guards.base import Guard, Place
from overproof.guards.cache_index import FaissIndex
from overproof.guards.cache_items import Items
from overproof.guards.cache_keys import KeyReader, fingerprints
from overproof.guards.cache_votes import nearest
from overproof.networks import in_mode

COLUMNS = ("keys", "scales", "weights", "labels", "source", "mirrored")
_READING = threading.RLock()  # hooks on a network cannot tell whose features they see
SAME = 0.01  # share of images that may be in the cache by chance: sets hold a few images twice


@dataclass(frozen=True)
class Neighbours:
    """The nearest items of N images, all (N, k): cosine, class, position of the image in its data set, whether it is mirrored."""

    similarity: Tensor
    labels: Tensor
    positions: Tensor
    mirrored: Tensor


class CacheMemory(Guard):
    """The part of a cache that remembers; how it answers is `Cache`.

    Its `facts`: "layers", "length" of a key, "classes" of the network, "images" remembered, "model".
    """

    place: ClassVar[Place] = "cache"
    labels: Tensor
    marks: Tensor  # a number for each remembered image and, if that is an item too, for its mirror image; whatever became of the items

    pool: int | None
    separate: bool
    mirror: bool
    index: str
    index_kind: str
    block: int

    def __init__(self) -> None:
        super().__init__()
        for name in (*COLUMNS, "marks"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.float32 if name in COLUMNS[:3] else torch.long))
        self._index: FaissIndex | None = None
        self._items: Items | None = None
        self._reader: KeyReader | None = None

    @property
    def fitted(self) -> bool:
        """Whether anything is remembered."""
        return len(self.labels) > 0

    @property
    def items(self) -> Items:
        """What is remembered."""
        if self._items is None or any(getattr(self._items, name) is not getattr(self, name) for name in COLUMNS):
            self._items = Items(index=self._index, **{name: getattr(self, name) for name in COLUMNS})
        return self._items

    def read(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) -> the model's logits (N, K), keys (N, D), in eval mode.

        Raises:
            UsageError: other numbers of classes or of features than those remembered.
        """
        if self._reader is None or self._reader.model is not model:
            self._reader = KeyReader(model, self.facts["layers"], pool=self.pool, separate=self.separate)
        with _READING, in_mode(model):
            logits, keys = self._reader(images)
        for what, found in (("length", keys.shape[1]), ("classes", logits.shape[1])):
            if self.facts.setdefault(what, found) != found:
                name = "keys of length" if what == "length" else "a number of classes of"
                raise UsageError(
                    f"The cache remembers {name} {self.facts[what]}, but this model gives {found} for images of shape "
                    f"{tuple(images.shape[1:])}. Give images of the size it was fitted on, or fit it for this model."
                )
        return logits, keys

    def keep(self, items: Items, images: Tensor) -> None:
        """Remember `items` of `images` beside what is there."""
        before = self.items
        if self.index == "faiss":
            self._index = self._index or FaissIndex(self.index_kind)
            self._index.add(items.take(slice(None), torch.float32))
            items = replace(items, keys=items.keys.new_zeros(0, items.keys.shape[1]))
        if len(before):
            items = before.plus(items, ordered=self.index != "faiss")
        for name in COLUMNS:
            setattr(self, name, getattr(items, name))
        marks = torch.cat([fingerprints(part) for part in (images, images.flip(-1))[: 2 if self.mirror else 1]])
        self.marks, self._items = torch.cat([self.marks.to(items.labels.device), marks.to(items.labels.device)]), None

    def forget(self) -> None:
        """Begin anew."""
        self._index, self._items, self._reader, self.facts = None, None, None, {}
        for name in (*COLUMNS, "marks"):
            setattr(self, name, getattr(self, name).new_zeros(0))

    def neighbours(self, model: nn.Module, images: Tensor, count: int = 5) -> Neighbours:
        """The `count` items nearest to each image, the nearest first: why the cache says what it says."""
        self.require_fitted()
        with torch.no_grad():
            similarity, rows = nearest(self.read(model, images)[1], self.items, count, self.block)
        return Neighbours(similarity, self.labels[rows], self.items.source[rows], self.items.mirrored[rows])

    def check_unseen(self, images: Tensor, index: Tensor | None = None) -> int:
        """Assert that the cache does not hold these images: on them it would be right without merit.

        Args:
            images: (N, C, H, W), compared pixel by pixel with those remembered.
            index: positions (N,) in the very data set that the cache was fitted on; compared too.

        Returns:
            How many of the images are in the cache all the same; no more than one in a hundred, as sets hold some images twice.

        Raises:
            UsageError: the cache holds them.
        """
        return self.check_marks(fingerprints(images), index)

    def check_marks(self, marks: Tensor, index: Tensor | None = None) -> int:
        """The same of images that are not at hand together, by their `fingerprints` (N,)."""
        self.require_fitted()
        seen = torch.isin(marks.cpu(), self.marks.cpu())
        known = torch.zeros_like(seen) if index is None else torch.isin(index.cpu(), self.items.source.cpu())
        same = int((seen | known).sum())
        if bool(known.any()) or same > SAME * len(marks):
            raise UsageError(
                f"{same} of these {len(marks)} images are in the cache, which knows their labels: no figure measured on them "
                "says anything. Use images that the cache was not fitted on."
            )
        return same

    def state(self) -> dict[str, Tensor]:
        """The tensors to be saved; an index as its bytes."""
        content = torch.zeros(0, dtype=torch.uint8) if self._index is None else self._index.dump()
        return {**super().state(), "index_bytes": content}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        """Take over what `state` and `facts` were.

        Raises:
            FolderError: tensors are missing, or others are there; or a damaged index.
        """
        self.forget()
        rest = {name: value for name, value in tensors.items() if name != "index_bytes"}
        content = tensors.get("index_bytes")
        super().restore(rest, facts)
        if content is not None and len(content):
            self._index = FaissIndex(self.index_kind).read(content)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy shares the keys, which nobody changes in place: copies of a guarded model cost no memory."""
        twin = type(self)(**self.options())
        twin._buffers.update(self._buffers)
        twin.facts, twin._index = copy.deepcopy(self.facts), self._index
        memo[id(self)] = twin
        return twin.train(self.training)
