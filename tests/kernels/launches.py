"""What a launcher has a GPU do: the ops of torch and the kernels, in their order, counted on tensors without data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

# Memory and views of it, of which nothing runs on a GPU; and the poison that tests put into memory.
NOTHING = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "alias", "_unsafe_view", "fill_")


class _Ops(TorchDispatchMode):
    def __init__(self, launched: list[str]) -> None:
        super().__init__()
        self.launched = launched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NOTHING:
            self.launched.append(name)
        return func(*args, **(kwargs or {}))


class _Recorded:
    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **options: self.launched.append(self.name)


@contextmanager
def launches(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> Iterator[list[str]]:
    """Names of the ops that run inside the block, and of those kernels of the modules that would."""
    launched: list[str] = []
    for module in modules:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, _Recorded(name, launched))
    with _Ops(launched):
        yield launched
