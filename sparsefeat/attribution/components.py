"""CAD: which weights make a concept, and the model without them (Component Attribution for Diffusion, arXiv 2412.02542).

With eps_t(c) what the denoiser says of the latents z_t under prompt c, and J a loss summed over the steps t of the schedule:

    score   alpha = w dJ/dw                     the first-order change of J, with the other sign, where w becomes 0
    erase   J = sum_t |eps_t(c) - stopgrad eps_t(nothing)|^2             along the pipeline's own trajectory of c
    amplify J = sum_t mean (eps_t(a) - aim)^2   z_t: finished latents of c, noised; aim: what was to be said; a: a prompt that
                                                leaves c open, default the empty one
    mask    of every row of n weights the floor(ratio n) of the highest score, if above 0, become 0

Both times weights go whose loss makes J fall: J is the distance from the picture without the concept, or the model's error on
pictures of it. Published for a is the concept's own word; a model that draws the concept when it is named has nothing to gain there.
The trajectory is walked once, with the gradient taken in passing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefeat.arguments import finite, number, whole
from sparsefeat.attribution.gradients import EachStep, Predict, WeightGradients, weight_paths
from sparsefeat.attribution.masks import WeightMask, chosen_weights
from sparsefeat.pipeline import Context, attach
from sparsefeat.pipeline.call_arguments import check_call, for_several
from sparsefeat.pipeline.noising import LATENTS, finished_latents, noised
from sparsefeat.pipeline.step_window import Steps, StepWindow

RATIO = 0.03
"""Of 0.01, 0.03 and 0.1 the one that erased best on the embedded pipeline's first edition, and of 0.01, 0.03, 0.05 and 0.1 the
largest at which amplifying still lowers J on other pictures and noise. The released program's is 0.001, which takes nothing of
rows shorter than 1,000."""


@dataclass(frozen=True)
class WeightScores:
    """alpha of single weights: `scores[path]`, fp32 of the weight's shape. Above 0: without the weight the loss falls."""

    scores: Mapping[str, Tensor]
    losses: tuple[float, ...]
    """J's terms, in the order in which they were taken."""

    def mask(
        self,
        ratio: float = RATIO,
        rule: str = "positive",
        *,
        per_row: bool = True,
        concept: str = "",
        steps: Steps = None,
    ) -> WeightMask:
        """The instrument that zeroes what CAD chooses by these scores; see `chosen_weights`.

        Raises:
            ValueError: nothing is chosen.
        """
        masks = {path: chosen_weights(score, ratio, rule, per_row=per_row) for path, score in self.scores.items()}
        if not any(mask.any() for mask in masks.values()):
            longest = max(score[0].numel() if per_row else score.numel() for score in self.scores.values())
            raise ValueError(
                f"ratio={ratio} chooses no weight: the longest row has {longest}, of which floor({ratio} * {longest}) = "
                f"{int(ratio * longest)} are taken; give at least {1 / longest:.2g}."
            )
        return WeightMask({path: mask for path, mask in masks.items() if mask.any()}, concept, steps=steps)


class _FromNothing(EachStep):
    """J of CAD-Erase."""

    def __init__(self, gradients: WeightGradients):
        super().__init__(gradients.root_name)
        self.gradients = gradients
        self.losses: list[float] = []

    def row(self, given: Mapping[str, Any], without: Mapping[str, Any] | None, image: int, context: Context) -> None:
        if without is None:
            return

        def loss(predict: Predict) -> Tensor:
            with torch.no_grad():
                nothing = predict(without)
            return (predict(given) - nothing).square().sum()

        self.losses.append(self.gradients.add(loss))


class OnLatents(EachStep):
    """J of CAD-Amplify: the denoiser's own loss on given latents, in the place of what its loop would give it."""

    def __init__(self, gradients: WeightGradients, latents: Tensor, seed: int):
        super().__init__(gradients.root_name)
        self.gradients: WeightGradients = gradients
        self.latents: Tensor = latents
        self.generator: torch.Generator = torch.Generator().manual_seed(seed)
        self.losses: list[float] = []

    def weight(self, image: int) -> float:
        """Of an image's loss in the sum."""
        return 1.0

    def row(self, given: Mapping[str, Any], without: Mapping[str, Any] | None, image: int, context: Context) -> None:
        name = next(one for one in LATENTS if one in given)
        latents = self.latents[image : image + 1]
        if given[name].shape != latents.shape:
            raise ValueError(
                f"the denoiser takes {list(given[name].shape)} and the latents are {list(latents.shape)}; draw both at one "
                "size, with a pipeline whose denoiser is given the latents alone."
            )
        assert context.step is not None
        assert self.scheduler is not None
        timestep = self.scheduler.timesteps[context.step : context.step + 1]
        noise = torch.randn(latents.shape, generator=self.generator, dtype=torch.float32).to(latents)
        seen, aim = noised(self.scheduler, latents, noise, timestep)

        def loss(predict: Predict) -> Tensor:
            said = predict({**given, name: seen.to(given[name])})
            said = said[:, : aim.shape[1]] if said.ndim == 4 else said  # beside it, a variance that some say
            return self.weight(image) * (said - aim.float()).square().mean()

        self.losses.append(self.gradients.add(loss))


