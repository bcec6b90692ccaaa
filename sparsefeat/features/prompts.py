"""What a layer of a text encoder gives for prompts, in a run of the pipeline's text encoders alone, and which of its
positions are the prompt's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsefeat.pipeline import Call, Hookpoint
from sparsefeat.pipeline.hookpoints import Target, resolve

# How many prompts are encoded at a time; more is no faster on any encoder of this size.
PROMPTS_AT_ONCE = 16

# Two prompts that every tokenizer writes with one token, not the same: what the pipeline makes of them is alike but for
# the prompt's own token.
_ONE_TOKEN_EACH = ("a", "b")

# Arguments of a call that are named after the prompt and are not the text of one: HunyuanVideo's and Lumina 2's.
_TEMPLATES = ("prompt_template", "system_prompt")


@dataclass(frozen=True)
class OwnTokens:
    """Where a prompt's own tokens stand among the positions that a text encoder runs on: `start` to `stop`.

    Before them stands the mark that begins a text (CLIP) or a template (Sana's instruction, the chat of Qwen-Image), or
    nothing (T5). The tokenizer's mark that ends a text, if it comes next, is counted with them; the rest of a template
    and padding are not.
    """

    start: int
    stop: int
    begin: int
    """The position of the begin mark where that alone stands before, else `start`."""

    ids: tuple[int, ...] = ()
    """What the tokenizer calls them, where that is known."""


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
    encoder is run on the tokenizer's tokens. What the pipeline makes of the encoder's output is not computed.

    Instruments do not see these runs when it is one of them that asks, inside its own methods.
    """
    for batch in _batches(prompts):
        yield from _run(pipe, at, {"prompt": batch}, length, arguments or {}).rows


@torch.no_grad()
def layer_outputs_and_tokens(
    pipe: Any, at: Hookpoint, prompts: Sequence[str], arguments: Mapping[str, Any]
) -> Iterator[tuple[Tensor, OwnTokens]]:
    """`layer_outputs` for a call with these arguments, and for each prompt which of the positions are its own."""
    frame = _Frame.of(pipe, at, arguments)
    for batch in _batches(prompts):
        run = _run(pipe, at, {"prompt": batch}, None, arguments)
        yield from zip(run.rows, [frame.own(tokens) for tokens in run.tokens], strict=True)


@torch.no_grad()
def own_tokens(pipe: Any, at: Hookpoint, call: Call) -> list[OwnTokens]:
    """For every prompt of a call, from what the pipeline gives the encoder: the encoder itself is not run."""
    assert call.prompts is not None
    texts = {"prompt": call.prompts, **{name: call.arguments.get(name) for name in ("prompt_2", "prompt_3")}}
    frame = _Frame.of(pipe, at, call.arguments)
    return [frame.own(tokens) for tokens in _run(pipe, at, texts, None, call.arguments, tokens_only=True).tokens]


def _batches(prompts: Sequence[str]) -> Iterator[list[str]]:
    for first in range(0, len(prompts), PROMPTS_AT_ONCE):
        yield list(prompts[first : first + PROMPTS_AT_ONCE])


@dataclass(frozen=True)
class _Tokens:
    """What an encoder was given for one text, without padding: the ids, and at which positions they are."""

    ids: list[int]
    positions: list[int]

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor | None, tokenizer: Any) -> _Tokens:
        if mask is not None:
            positions = mask.nonzero()[:, 0].tolist()
            return cls(ids[mask.bool()].tolist(), positions)
        pad, end = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
        is_text = [position for position, token in enumerate(ids.tolist()) if token != pad] or [0]
        stop = is_text[-1] + 1
        if pad == end and stop < len(ids):  # CLIP pads with the mark that ends the text
            stop += 1
        return cls(ids[is_text[0] : stop].tolist(), list(range(is_text[0], stop)))


@dataclass(frozen=True)
class _Frame:
    """The ids that a pipeline puts before and after the prompt's own, for one encoder."""

    before: list[int]
    after: list[int]
    closed: bool
    """Whether the mark that ends a text comes right after the prompt."""

    @classmethod
    def of(cls, pipe: Any, at: Hookpoint, arguments: Mapping[str, Any]) -> _Frame:
        texts = {"prompt": list(_ONE_TOKEN_EACH)}
        one, other = (tokens.ids for tokens in _run(pipe, at, texts, None, arguments, tokens_only=True).tokens)
        differs = [position for position, (a, b) in enumerate(zip(one, other, strict=False)) if a != b]
        if len(one) != len(other) or len(differs) != 1:
            raise ValueError(
                f"where a prompt's tokens stand at {at} cannot be told: this {type(pipe).__name__} gives its text encoder "
                f"{one} for {_ONE_TOKEN_EACH[0]!r} and {other} for {_ONE_TOKEN_EACH[1]!r}, which should differ in one "
                "place; use a pipeline that has its own tokenizer and takes the prompt as it is."
            )
        after = one[differs[0] + 1 :]
        marks = [getattr(_tokenizer(pipe, at), name, None) for name in ("eos_token_id", "sep_token_id")]  # sep: BERT's
        return cls(one[: differs[0]], after, bool(after) and after[0] in marks)

    def own(self, tokens: _Tokens) -> OwnTokens:
        ids = tokens.ids
        # A text that was cut off at its end has only the beginning of what comes after the prompt, or none of it.
        kept = next(k for k in range(len(self.after), -1, -1) if ids[len(ids) - k :] == self.after[:k])
        stop = len(ids) - kept + int(self.closed and kept > 0)
        start = min(len(self.before), stop)
        positions = [*tokens.positions, tokens.positions[-1] + 1] if ids else [0]
        begin = positions[0 if len(self.before) == 1 else start]
        return OwnTokens(positions[start], positions[stop], begin, tuple(ids[start:stop]))


