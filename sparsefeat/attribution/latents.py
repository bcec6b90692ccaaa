"""Which latents of an SAE made a concept: gradient times activation, integrated gradients, and ablation, the truth of both.

With J what the denoiser's prediction is asked for, x the rows of the block, z_i and d_i a latent's activations and direction, and
x0 = x - sum_i z_i d_i what the SAE does not explain:

    ablation   s_i = J(x) - J(x - z_i d_i)                              a run of the denoiser for every latent
    gradient   s_i = sum over rows of z_i (d_i . dJ/dx)                 one run and its backward
    integrated s_i = the same with the mean of dJ/dx on the way from x0 to x; the scores add up to J(x) - J(x0)

each summed over the images and the steps. Where J is linear in x the three are one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from sparsefeat.arguments import taking_gradients, whole
from sparsefeat.attribution.block import CodedBlock, active_latents, finite_gradient
from sparsefeat.attribution.components import prompts_of
from sparsefeat.attribution.gradients import EachStep, predicted
from sparsefeat.pipeline import Context, Hookpoint, attach
from sparsefeat.pipeline.call_arguments import check_call
from sparsefeat.pipeline.instrument import like_tensor, rows_of
from sparsefeat.pipeline.step_window import Steps, StepWindow
from sparsefeat.sae import SAE

Objective = Callable[[Tensor, Tensor | None], Tensor]

METHODS = ("gradient", "integrated", "ablation")


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


class _Attribution(EachStep):
    def __init__(
        self,
        block: CodedBlock,
        method: str,
        objective: Objective,
        window: StepWindow,
        latents: Sequence[int],
        integration_steps: int,
    ):
        super().__init__(block.read.target.root_name)
        self.block, self.method, self.objective = block, method, objective
        self.window, self.latents, self.integration_steps = window, latents, integration_steps
        self.sums = torch.zeros(block.sae.n_latents, dtype=torch.float64)
        self.fired = torch.zeros(block.sae.n_latents, dtype=torch.bool)
        self.moments = 0

    def row(self, given: Mapping[str, Any], without: Mapping[str, Any] | None, image: int, context: Context) -> None:
        if not self.window.contains(context):
            return
        self.moments += 1
        block = self.block
        with torch.no_grad():
            nothing = None if without is None else predicted(block.written.root, without)
        found = block.run(given)
        fired = active_latents(found.code)
        self.fired[fired] = True

        def value(rows: Tensor) -> Tensor:
            said = block.written.predict(given, lambda own: like_tensor(rows, own))
            return self.objective(said, nothing)

        def gradient(rows: Tensor) -> Tensor:
            leaf = rows.detach().requires_grad_()
            with taking_gradients("attribute_latents"):
                slope = finite_gradient(value(leaf), leaf)
            return torch.zeros_like(rows) if slope is None else slope

        rows = rows_of(found.written).float()
        if self.method == "ablation":
            with torch.no_grad():
                before = float(self.objective(found.said, nothing))
                for latent in set(self.latents) & set(fired.tolist()):
                    self.sums[latent] += before - float(value(rows - block.part(found, latent)))
            return
        if self.method == "gradient":
            self.sums += block.sums(found, gradient(rows))
            return
        explained = block.explained(found)
        shares = [(i + 0.5) / self.integration_steps for i in range(self.integration_steps)]
        slopes = [gradient(rows - (1 - share) * explained) for share in shares]
        self.sums += block.sums(found, torch.stack(slopes).mean(0))


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
        at: hookpoint in the denoiser; default the SAE's. A transcoder is read at a module's input, and x are the rows of the
            output, which it writes.
        steps: window of steps as in `Steer`.
        seed: of the images.
        call: arguments of the pipeline; the default objective needs guidance.

    Instruments of other sessions are not at work in the runs that are attributed.

    Raises:
        TypeError: `sae` is no SAE; an argument that the pipeline's call does not take.
        ValueError: a hookpoint outside the denoiser, a latent that is not there, no guidance.

    Example:
        print(sf.attribute_latents(pipe, sae, "a noto emoji of a fox", num_inference_steps=8))
    """
    window = StepWindow.parse(steps)
    block = CodedBlock(pipe, sae, at)
    texts = prompts_of("prompts", prompts)
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; use one of {', '.join(map(repr, METHODS))}.")
    chosen = None if latents is None else [sae.latent(latent) for latent in latents]
    sae.directions(chosen or [])  # names a latent that does not exist
    whole("integration_steps", integration_steps)
    whole("seed", seed, 0)
    check_call(pipe, call, attribute_latents, "output_type")

    def scored(how: str, ablated: Sequence[int]) -> LatentScores:
        found = _Attribution(block, how, objective, window, ablated, integration_steps)
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
