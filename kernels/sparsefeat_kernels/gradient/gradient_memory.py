"""Memory for weight gradients on a CPU: in pages of 2 MiB, and used again by the next step.

A training step makes two gradients of hundreds of megabytes. Memory that is new costs a wait for the system at the first
write to every page: in pages of 4 KiB several times what filling it takes (39 ms and 4 ms for 20,480 x 1280 on one core
of an AMD EPYC), and in a virtual machine that gives free memory back to its host more than that. So large pages are asked
for, and the memory of the last gradients stays with this module when they are gone.

Memory is used again once nothing is left that could see it: torch holds a Python object for as long as the storage exists,
which every view, alias, NumPy array or graph that shares a gradient keeps alive, and a weak reference to that object tells.
Whoever takes memory writes all of it. Its storage cannot be resized.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import threading
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["empty_gradient", "keep_gradient_memory", "release_gradient_memory"]

SMALLEST = 32 << 20  # bytes; malloc keeps what is smaller by itself
_LARGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)


@dataclass
class _Block:
    memory: mmap.mmap
    used_by: weakref.ref[memoryview]

    @property
    def free(self) -> bool:
        return self.used_by() is None


_lock = threading.Lock()
_kept: list[_Block] = []
_most = 2  # the gradients of W_enc and W_dec


def _new_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)  # another thread may have held it


def keep_gradient_memory(blocks: int) -> None:
    """How many weight gradients' memory is kept on a CPU for the next step: 2 at first, those of one SAE; 0 keeps none.

    Memory beyond is given back, at once or when its gradient is gone. Only gradients of 32 MiB and more, on Linux.

    Raises: ValueError for a negative number.
    """
    if not hasattr(blocks, "__index__") or blocks < 0:
        raise ValueError(f"blocks must be 0 or more, got {blocks!r:.80}; 0 keeps no memory")
    global _most
    with _lock:
        _most = blocks
        _kept.sort(key=lambda block: block.free)  # those in use first: free ones are worth least
        del _kept[blocks:]


def release_gradient_memory() -> None:
    """Give back what is kept and not in use: after the last step."""
    with _lock:
        _kept[:] = [block for block in _kept if not block.free]


def empty_gradient(rows: int, columns: int, like: Tensor) -> Tensor:
    """`like.new_empty(rows, columns)`: what is in it is anything, also parts of an earlier gradient."""
    nbytes = rows * columns * like.itemsize
    if sys.platform != "linux" or like.device.type != "cpu" or nbytes < SMALLEST:
        return like.new_empty(rows, columns)
    with _lock:
        block = next((b for b in _kept if b.free and len(b.memory) == nbytes), None)
        try:
            memory = _new_memory(nbytes) if block is None else block.memory
        except OSError:  # torch says in its own words what is wrong
            return like.new_empty(rows, columns)
        held = memoryview(memory)
        used_by = weakref.ref(held)
        gradient = torch.frombuffer(held, dtype=like.dtype).view(rows, columns)
        del held  # from here on, only the gradient's storage holds it
        if block is not None:
            block.used_by = used_by
        else:
            block = _Block(memory, used_by)
            if len(_kept) >= _most:  # of other sizes: instead of one that is not used
                _kept[:] = [b for b in _kept if not b.free]
            if len(_kept) < _most:
                _kept.append(block)
        if block.free:  # torch did not hold the object: nothing can be known of this memory
            _kept[:] = [b for b in _kept if b is not block]
    return gradient


def _new_memory(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if _LARGE_PAGES is not None:
        with contextlib.suppress(OSError):  # a system without them
            memory.madvise(_LARGE_PAGES)
    return memory
