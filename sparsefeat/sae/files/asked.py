"""What a reader asked of a file, and what it left: peers load strictly, and so is everything read here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def listed(names: str) -> frozenset[str]:
    """Names with spaces between them."""
    return frozenset(names.split())


class Asked(Mapping[str, Any]):
    """A mapping that notes the names it is asked for, whether they are there or not."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.plain: dict[str, Any] = dict(values)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return self.plain[name]

    def __contains__(self, name: object) -> bool:
        self.asked.add(str(name))
        return name in self.plain

    def __iter__(self) -> Iterator[str]:
        return iter(self.plain)

    def __len__(self) -> int:
        return len(self.plain)

    def left(self) -> dict[str, Any]:
        """What nobody asked for."""
        return {name: value for name, value in self.plain.items() if name not in self.asked}
