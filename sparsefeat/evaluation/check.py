"""Does an SAE belong where it is attached? A wrong tensor, stream or normaliser runs without a word and gives garbage."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsefeat.arguments import whole
from sparsefeat.evaluation.sae_metrics import SAEMetrics, SAEQuality
from sparsefeat.features.attached import hookpoint_of
from sparsefeat.pipeline import Activations, Context, Delta, Hookpoint, Instrument, attach
from sparsefeat.pipeline.call_arguments import check_call
from sparsefeat.pipeline.hookpoints import resolve
from sparsefeat.sae import SAE

# Above the first an SAE is doubtful, above the second it explains next to nothing: published SAEs of diffusion models
# have 0.1 to 0.45 at the place they were trained on.
DOUBTFUL, WRONG = 0.6, 0.9

# Another reading is evidently the right one where it leaves less than this share of the error.
EVIDENT = 0.7


@dataclass(frozen=True)
class Check:
    """hookpoint: what was asked; quality: FVU, L0 and more of the SAE there; alternatives: FVU of other readings of the
    same rows, by a description; problem: what is evidently wrong and what to do, None if nothing is."""

    hookpoint: Hookpoint
    quality: SAEQuality
    alternatives: dict[str, float] = field(default_factory=dict)
    problem: str | None = None

    def __bool__(self) -> bool:
        return self.problem is None

    def __str__(self) -> str:
        return f"{self.hookpoint}: {self.quality}. " + (
            self.problem or f"It explains {1 - self.quality.fvu:.0%} of the variance. The SAE fits."
        )


class CheckWarning(UserWarning):
    """The SAE does not explain the activations it was given."""


@torch.no_grad()
def check(
    sae: SAE,
    pipe: Any,
    prompts: Sequence[str],
    *,
    at: str | Hookpoint | None = None,
    rows: int = 2048,
    seed: int = 0,
    **call: Any,
) -> Check:
    """Run `prompts`, measure the SAE's FVU on about `rows` of the activations, and warn if it is evidently misplaced.

    Where the FVU is above 0.6, the same rows are also read in the other ways published SAEs have: the block's input,
    output or difference, the other stream of a joint block, with and without standardisation, the transposed decoder
    (if n_latents is d_model), and as the published Concept Steerers' SAEs were trained, to reconstruct x - b_pre.

    Args:
        at: hookpoint; default the SAE's.
        rows: how many activation rows, drawn over prompts, steps and positions; conditional ones alone.
        call: arguments of the pipeline; num_inference_steps is 4 unless given.

    Returns: a `Check`, false if something is wrong. Warns with `CheckWarning` in that case.

    Raises:
        TypeError: `sae` is no SAE; an argument that the pipeline's call does not take.
        ValueError: an argument that cannot be, by its name; an SAE that depends on the timestep; a
            hookpoint of another width.
    """
    hookpoint = hookpoint_of(sae, at)
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(one, str) for one in prompts):
        raise ValueError(f"prompts is {prompts!r:.80}: pass a list with at least one prompt")
    whole("rows", rows, 2)  # an FVU needs two
    whole("seed", seed, 0)
    if sae.config.normalizer == "timestep":
        raise ValueError(
            "the SAE depends on the timestep, which rows do not say: record it with attach, which knows the step"
        )
    check_call(pipe, call, check)
    _check_width(sae, pipe, hookpoint)
    seen = _seen(sae, pipe, hookpoint, prompts, rows, seed, call)
    readings = dict(_readings(sae, hookpoint, seen))
    first = next(iter(readings))
    quality = readings.pop(first)()
    unread = _unread(pipe, hookpoint, prompts[0], seed, call)
    if unread is not None:
        warnings.warn(unread, CheckWarning, stacklevel=3)
        return Check(hookpoint, quality, problem=unread)
    if quality.fvu <= DOUBTFUL:
        return Check(hookpoint, quality)
    alternatives = {name: measured().fvu for name, measured in readings.items()}
    problem = _problem(hookpoint, quality.fvu, alternatives)
    warnings.warn(problem, CheckWarning, stacklevel=3)  # 2 is torch.no_grad's
    return Check(hookpoint, quality, alternatives, problem)


def _unread(pipe: Any, hookpoint: Hookpoint, prompt: str, seed: int, call: dict[str, Any]) -> str | None:
    """Of a text encoder: the sentence that an edit does nothing, if what the pipeline reads lies before the hookpoint.

    Found out by an edit that nothing could hide, in one denoising step with and without it.
    """
    if resolve(pipe, hookpoint.path).family.runs_in_steps:
        return None
    call = {"output_type": "latent", **call, "num_inference_steps": 1}
    if "output_type" not in inspect.signature(type(pipe).__call__).parameters:
        del call["output_type"]
    given = []
    for push in (None, _Push(hookpoint, seed)):
        with attach(pipe, push) if push is not None else contextlib.nullcontext():
            given.append(pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **call)[0])
    if not _equal(*given):
        return None
    return (
        f"an edit at {hookpoint} changes nothing: {type(pipe).__name__} reads hidden states of its text encoder that come "
        "before it, so use an SAE of an earlier layer"
    )


class _Push(Instrument):
    """Adds noise as large as the activations, everywhere."""

    def __init__(self, hookpoint: Hookpoint, seed: int):
        self.hookpoint, self.seed = hookpoint, seed

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.hookpoint,)

    def at_hookpoint(self, activations: Activations, context: Context) -> Delta:
        rows = activations.rows
        noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float32)
        return Delta(noise.to(rows.device) * rows.float().square().mean().sqrt())


def _equal(one: Any, other: Any) -> bool:
    """Of what pipelines give: tensors, arrays, images, lists of these."""
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool((torch.as_tensor(np.asarray(one)) == torch.as_tensor(np.asarray(other))).all())


def _check_width(sae: SAE, pipe: Any, hookpoint: Hookpoint) -> None:
    """Before anything runs, where the model tells the width."""
    target = resolve(pipe, hookpoint.path)
    width = target.family.width(target.module, "input" if hookpoint.io == "input" else "output")
    if width not in (None, sae.d_model):
        raise ValueError(
            f"the SAE is {sae.d_model} wide, but {hookpoint} is {width} wide in this {type(pipe).__name__}: it was made "
            "for another model or another hookpoint (sparsefeat.hookpoints(pipe) lists all with their widths)"
        )


def _problem(hookpoint: Hookpoint, fvu: float, alternatives: dict[str, float]) -> str:
    measured = f"the SAE leaves {fvu:.0%} of the variance at {hookpoint} unexplained"
    best = min(alternatives, key=alternatives.__getitem__, default=None)
    if best is not None and alternatives[best] < EVIDENT * min(fvu, 1.0):
        return f"{measured}, but {alternatives[best]:.0%} {best}: that is evidently what it was trained on"
    how_bad = "explains next to nothing there" if fvu > WRONG else "fits badly"
    return (
        f"{measured} and {how_bad}: check its hookpoint, its base model and the prompts (other readings of this block: "
        + ", ".join(f"{value:.0%} {name}" for name, value in alternatives.items())
        + ")"
    )


def _readings(
    sae: SAE, hookpoint: Hookpoint, seen: dict[tuple[str, str], Tensor]
) -> Iterator[tuple[str, Callable[[], SAEQuality]]]:
    """The SAE's own reading first, then every other that the rows allow."""

    def pairs(io: str, stream: str) -> tuple[Tensor, Tensor] | None:
        given, gives = seen.get(("input", stream)), seen.get(("output", stream))
        if sae.config.transcoder:
            return None if given is None or gives is None or io == "diff" else (given, gives)
        if io == "diff":
            if given is None or gives is None or given.shape != gives.shape:
                return None
            rows = gives - given
        else:
            found = seen.get((io, stream))
            if found is None:
                return None
            rows = found
        return None if rows.shape[1] != sae.d_model else (rows, rows)

    def measured(model: SAE, rows: tuple[Tensor, Tensor], shift: Tensor | None = None) -> Callable[[], SAEQuality]:
        return lambda: _measure(model, *rows, shift)

    own = pairs(hookpoint.io, hookpoint.stream)
    if own is None:
        widths = ", ".join(f"{io} {rows.shape[1]}" for (io, stream), rows in seen.items() if stream == hookpoint.stream)
        raise ValueError(
            f"{hookpoint} (stream {hookpoint.stream!r}) gives no rows of the SAE's width, {sae.d_model}: its widths are "
            f"{widths or 'none'}; name another hookpoint"
        )
    yield "", measured(sae, own)
    streams = sorted({stream for _, stream in seen}, key=lambda stream: stream != hookpoint.stream)
    for stream, io in itertools.product(streams, ("output", "diff", "input")):
        rows = pairs(io, stream)
        if (io, stream) != (hookpoint.io, hookpoint.stream) and rows is not None and not sae.config.transcoder:
            where = Hookpoint(hookpoint.path, io, stream)
            yield f"of {where}" + (f" (stream {stream!r})" if len(streams) > 1 else ""), measured(sae, rows)
    other = "b_pre" if sae.config.normalizer == "standardize" else "standardize"
    if sae.config.normalizer in ("none", "b_pre", "standardize"):
        yield f"with normalizer={other!r}", measured(_like(sae, normalizer=other), own)
    if sae.n_latents == sae.d_model:
        yield "with the decoder transposed", measured(_like(sae, W_dec=sae.W_dec.T.contiguous()), own)
    if sae.b_pre.any():
        yield (
            "if b_pre is added to the reconstruction once more (Concept Steerers' training target)",
            measured(sae, own, sae.b_pre),
        )


