"""Triton's interpreter, several times as fast: what it works out again at every operation is worked out once.

* A launch prepares `triton.language` once, not at every call of a function within the kernel.
* The types of blocks, and numpy's for them, are kept: of a small block they take longer than what is done with it. Blocks of one
  shape then have one object for it, and are not compared to be broadcast.
* A reduction by a function of the kernel's own goes through slices, of all other axes together, not through elements; along
  the axis in the same order.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from typing import Any

import numpy as np


def hasten() -> None:
    """From now on, in this process."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    _prepare_once_a_launch(interpreter, language)
    _keep_types(interpreter, language)
    interpreter.ReduceOps.generic_reduce = _reduce_by_slices


def _prepare_once_a_launch(interpreter: Any, language: Any) -> None:
    prepare, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    prepared: set[tuple[str, ...]] = set()

    @functools.cache
    def modules_of(function: Any) -> tuple[str, ...]:
        """Those of its names that stand for what is prepared."""
        seen = function.__globals__.values()
        return tuple(m.__name__ for m in (language, language.core) if any(value is m for value in seen))

    def prepare_once(function: Any) -> Any:
        modules = modules_of(function)
        if modules in prepared:
            return None
        prepared.add(modules)
        return prepare(function)

    def launch_and_forget(self: Any, *arguments: Any, **options: Any) -> Any:
        prepared.clear()
        try:
            return launch(self, *arguments, **options)
        finally:
            prepared.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = prepare_once, launch_and_forget


def _keep_types(interpreter: Any, language: Any) -> None:
    core = language.core
    numpy_type, begin_type, begin_tensor = (
        interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__,
    )  # fmt: skip
    of_numpy: dict[str, Any] = {}
    types: dict[Any, dict[str, Any]] = {}
    tensors: dict[tuple[int, ...], dict[str, Any]] = {}

    def kept_numpy_type(type_: Any) -> Any:
        name = type_.scalar.name
        if name not in of_numpy:
            of_numpy[name] = numpy_type(type_)
        return of_numpy[name]

    def begin_kept_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(size.value if isinstance(size, core.constexpr) else size for size in shape)
        if key not in types:
            begin_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key], element_ty=element_ty)

    def begin_kept_tensor(self: Any, handle: Any, type: Any) -> None:
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in tensors:
            begin_tensor(self, handle, type)
            tensors[shape] = dict(vars(self))
        vars(self).update(tensors[shape], handle=handle, type=type, dtype=type.scalar)

    interpreter._get_np_dtype, core.block_type.__init__, core.tensor.__init__ = (
        kept_numpy_type, begin_kept_type, begin_kept_tensor,
    )  # fmt: skip
    semantic = getattr(language.semantic, "TritonSemantic", None)
    if semantic is None:  # before Triton 3.4
        return
    broadcast = semantic.broadcast_impl_value

    def broadcast_others(self: Any, a: Any, b: Any) -> Any:
        return (a, b) if a.shape is b.shape else broadcast(self, a, b)

    semantic.broadcast_impl_value = broadcast_others


def _reduce_by_slices(self: Any, given: tuple[Any, ...]) -> Any:
    """In place of ReduceOps.generic_reduce: `self` is the ReduceOps, `given` the tensors it reduces together."""
    along, axis = self.unravel(given, self.axis)
    parts = [np.moveaxis(each.handle.data, axis, 0) for each in along]
    shape = parts[0].shape[1:]

    def tensors(arrays: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(self.to_tensor(array, each.dtype) for array, each in zip(arrays, along, strict=True))

    def array_of(value: Any) -> Any:
        return value.handle.data.reshape(shape) if hasattr(value, "handle") else np.full(shape, value)

    total = tensors(part[0] for part in parts)
    for i in range(1, len(parts[0])):
        found = self.combine_fn.fn(*total, *tensors(part[i] for part in parts))
        total = tensors(map(array_of, found if isinstance(found, tuple) else (found,)))
    if self.keep_dims:
        shape = (1,) * given[0].handle.data.ndim if self.axis is None else (*shape[:axis], 1, *shape[axis:])
    reduced = tensors(each.handle.data.reshape(shape) for each in total)
    return reduced[0] if len(reduced) == 1 else reduced