def _tokenizer(pipe: Any, at: Hookpoint) -> Any:
    tokenizer = tokenizer_of(pipe, at)
    return getattr(tokenizer, "tokenizer", tokenizer)  # inside a processor, Kandinsky 5's


@dataclass
class _Run:
    """One batch of texts: what the encoder was given and, unless only that was wanted, what the layer gave."""

    tokens: list[_Tokens] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)


class _Enough(Exception):
    """All texts went through the encoder: the rest of `encode_prompt` may need settings that only a call has."""


def _run(
    pipe: Any,
    at: Hookpoint,
    texts: Mapping[str, Any],
    length: int | None,
    arguments: Mapping[str, Any],
    tokens_only: bool = False,
) -> _Run:
    tokenizer, target = _tokenizer(pipe, at), resolve(pipe, at.path)
    prompts: list[str] = texts["prompt"]
    with _watched(target, tokenizer, len(prompts), tokens_only) as run:
        try:
            _encode(pipe, target, texts, length, arguments)
            run.tokens.clear()
            run.rows.clear()
            limit = tokenizer.model_max_length if length is None else length
            tokens = tokenizer(prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
            target.root(tokens.input_ids.to(_device(pipe, target)))
        except _Enough:
            return run
    raise ValueError(
        f"{at} did not run for each of {len(prompts)} prompts: name a layer that every prompt goes through"
    )


def _encode(
    pipe: Any, target: Target, texts: Mapping[str, Any], length: int | None, arguments: Mapping[str, Any]
) -> None:
    # Hunyuan-DiT runs one encoder at a time.
    which = int(target.root_name == "text_encoder_2")
    encode_alone(pipe, texts, arguments, device=_device(pipe, target), length=length, text_encoder_index=which)


@torch.no_grad()
def encode_alone(
    pipe: Any,
    texts: Mapping[str, Any],
    arguments: Mapping[str, Any],
    *,
    device: Any,
    length: int | None = None,
    **more: Any,
) -> Any:
    """What the pipeline's `encode_prompt` returns for prompts alone, without their negatives, once each, with the settings
    of a call with these arguments; None where it has no such method. `texts` has `prompt`, a list, and what other
    encoders are given, `prompt_2` and `prompt_3`.
    """
    encode = getattr(pipe, "encode_prompt", None)
    if encode is None:
        return None
    of_a_call = inspect.signature(type(pipe).__call__).parameters.values()
    settings = [p for p in of_a_call if p.default is not p.empty and ("prompt" not in p.name or p.name in _TEMPLATES)]
    wanted = {p.name: arguments.get(p.name, p.default) for p in settings}
    if length is not None and "max_sequence_length" in wanted:
        wanted["max_sequence_length"] = length
    wanted |= {
        "prompt_2": texts.get("prompt_2"),  # the other encoders' prompts, which Stable Diffusion 3 insists on
        "prompt_3": texts.get("prompt_3"),
        "device": device,
        "num_images_per_prompt": 1,
        "num_videos_per_prompt": 1,
        "do_classifier_free_guidance": False,
        **more,
    }
    taken = inspect.signature(encode).parameters
    return encode(texts["prompt"], **{name: value for name, value in wanted.items() if name in taken})


def _device(pipe: Any, target: Target) -> torch.device:
    return getattr(pipe, "_execution_device", None) or next(target.root.parameters()).device


@contextmanager
def _watched(target: Target, tokenizer: Any, n_texts: int, tokens_only: bool) -> Iterator[_Run]:
    """Keeps what the encoder's runs are given and the target's outputs, in order, and ends when `n_texts` are there."""
    run = _Run()
    root = getattr(target.root, "_orig_mod", target.root)
    # The class's forward: offloading puts one on the instance that says (*args, **kwargs) in older versions.
    signature = inspect.signature(type(root).forward)

    def given(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = signature.bind_partial(root, *args, **kwargs).arguments
        ids, mask = arguments["input_ids"], arguments.get("attention_mask")
        masks = [None] * len(ids) if mask is None else list(mask.cpu())
        run.tokens += [_Tokens.of(*text, tokenizer) for text in zip(ids.cpu(), masks, strict=True)]
        if tokens_only and len(run.tokens) == n_texts:
            raise _Enough

    def keep(module: Any, args: tuple[Any, ...], output: Any) -> None:
        run.rows += list(output if isinstance(output, Tensor) else output[0])

    def enough(module: Any, args: tuple[Any, ...], output: Any) -> None:
        if len(run.rows) == n_texts:
            raise _Enough

    handles = [
        target.root.register_forward_pre_hook(given, with_kwargs=True),
        target.module.register_forward_hook(keep),
        target.root.register_forward_hook(enough),
    ]
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()
