"""Interpret-then-Deactivate (ItD, arXiv 2503.09446): erase concepts in the text encoder.

The SAE reads one layer of the text encoder. With a(p) [n_latents] the largest value of every latent over the tokens of
prompt p, the first one left out:

    selection   F = union over erased prompts of top_M(a)  \\  union over remaining prompts of top_M(a)
    edit        z'_i = strength z_i for i in F, at every token but the first;  x_hat' = decode(z')
    gate        x' = x_hat' where e(x_hat', x) >= tau, else x, for every prompt as a whole

e is the squared error of a prompt's tokens (padding left out, the first token not), its mean over d_model and tokens, or
over d_model and then the largest of the tokens. tau = 0.99 times the least e over the erased prompts: a prompt that
the edit changes less than it changes any of them is left alone.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sparsefeat.features.attached import beside, hookpoint_of, reconstructing
from sparsefeat.features.prompts import layer_outputs, n_tokens, tokenizer_of
from sparsefeat.pipeline import Activations, Call, Context, Hookpoint, Replace
from sparsefeat.sae import SAE
from sparsefeat.steering.saved import SavableInstrument, register, save_instrument

GateReduce = Literal["mean", "max_token"]

# tau, as a part of the least error of an erased prompt.
MARGIN = 0.99


@register("sparsefeat.erasure:InterpretThenDeactivate")
class InterpretThenDeactivate(SavableInstrument):
    """Instrument: ItD's erasure. Made by `InterpretThenDeactivate.fit`.

    Only conditional prompts are edited. Padding is never looked at, for the selection or for the gate: the published
    code's answers depend on the longest prompt of the batch. Padding is edited, though: the layer lets it see the prompt.

    Args:
        latents: F.
        strength: factor of their values; the paper's -8.
        tau: the gate's threshold; None edits every prompt.
        gate_reduce: "mean" or "max_token", above. The published code takes the mean for tau and for the gate with
            artistic styles; with celebrities the largest token for tau and the mean for the gate, which do not compare.
        at: hookpoint; default the SAE's.
    """

    def __init__(
        self,
        sae: SAE,
        latents: Sequence[int] | Tensor,
        *,
        strength: float = -8.0,
        tau: float | None = None,
        gate_reduce: GateReduce = "mean",
        at: str | Hookpoint | None = None,
    ):
        if gate_reduce not in ("mean", "max_token"):
            raise ValueError(f'gate_reduce={gate_reduce!r} is not known; use "mean" or "max_token".')
        self.sae = reconstructing(sae)
        self.latents = torch.as_tensor(latents, dtype=torch.int64).unique()
        sae.directions(self.latents)  # names a latent that does not exist
        self.strength, self.tau, self.gate_reduce = float(strength), tau, gate_reduce
        self.at = hookpoint_of(sae, at)
        self._lengths: list[int] | None = None
        self._images_per_prompt = 1

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        pipe: Any,
        sae: SAE,
        erase: Sequence[str],
        remain: Sequence[str] = (),
        *,
        top_m: int = 128,
        strength: float = -8.0,
        gate: bool = True,
        gate_reduce: GateReduce = "mean",
        gate_strength: float | None = None,
        max_sequence_length: int | None = None,
        at: str | Hookpoint | None = None,
    ) -> InterpretThenDeactivate:
        """Select the latents of the prompts to erase, and the gate's threshold.

        Args:
            erase, remain: prompts.
            top_m: M above; 128 in the paper for celebrities and nudity, 256 for artistic styles.
            gate: False edits every prompt, as the paper has it for nudity.
            gate_strength: the strength tau is computed with, if not `strength`; -6 in the published code for styles.
            max_sequence_length: that of the calls it will run in, if not the pipeline's default: the T5 of FLUX and SD3
                attends to its padding, so what it gives depends on it.

        Memory: the SAE's weights, the kernel's scratch (64 MiB), and two numbers a latent; no dense code of a batch.
        """
        for name, prompts in (("erase", erase), ("remain", remain)):
            if isinstance(prompts, str):
                raise ValueError(f"{name}={prompts!r} must be a list of prompts, as in {name}=[{prompts!r}].")
        if not erase:
            raise ValueError("erase=[] is empty; give at least one prompt that shows the concept.")
        if not 1 <= top_m <= sae.n_latents:
            raise ValueError(f"top_m={top_m} must be from 1 to the SAE's {sae.n_latents} latents.")
        where = hookpoint_of(sae, at)
        chosen = torch.zeros(sae.n_latents, dtype=torch.bool)
        for prompts, value in ((erase, True), (remain, False)):
            for rows, lengths in _text_rows(pipe, sae, where, prompts, max_sequence_length):
                for latents in _top_latents(sae, rows, lengths, top_m):
                    chosen[latents] = value
        if not chosen.any():
            warnings.warn(
                f"no latent is selected, so nothing will be erased: all of the {top_m} largest of every erased prompt are "
                "also among a remaining prompt's (or none is active); raise top_m, or leave out remaining prompts like them",
                stacklevel=3,  # 2 is torch.no_grad's
            )
        made = cls(sae, chosen.nonzero()[:, 0], strength=strength, gate_reduce=gate_reduce, at=where)
        if gate and len(made.latents):
            judge = made if gate_strength is None else made._stronger(gate_strength)
            text_rows = _text_rows(pipe, sae, where, erase, max_sequence_length)
            errors = [judge._errors(rows, lengths) for rows, lengths in text_rows]
            made.tau = MARGIN * float(torch.cat(errors).min())
        return made

    def _stronger(self, strength: float) -> InterpretThenDeactivate:
        return InterpretThenDeactivate(
            self.sae, self.latents, strength=strength, gate_reduce=self.gate_reduce, at=self.at
        )

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    def begin_call(self, call: Call) -> None:
        self._images_per_prompt = call.images_per_prompt
        tokenizer = tokenizer_of(call.pipe, self.at)
        self._lengths = None if call.prompts is None else [n_tokens(tokenizer, prompt) for prompt in call.prompts]

    def active(self, context: Context) -> bool:
        return "cond" in context.condition and len(self.latents) > 0

    @torch.no_grad()
    def at_hookpoint(self, activations: Activations, context: Context) -> Replace:
        x = activations.rows
        beside(self.sae, activations)
        grid = x.view(context.batch, context.positions, -1)
        chosen = [row for row, condition in enumerate(context.condition) if condition == "cond"]
        part = grid[chosen]
        is_first = torch.arange(part[..., 0].numel(), device=x.device) % context.positions == 0
        edited = self.deactivated(part.flatten(0, 1), is_first).view_as(part)
        if self.tau is not None:
            prompts = [context.prompt_index[row] // self._images_per_prompt for row in chosen]
            lengths = [
                min(self._lengths[p], context.positions) if self._lengths else context.positions for p in prompts
            ]
            errors = _gate_error(edited, part, lengths, self.gate_reduce)
            edited = torch.where((errors >= self.tau)[:, None, None], edited, part.to(edited.dtype))
        out = grid.to(torch.promote_types(edited.dtype, x.dtype), copy=True)
        out[chosen] = edited.to(out.dtype)
        return Replace(out.flatten(0, 1))

    def deactivated(self, x: Tensor, is_first: Tensor) -> Tensor:
        """x_hat' of rows [rows, d_model]; `is_first` [rows]: a prompt's first token, which keeps its code."""
        code = self.sae.encode(x)
        is_chosen = torch.isin(code.indices, self.latents.to(code.indices))
        values = torch.where(is_chosen & ~is_first[:, None], self.strength * code.values, code.values)
        return self.sae.decode(dataclasses.replace(code, values=values), like=x)

    def _errors(self, rows: Tensor, lengths: Sequence[int]) -> Tensor:
        """e of prompts one after the other, [prompts]."""
        counts = torch.tensor(lengths, device=rows.device)
        is_first = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        is_first[counts.cumsum(0) - counts] = True
        error = (self.deactivated(rows, is_first).float() - rows.float()).square().mean(-1)
        return torch.stack([e.mean() if self.gate_reduce == "mean" else e.amax() for e in error.split(list(lengths))])

    def save(self, folder: str | os.PathLike[str], include_sae: bool = True) -> None:
        """Write the selection and the gate, and by default the SAE, for `load_instrument(folder)`."""
        settings = {
            "strength": self.strength,
            "tau": self.tau,
            "gate_reduce": self.gate_reduce,
            "at": [str(self.at), self.at.stream],
        }
        save_instrument(self, folder, settings, {"latents": self.latents}, include_sae)

    @classmethod
    def from_saved(cls, sae: SAE, config: dict[str, Any], tensors: dict[str, Tensor]) -> InterpretThenDeactivate:
        at = Hookpoint.parse(*config["at"])
        settings = {name: config[name] for name in ("strength", "tau", "gate_reduce")}
        return cls(sae, tensors["latents"], at=at, **settings)

    def __repr__(self) -> str:
        gate = "no gate" if self.tau is None else f"tau {self.tau:.4g} ({self.gate_reduce})"
        return f"InterpretThenDeactivate({len(self.latents)} latents times {self.strength:g}, {gate}, at {self.at})"


def _gate_error(edited: Tensor, x: Tensor, lengths: Sequence[int], reduce: GateReduce) -> Tensor:
    """e(x_hat', x) above of [prompts, positions, d_model], `[prompts]`: the first `length` positions of each count."""
    error = (edited.float() - x.float()).square().mean(-1)
    counts = torch.tensor(lengths, device=x.device)
    is_text = torch.arange(x.shape[1], device=x.device) < counts[:, None]
    if reduce == "mean":
        return error.where(is_text, 0).sum(1) / counts
    return error.where(is_text, -torch.inf).amax(1)


def _top_latents(sae: SAE, rows: Tensor, lengths: Sequence[int], top_m: int) -> Iterator[Tensor]:
    """For each of several prompts one after the other, the latents with the largest values over its rows, the first row
    left out; latents that are nowhere active do not count, however few the others are."""
    code = sae.encode(rows)
    first = 0
    for length in lengths:
        part = code.slice_rows(first + 1, first + length)
        largest = torch.zeros(sae.n_latents, dtype=code.values.dtype, device=rows.device)
        largest.scatter_reduce_(0, part.indices.flatten().long(), part.values.flatten(), "amax")
        top = largest.topk(top_m)
        yield top.indices[top.values > 0].cpu()
        first += length


def _text_rows(
    pipe: Any, sae: SAE, at: Hookpoint, prompts: Sequence[str], length: int | None, at_once: int = 64
) -> Iterator[tuple[Tensor, list[int]]]:
    """The layer's outputs without padding, of up to `at_once` prompts one after the other, `[tokens, d_model]`, and how
    many each has: one encode reads a large dictionary once for all of them."""
    tokenizer = tokenizer_of(pipe, at)
    for first in range(0, len(prompts), at_once):
        some = prompts[first : first + at_once]
        outputs = list(layer_outputs(pipe, at, some, length))
        counts = [min(n_tokens(tokenizer, prompt), len(out)) for prompt, out in zip(some, outputs, strict=True)]
        yield torch.cat([out[:count] for out, count in zip(outputs, counts, strict=True)]).to(sae.device), counts
