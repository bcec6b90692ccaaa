"""What the denoiser would be given for other prompts: its own arguments, with the prompt's embeddings exchanged.

The prompts of the call and the others are encoded by the pipeline's `encode_prompt`. Whatever among the denoiser's arguments
is what that gave for the call's own prompt, is exchanged for what it gives for another: cross-attention's text, pooled
text, masks. What the denoiser is given of the prompt and cannot be found so is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefeat.features.prompts import encode_alone
from sparsefeat.pipeline import Call


class Texts:
    """The prompts of one call and the others that are asked for, as the pipeline encodes them: each once, with its images'
    rows the same. `who` asks, for errors.
    """

    def __init__(self, call: Call, others: Sequence[str], who: str):
        self.call = call
        pipe = call.pipe
        self.who: str = who
        if call.prompts is None:
            raise ValueError(
                f"{who} exchanges the prompt for others, and this call has none that is text; call with prompt=, not with "
                "embeddings."
            )
        if not hasattr(pipe, "encode_prompt"):
            raise ValueError(
                f"{type(pipe).__name__} has no encode_prompt, by which {who} would encode other prompts; use another pipeline."
            )
        self._prompts, self._each = call.prompts, call.images_per_prompt
        own = {"prompt": call.prompts, **{name: call.arguments.get(name) for name in ("prompt_2", "prompt_3")}}
        self._own = self._encoded(own)
        self._others = {text: self._encoded({"prompt": [text]}) for text in dict.fromkeys(others)}

    @property
    def negative(self) -> str:
        """The call's negative prompt, the empty one where it has none."""
        given = self.call.arguments.get("negative_prompt")
        texts = set(given) if isinstance(given, (list, tuple)) else {given or ""}
        if len(texts) != 1:
            raise ValueError(
                f"{self.who} needs the unconditional prediction, and this call has a negative prompt for each prompt; give one "
                "for all."
            )
        return texts.pop()

    def _encoded(self, texts: Mapping[str, Any]) -> list[Tensor]:
        pipe, arguments = self.call.pipe, self.call.arguments
        attention = arguments.get("cross_attention_kwargs") or arguments.get("joint_attention_kwargs") or {}
        device = getattr(pipe, "_execution_device", None) or pipe.device
        given = encode_alone(pipe, texts, arguments, device=device, lora_scale=attention.get("scale"))
        elements = given if isinstance(given, (tuple, list)) else (given,)
        if not all(element is None or isinstance(element, Tensor) for element in elements):
            raise ValueError(
                f"{type(pipe).__name__} encodes prompts as texts of different lengths, in which {self.who} cannot exchange "
                "one for another; use a pipeline that pads them."
            )
        return [element for element in elements if element is not None]

    def exchanged(self, arguments: Mapping[str, Any], images: Sequence[int], text: str) -> dict[str, Any]:
        """The arguments of rows that are conditional, one for each of `images`, with another prompt in the place of theirs."""
        places = [image // self._each for image in images]
        found: set[int] = set()
        if text not in self._others:
            self._others[text] = self._encoded({"prompt": [text]})
        other = self._others[text]

        def exchange(value: Any) -> Any:
            if isinstance(value, Tensor):
                for index, own in enumerate(self._own):
                    if len(own) == len(self._prompts) and _is(value, own[places], self.call.autocast):
                        found.add(index)
                        return self._fitting(other[index], value, text)
                return value
            if isinstance(value, Mapping):
                return {name: exchange(one) for name, one in value.items()}
            if isinstance(value, (list, tuple)):
                return type(value)(exchange(one) for one in value)
            return value

        exchanged = {name: exchange(value) for name, value in arguments.items()}
        missed = [i for i, own in enumerate(self._own) if i not in found and not _same(own[:1], other[i][:1])]
        if missed or not found:
            raise ValueError(
                f"what {type(self.call.pipe).__name__} makes of the prompt is not among the arguments of its denoiser as "
                f"encode_prompt gives it, so {self.who} cannot exchange it for {text!r}; leave out what edits the text, "
                "or use another pipeline."
            )
        return exchanged

    def _fitting(self, other: Tensor, value: Tensor, text: str) -> Tensor:
        if other.shape[1:] != value.shape[1:]:
            raise ValueError(
                f"{text!r} becomes {list(other.shape[1:])} in {type(self.call.pipe).__name__} and the prompt "
                f"{list(value.shape[1:])}; give prompts of as many tokens, or a pipeline that pads them."
            )
        return other.to(value).expand_as(value)


def _is(value: Tensor, own: Tensor, autocast: bool) -> bool:
    """Whether each row of one tensor is that of the other: encoded in another batch, or beside autocast, it may be
    rounded otherwise."""
    if value.shape != own.shape or value.is_floating_point() != own.is_floating_point():
        return False
    own = own.to(value)
    if not value.is_floating_point():
        return torch.equal(value, own)
    narrow = autocast or value.dtype not in (torch.float32, torch.float64)
    share = (
        2e-2 if narrow else 1e-4
    )  # single elements may be off by more: of all, by well under a hundredth in bfloat16
    difference, size = (x.float().flatten(1).norm(dim=1) for x in (value - own, own))
    return bool((difference <= share * size).all())


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.to(one))
