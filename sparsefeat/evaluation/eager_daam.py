"""DAAM as it computes itself: the whole matrix of every cross-attention, a map kept for every layer and head.

What `HeatMaps` is measured against: an attention processor in the place of diffusers', written from DAAM's formula (Tang et
al., ACL 2023; the head of `sparsefeat.attention.heat_maps` has it), with its clamp after every map's resize.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def spelled_at(tokenizer: Any, prompt: str, word: str) -> list[int]:
    """The word's tokens, found as DAAM finds them: its spelling among the prompt's, after the start token."""
    spelled, wanted = tokenizer.tokenize(prompt.lower()), tokenizer.tokenize(word.lower())
    places = [i for i in range(len(spelled)) if spelled[i : i + len(wanted)] == wanted]
    return [1 + place + i for place in places for i in range(len(wanted))]


class EagerDAAM:
    """Within `attached(pipe)`, probabilities of the second half of every batch (`guidance`), or of all of it, are summed
    over steps; `maps(image)` is then [tokens, h, w], and `forget()` begins anew."""

    def __init__(self, guidance: bool):
        self.guidance = guidance
        self._sums: dict[str, Tensor] = {}
        self._grids: dict[int, tuple[int, int]] = {}

    def forget(self) -> None:
        self._sums = {}

    @contextmanager
    def attached(self, pipe: Any) -> Iterator[EagerDAAM]:
        unet = pipe.unet
        before = unet.attn_processors
        own = {
            name: _Eager(self, name) if ".attn2." in name and not name.startswith("mid_block") else processor
            for name, processor in before.items()
        }

        def sizes(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            height, width = (args[0] if args else kwargs["sample"]).shape[-2:]
            while height * width > 1:
                self._grids[height * width] = height, width
                height, width = (height + 1) // 2, (width + 1) // 2

        handle = unet.register_forward_pre_hook(sizes, with_kwargs=True)
        unet.set_attn_processor(own)
        try:
            yield self
        finally:
            handle.remove()
            unet.set_attn_processor(before)

    def seen(self, name: str, probabilities: Tensor) -> None:
        if self.guidance:
            probabilities = probabilities[len(probabilities) // 2 :]
        self._sums[name] = self._sums[name] + probabilities if name in self._sums else probabilities

    def word(self, image: int, tokenizer: Any, prompt: str, word: str) -> Tensor:
        """[h, w], the mean over the word's tokens."""
        return self.maps(image)[spelled_at(tokenizer, prompt, word)].mean(0)

    def maps(self, image: int) -> Tensor:
        large = max(self._grids[held.shape[2]] for held in self._sums.values())
        every = [
            F.interpolate(head.T.unflatten(-1, self._grids[held.shape[2]])[None], size=large, mode="bicubic")[0].clamp(
                min=0
            )
            for held in self._sums.values()
            for head in held[image]
        ]
        return torch.stack(every).mean(0)


class _Eager:
    """A cross-attention with its matrix."""

    def __init__(self, daam: EagerDAAM, name: str):
        self._daam, self._name = daam, name

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        query, key, value = (
            project(given).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project, given in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        probabilities = (query @ key.transpose(2, 3) * attn.scale).softmax(-1)
        self._daam.seen(self._name, probabilities.float())
        out = (probabilities @ value).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)
