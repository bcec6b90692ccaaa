"""What a layer of a text encoder gives for prompts, in a run of the pipeline's text encoders alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
def layer_outputs(
    pipe: Any,
    at: Hookpoint,
    prompts: Sequence[str],
    length: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Iterator[Tensor]:
    """For every prompt, padded to `length` tokens (default: the pipeline's own), `[length, width]`. `arguments` are those
    of the call it is for, where one is going on.

    They are encoded by the pipeline's `encode_prompt`: its templates, its length and its attention mask, without which a
    T5 attends to the padding and gives other outputs. Where a pipeline has none, or it does not run this encoder, the
    encoder is run on the tokenizer's tokens.

    Instruments do not see these runs when it is one of them that asks, inside its own methods.
    """
    tokenizer, target = tokenizer_of(pipe, at), resolve(pipe, at.path)
    for first in range(0, len(prompts), PROMPTS_AT_ONCE):
        batch = list(prompts[first : first + PROMPTS_AT_ONCE])
        with _outputs(target) as seen:
            _encode(pipe, target, batch, length, arguments or {})
            if not seen or len(seen[0]) != len(batch):
                seen.clear()
                limit = tokenizer.model_max_length if length is None else length
                tokens = tokenizer(batch, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
                target.root(tokens.input_ids.to(_device(pipe, target)))
        yield from seen[0]


def _encode(pipe: Any, target: Target, prompts: list[str], length: int | None, arguments: Mapping[str, Any]) -> None:
    """The prompts alone, without their negatives, once each, with the settings that a call has by default."""
    encode = getattr(pipe, "encode_prompt", None)
    if encode is None:
        return
    of_a_call = inspect.signature(type(pipe).__call__).parameters.values()
    wanted = {p.name: p.default for p in of_a_call if p.default is not p.empty and "prompt" not in p.name}
    wanted |= {name: value for name, value in arguments.items() if name in wanted}
    if length is not None and "max_sequence_length" in wanted:
        wanted["max_sequence_length"] = length
    wanted |= {
        "prompt_2": None,  # the other encoders' prompts, which Stable Diffusion 3 insists on: the same
        "prompt_3": None,
        "device": _device(pipe, target),
        "num_images_per_prompt": 1,
        "num_videos_per_prompt": 1,
        "do_classifier_free_guidance": False,
        "text_encoder_index": int(target.root_name == "text_encoder_2"),  # Hunyuan-DiT runs one at a time
    }
    taken = inspect.signature(encode).parameters
    encode(prompts, **{name: value for name, value in wanted.items() if name in taken})


def _device(pipe: Any, target: Target) -> torch.device:
    return getattr(pipe, "_execution_device", None) or next(target.root.parameters()).device


@contextmanager
def _outputs(target: Target) -> Iterator[list[Tensor]]:
    """The outputs of the target's runs, in order."""
    seen: list[Tensor] = []

    def keep(module: Any, args: tuple, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    handle = target.module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
