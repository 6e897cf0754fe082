"""What was computed before, found again by what it depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from overproof import console
from overproof.folder import atomic

FORMAT = 1  # of what is kept; raised whenever the same parts would be computed otherwise
ROOM = 2**30  # bytes that the files of one folder may take


def fingerprint(*tensors: Tensor) -> str:
    """What identifies tensors: shapes, types and bits."""
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        found.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


class Store:
    """Tensors by what they were computed from.

    Everything is kept in memory; what is asked to last is kept in `folder` too, and read from there by the next run. The
    files take up at most a fixed room, the oldest make way, and what would fill more than a quarter of it is kept in memory alone.

    Args:
        folder: where files lie, made when the first is written; None: memory alone.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._known: dict[str, dict[str, Tensor]] = {}
        self.made = 0
        """How often something was not known and had to be computed."""

    def get(
        self, parts: Sequence[object], make: Callable[[], Mapping[str, Tensor]], *, lasting: bool = False
    ) -> dict[str, Tensor]:
        """What `make` gave when it was first called for these `parts`, whose texts say all that the result depends on."""
        key = hashlib.blake2b(repr((FORMAT, *map(str, parts))).encode(), digest_size=16).hexdigest()
        if key not in self._known:
            found = self._read(key) if lasting else None
            if found is None:
                found = {name: value.detach().cpu() for name, value in make().items()}
                self.made += 1
                if lasting:
                    self._write(key, found)
            self._known[key] = found
        return self._known[key]

    def tensor(self, parts: Sequence[object], make: Callable[[], Tensor], *, lasting: bool = False) -> Tensor:
        """The same for a single tensor."""
        return self.get(parts, lambda: {"value": make()}, lasting=lasting)["value"]

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{key}.safetensors"

    def _read(self, key: str) -> dict[str, Tensor] | None:
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found: dict[str, Tensor] = load_file(path)
        except (SafetensorError, OSError) as error:
            console.note(f"note: {path} cannot be read ({error}); it is computed anew.")
            return None
        return found

    def _write(self, key: str, found: Mapping[str, Tensor]) -> None:
        path = self._path(key)
        if path is None or sum(value.nbytes for value in found.values()) > ROOM // 4:
            return
        from safetensors.torch import save

        with atomic(path) as file:
            file.write(save({name: value.contiguous().clone() for name, value in found.items()}))
        self._make_room(path)

    def _make_room(self, newest: Path) -> None:
        assert self.folder is not None
        with suppress(FileNotFoundError):  # another run makes room too
            known = {path: path.stat() for path in self.folder.glob("*.safetensors")}
            taken = sum(facts.st_size for facts in known.values())
            for path in sorted(known.keys() - {newest}, key=lambda path: known[path].st_mtime_ns):
                if taken <= ROOM:
                    return
                path.unlink()
                taken -= known[path].st_size
