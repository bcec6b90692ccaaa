"""Seeing the queries and keys of an attention module: `F.scaled_dot_product_attention` is where all of diffusers'
processors end with its default backend, and a `TorchFunctionMode` sees that call whoever makes it. Below it torch runs
one of its kernels, most of which give the log-sum-exp of every row too; a `TorchDispatchMode` around the call takes it
from there, so that nobody has to compute it again.

The mode is entered in a wrapper of the module's `forward`, put on the instance. Entering it in a pre-hook and leaving
it in a hook would leave it entered after a KeyboardInterrupt: hooks do not run then, `with` does. Offloading wraps
`forward` of whole components, so wrapping that of the attention modules inside them does not interfere.
"""

from __future__ import annotations

import functools
import math
import os
import types
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparsefeat.pipeline.hookpoints import Target
from sparsefeat.pipeline.instrument import AttentionCall

try:
    from diffusers.models import attention_dispatch
except ImportError:  # before diffusers 0.35
    attention_dispatch = None

_ABSENT = object()


class AttentionTap:
    """A wrapper of an attention module's forward. `wiring.attended(target, call)` is called after each attention in it
    while `wiring.listening`, as long as there is a wiring.
    """

    def __init__(self, wiring: Any, target: Target):
        self._wiring = weakref.ref(wiring)
        self.target = target
        self._before = vars(target.module).get("forward", _ABSENT)
        self._forward = target.module.forward
        self.unturned = False  # whether queries are wanted before the rotary embedding too
        functools.update_wrapper(self, self._forward, updated=())  # not what another tap knows

    @torch.compiler.disable  # under torch.compile the module runs eagerly: what instruments do is not for a graph
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wiring = self._wiring()
        if wiring is None or not wiring.listening():
            return self._forward(*args, **kwargs)
        text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        is_cross = getattr(self.target.module, "is_cross_attention", text is not None)
        linear = type(getattr(self.target.module, "processor", None)).__name__ == _LINEAR
        seen = functools.partial(wiring.attended, self.target)
        if linear:
            with _LinearSeam(self.target.path, is_cross, seen):
                return self._forward(*args, **kwargs)
        norms = _QueryNorms(self.target.module if self.unturned else None)
        with norms, _Seam(self.target.path, is_cross, seen, norms):
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


# What a module calls the norm of its queries, of the image or of one sequence of both; and of the text's.
_NORMS = ("norm_q", "q_rms_norm", "query_norm")
_TEXT_NORMS = ("norm_added_q", "q_rms_norm_t")


def normalises_queries(module: nn.Module) -> bool:
    return any(isinstance(getattr(module, name, None), nn.Module) for name in _NORMS)


