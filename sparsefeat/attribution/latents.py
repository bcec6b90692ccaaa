"""Which latents of an SAE made a concept: gradient times activation, integrated gradients, and ablation, the truth of both.

With J what the denoiser's prediction is asked for, x the rows of the block, z_i and d_i a latent's activations and direction, and
x0 = x - sum_i z_i d_i what the SAE does not explain:

    ablation   s_i = J(x) - J(x - z_i d_i)                              a run of the denoiser for every latent
    gradient   s_i = sum over rows of z_i (d_i . dJ/dx)                 one run and its backward
    integrated s_i = the same with the mean of dJ/dx on the way from x0 to x; the scores add up to J(x) - J(x0)

each summed over the images and the steps. Where J is linear in x the three are one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy import stats
from sparsefeat_kernels import SparseCode
from torch import Tensor, nn

from sparsefeat.arguments import whole
from sparsefeat.attribution.components import prompts_of
from sparsefeat.attribution.gradients import EachStep, predicted
from sparsefeat.features.attached import hookpoint_of, reconstructing
from sparsefeat.pipeline import Context, Hookpoint, attach, resolve
from sparsefeat.pipeline.call_arguments import check_arguments
from sparsefeat.pipeline.families.family import Run
from sparsefeat.pipeline.instrument import like_tensor, rows_of
from sparsefeat.pipeline.outputs import argument, put, take, take_argument
from sparsefeat.pipeline.step_window import Steps, StepWindow
from sparsefeat.sae import SAE

Objective = Callable[[Tensor, Tensor | None], Tensor]

METHODS = ("gradient", "integrated", "ablation")

# [rows, n_latents] of so many bytes at a time.
SCORE_BYTES = 64 << 20


def distance_from_nothing(said: Tensor, without: Tensor | None) -> Tensor:
    """|eps(c) - eps(nothing)|^2: CAD's objective of erasing."""
    if without is None:
        raise ValueError(
            "the pipeline ran without guidance, so there is no prediction without the concept to compare with; pass "
            "guidance_scale=3 (FLUX and others that take it: true_cfg_scale=3 and negative_prompt=''), or objective=."
        )
    return (said - without).square().sum()


@dataclass(frozen=True)
class LatentScores:
    """Latents and their scores, the highest first; a latent that was never active is not among them.

    latents: int64 [n]. scores: fp64 [n]. method: how.
    """

    latents: Tensor
    scores: Tensor
    method: str
    names: tuple[str, ...] = ()
    """Of the latents, where the SAE has some."""

    def top(self, n: int = 10) -> list[tuple[int, float]]:
        """(latent, score) of the n highest."""
        return list(zip(self.latents[:n].tolist(), self.scores[:n].tolist(), strict=True))

    def of(self, latents: Sequence[int]) -> Tensor:
        """fp64, the scores of these latents; 0 for one that was never active."""
        found = dict(zip(self.latents.tolist(), self.scores.tolist(), strict=True))
        return torch.tensor([found.get(int(latent), 0.0) for latent in latents], dtype=torch.float64)

    def rank_correlation(self, other: LatentScores) -> float:
        """Spearman's, over the latents that both have; NaN for fewer than two."""
        both = sorted(set(self.latents.tolist()) & set(other.latents.tolist()))
        return float(stats.spearmanr(self.of(both), other.of(both)).statistic) if len(both) > 1 else float("nan")

    def __str__(self) -> str:
        names = self.names or ("",) * len(self.latents)
        lines = [
            f"{latent:>8}  {score:+.4g}  {name}".rstrip()
            for (latent, score), name in zip(self.top(20), names, strict=False)
        ]
        return "\n".join([f"  latent  {self.method}", *lines])


