"""Tensors that say they are on a GPU and compute on the CPU: what plain torch does there, as far as devices go.

`on_gpu(t)` is such a tensor. Operations on it run on the CPU and give such tensors. One that takes a CPU tensor beside it
is refused, as CUDA refuses it, and `waits` counts how often the host asked for a value, for which it would have to wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

aten = torch.ops.aten
# Half precision with wider sums, which a CPU does not have, nor a torch before 2.8.
WIDER = tuple(getattr(aten.mm, name) for name in ("dtype", "dtype_out") if name in aten.mm.overloads())
# Answers that the host reads, and results whose size it must know.
WAITING = (aten._local_scalar_dense, aten.nonzero, aten._unique2, aten.unique_consecutive, aten.masked_select)
# What CUDA takes from the CPU: indices, numbers, copies.
MIXED = (aten.index, aten.index_put_, aten.index_put, aten.copy_, aten._to_copy, aten._index_put_impl_)


class OnGpu(torch.Tensor):
    @staticmethod
    def __new__(cls, of: torch.Tensor) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls, of.shape, strides=of.stride(), storage_offset=of.storage_offset(), dtype=of.dtype
        )
        made.of = of
        return made

    # Said in Python alone: a torch without CUDA cannot hold a tensor that is there.
    device = property(lambda self: torch.device("cuda:0"))
    is_cuda = property(lambda self: True)

    def tolist(self) -> list[Any]:
        waits.append("tolist")
        return self.of.tolist()

    def __repr__(self) -> str:
        return f"OnGpu({self.of})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def on_gpu(value: Any) -> Any:
    return OnGpu(value) if isinstance(value, torch.Tensor) and not isinstance(value, OnGpu) else value


def back(value: Any) -> Any:
    return value.of if isinstance(value, OnGpu) else value


waits: list[str] = []
sizes: list[int] = []  # bytes of the memory behind every result


def run(func: Any, args: Any, kwargs: Any) -> Any:
    if func.namespace == "sparsefeat":  # the op's own program, as a GPU runs it
        with _Factories():  # which is not in force inside of what it handles
            return torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    here = [leaf for leaf in given if isinstance(leaf, OnGpu)]
    packet = func.overloadpacket
    if any(not isinstance(leaf, OnGpu) and leaf.dim() for leaf in given) and here and packet not in MIXED:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    by_mask = packet in (aten.index, aten.index_put_) and any(leaf.dtype == torch.bool for leaf in given[1:])
    if here and (packet in WAITING or by_mask):
        waits.append(str(packet))
    plain_args, plain_kwargs = pytree.tree_map(back, args), pytree.tree_map(back, kwargs)
    if func in WIDER:
        x, W, dtype = plain_args
        wide = x.to(dtype) @ W.to(dtype)
        answer = plain_kwargs["out"].copy_(wide) if plain_kwargs else wide
    else:
        answer = func(*plain_args, **plain_kwargs)
    sizes.extend(
        leaf.untyped_storage().nbytes() for leaf in pytree.tree_leaves(answer) if isinstance(leaf, torch.Tensor)
    )
    known = {id(leaf.of): leaf for leaf in here}  # what is done in place gives the tensor itself
    return pytree.tree_map(lambda leaf: known.get(id(leaf), on_gpu(leaf)), answer)


class _Factories(TorchFunctionMode):
    """torch.zeros(..., device=x.device) makes such a tensor too, and so does x.to(device); without a device it stays on
    the CPU.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], (str, torch.device)):
            kwargs |= dict(zip(("device", "dtype", "non_blocking", "copy"), args[1:], strict=False))
            args = args[:1]
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        return on_gpu(func(*args, **kwargs | {"device": "cpu"}))


def place(*modules: nn.Module) -> None:
    """Move modules there, for good."""
    for module in (inner for each in modules for inner in each.modules()):
        for held in (module._parameters, module._buffers):
            held.update({name: on_gpu(tensor.detach()) for name, tensor in held.items() if tensor is not None})


@contextmanager
def pretended() -> Iterator[list[str]]:
    """Inside the block factories know the device too; the list has what the host waited for."""
    waits.clear()
    sizes.clear()
    with _Factories():
        yield waits
