"""The label of every row is what changes when a prompt is changed: over all families, the ways of guidance, batches and
images a prompt. A call is made twice, with one prompt altered, and the denoiser's inputs are compared row by row in the
first step, where nothing but the text can differ. Nobody's table is asked, and none of the package's comparing.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import diffusers
import pytest
import torch

from sparsefeat.pipeline import attach
from tests.families import families
from tests.families.kandinsky import EMBEDDING
from tests.pipeline.matrix import BATCHES
from tests.pipeline.promises import NotHere, Spot, denoisers, prepared

PROMPTS, OTHER = ("a fox", "red cat"), "red fox"  # as long as the others: texts are padded to the longest
FAMILIES = families()
NOT_BY_ROW = ("encoder_hidden_states_llama3",)  # of which the first axis is the layers
# diffusers 0.33 repeats the pooled texts of several prompts for several images as a whole, so that they are mixed up.
MIXED = ("sd3",) if diffusers.__version__.startswith("0.33.") else ()
CASES = [
    (name, guidance, batch)
    for name, guidance, batch in itertools.product(FAMILIES, (True, False), BATCHES)
    if guidance is False or FAMILIES[name].guidance == "cfg"
    if not (FAMILIES[name].alone and guidance and batch != "1")  # diffusers' own pipeline fails
]


@functools.lru_cache(maxsize=1)
def pipeline(name: str) -> Any:
    return prepared(name, next(iter(FAMILIES[name].options), ""), "plain")


def rows(value: Any, batch: int) -> Iterator[list[torch.Tensor]]:
    """The rows of every batch of tensors among a model's arguments."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from rows(inner, batch)
    elif isinstance(value, (list, tuple)):
        if len(value) == batch and all(isinstance(each, torch.Tensor) for each in value):
            yield list(value)
    elif isinstance(value, torch.Tensor) and value.ndim and value.shape[0] and value.shape[0] % batch == 0:
        yield list(value.unflatten(0, (batch, -1)))  # frames of a video lie in the batch, one after the other


def told(name: str, prompts: list[str], guidance: bool, each: int) -> dict[str, Any]:
    """The prompts of a pipeline that is given embeddings in their place, each made of its text."""
    if name != "kandinsky":
        return {}
    seeds = [zlib.crc32(prompt.encode()) for prompt in prompts]
    embeds = torch.stack([torch.randn(EMBEDDING, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    embeds = embeds if guidance else embeds.repeat_interleave(each, dim=0)
    return {"image_embeds": embeds, "negative_image_embeds": torch.zeros_like(embeds)}


def kept(value: Any) -> Any:
    """A copy: some pipelines write their latents in place."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {name: kept(inner) for name, inner in value.items()}
    return [kept(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def first_step(family: Any, pipe: Any, prompts: list[str], spot: Spot | None, **call: Any) -> list[dict[str, Any]]:
    """The arguments of the denoiser's runs in the first step."""
    model = getattr(pipe, denoisers(family)[0])
    heard: list[dict[str, Any]] = []

    def listen(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        heard.append(kept({**dict(zip(names, args, strict=False)), **kwargs}))

    handle = model.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        if spot is None:
            family.call(pipe, prompts, **call)
        else:
            with attach(pipe, spot):
                family.call(pipe, prompts, **call)
    finally:
        handle.remove()
    return heard


@pytest.mark.parametrize(("name", "guidance", "batch"), CASES, ids=lambda value: str(value))
def test_the_label_of_every_row_is_what_changes_with_its_prompt(name, guidance, batch):
    family = FAMILIES[name]
    if not family.available:
        pytest.skip(f"{family.pipeline} is not in this diffusers")
    try:
        pipe = pipeline(name)
    except NotHere as reason:
        pytest.skip(str(reason))
    n_prompts, each = BATCHES[batch]
    prompts = list(PROMPTS[:n_prompts])
    call = {"guidance": guidance, "images_per_prompt": each, "size": "square", "steps": 2, "seed": 3}
    block = next(block for block in family.blocks if block.path.startswith(denoisers(family)[0] + "."))
    spot = Spot(block)
    heard = first_step(family, pipe, prompts, spot, **call, **told(name, prompts, guidance, each))
    contexts = [context for context in spot.contexts if context.step == 0]
    assert contexts
    for altered in range(n_prompts):
        others = [OTHER if i == altered else prompt for i, prompt in enumerate(prompts)]
        again = first_step(family, pipe, others, None, **call, **told(name, others, guidance, each))
        for context, before, after in zip(contexts, heard, again, strict=False):
            n = context.batch
            pairs = [
                (a, b)
                for argument, value in before.items()
                if argument not in NOT_BY_ROW and not (argument == "pooled_projections" and name.startswith(MIXED))
                for a, b in zip(rows(value, n), rows(after.get(argument), n), strict=False)
            ]
            assert pairs, "no batch among the arguments"
            for entry, (condition, image) in enumerate(context.entries):
                changes = any(a[entry].shape != b[entry].shape or not torch.equal(a[entry], b[entry]) for a, b in pairs)
                per_prompt = max(1, _n_images(contexts) // n_prompts)
                expected = condition in ("cond", "perturbed") and image // per_prompt == altered
                assert changes == expected, (entry, condition, image, f"prompt {altered} altered")


def _n_images(contexts: list[Any]) -> int:
    return max(max(context.prompt_index) for context in contexts) + 1