def prompts_of(name: str, given: str | Sequence[str]) -> list[str]:
    several = isinstance(given, Sequence) and not isinstance(given, (str, bytes))
    prompts: list[Any] = list(given) if several else [given]
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ValueError(f"{name}={given!r} must be a prompt of the concept, or a list of prompts.")
    return prompts


def _scores(gradients: WeightGradients, losses: Sequence[float]) -> WeightScores:
    sums = gradients.checked()
    return WeightScores({path: gradients.values[path].float() * sums[path] for path in sums}, tuple(losses))


def attribute_weights(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    objective: str = "erase",
    concept: str = "",
    latents: Tensor | None = None,
    modules: str | Sequence[str] = "ff",
    seed: int = 0,
    **call: Any,
) -> WeightScores:
    """CAD's scores of single weights for a concept.

    Args:
        prompts: of the concept; each is drawn once, and the losses add up.
        objective: "erase" or "amplify", see above.
        concept: amplify: a, what the denoiser is given with the latents: a prompt under which the concept is to come more often.
        latents: amplify: finished latents of the concept, one for each prompt, in the layout in which the denoiser takes
            them; default those that the pipeline draws for the prompts.
        modules: a part of the paths of the Linear and Conv2d modules of the denoiser, or their paths. "ff", the published, is
            the feed-forward layers.
        seed: of the images and of the noise.
        call: arguments of the pipeline. "erase" needs guidance (the published: guidance_scale=3, 50 steps): the unconditional
            prediction is what the conditional one is compared with.

    Costs, beside the pipeline's own run, a forward and a backward of the denoiser for every image and step, and a second forward
    to erase.

    Raises:
        TypeError: an argument that the pipeline's call does not take.
        ValueError: no guidance, modules that cannot be read, or a gradient that is not finite.
    """
    prompts = prompts_of("prompts", prompts)
    whole("seed", seed, 0)
    if objective not in ("erase", "amplify"):
        raise ValueError(f"objective={objective!r} is not known; use 'erase' or 'amplify'.")
    if objective == "erase" and (concept or latents is not None):
        raise ValueError("concept= and latents= are of objective='amplify'; leave them out to erase.")
    if latents is not None and (not isinstance(latents, Tensor) or len(finite("latents", latents)) != len(prompts)):
        raise ValueError(f"latents must be a tensor of one entry for each of the {len(prompts)} prompts.")
    check_call(pipe, call, attribute_weights, "output_type", "return_dict")
    gradients = WeightGradients(pipe, weight_paths(pipe, modules))
    if objective == "erase":
        losses: list[float] = []
        for i, prompt in enumerate(prompts):
            from_nothing = _FromNothing(gradients)
            with attach(pipe, from_nothing):
                pipe(prompt, generator=torch.Generator().manual_seed(seed + i), output_type="latent", **call)
            if not from_nothing.losses:
                raise ValueError(
                    "the pipeline ran without guidance, so there is no prediction without the concept to compare with; pass "
                    "guidance_scale=3 (FLUX and others that take it: true_cfg_scale=3 and negative_prompt='')."
                )
            losses += from_nothing.losses
        return _scores(gradients, losses)
    if latents is None:
        latents = finished_latents(pipe, prompts, seed, **call)
    on_latents = OnLatents(gradients, latents, seed)
    with attach(pipe, on_latents):
        several = for_several(call, len(prompts))
        pipe([concept] * len(prompts), generator=torch.Generator().manual_seed(seed), output_type="latent", **several)
    return _scores(gradients, on_latents.losses)


def _cad(
    pipe: Any,
    prompts: str | Sequence[str],
    objective: str,
    ratio: float,
    steps: Steps,
    options: dict[str, Any],
) -> WeightMask:
    number("ratio", ratio, 0, 1, above=True)
    StepWindow.parse(steps)
    concept = ", ".join(prompts_of("prompts", prompts))
    return attribute_weights(pipe, prompts, objective=objective, **options).mask(ratio, concept=concept, steps=steps)


def cad_erase(
    pipe: Any, prompts: str | Sequence[str], *, ratio: float = RATIO, steps: Steps = None, **options: Any
) -> WeightMask:
    """CAD-Erase: a mask of the weights that make the concept.

    Args:
        ratio: share of every row that goes, rounded down, so that rows shorter than 1 / ratio lose nothing.
        steps: when the weights are 0; default all.
        options: modules, seed and the pipeline's own arguments, see `attribute_weights`.

    Raises:
        ValueError: `ratio` is not above 0 and up to 1; as `attribute_weights`.
    """
    return _cad(pipe, prompts, "erase", ratio, steps, options)


def cad_amplify(
    pipe: Any, prompts: str | Sequence[str], *, ratio: float = RATIO, steps: Steps = None, **options: Any
) -> WeightMask:
    """CAD-Amplify: a mask of the weights that keep the concept down where a prompt leaves it open; arguments as of `cad_erase`,
    and concept, latents of `attribute_weights`.

    Raises:
        ValueError: as `cad_erase`.
    """
    return _cad(pipe, prompts, "amplify", ratio, steps, options)
