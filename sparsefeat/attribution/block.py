"""The denoiser as a function of a block's activations, and of the latents of an SAE or transcoder there.

It is run again on the arguments that the pipeline gave it, with forward hooks of this run alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from sparsefeat_kernels import SparseCode
from torch import Tensor, nn

from sparsefeat.attribution.gradients import predicted
from sparsefeat.features.attached import hookpoint_of
from sparsefeat.pipeline import Hookpoint, resolve
from sparsefeat.pipeline.families.family import Family, Run, timestep_in
from sparsefeat.pipeline.hookpoints import Target
from sparsefeat.pipeline.instrument import rows_of
from sparsefeat.pipeline.outputs import argument, put, put_argument, take, take_argument
from sparsefeat.pipeline.part import Part
from sparsefeat.sae import SAE

# [rows, n_latents] of so many bytes at a time.
SCORE_BYTES = 64 << 20

Edit = Callable[[Tensor], Tensor]


class Block:
    """Where one block's activations come by in a run of the denoiser."""

    def __init__(self, pipe: Any, at: Hookpoint):
        self.at: Hookpoint = at
        self.target: Target = resolve(pipe, at.path)
        self.family: Family = self.target.family.stating(at.rows)
        if not self.family.runs_in_steps:
            raise ValueError(f"at={str(at)!r} must be of a block of the denoiser, to be attributed.")
        self.root: nn.Module = getattr(self.target.root, "_orig_mod", self.target.root)
        stream = self.family.stream_at(self.target.inner, self.target.module, at.stream)
        if stream is None:
            raise ValueError(
                f"{at.path} has no {at.stream} stream in this {type(pipe).__name__}; ask for its other one."
            )
        self.stream = stream

    def predict(self, arguments: Mapping[str, Any], edit: Edit) -> Tensor:
        """The prediction where the block's activations, in the module's own layout, are `edit` of what they would be."""
        with self.exchanging(arguments, edit):
            return predicted(self.root, arguments)

    @contextmanager
    def exchanging(self, arguments: Mapping[str, Any], edit: Edit) -> Iterator[None]:
        """Within, one run of the denoiser on these arguments goes on from `edit` of the block's activations."""
        run = Run(self.root, arguments, self.grid_of(arguments))
        times = 0

        def edited(own: Tensor, base: Tensor | float = 0.0) -> Tensor:
            nonlocal times
            times += 1
            return (edit(own - base) + base).to(own.dtype)

        def taken_in(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Part, Tensor] | None:
            given = functools.partial(argument, module, args, kwargs)
            part = self.family.input_part(self.target.inner, self.stream, given, run)
            return None if part is None else (part, take_argument(module, part.name, args, kwargs))

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            found = taken_in(module, args, kwargs)
            if found is None:
                return None
            part, whole = found
            return put_argument(module, part.name, args, kwargs, part.into(whole, edited(part.of(whole))))

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            part = self.family.output_part(self.target.inner, self.stream, output, run)
            if part is None:
                return None
            base: Tensor | float = 0.0
            if self.at.io == "diff":
                found = taken_in(module, args, kwargs)
                assert found is not None
                base = found[0].of(found[1])
            whole = take(output, part.index)
            return put(output, part.index, part.into(whole, edited(part.of(whole), base)))

        module = self.target.module
        hook = (
            module.register_forward_pre_hook(before, with_kwargs=True)
            if self.at.io == "input"
            else module.register_forward_hook(after, with_kwargs=True)
        )
        try:
            yield
        finally:
            hook.remove()
        if times != 1:
            raise ValueError(
                f"{self.at} ran {times} times in one run of the denoiser; attribution needs a block that runs once."
            )

    def grid_of(self, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        return self.family.image_grid(self.root, arguments)


@dataclass(frozen=True)
class Coded:
    """One run of the denoiser, coded: `read`, the activations that were encoded, `written`, those that the latents write
    to, both in the module's own layout, and the prediction.
    """

    code: SparseCode
    read: Tensor
    written: Tensor
    said: Tensor


class CodedBlock:
    """An SAE at a block: its latents write where they are read. Of a transcoder they are read at the module's input and
    written at its output.
    """

    def __init__(self, pipe: Any, sae: SAE, at: str | Hookpoint | None = None):
        where = hookpoint_of(sae, at)
        if sae.config.transcoder and where.io != "input":
            raise ValueError(
                f"at={str(where)!r} is no input, which a transcoder reads; write {where.path + ':input'!r}."
            )
        self.sae: SAE = sae
        self.read: Block = Block(pipe, where)
        self.written: Block = Block(pipe, replace(where, io="output")) if sae.config.transcoder else self.read

    @torch.no_grad()
    def run(self, arguments: Mapping[str, Any]) -> Coded:
        """The denoiser as it is."""
        seen: dict[Block, Tensor] = {}

        def keep(block: Block, x: Tensor) -> Tensor:
            seen[block] = x.detach()
            return x

        with self.read.exchanging(arguments, functools.partial(keep, self.read)):
            said = self.written.predict(arguments, functools.partial(keep, self.written))
        read, written = seen.get(self.read, seen[self.written]), seen[self.written]
        return Coded(self.encode(read, arguments), read, written, said)

    def encode(self, x: Tensor, arguments: Mapping[str, Any]) -> SparseCode:
        """Of activations in the module's layout, at the timestep of these arguments; the gradient reaches `x`."""
        if self.sae.device != x.device:
            self.sae.to(x.device)
        if self.sae.config.normalizer == "timestep":
            self.sae.at_timestep(float(torch.as_tensor(timestep_in(arguments)).flatten()[0]))
        return self.sae.encode(rows_of(x))

    @torch.no_grad()
    def part(self, found: Coded, latent: int) -> Tensor:
        """z_i d_i in every row."""
        part = found.code.select([latent]).float() * self.sae.directions([latent]).float()
        scale = self.sae.row_scale(rows_of(found.read))
        return part if scale is None else part * scale.float()

    @torch.no_grad()
    def explained(self, found: Coded) -> Tensor:
        """sum_i z_i d_i, `[rows, d_model]`."""
        like, code = rows_of(found.read), found.code
        nothing = replace(code, values=torch.zeros_like(code.values))
        return (self.sae.decode(code, like=like) - self.sae.decode(nothing, like=like)).float()

    @torch.no_grad()
    def sums(self, found: Coded, gradient: Tensor) -> Tensor:
        """fp64 [n_latents]: sum over rows of z_i (d_i . gradient), with `gradient [rows, d_model]` where they are written."""
        scale = self.sae.row_scale(rows_of(found.read))
        gradient = gradient.float() if scale is None else gradient.float() * scale.float()
        directions = self.sae.directions(list(range(self.sae.n_latents))).float()
        code, sums = found.code, torch.zeros(self.sae.n_latents, dtype=torch.float64)
        row, latent, z = code.row_ids.flatten(), code.indices.flatten().long(), code.values.flatten().double()
        at_once = max(1, SCORE_BYTES // (4 * self.sae.n_latents))
        for first in range(0, code.rows, at_once):
            here = (row >= first) & (row < first + at_once)
            slopes = (gradient[first : first + at_once] @ directions.T).double()
            sums.index_add_(0, latent[here].cpu(), (z[here] * slopes[row[here] - first, latent[here]]).cpu())
        return sums


def active_latents(code: SparseCode) -> Tensor:
    """int64, those that are not 0 somewhere."""
    return code.indices[code.values != 0].long().unique().cpu()


def finite_gradient(value: Tensor, leaf: Tensor, *, keep: bool = False) -> Tensor | None:
    """dvalue / dleaf; None where the one does not depend on the other. `keep` leaves the graph for another.

    Raises:
        ValueError: it is not finite, as in float16.
    """
    if not value.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(value, leaf, retain_graph=keep, allow_unused=True)
    if gradient is not None and not gradient.isfinite().all():
        raise ValueError("the gradient is not finite in the model's dtype; load it in bfloat16 or float32.")
    return gradient
