"""A steering vector from a prompt: what an SAE of a text encoder sees in it, added to every other prompt.

Concept Steerers (Kim and Ghadiyaram, arXiv 2501.19066). With x_C(p) the layer's output at token p of the concept prompt,
padded to the encoder's full length:

    v(p) = strength * sum over i of relu(w_i (x_C(p) - b_pre) + b_i) d_i          all latents, no top-k, no bias

The conditional prompt's layer output gets + v(p), the unconditional one's - v(p), at every position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefeat.arguments import number
from sparsefeat.features.attached import hookpoint_of
from sparsefeat.features.prompts import layer_outputs, tokenizer_of
from sparsefeat.pipeline import Activations, Call, Context, Delta, FrozenInstrument, Hookpoint
from sparsefeat.sae import SAE
from sparsefeat.steering.where import check_condition, condition_signs

# [rows, n_latents] of so many bytes at a time: the concept prompt's code is dense.
CODE_BYTES = 64 << 20


class PromptVector(FrozenInstrument):
    """Instrument: adds the vector of a concept prompt to what one or several text encoders give.

    It is computed in the first call, by the encoders alone, and again only for another length of their input
    (`max_sequence_length`): no extra run of the pipeline.

    Args:
        sae: of one layer's outputs, or of those of several encoders side by side (the SDXL SAEs: 768 + 1280 columns).
        concept: the prompt to steer towards (strength above 0) or away from (below).
        strength: factor of the vector; the published ones lie between -0.15 and -0.7.
        at: hookpoints, one an encoder, in the order of the SAE's columns; default the SAE's.
        condition: "cond+uncond-" (default, the paper's for Stable Diffusion and SDXL), or as in `Steer`; without guidance
            there are conditional prompts alone.

    Raises:
        TypeError: `sae` is no SAE.
        ValueError: an argument that cannot be, by its name.
    """

    def __init__(
        self,
        sae: SAE,
        concept: str,
        strength: float,
        *,
        at: str | Hookpoint | Sequence[str | Hookpoint] | None = None,
        condition: str = "cond+uncond-",
    ):
        if not isinstance(concept, str) or not concept.strip():
            raise ValueError(f"concept={concept!r} must be the text of a prompt, as in concept='a fox'.")
        self.concept: str = concept
        self.strength: float = number("strength", strength)
        places: Sequence[str | Hookpoint | None] = (at,) if at is None or isinstance(at, (str, Hookpoint)) else at
        self.at: tuple[Hookpoint, ...] = tuple(hookpoint_of(sae, place) for place in places)
        if not self.at or len(set(self.at)) < len(self.at):
            raise ValueError(f"at={at!r:.80} must be one hookpoint or a list of different ones.")
        self.condition: str = check_condition(condition)
        # Not `self.sae`: `attach` compares that one's width with each hookpoint's, and here it is the sum of them.
        self.codec = sae
        self._now: dict[str, Tensor] = {}

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return self.at

    def prepare(self, pipe: Any) -> None:
        for place in self.at:
            tokenizer_of(pipe, place)  # names a hookpoint that is not in a text encoder

    def begin_call(self, call: Call) -> None:
        self._now = self._of_call(call.pipe, call.arguments)

    def vector(self, at: str | Hookpoint) -> Tensor:
        """v of one hookpoint for the call that is going on, `[positions, d_model]` in float32."""
        return self._now[str(at)]

    def at_hookpoint(self, activations: Activations, context: Context) -> Delta:
        vector = self._now[str(context.hookpoint)]
        if context.positions != len(vector):
            raise ValueError(
                f"{context.hookpoint} ran on {context.positions} tokens, but the vector of {self.concept!r} has "
                f"{len(vector)} positions: encode prompts with the pipeline's own tokenizer and length."
            )
        signs = condition_signs(self.condition, context).to(context.device)
        rows = signs[:, None, None] * vector.to(context.device)
        return Delta(rows.flatten(0, 1))

    @torch.no_grad()
    def _of_call(self, pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        lengths = tuple(_length(pipe, place, arguments) for place in self.at)
        if len(set(lengths)) > 1:
            raise ValueError(
                f"the encoders at {', '.join(map(str, self.at))} run on {lengths} tokens: they must agree."
            )
        given = [
            next(layer_outputs(pipe, place, [self.concept], length, arguments))
            for place, length in zip(self.at, lengths, strict=True)
        ]
        widths, sae = [part.shape[1] for part in given], self.codec
        if sum(widths) != sae.d_model:
            raise ValueError(
                f"the SAE is {sae.d_model} wide, but {' + '.join(map(str, widths))} come from "
                f"{', '.join(map(str, self.at))}: it was made for another model or other hookpoints."
            )
        vector = self.strength * dense_relu_decode(sae, torch.cat([part.to(sae.device) for part in given], 1))
        return {str(place): part for place, part in zip(self.at, vector.split(widths, 1), strict=True)}


def dense_relu_decode(sae: SAE, x: Tensor) -> Tensor:
    """`sum over i of relu(pre_i) d_i` of every row of `x [rows, d_model]`, in float32 and without bias: the code is dense,
    whatever the SAE's own activation."""
    x = sae.normalize(x).float() - sae.b_pre.float()
    W_enc, b_enc, W_dec = sae.W_enc.float(), sae.b_enc.float(), sae.W_dec.float()
    rows = max(1, CODE_BYTES // (4 * sae.n_latents))
    return torch.cat([torch.addmm(b_enc, part, W_enc.T).relu_() @ W_dec for part in x.split(rows)])


def _length(pipe: Any, at: Hookpoint, arguments: Mapping[str, Any]) -> int:
    """How many tokens the pipeline pads a prompt to: T5's is an argument of the call, CLIP's the tokenizer's limit."""
    tokenizer = tokenizer_of(pipe, at)
    asked = arguments.get("max_sequence_length")
    is_clip = "CLIP" in type(tokenizer).__name__
    return asked if isinstance(asked, int) and not is_clip else tokenizer.model_max_length
