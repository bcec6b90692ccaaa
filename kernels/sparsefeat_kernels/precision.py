"""Products of fp32 in fp32, whatever less a process has allowed torch: TF32 on a GPU, bf16 on a CPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["products_are_rounded", "whole_products"]

_ROUNDED = ("tf32", "bf16")
# Torch has one setting for all devices, and since 2.9 one for each too.
_OF_DEVICES = hasattr(torch.backends.mkldnn, "matmul") and hasattr(torch.backends.cuda.matmul, "fp32_precision")
_CPU: Any = torch.backends.mkldnn.matmul if _OF_DEVICES else None
_GPU: Any = torch.backends.cuda.matmul


def products_are_rounded(device: str) -> bool:
    """Whether torch may round the factors of fp32 products on "cpu" or "cuda"."""
    if not _OF_DEVICES:
        return torch.get_float32_matmul_precision() != "highest"
    return (_CPU if device == "cpu" else _GPU).fp32_precision in _ROUNDED


class _Whole:
    """The settings are the process's: the first call that needs them whole changes them, the last one puts them back."""

    def __init__(self) -> None:
        self._lock, self._calls, self._settings = threading.Lock(), 0, contextlib.ExitStack()

    def enter(self) -> None:
        with self._lock:
            if not self._calls:
                self._settings.enter_context(_all_whole())
            self._calls += 1

    def leave(self) -> None:
        with self._lock:
            self._calls -= 1
            if not self._calls:
                self._settings.close()


_whole = _Whole()


@contextlib.contextmanager
def whole_products() -> Iterator[None]:
    """Within this torch rounds no factor of an fp32 product."""
    _whole.enter()
    try:
        yield
    finally:
        _whole.leave()


@contextlib.contextmanager
def _all_whole() -> Iterator[None]:
    try:
        of_all = torch.get_float32_matmul_precision()
    except RuntimeError:  # the settings of devices were changed without it, and it may not be either
        of_all = "highest"
    before = [(setting, setting.fp32_precision) for setting in (_CPU, _GPU)] if _OF_DEVICES else []
    if of_all != "highest":
        torch.set_float32_matmul_precision("highest")
    for setting, precision in before:
        if of_all == "highest" and precision in _ROUNDED:
            setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        if of_all != "highest":
            torch.set_float32_matmul_precision(of_all)
        for setting, precision in before:
            if setting.fp32_precision != precision:
                setting.fp32_precision = "none"  # that of all backends, which it may have had
            if setting.fp32_precision != precision:
                setting.fp32_precision = precision
