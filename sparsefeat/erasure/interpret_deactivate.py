"""Interpret-then-Deactivate (ItD, arXiv 2503.09446): erase concepts in the text encoder.

The SAE reads one layer of the text encoder. With a(p) [n_latents] the largest value of every latent over prompt p's own
tokens and its end mark:

    selection   F = union over erased prompts of top_M(a)  \\  union over remaining prompts of top_M(a)
    edit        z'_i = strength z_i for i in F, from the first own token on;  x_hat' = decode(z')
    gate        x' = x_hat' where e(x_hat', x) >= tau, else x, for every prompt as a whole

e is the squared error of the same tokens and of CLIP's begin mark, its mean over d_model and tokens, or over d_model and
then the largest of the tokens. tau = 0.99 times the least e over the erased prompts: a prompt that the edit changes less
than it changes any of them is left alone.

What stands before the own tokens, CLIP's begin mark or a pipeline's template (Sana, Qwen-Image, HunyuanVideo), keeps its
code: it is the same in every prompt. The paper knows the begin mark alone.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from sparsefeat.arguments import number, whole
from sparsefeat.features.attached import beside, hookpoint_of, reconstructing
from sparsefeat.features.progress import progress_bar
from sparsefeat.features.prompts import OwnTokens, layer_outputs_and_tokens, own_tokens
from sparsefeat.pipeline import Activations, Call, Context, Hookpoint, Replace
from sparsefeat.pipeline.call_arguments import check_call
from sparsefeat.sae import SAE
from sparsefeat.steering.saved import SavableInstrument, register

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

    Raises:
        TypeError: `sae` is no SAE; `latents` is no list.
        ValueError: an argument that cannot be, by its name.
    """

    kept: ClassVar[tuple[str, ...]] = ("latents", "strength", "tau", "gate_reduce")

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
        self.sae: SAE = reconstructing(sae)
        try:
            given = torch.as_tensor(latents)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"latents={latents!r:.80} must be the latents' numbers, as in latents=[12, 40].") from None
        if given.numel() and (given.is_floating_point() or given.dtype == torch.bool):
            raise ValueError(f"latents={latents!r:.80} must be the latents' numbers, as in latents=[12, 40].")
        self.latents = given.to(torch.int64).unique()
        sae.directions(self.latents)  # names a latent that does not exist
        self.strength: float = number("strength", strength)
        self.gate_reduce = gate_reduce
        self.tau: float | None = None if tau is None else number("tau", tau)
        self.at: Hookpoint = hookpoint_of(sae, at)
        self._own: list[OwnTokens] | None = None
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
        at: str | Hookpoint | None = None,
        **call: Any,
    ) -> InterpretThenDeactivate:
        """Select the latents of the prompts to erase, and the gate's threshold.

        Args:
            erase, remain: prompts.
            top_m: M above; 128 in the paper for celebrities and nudity, 256 for artistic styles.
            gate: False edits every prompt, as the paper has it for nudity.
            gate_strength: the strength tau is computed with, if not `strength`; -6 in the published code for styles.
            call: arguments of the calls it will run in that say how prompts are encoded, where they are not the
                pipeline's defaults: max_sequence_length (the T5 of FLUX and SD3 attends to its padding, so what it gives
                depends on it), complex_human_instruction (Sana), prompt_template (HunyuanVideo).

        Memory: the SAE's weights, the kernel's scratch (64 MiB), and two numbers a latent; no dense code of a batch.

        Raises:
            TypeError: `sae` is no SAE; an argument that the pipeline's call does not take.
            ValueError: an argument that cannot be, by its name; no prompt to erase.
        """
        hookpoint_of(sae, at)
        for name, prompts in (("erase", erase), ("remain", remain)):
            if isinstance(prompts, str):
                raise ValueError(f"{name}={prompts!r} must be a list of prompts, as in {name}=[{prompts!r}].")
            if not isinstance(prompts, Sequence) or not all(isinstance(prompt, str) for prompt in prompts):
                raise ValueError(f"{name}={prompts!r:.80} must be a list of prompts, as in {name}=['a fox'].")
        if not erase or not all(prompt.strip() for prompt in erase):
            raise ValueError(
                f"erase={list(erase)!r} must be prompts that show the concept, at least one, none of them blank."
            )
        check_call(pipe, call, cls.fit)
        whole("top_m", top_m, 1, sae.n_latents)
        number("strength", strength)
        if gate_strength is not None:
            number("gate_strength", gate_strength)
        where = hookpoint_of(sae, at)
        n_texts = len(erase) + len(remain) + (len(erase) if gate else 0)
        with progress_bar(n_texts, "reading prompts", "prompts") as bar:
            chosen = cls._select(pipe, sae, where, erase, remain, top_m, call, bar)
            made = cls(sae, chosen, strength=strength, gate_reduce=gate_reduce, at=where)
            if gate and len(chosen):
                judge = made if gate_strength is None else made._stronger(gate_strength)
                text_rows = _text_rows(pipe, sae, where, erase, call, bar)
                errors = [judge._errors(rows, texts) for rows, texts in text_rows]
                vars(made)["tau"] = MARGIN * float(torch.cat(errors).min())
        return made

    @staticmethod
    def _select(
        pipe: Any,
        sae: SAE,
        where: Hookpoint,
        erase: Sequence[str],
        remain: Sequence[str],
        top_m: int,
        call: Mapping[str, Any],
        bar: tqdm,
    ) -> Tensor:
        """F, int64."""
        chosen = torch.zeros(sae.n_latents, dtype=torch.bool)
        for prompts, value in ((erase, True), (remain, False)):
            for rows, texts in _text_rows(pipe, sae, where, prompts, call, bar):
                for latents in _top_latents(sae, rows, texts, top_m):
                    chosen[latents] = value
        if not chosen.any():
            warnings.warn(
                f"no latent is selected, so nothing will be erased: all of the {top_m} largest of every erased prompt are "
                "also among a remaining prompt's (or none is active); raise top_m, or leave out remaining prompts like them",
                stacklevel=4,  # 2 is fit, 3 is torch.no_grad's
            )
        return chosen.nonzero()[:, 0]

    def _stronger(self, strength: float) -> InterpretThenDeactivate:
        return InterpretThenDeactivate(
            self.sae, self.latents, strength=strength, gate_reduce=self.gate_reduce, at=self.at
        )

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    def begin_call(self, call: Call) -> None:
        self._images_per_prompt = call.images_per_prompt
        self._own = None if call.prompts is None else own_tokens(call.pipe, self.at, call)

    def conditions(self) -> tuple[str, ...]:
        return ("cond",)

    def active(self, context: Context) -> bool:
        return "cond" in context.condition and len(self.latents) > 0

    def at_hookpoint(self, activations: Activations, context: Context) -> Replace:
        x = activations.rows
        beside(self.sae, activations, context)
        grid = x.view(context.batch, context.positions, -1)
        chosen = [(row, image) for row, (condition, image) in enumerate(context.entries) if condition == "cond"]
        rows = [row for row, _ in chosen]
        part = grid[rows]
        everything = OwnTokens(1, context.positions, begin=0)  # of embeddings no prompt is known
        own = self._own or [everything] * (max(context.prompt_index) + 1)
        texts = [own[image // self._images_per_prompt] for _, image in chosen]
        positions = torch.arange(context.positions, device=x.device)
        places = torch.tensor([(t.start, t.stop, t.begin) for t in texts], device=x.device)
        start, stop, begin = places[..., None].unbind(1)  # each [prompts, 1]
        edited = self.deactivated(part.flatten(0, 1), (positions < start).flatten()).view_as(part)
        if self.tau is not None:
            errors = _gate_error(edited, part, (begin <= positions) & (positions < stop), self.gate_reduce)
            edited = torch.where((errors >= self.tau)[:, None, None], edited, part.to(edited.dtype))
        out = grid.to(torch.promote_types(edited.dtype, x.dtype), copy=True)
        out[rows] = edited.to(out.dtype)
        return Replace(out.flatten(0, 1))

    def deactivated(self, x: Tensor, is_before: Tensor) -> Tensor:
        """x_hat' of rows [rows, d_model]; `is_before` [rows]: what stands before the prompt's own tokens keeps its code."""
        code = self.sae.encode(x)
        is_chosen = torch.isin(code.indices, self.latents.to(code.indices))
        values = torch.where(is_chosen & ~is_before[:, None], self.strength * code.values, code.values)
        return self.sae.decode(dataclasses.replace(code, values=values), like=x)

    def _errors(self, rows: Tensor, texts: Sequence[OwnTokens]) -> Tensor:
        """e of prompts one after the other, [prompts]."""
        is_before = torch.cat([torch.arange(t.begin, t.stop, device=rows.device) < t.start for t in texts])
        error = (self.deactivated(rows, is_before).float() - rows.float()).square().mean(-1)
        each = error.split([t.stop - t.begin for t in texts])
        return torch.stack([e.mean() if self.gate_reduce == "mean" else e.amax() for e in each])

    def __repr__(self) -> str:
        gate = "no gate" if self.tau is None else f"tau {self.tau:.4g} ({self.gate_reduce})"
        return f"InterpretThenDeactivate({len(self.latents)} latents times {self.strength:g}, {gate}, at {self.at})"


def _gate_error(edited: Tensor, x: Tensor, counts: Tensor, reduce: GateReduce) -> Tensor:
    """e(x_hat', x) above of [prompts, positions, d_model], `[prompts]`; `counts` [prompts, positions] is what counts. Below
    any threshold where nothing does, as of a blank prompt in a template."""
    error = (edited.float() - x.float()).square().mean(-1)
    if reduce == "mean":
        return error.where(counts, 0).sum(1) / counts.sum(1).clamp(min=1)
    return error.where(counts, -torch.inf).amax(1)


def _top_latents(sae: SAE, rows: Tensor, texts: Sequence[OwnTokens], top_m: int) -> Iterator[Tensor]:
    """For each of several prompts one after the other, the latents with the largest values over its own tokens; latents
    that are nowhere active do not count, however few the others are."""
    code = sae.encode(rows)
    first = 0
    for text in texts:
        last = first + text.stop - text.begin
        part = code.slice_rows(first + text.start - text.begin, last)
        largest = torch.zeros(sae.n_latents, dtype=code.values.dtype, device=rows.device)
        largest.scatter_reduce_(0, part.indices.flatten().long(), part.values.flatten(), "amax")
        top = largest.topk(top_m)
        yield top.indices[top.values > 0].cpu()
        first = last


def _text_rows(
    pipe: Any,
    sae: SAE,
    at: Hookpoint,
    prompts: Sequence[str],
    call: Mapping[str, Any],
    bar: tqdm,
    at_once: int = 64,
) -> Iterator[tuple[Tensor, list[OwnTokens]]]:
    """The layer's outputs at the positions of up to `at_once` prompts one after the other, `begin` to `stop` of each,
    `[tokens, d_model]`: one encode reads a large dictionary once for all of them."""
    for first in range(0, len(prompts), at_once):
        some = []
        for out_and_text in layer_outputs_and_tokens(pipe, at, prompts[first : first + at_once], call):
            some.append(out_and_text)
            bar.update()
        texts = [text for _, text in some]
        yield torch.cat([out[text.begin : text.stop] for out, text in some]).to(sae.device), texts
