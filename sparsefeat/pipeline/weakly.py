"""References that keep nothing alive, and that do not go along when what has them is copied or pickled."""

from __future__ import annotations

import weakref
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Weakly(Generic[T]):
    """What it refers to, when called; None once that is gone, and in a copy of the reference."""

    def __init__(self, held: T | None = None):
        self._held = None if held is None else weakref.ref(held)

    def __call__(self) -> T | None:
        return None if self._held is None else self._held()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()
