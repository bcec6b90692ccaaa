"""Attention computed again, plainly: what every call of `F.scaled_dot_product_attention` was given, in fp64, module by
module, and the softmax of it. Nothing of sparsefeat is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F


@dataclass
class Seen:
    """One call: query, key and value [batch, heads, n, d] in fp64 (the key's heads repeated), scale and mask."""

    path: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    mask: torch.Tensor | None

    def scores(self, key: torch.Tensor | None = None) -> torch.Tensor:
        other = self.key if key is None else key
        scores = torch.einsum("bhnd,bhtd->bhnt", self.query, other) * self.scale
        if self.mask is None or key is not None:
            return scores
        if self.mask.dtype == torch.bool:
            return scores.masked_fill(~self.mask, -torch.inf)
        return scores + self.mask


@dataclass
class Ran:
    """What a run of a pipeline showed: its attentions in order, what its text encoders were given, and its result."""

    attentions: list[Seen] = field(default_factory=list)
    texts: dict[str, list[tuple[list[int], list[int] | None]]] = field(default_factory=dict)
    result: Any = None

    def of(self, path: str) -> list[Seen]:
        return [seen for seen in self.attentions if seen.path == path]


def eager(pipe: Any, paths: tuple[str, ...], run: Callable[[], Any]) -> Ran:
    """Run the pipeline and look at the attentions of the modules at `paths` ("transformer.transformer_blocks.0.attn")."""
    ran, stack, handles = Ran(), [], []
    original = F.scaled_dot_product_attention

    def watched(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more):
        if stack:
            q, k, v = (t.detach().double() for t in (query, key, value))
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
            factor = q.shape[-1] ** -0.5 if scale is None else scale
            mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.detach().double()
            ran.attentions.append(Seen(stack[-1], q, k, v, factor, mask))
        return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more)

    for path in paths:
        root, _, inner = path.partition(".")
        module = getattr(pipe, root).get_submodule(inner)
        handles.append(module.register_forward_pre_hook(lambda *_, path=path: stack.append(path)))
        handles.append(module.register_forward_hook(lambda *_: stack.pop() and None))
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4"):
        encoder = getattr(pipe, name, None)
        if encoder is not None:

            def given(module, args, kwargs, name=name):
                ids = args[0] if args else kwargs["input_ids"]
                mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
                masks = [None] * len(ids) if mask is None else mask.tolist()
                ran.texts.setdefault(name, []).extend(zip(ids.tolist(), masks, strict=True))

            handles.append(encoder.register_forward_pre_hook(given, with_kwargs=True))
    F.scaled_dot_product_attention = watched
    try:
        ran.result = run()
    finally:
        F.scaled_dot_product_attention = original
        for handle in handles:
            handle.remove()
    return ran
