"""Statistics of what a pipeline does: an instrument, and the whole run over prompts."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from sparsefeat.arguments import whole
from sparsefeat.features.attached import beside, hookpoint_of
from sparsefeat.features.progress import Progress
from sparsefeat.features.statistics import (
    OUTSIDE_SCHEDULE,
    Concepts,
    Statistics,
    check_statistics,
    concepts_of,
    decoder_numbers,
)
from sparsefeat.pipeline import Activations, Call, Context, Enough, FrozenInstrument, Hookpoint, Instrument, attach
from sparsefeat.pipeline.call_arguments import GIVEN_TO_SEVERAL, check_call, for_several
from sparsefeat.pipeline.families.registry import family_of
from sparsefeat.pipeline.hookpoints import components, resolve
from sparsefeat.sae import SAE


class CollectStatistics(FrozenInstrument):
    """Instrument: adds the codes of every call to `statistics`, when it ends: of one that is interrupted nothing is counted.

    Args:
        sae: whose codes.
        statistics: they are added here; `run[collect]` is the same object.
        concepts: the concept (or several) of each prompt: a list in the order of a call's prompts, or a mapping from
            the prompt's text, which also serves several calls. None: do not count this prompt.
        at: hookpoint; default the SAE's.
        condition: rows to count (SAeUron: the conditional half only).

    Raises:
        TypeError: `sae` or `statistics` is no such thing.
        ValueError: statistics of another SAE; an argument that cannot be, by its name.
    """

    def __init__(
        self,
        sae: SAE,
        statistics: Statistics,
        concepts: Sequence[Concepts | None] | Mapping[str, Concepts | None],
        at: str | Hookpoint | None = None,
        condition: str = "cond",
    ):
        self.at: Hookpoint = hookpoint_of(sae, at)
        check_statistics(statistics, sae)
        if not isinstance(concepts, (Mapping, Sequence)) or isinstance(concepts, str):
            raise ValueError(
                f"concepts={concepts!r:.80} must be a list, one for each prompt, or map prompts to concepts."
            )
        self.sae: SAE = sae
        self.statistics: Statistics = statistics
        self._decoder: tuple[float, ...] = decoder_numbers(sae)
        for named in concepts.values() if isinstance(concepts, Mapping) else concepts:
            self._names(named)
        self.condition: str = condition
        self.concepts = concepts
        self._has_counted = False
        self._of_image: list[tuple[int, ...]] = []  # places in the part
        self._part: Statistics | None = None

    @property
    def has_counted(self) -> bool:
        """Anything in this call."""
        return self._has_counted

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    def _names(self, named: Concepts | None) -> tuple[str, ...]:
        names = concepts_of("concept", named)
        if names:
            self.statistics.places(names)  # says which is not there
        return names

    def begin_call(self, call: Call) -> None:
        if isinstance(self.concepts, Mapping):
            if call.prompts is None:
                raise ValueError(
                    "concepts= by prompt need the prompts' text; this call was given embeddings: pass a list."
                )
            missing = [p for p in call.prompts if p not in self.concepts]
            if missing:
                raise ValueError(f"concepts= says nothing about the prompt {missing[0]!r}; map it, to None to skip it.")
            of_prompt = [self.concepts[p] for p in call.prompts]
        else:
            of_prompt = list(self.concepts)
            n_prompts = len(of_prompt) if call.n_prompts is None else call.n_prompts  # a loop of one's own may not say
            if len(of_prompt) != n_prompts:
                raise _not_one_each(of_prompt, n_prompts)
        names = [self._names(c) for c in of_prompt]
        of_call = list(dict.fromkeys(name for several in names for name in several))
        places = [tuple(of_call.index(name) for name in several) for several in names]
        self._has_counted = False
        self._of_image = [place for place in places for _ in range(call.images_per_prompt)]
        self._part = self.statistics.part(of_call, self._decoder) if of_call else None

    def at_hookpoint(self, activations: Activations, context: Context) -> None:
        if max(context.prompt_index, default=0) >= len(self._of_image):
            raise _not_one_each(self._of_image, max(context.prompt_index) + 1)
        of_row = [self._of_image[image] if condition == self.condition else () for condition, image in context.entries]
        if context.recomputing or not any(of_row) or self._part is None:
            return
        self._has_counted = True
        code = activations.code(beside(self.sae, activations, context))
        timestep = OUTSIDE_SCHEDULE if context.timestep is None else context.timestep
        row_batch = torch.arange(context.batch).repeat_interleave(context.positions)
        for slot in range(max(map(len, of_row))):
            of_batch = torch.tensor([places[slot] if slot < len(places) else -1 for places in of_row])
            self._part.add(code, of_batch[row_batch], timestep)

    def end_call(self, call: Call) -> Statistics:
        part, self._part = self._part, None
        if part is not None:
            self.statistics.take(part)
        if not self._has_counted and any(self._of_image):
            warnings.warn(
                f"nothing was counted: no row of this call was under condition={self.condition!r}; use 'cond', or turn "
                "guidance on for 'uncond'",
                stacklevel=2,
            )
        return self.statistics


def _not_one_each(concepts: Sequence[Any], prompts: int) -> ValueError:
    return ValueError(f"concepts= has {len(concepts)} entries for {prompts} prompts; give one for each prompt.")


class _BeforeSteps(Instrument):
    """Ends each call where a denoiser is about to run, when its texts are counted."""

    def __init__(self, collect: CollectStatistics):
        self.collect = collect

    def components(self, pipe: Any) -> tuple[str, ...]:
        return tuple(name for name, root in components(pipe).items() if family_of(root).runs_in_steps)

    def at_component(self, name: str, arguments: Mapping[str, Any], context: Context) -> None:
        if self.collect.has_counted:
            raise Enough


def collect_statistics(
    pipe: Any,
    sae: SAE,
    prompts: Mapping[str, Sequence[str]],
    *,
    at: str | Hookpoint | None = None,
    batch_size: int = 4,
    seed: int | None = 0,
    statistics: Statistics | None = None,
    **call: Any,
) -> Statistics:
    """Run the pipeline on the prompts of each concept and return the statistics of its codes.

    Args:
        prompts: concept -> its prompts. A prompt listed under several concepts is drawn once and counts for each; one
            that a concept lists several times is drawn as often, each from noise of its own.
        batch_size: prompts a call.
        seed: image i of all prompts starts from the generator seeded seed + i, whatever the batch size; None: unseeded.
        statistics: add to these instead of new ones.
        call: arguments of the pipeline, e.g. num_inference_steps, guidance_scale. At a text encoder, which has run
            before the first step, calls end where the denoiser begins.

    Raises:
        TypeError: `sae` is no SAE; an argument that the pipeline's call does not take.
        ValueError: an argument that cannot be, by its name; a hookpoint that is not there (`UnknownHookpointError`).
    """
    check_call(pipe, call, collect_statistics, *GIVEN_TO_SEVERAL)
    check_prompts(prompts)
    hookpoint_of(sae, at)
    whole("batch_size", batch_size)
    if seed is not None:
        whole("seed", seed, 0)
    concepts_of: dict[str, list[str]] = {}
    drawn: Counter[str] = Counter()
    for concept, its_prompts in prompts.items():
        for prompt, times in Counter(its_prompts).items():
            concepts_of.setdefault(prompt, []).append(concept)
            drawn[prompt] = max(drawn[prompt], times)
    statistics = statistics if statistics is not None else Statistics(prompts, sae.n_latents)
    collect = CollectStatistics(sae, statistics, concepts_of, at=at)
    texts = list(drawn.elements())
    instruments = [collect, progress := Progress(len(texts), "collecting statistics")]
    if resolve(pipe, collect.at.path).family.stream == "text":
        instruments.append(_BeforeSteps(collect))
    with progress, attach(pipe, *instruments):
        run_prompts(pipe, texts, batch_size=batch_size, seed=seed, **call)
    return statistics


def run_prompts(pipe: Any, prompts: Sequence[str], *, batch_size: int, seed: int | None, **call: Any) -> None:
    """Run the pipeline on prompts for what is attached to see, `batch_size` a call; arguments as those of `collect_statistics`."""
    options: dict[str, Any] = {"output_type": "latent", **call}
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        if seed is not None:
            options["generator"] = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        pipe(batch, **for_several(options, len(batch)))


def check_prompts(prompts: Any) -> None:
    """Refuse what does not map concepts to lists of prompts."""
    if not isinstance(prompts, Mapping) or not prompts:
        raise ValueError(f"prompts={prompts!r:.80} must map concepts to their prompts, {{'fox': ['a fox', …], …}}.")
    for concept, its_prompts in prompts.items():
        if not isinstance(concept, str):
            raise ValueError(f"prompts has the concept {concept!r:.80}; name each by a text.")
        listed = isinstance(its_prompts, Collection) and not isinstance(its_prompts, str)
        if not listed or not its_prompts or not all(isinstance(prompt, str) for prompt in its_prompts):
            raise ValueError(f"prompts[{concept!r}]={its_prompts!r:.80} must be a list of one or more prompts.")
