"""Seeing the queries and keys of an attention module: `F.scaled_dot_product_attention` is where all of diffusers'
processors end with its default backend, and a `TorchFunctionMode` sees that call whoever makes it.

The mode is entered in a wrapper of the module's `forward`, put on the instance. Entering it in a pre-hook and leaving
it in a hook would leave it entered after a KeyboardInterrupt: hooks do not run then, `with` does. Offloading wraps
`forward` of whole components, so wrapping that of the attention modules inside them does not interfere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from sparsefeat.pipeline.instrument import AttentionCall

_ABSENT = object()


class AttentionTap:
    """A wrapped attention module. `seen(call)` is called for each attention in it while `wanted()`."""

    def __init__(self, path: str, module: nn.Module, wanted: Callable[[], bool], seen: Callable[[AttentionCall], None]):
        self.module = module
        self._before = vars(module).get("forward", _ABSENT)
        forward = module.forward

        @functools.wraps(forward)
        def tapped(*args: Any, **kwargs: Any) -> Any:
            if not wanted():
                return forward(*args, **kwargs)
            text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
            with _Seam(path, getattr(module, "is_cross_attention", text is not None), seen):
                return forward(*args, **kwargs)

        # Under torch.compile the module runs eagerly: what instruments do is not for a graph.
        self._wrapper = torch.compiler.disable(tapped)
        module.forward = self._wrapper

    def remove(self) -> None:
        if vars(self.module).get("forward") is not self._wrapper:
            return  # somebody wrapped it again, or offloading put its own back
        if self._before is _ABSENT:
            del self.module.forward
        else:
            self.module.forward = self._before


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
