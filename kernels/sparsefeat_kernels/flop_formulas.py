"""Formulas for torch.utils.flop_counter, handed to it when somebody imports it: it imports Triton, which takes long."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"

_waiting: list[tuple[Any, Callable[..., int]]] = []


def register_flop_formula(ops: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """As torch's own, but that it need not be imported yet."""

    def register(formula: Callable[..., int]) -> Callable[..., int]:
        _waiting.append((ops, formula))
        if COUNTER in sys.modules:
            _hand_over(sys.modules[COUNTER])
        return formula

    return register


def _hand_over(counter: ModuleType) -> None:
    while _waiting:
        ops, formula = _waiting.pop()
        counter.register_flop_formula(ops)(formula)


class _OnImport(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_hand_over(module: ModuleType) -> None:
                run(module)
                _hand_over(module)

            vars(spec.loader)["exec_module"] = run_and_hand_over
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _OnImport())
