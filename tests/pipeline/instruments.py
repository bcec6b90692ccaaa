"""Small instruments for the tests: what the real ones do, without an SAE's machinery."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparsefeat.pipeline import Activations, AttentionCall, Call, Context, Delta, Hookpoint, Instrument, Replace


class Watch(Instrument):
    """Keeps every context and a copy of the activations; its recording is how many it saw in the call."""

    def __init__(self, *hookpoints: str | Hookpoint):
        self._hookpoints = tuple(Hookpoint.parse(h) if isinstance(h, str) else h for h in hookpoints)
        self.begin_call(Call())

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return self._hookpoints

    def begin_call(self, call: Call) -> None:
        self.call = call
        self.contexts: list[Context] = []
        self.rows: list[torch.Tensor] = []
        self.tensors: list[torch.Tensor] = []
        self.ended: list[Context] = []

    def at_hookpoint(self, activations: Activations, context: Context) -> None:
        self.contexts.append(context)
        self.rows.append(activations.rows.clone())
        self.tensors.append(activations.tensor)

    def end_step(self, context: Context) -> None:
        self.ended.append(context)

    def end_call(self, call: Call) -> int:
        return len(self.contexts)


class Edit(Watch):
    """Answers what `rule(activations, context)` answers."""

    def __init__(self, rule: Callable[[Activations, Context], Any], *hookpoints: str):
        self.rule = rule
        super().__init__(*hookpoints)

    def at_hookpoint(self, activations: Activations, context: Context) -> Any:
        super().at_hookpoint(activations, context)
        return self.rule(activations, context)


class WatchAttention(Instrument):
    """Keeps the calls of the tapped attention modules and their contexts."""

    def __init__(self, *paths: str):
        self.paths = paths

    def attentions(self, pipe: Any) -> tuple[str, ...]:
        return self.paths

    def begin_call(self, call: Call) -> None:
        self.seen: list[tuple[AttentionCall, Context]] = []

    def at_attention(self, call: AttentionCall, context: Context) -> None:
        self.seen.append((call, context))

    def end_call(self, call: Call) -> int:
        return len(self.seen)


class CountingSAE:
    """An SAE by its shape only: `encode` gives the rows back and counts how often it was asked."""

    def __init__(self, d_model: int):
        self.d_model = d_model
        self.encodes = 0

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        self.encodes += 1
        return rows.clone()


def zero(activations: Activations, context: Context) -> Delta:
    return Delta(torch.zeros_like(activations.rows))


def same(activations: Activations, context: Context) -> Replace:
    return Replace(activations.rows.clone())


def push(amount: float = 3.0) -> Callable[[Activations, Context], Delta]:
    """Adds a fixed direction of this size to every row."""

    def rule(activations: Activations, context: Context) -> Delta:
        width = activations.rows.shape[1]
        return Delta(amount * torch.linspace(-1, 1, width))

    return rule


class Encode(Watch):
    def __init__(self, sae, *hookpoints, rule=None):
        self.sae = sae
        self.rule = rule
        super().__init__(*hookpoints)

    def at_hookpoint(self, activations, context):
        super().at_hookpoint(activations, context)
        self.code = activations.code(self.sae)
        return self.rule(activations, context) if self.rule else None


BLOCK = "unet.up_blocks.1.attentions.1"
ATTENTION = f"{BLOCK}.transformer_blocks.0.attn2"
EVERYTHING = (BLOCK, f"{BLOCK}:input", "unet.mid_block:diff", "unet", "text_encoder.encoder.layers.0")


def one_of_each():
    """Instruments at Stable Diffusion's blocks and in an attention: all that is put in."""
    return Watch(*EVERYTHING), Edit(zero, *EVERYTHING), WatchAttention(ATTENTION)