class _QueryNorms:
    """Within this, what the norms of a module's queries gave: the last thing before the rotary embedding."""

    def __init__(self, module: nn.Module | None):
        self._module = module
        self._given: dict[str, torch.Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        for stream, names in (("image", _NORMS), ("text", _TEXT_NORMS)) if self._module is not None else ():
            for name in names:
                norm = getattr(self._module, name, None)
                if isinstance(norm, nn.Module):
                    self._hooks.append(norm.register_forward_hook(functools.partial(self._take, stream)))

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._given = {}

    def _take(self, stream: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self._given[stream] = output.detach().clone()  # CogView 4 and CogVideoX turn them where they are

    def of(self, query: torch.Tensor, path: str) -> dict[str, torch.Tensor]:
        """Of the attention with this query, [batch, heads, rows, d] each in its dtype."""
        held, self._given = self._given, {}
        if not held:
            return {}
        batch, heads, rows, d = query.shape
        whole = {stream: t.unflatten(-1, (-1, d)) if t.dim() == 3 else t for stream, t in held.items()}
        heads_last = all(t.dim() == 4 and t.shape[2] == heads for t in whole.values())
        heads_first = all(t.dim() == 4 and t.shape[1] == heads for t in whole.values())
        found = {s: (t.transpose(1, 2) if heads_last else t).to(query.dtype) for s, t in whole.items()}
        if heads_last == heads_first or any(t.shape[:2] != (batch, heads) or t.shape[3] != d for t in found.values()):
            raise ValueError(
                f"the queries of {path} before its rotary embedding cannot be told from what its norms gave, of the shapes "
                f"{[list(t.shape) for t in held.values()]} for {list(query.shape)}: take another kind= than 'query_query'"
            )
        return {"all": found["image"]} if found["image"].shape[2] == rows else found


class _Seam(TorchFunctionMode):
    def __init__(self, path: str, is_cross: bool, seen: Callable[[AttentionCall], None], norms: _QueryNorms):
        super().__init__()
        self._path, self._is_cross, self._seen, self._norms = path, is_cross, seen, norms
        self._calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with _LogSumExp() as rows:
            output = func(*args, **kwargs)
        call = self._call(*args, **kwargs)
        unturned = self._norms.of(call.query, self._path)
        self._seen(replace(call, output=output, lse=rows.of(call.query), unturned=unturned))
        self._calls += 1
        return output

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


_LINEAR = "SanaLinearAttnProcessor2_0"


class _LinearSeam(TorchFunctionMode):
    """Sana's linear attention: features of the query [batch, heads, d, queries] and of the key [batch, heads, keys, d] are
    two calls of `F.relu`, and the value [batch, heads, d, keys] is padded by a row of ones, for the sum of the shares.
    """

    def __init__(self, path: str, is_cross: bool, seen: Callable[[AttentionCall], None]):
        super().__init__()
        self._path, self._is_cross, self._seen = path, is_cross, seen
        self._features: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.relu:
            self._features.append(result)
        if func is F.pad and len(self._features) == 2:
            (query, key), value = self._features, args[0]
            self._features = []
            self._seen(
                AttentionCall(self._path, query.mT, key, value.mT, 1.0, None, is_cross=self._is_cross, linear=True)
            )
        return result


# torch's attention kernels, and where among their results the log-sum-exp is. On a CPU and for flash on CUDA it comes
# with the output anyway; the memory-efficient one and cuDNN's write it only if asked, which changes nothing else.
_KERNELS = (
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
)


class _LogSumExp(TorchDispatchMode):
    """Within this, the log-sum-exp of the rows of torch's attention kernel."""

    def __init__(self) -> None:
        super().__init__()
        self._found: torch.Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name == "aten::scaled_dot_product_attention":  # whole, under inference mode
            with self:
                return func.decompose(*args, **kwargs)
        asks = [argument.name for argument in func._schema.arguments] if name in _KERNELS else []
        if "compute_log_sumexp" in asks:
            place = asks.index("compute_log_sumexp")
            if place < len(args):
                args = (*args[:place], True, *args[place + 1 :])
            else:
                kwargs = {**kwargs, "compute_log_sumexp": True}
        result = func(*args, **kwargs)
        if name in _KERNELS:
            self._found = result[1]
        return result

    def of(self, query: torch.Tensor) -> torch.Tensor | None:
        """[batch, heads, queries] in fp32 (fp64 for fp64), None where the kernel gave none."""
        found, (batch, heads, rows, _) = self._found, query.shape
        if found is None or not found.numel():
            return None
        found = found.detach()
        found = found[..., 0] if found.dim() == 4 else found  # cuDNN's, since torch 2.9
        if found.dim() != 3 or found.shape[:2] != (batch, heads) or found.shape[2] < rows:
            return None
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        return found[:, :, :rows].to(wide)  # the memory-efficient kernel's is padded


def bypass(root_name: str, module: nn.Module) -> str | None:
    """Why the attention of a module is not seen, with the remedy, by its processor; None if nothing speaks against it."""
    processor: Any = getattr(module, "processor", None)
    name = type(processor).__name__
    if getattr(processor, "_parallel_config", None) is not None:
        return f"its {name} shares its sequence among several devices (context parallelism): run it on one"
    if hasattr(processor, "_attention_backend"):
        chosen = processor._attention_backend or _active_backend()
        backend = str(getattr(chosen, "value", chosen))
        if backend in ("native", "_native_flash", "_native_efficient", "_native_cudnn", "_native_math"):
            return None
        return (
            f"its {name} runs the attention backend {backend!r}, which does not call F.scaled_dot_product_attention: take "
            f"the native one, pipe.{root_name}.set_attention_backend('native')"
        )
    if "Linear" in name and name != _LINEAR:
        return f"its {name} is a linear attention whose features are not known: read another module"
    if name in _BYPASSING or any(part in name for part in ("XFormers", "Sliced", "NPU", "XLA")):
        return f"its {name} does not call F.scaled_dot_product_attention: {_remedy(root_name, name)}"
    return None


def _active_backend() -> Any:
    """What diffusers runs for a processor that names none: of `with attention_backend(...)`, of the model that was last
    given one, or of the environment."""
    registry = getattr(attention_dispatch, "_AttentionBackendRegistry", None)
    return getattr(registry, "_active_backend", None) or os.environ.get("DIFFUSERS_ATTN_BACKEND", "native")


_BYPASSING = ("AttnProcessor", "AttnAddedKVProcessor", "CustomDiffusionAttnProcessor", "IPAdapterAttnProcessor")


def _remedy(root_name: str, processor: str) -> str:
    """How to get a processor that is seen, for the model that has this one."""
    if "XFormers" in processor:
        return "pipe.disable_xformers_memory_efficient_attention()"
    if "Sliced" in processor:
        return "pipe.disable_attention_slicing()"
    if "IPAdapter" in processor or "CustomDiffusion" in processor:
        return f"set pipe.{root_name}.set_attn_processor(AttnProcessor2_0()) and load the adapter again"
    replaced = "AttnAddedKVProcessor2_0" if "AddedKV" in processor else "AttnProcessor2_0"
    return f"pipe.{root_name}.set_attn_processor({replaced}())"


def why_unseen(root_name: str, module: nn.Module) -> str:
    """The same for an attention that was not seen in a whole call."""
    known = bypass(root_name, module)
    if known is not None:
        return known
    name = type(getattr(module, "processor", module)).__name__
    remedy = f"use a processor that does ({_remedy(root_name, name)})"
    if hasattr(getattr(module, "processor", None), "_attention_backend"):
        remedy = (
            f"use the native backend (pipe.{root_name}.set_attention_backend('native')) and diffusers' own processors"
        )
    return f"its {name} did not call F.scaled_dot_product_attention, or the module did not run: {remedy}"