class Block:
    """The denoiser as a function of one block's activations."""

    def __init__(self, pipe: Any, at: Hookpoint):
        self.at, self.target = at, resolve(pipe, at.path)
        self.family = self.target.family.stating(at.rows)
        if at.io == "input" or not self.family.runs_in_steps:
            raise ValueError(
                f"at={str(at)!r} must be the output or the diff of a block of the denoiser, to be attributed."
            )
        self.root = getattr(self.target.root, "_orig_mod", self.target.root)
        stream = self.family.stream_at(self.target.inner, self.target.module, at.stream)
        if stream is None:
            raise ValueError(
                f"{at.path} has no {at.stream} stream in this {type(pipe).__name__}; ask for its other one."
            )
        self.stream = stream

    def predict(self, arguments: Mapping[str, Any], edit: Callable[[Tensor], Tensor]) -> Tensor:
        """The prediction where the block's activations, in the module's own layout, are `edit` of what they would be."""
        run = Run(self.root, arguments, self.family.image_grid(self.root, arguments))
        times = 0

        def exchange(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            nonlocal times
            part = self.family.output_part(self.target.inner, self.stream, output, run)
            if part is None:
                return None
            times += 1
            whole_output = take(output, part.index)
            own = part.of(whole_output)
            base: Tensor | float = 0.0
            if self.at.io == "diff":
                given = functools.partial(argument, module, args, kwargs)
                into = self.family.input_part(self.target.inner, self.stream, given, run)
                assert into is not None
                base = into.of(take_argument(module, into.name, args, kwargs))
            edited = edit(own - base) + base
            return put(output, part.index, part.into(whole_output, edited.to(own.dtype)))

        hook = self.target.module.register_forward_hook(exchange, with_kwargs=True)
        try:
            said = predicted(self.root, arguments)
        finally:
            hook.remove()
        if times != 1:
            raise ValueError(
                f"{self.at} ran {times} times in one run of the denoiser; attribution needs a block that runs once."
            )
        return said


class _Attribution(EachStep):
    def __init__(
        self,
        block: Block,
        sae: SAE,
        method: str,
        objective: Objective,
        window: StepWindow,
        latents: Sequence[int],
        integration_steps: int,
    ):
        super().__init__(block.target.root_name)
        self.block, self.sae, self.method, self.objective = block, sae, method, objective
        self.window, self.latents, self.integration_steps = window, latents, integration_steps
        self.sums = torch.zeros(sae.n_latents, dtype=torch.float64)
        self.fired = torch.zeros(sae.n_latents, dtype=torch.bool)
        self.moments = 0

    def row(self, given: Mapping[str, Any], without: Mapping[str, Any] | None, image: int, context: Context) -> None:
        if not self.window.contains(context):
            return
        self.moments += 1
        seen: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            seen.append(x.detach())
            return x

        with torch.no_grad():
            nothing = None if without is None else predicted(self.block.root, without)
            plain = self.block.predict(given, keep)
        x = seen[0]
        if self.sae.device != x.device:
            self.sae.to(x.device)
        if self.sae.config.normalizer == "timestep":
            self.sae.at_timestep(float(torch.as_tensor(given["timestep"]).flatten()[0]))
        with torch.no_grad():
            code = self.sae.encode(rows_of(x))
            fired = code.indices[code.values != 0].long().unique().cpu()
        self.fired[fired] = True

        def value(rows: Tensor) -> Tensor:
            return self.objective(self.block.predict(given, lambda own: like_tensor(rows, own)), nothing)

        rows = rows_of(x).float()
        if self.method == "ablation":
            with torch.no_grad():
                before = self.objective(plain, nothing)
                for latent in set(self.latents) & set(fired.tolist()):
                    after = value(rows - self._part(code, rows_of(x), latent))
                    self.sums[latent] += float(before) - float(after)
            return
        if self.method == "gradient":
            gradient = self._gradient(value, rows)
        else:
            with torch.no_grad():
                explained = self.sae.decode(code, like=rows_of(x)) - self.sae.decode(_empty(code), like=rows_of(x))
            shares = [(i + 0.5) / self.integration_steps for i in range(self.integration_steps)]
            parts = [self._gradient(value, rows - (1 - share) * explained.float()) for share in shares]
            gradient = torch.stack(parts).mean(0)
        self._add(code, rows_of(x), gradient)

    @staticmethod
    def _gradient(value: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        leaf = rows.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(value(leaf), leaf)
        if not gradient.isfinite().all():
            raise ValueError("the gradient is not finite in the model's dtype; load it in bfloat16 or float32.")
        return gradient

    @torch.no_grad()
    def _part(self, code: SparseCode, x: Tensor, latent: int) -> Tensor:
        """z_i d_i in every row."""
        part = code.select([latent]).float() * self.sae.directions([latent]).float()
        scale = self.sae.row_scale(x)
        return part if scale is None else part * scale.float()

    @torch.no_grad()
    def _add(self, code: SparseCode, x: Tensor, gradient: Tensor) -> None:
        scale = self.sae.row_scale(x)
        if scale is not None:
            gradient = gradient * scale.float()
        directions = self.sae.directions(list(range(self.sae.n_latents))).float()
        row, latent, z = code.row_ids.flatten(), code.indices.flatten().long(), code.values.flatten().double()
        at_once = max(1, SCORE_BYTES // (4 * self.sae.n_latents))
        for first in range(0, code.rows, at_once):
            here = (row >= first) & (row < first + at_once)
            slopes = (gradient[first : first + at_once] @ directions.T).double()
            terms = z[here] * slopes[row[here] - first, latent[here]]
            self.sums.index_add_(0, latent[here].cpu(), terms.cpu())


def _empty(code: SparseCode) -> SparseCode:
    return replace(code, values=torch.zeros_like(code.values))


def attribute_latents(
    pipe: Any,
    sae: SAE,
    prompts: str | Sequence[str],
    *,
    method: str = "gradient",
    objective: Objective = distance_from_nothing,
    latents: Sequence[int | str] | None = None,
    integration_steps: int = 8,
    at: str | Hookpoint | None = None,
    steps: Steps = None,
    seed: int = 0,
    **call: Any,
) -> LatentScores:
    """How much each latent makes the denoiser's prediction what it is under these prompts.

    Args:
        prompts: each is drawn once; the scores add up.
        method: "gradient", "integrated" or "ablation"; see above.
        objective: J, a number of (what the denoiser says under the prompt, what it says without one), float32 tensors of one
            image; the second is None without guidance. Default: the squared distance of the two.
        latents: those to ablate; default the 20 that the gradient scores highest or lowest. The gradients are of all.
        integration_steps: points on the way from x0 to x.
        at: hookpoint in the denoiser, its output or diff; default the SAE's.
        steps: window of steps as in `Steer`.
        seed: of the images.
        call: arguments of the pipeline; the default objective needs guidance.

    Instruments of other sessions are not at work in the runs that are attributed.

    Raises:
        ValueError: a hookpoint outside the denoiser, a latent that is not there, no guidance.

    Example:
        print(sf.attribute_latents(pipe, sae, "a noto emoji of a fox", num_inference_steps=8))
    """
    where = hookpoint_of(sae, at)
    reconstructing(sae)
    texts = prompts_of("prompts", prompts)
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; use one of {', '.join(map(repr, METHODS))}.")
    chosen = None if latents is None else [sae.latent(latent) for latent in latents]
    sae.directions(chosen or [])  # names a latent that does not exist
    whole("integration_steps", integration_steps)
    whole("seed", seed, 0)
    window = StepWindow.parse(steps)
    check_arguments(pipe, call, also=inspect.signature(attribute_latents).parameters)

    def scored(how: str, ablated: Sequence[int]) -> LatentScores:
        found = _Attribution(Block(pipe, where), sae, how, objective, window, ablated, integration_steps)
        with attach(pipe, found):
            for i, text in enumerate(texts):
                pipe(text, generator=torch.Generator().manual_seed(seed + i), output_type="latent", **call)
        if not found.moments:
            raise ValueError(f"none of the steps that ran is among steps={steps!r}; leave it out or choose others.")
        of = torch.tensor(ablated, dtype=torch.int64) if how == "ablation" else found.fired.nonzero()[:, 0]
        order = of[found.sums[of].argsort(descending=True, stable=True)]
        names = tuple(sae.names.get(latent, "") for latent in order.tolist()) if sae.names else ()
        return LatentScores(order, found.sums[order], how, names)

    if method != "ablation":
        return scored(method, ())
    if chosen is None:
        guessed = scored("gradient", ())
        chosen = guessed.latents[guessed.scores.abs().argsort(descending=True)[:20]].tolist()
    return scored("ablation", chosen)
