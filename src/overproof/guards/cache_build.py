"""From images to items: features in order of class, mirrored, merged and stored as wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from overproof.data.pixels import check_images, check_labels, to_float
from overproof.errors import DataError
from overproof.guards.cache_items import Items, KeyType, assemble, clustered, stored
from overproof.guards.cache_keys import check_keys
from overproof.networks import device_of

BATCH = 256  # images
Read = Callable[[Tensor], tuple[Tensor, Tensor]]  # images -> logits, keys


@dataclass(frozen=True)
class Pictures:
    """Labelled images: uint8 or floats in [0, 1], class numbers, and positions in the set they come from."""

    images: Tensor
    labels: Tensor
    positions: Tensor

    @classmethod
    def checked(cls, images: Tensor, labels: Tensor, index: Tensor | None, first: int = 0) -> Pictures:
        """Those given, with positions counted from `first` if there are none.

        Raises:
            DataError: images or labels are not what they must be, or other numbers of them.
        """
        check_images(images, "cache")
        labels = check_labels(labels, len(images), "cache")
        positions = torch.arange(first, first + len(images)) if index is None else index.long()
        if len(positions) != len(images):
            raise DataError(f"cache: {len(images)} images, but {len(positions)} positions in `index`. Give one per image.")
        return cls(images, labels.cpu(), positions.cpu())

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, rows: Tensor) -> Pictures:
        """Those at `rows`."""
        return Pictures(self.images[rows.to(self.images.device)], self.labels[rows], self.positions[rows])

    def batches(self) -> Iterator[Pictures]:
        """A few at a time, in order."""
        for rows in torch.split(torch.arange(len(self)), BATCH):
            yield self.at(rows)


def for_model(images: Tensor, model: nn.Module) -> Tensor:
    """Images as `model` reads them: floats in [0, 1] of its precision, where it is."""
    kinds = (p.dtype for p in model.parameters() if p.is_floating_point())
    return to_float(images).to(device_of(model), next(kinds, None))


@dataclass(frozen=True)
class _Views:
    """Pictures in order of class, each also mirrored if wanted: rows of `given`, and whether to mirror them."""

    given: Pictures
    rows: Tensor
    mirrored: Tensor

    @classmethod
    def of(cls, given: Pictures, *, mirror: bool) -> _Views:
        copies = 2 if mirror else 1
        rows = given.labels.argsort(stable=True).repeat_interleave(copies)
        return cls(given, rows, torch.arange(len(rows)) % copies == 1)

    def keys(self, chosen: Tensor, read: Read, model: nn.Module, layers: Sequence[str]) -> Tensor:
        """Keys (n, D) of the views number `chosen` (n,)."""
        found = []
        for part in torch.split(chosen, BATCH):
            images = for_model(self.given.images[self.rows[part].to(self.given.images.device)], model)
            images = torch.where(self.mirrored[part, None, None, None].to(images.device), images.flip(-1), images)
            found.append(read(images)[1])
            check_keys(found[-1], self.given.positions[self.rows[part]].to(images.device), layers)
        return torch.cat(found)

    def columns(self, chosen: Tensor, place: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, positions and whether mirrored, (n,) each."""
        rows = self.rows[chosen]
        return self.given.labels[rows].to(place), self.given.positions[rows].to(place), self.mirrored[chosen].to(place)


def remember(
    read: Read,
    model: nn.Module,
    given: Pictures,
    *,
    layers: Sequence[str],
    mirror: bool,
    dtype: KeyType,
    centres: int | None,
    seed: int,
) -> Items:
    """The items of the pictures, sorted by class.

    Args:
        read: images -> logits (N, K), keys (N, D).
        model: whose precision and place the images take.
        given: the pictures.
        layers: for messages.
        mirror: every picture has its mirror image as a second item.
        dtype: of the stored keys.
        centres: items that stand for all of a class; None: each for itself.
        seed: of the choice of centres.

    Raises:
        DataError: features without a direction.
    """
    views, generator = _Views.of(given, mirror=mirror), torch.Generator().manual_seed(seed)
    counts = torch.bincount(given.labels[views.rows]).tolist()

    def parts() -> Iterator[tuple[Tensor, ...]]:
        for chosen in torch.split(torch.arange(len(views.rows)), BATCH if centres is None else counts):
            if not len(chosen):  # a class without images
                continue
            keys, weights = views.keys(chosen, read, model, layers), torch.zeros(0)
            if centres is not None:
                keys, weights, members = clustered(keys, centres, generator)
                chosen = chosen[members.cpu()]
            kept, scales = stored(keys, dtype)
            yield kept, scales, weights.float().to(keys.device), *views.columns(chosen, keys.device)

    return assemble(parts(), len(views.rows) if centres is None else sum(min(count, centres) for count in counts))