def _measure(sae: SAE, x: Tensor, target: Tensor, shift: Tensor | None) -> SAEQuality:
    metrics = SAEMetrics(sae.d_model, sae.n_latents, sae.device)
    for rows, wanted in zip(x.split(8192), target.split(8192), strict=True):
        code = sae.encode(rows)
        x_hat = sae.decode(code, like=rows).float()
        metrics.update(wanted, x_hat if shift is None else x_hat + shift, code)
    return metrics.result()


def _like(sae: SAE, normalizer: str | None = None, **tensors: Tensor) -> SAE:
    """The same SAE, sharing its tensors, but for these."""
    config = dataclasses.replace(sae.config, normalizer=normalizer or sae.config.normalizer)
    with torch.device("meta"):
        other = SAE(config)
    other.load_state_dict({**sae.state_dict(), **tensors}, assign=True)
    return other.eval()


class _Sample(Instrument):
    """Keeps some conditional rows of every run of the block, the same positions of its inputs and outputs."""

    def __init__(self, hookpoints: Sequence[Hookpoint], rows_per_run: int, seed: int):
        self._hookpoints = tuple(hookpoints)
        self.rows_per_run, self.seed = rows_per_run, seed
        self.kept: dict[tuple[str, str], list[Tensor]] = {}

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return self._hookpoints

    def at_hookpoint(self, activations: Activations, context: Context) -> None:
        assert context.hookpoint is not None
        kept = self.kept.setdefault((context.hookpoint.io, context.hookpoint.stream), [])
        generator = torch.Generator().manual_seed(self.seed + len(kept))
        conditional = context.row_condition().nonzero()[:, 0]
        chosen = torch.randperm(len(conditional), generator=generator)[: self.rows_per_run]
        kept.append(activations.rows[conditional[chosen.to(conditional.device)]].detach().float().cpu())


def _seen(
    sae: SAE, pipe: Any, hookpoint: Hookpoint, prompts: Sequence[str], rows: int, seed: int, call: dict[str, Any]
) -> dict[tuple[str, str], Tensor]:
    """(io, stream) -> rows of the block's inputs and outputs, as far as it has them."""
    target = resolve(pipe, hookpoint.path)
    family, module = target.family, target.module
    streams = family.streams(target.path.partition(".")[2], module)
    streams = streams if len(streams) > 1 else (hookpoint.stream,)
    places = [Hookpoint(hookpoint.path, io, stream) for stream in streams for io in ("input", "output")]
    call = {"num_inference_steps": 4, **call}
    runs = len(prompts) * (call["num_inference_steps"] if family.runs_in_steps else 1)
    sample = _Sample(places, max(1, math.ceil(rows / runs)), seed)
    with attach(pipe, sample):
        for number, prompt in enumerate(prompts):
            pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed + number), **call)
    return {place: torch.cat(kept).to(sae.device) for place, kept in sample.kept.items()}
