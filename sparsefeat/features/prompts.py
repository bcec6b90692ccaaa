"""What a layer of a text encoder gives for prompts, in a run of the encoder alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefeat.pipeline import Hookpoint
from sparsefeat.pipeline.hookpoints import Target, resolve

# How many prompts are encoded at a time; more is no faster on any encoder of this size.
PROMPTS_AT_ONCE = 16


def tokenizer_of(pipe: Any, at: Hookpoint) -> Any:
    """The tokenizer that belongs to the text encoder a hookpoint lies in: `tokenizer_2` to `text_encoder_2`."""
    target = resolve(pipe, at.path)
    name = target.root_name.replace("text_encoder", "tokenizer")
    tokenizer = getattr(pipe, name, None)
    if tokenizer is None or name == target.root_name:
        raise ValueError(
            f"{at} is not in a text encoder of this {type(pipe).__name__} that has a tokenizer ({name}): name a layer "
            "of a text encoder, as in at='text_encoder.encoder.layers.8'."
        )
    return tokenizer


def n_tokens(tokenizer: Any, prompt: str) -> int:
    """Tokens of a prompt, begin and end included, padding not, cut off at the tokenizer's limit."""
    return len(tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length)["input_ids"])


@torch.no_grad()
def layer_outputs(pipe: Any, at: Hookpoint, prompts: Sequence[str], length: int | None = None) -> Iterator[Tensor]:
    """For every prompt, padded to `length` tokens (default: the tokenizer's limit), `[length, width]`.

    Instruments do not see these runs when it is one of them that asks, inside its own methods.
    """
    tokenizer, target = tokenizer_of(pipe, at), resolve(pipe, at.path)
    limit = tokenizer.model_max_length if length is None else length
    device = getattr(pipe, "_execution_device", None) or next(target.root.parameters()).device
    for first in range(0, len(prompts), PROMPTS_AT_ONCE):
        batch = list(prompts[first : first + PROMPTS_AT_ONCE])
        tokens = tokenizer(batch, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        yield from _run(target, tokens.input_ids.to(device))


def _run(target: Target, input_ids: Tensor) -> Tensor:
    seen: list[Tensor] = []

    def keep(module: Any, args: tuple, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    handle = target.module.register_forward_hook(keep)
    try:
        target.root(input_ids)
    finally:
        handle.remove()
    return seen[0]
