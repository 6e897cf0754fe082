"""How much work an attack asks of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class Passes:
    """Images sent forward through a model, and gradients taken back through it."""

    forward: int = 0
    backward: int = 0

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Count what happens to `model` inside the block; its hooks are as before afterwards."""

        def back(gradient: Tensor) -> None:
            self.backward += len(gradient)

        def seen(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self.forward += len(output)
                if output.requires_grad:
                    output.register_hook(back)  # type: ignore[no-untyped-call]

        handle = model.register_forward_hook(seen)
        try:
            yield
        finally:
            handle.remove()
