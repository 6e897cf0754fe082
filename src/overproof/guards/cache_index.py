"""Keys in a FAISS index: for caches beyond memory, and for searches faster than a matrix product."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from overproof.errors import FolderError, OverproofError, UsageError

NOBODY = -2.0  # no cosine


class FaissIndex:
    """Inner-product search by `faiss`; the keys lie in the index, as exact or as compressed as its kind says.

    Args:
        kind: a FAISS factory string: "Flat" is exact, "IVF1024,PQ64" keeps 64 bytes a key and looks into a few cells.
        probes: cells that a search looks into, for kinds with cells ("IVF...").

    Raises:
        OverproofError: `faiss` is not installed.
    """

    def __init__(self, kind: str, probes: int = 16) -> None:
        self.faiss, self.kind, self.probes = _faiss(), kind, probes
        self._index: Any = None

    def add(self, keys: Tensor) -> None:
        """Append keys (M, D); those of the first call also teach the index where its cells are.

        Raises:
            UsageError: FAISS does not know the kind, or needs more keys to learn its cells from.
        """
        rows = _rows(keys)
        try:
            if self._index is None:
                index = self.faiss.index_factory(rows.shape[1], self.kind, self.faiss.METRIC_INNER_PRODUCT)
                index.train(rows)
                self._index = index
            self._index.add(rows)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1][:200]
            raise UsageError(
                f"faiss could not put {len(rows)} keys of length {rows.shape[1]} into an index of kind {self.kind!r} ({reason}). "
                'Use index_kind="Flat", or one with fewer cells and parts.'
            ) from None
        self._prepare()

    def search(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Similarities (N, k) and numbers (N, k) of the nearest keys, the nearest first; a similarity of -2: no further key was found."""
        similarity, rows = self._index.search(_rows(queries), count)
        if (rows < 0).any():  # the cells looked into hold fewer keys
            similarity, rows = np.where(rows < 0, np.float32(NOBODY), similarity), rows.clip(min=0)
        return torch.from_numpy(similarity).to(queries), torch.from_numpy(rows).to(queries.device)

    def take(self, rows: slice | Tensor) -> Tensor:
        """The keys at `rows` (M, D), as the index remembers them."""
        numbers = np.arange(self._index.ntotal)[rows] if isinstance(rows, slice) else rows.cpu().numpy()
        return torch.from_numpy(self._index.reconstruct_batch(numbers))

    def dump(self) -> Tensor:
        """The index as bytes."""
        return torch.from_numpy(self.faiss.serialize_index(self._index))

    def read(self, content: Tensor) -> FaissIndex:
        """Take over what `dump` gave.

        Raises:
            FolderError: these bytes are no index.
        """
        try:
            self._index = self.faiss.deserialize_index(content.cpu().numpy())
        except RuntimeError as error:
            raise FolderError(
                f"The index of the cache is damaged ({str(error).strip().splitlines()[-1][:200]}). Fit it again."
            ) from None
        self._prepare()
        return self

    def _prepare(self) -> None:
        if "IVF" in self.kind:
            cells = self.faiss.extract_index_ivf(self._index)
            cells.nprobe = self.probes
            cells.make_direct_map()  # so that keys can be read back


def _rows(keys: Tensor) -> np.ndarray:
    return np.ascontiguousarray(keys.detach().cpu().float().numpy())


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise OverproofError('index="faiss" needs the package faiss: pip install "overproof[faiss]".') from None
    return faiss
