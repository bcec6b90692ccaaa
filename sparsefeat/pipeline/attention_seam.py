"""Seeing the queries and keys of an attention module: `F.scaled_dot_product_attention` is where all of diffusers'
processors end with its default backend, and a `TorchFunctionMode` sees that call whoever makes it.

The mode is entered in a wrapper of the module's `forward`, put on the instance. Entering it in a pre-hook and leaving
it in a hook would leave it entered after a KeyboardInterrupt: hooks do not run then, `with` does. Offloading wraps
`forward` of whole components, so wrapping that of the attention modules inside them does not interfere.
"""

from __future__ import annotations

import functools
import math
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from sparsefeat.pipeline.hookpoints import Target
from sparsefeat.pipeline.instrument import AttentionCall

_ABSENT = object()


class AttentionTap:
    """A wrapper of an attention module's forward. `wiring.attended(target, call)` is called for each attention in it while
    `wiring.listening`, as long as there is a wiring.
    """

    def __init__(self, wiring: Any, target: Target):
        self._wiring = weakref.ref(wiring)
        self.target = target
        self._before = vars(target.module).get("forward", _ABSENT)
        self._forward = target.module.forward
        functools.update_wrapper(self, self._forward)

    @torch.compiler.disable  # under torch.compile the module runs eagerly: what instruments do is not for a graph
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wiring = self._wiring()
        if wiring is None or not wiring.listening():
            return self._forward(*args, **kwargs)
        text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        is_cross = getattr(self.target.module, "is_cross_attention", text is not None)
        with _Seam(self.target.path, is_cross, functools.partial(wiring.attended, self.target)):
            return self._forward(*args, **kwargs)

    def __reduce__(self) -> Any:
        """A copy of the module has the forward that was there."""
        if self._before is not _ABSENT:
            return _itself, (self._before,)
        return _bound, (type(self.target.module).forward, self.target.module)

    def put_on(self) -> None:
        """Doing it twice is harmless."""
        if vars(self.target.module).get("forward") is not self:
            self.target.module.forward = self

    def take_off(self) -> None:
        """Doing it twice is harmless."""
        module = self.target.module
        if vars(module).get("forward") is not self:
            return  # somebody wrapped it again, or offloading put its own back
        if self._before is _ABSENT:
            del module.forward
        else:
            module.forward = self._before


def _itself(forward: Any) -> Any:
    return forward


def _bound(forward: Any, module: Any) -> Any:
    return types.MethodType(forward, module)


class _Seam(TorchFunctionMode):
    def __init__(self, path: str, is_cross: bool, seen: Callable[[AttentionCall], None]):
        super().__init__()
        self._path, self._is_cross, self._seen = path, is_cross, seen
        self._calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._seen(self._call(*args, **kwargs))
            self._calls += 1
        return func(*args, **kwargs)

    def _call(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> AttentionCall:
        return AttentionCall(
            path=self._path,
            query=query,
            key=key,
            value=value,
            scale=1 / math.sqrt(query.shape[-1]) if scale is None else scale,
            mask=attn_mask,
            is_cross=self._is_cross,
            is_causal=is_causal,
            index=self._calls,
        )
