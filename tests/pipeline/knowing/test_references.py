"""What the prompts became: the names of returned values, and which of them are whose."""

from __future__ import annotations

import diffusers
import pytest
import torch

from sparsefeat.pipeline import Call
from sparsefeat.pipeline.knowing.references import ENCODERS, References, returned_names

FOUR = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


@pytest.mark.parametrize(
    ("pipeline", "method", "names"),
    [
        ("StableDiffusionPipeline", "encode_prompt", FOUR[:2]),
        ("StableDiffusionXLPipeline", "encode_prompt", FOUR),
        ("StableDiffusion3Pipeline", "encode_prompt", FOUR),
        ("FluxPipeline", "encode_prompt", ("prompt_embeds", "pooled_prompt_embeds", "text_ids")),
        ("WanPipeline", "encode_prompt", FOUR[:2]),
        ("PRXPipeline", "encode_prompt", (FOUR[0], "prompt_attention_mask", FOUR[1], "negative_prompt_attention_mask")),
    ],
)
def test_the_names_of_what_a_method_returns_are_read_in_its_source(pipeline, method, names):
    if not hasattr(diffusers, pipeline):
        pytest.skip(f"this diffusers has no {pipeline}")
    assert returned_names(getattr(getattr(diffusers, pipeline), method), len(names)) == names


def test_what_no_source_says_has_no_name():
    assert returned_names(len, 2) == ("", "")
    assert returned_names(eval("lambda: (1, 2)"), 2) == ("", "")


@pytest.mark.parametrize(
    "name", ["encode_prompt", "_encode_prompt", "_encode_prompt_qwen", "encode_image", "_encode_image"]
)
def test_methods_that_encode_are_known_by_their_names(name):
    assert ENCODERS.fullmatch(name)


@pytest.mark.parametrize("name", ["encode_video", "_encode_vae_image", "decode_latents", "prepare_latents"])
def test_other_methods_are_not(name):
    assert not ENCODERS.fullmatch(name)


def encode_prompt(self, prompt, negative_prompt=None):
    prompt_embeds, negative_embeds = self
    return prompt_embeds, negative_embeds


def encode_one(self, prompt, prompt_embeds=None):
    prompt_embeds = self
    return prompt_embeds


def found(call, *calls):
    references = References(call)
    for method, pipe, prompt in calls:
        references.begin(method, pipe, (prompt,), {})
        references.end(method, pipe, method(pipe, prompt))
    return [(r.condition, r.image, r.images) for r in references.found]


def test_a_method_that_encodes_both_says_by_its_names_which_is_which():
    call = Call(prompts=["a", "b"], images_per_prompt=2)
    embeds = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    both = found(call, (encode_prompt, embeds, ["a", "b"]))
    assert both == [("cond", 0, 2), ("cond", 2, 2), ("uncond", 0, 2), ("uncond", 2, 2)]


@pytest.mark.parametrize("order", [("a", "no"), ("no", "a")])
def test_a_method_that_encodes_one_text_is_told_by_the_text(order):
    call = Call(prompts=["a"], arguments={"prompt": "a", "negative_prompt": "no"})
    one = torch.randn(1, 3, 5)
    said = found(call, *((encode_one, one, text) for text in order))
    assert [condition for condition, *_ in said] == [{"a": "cond", "no": "uncond"}[text] for text in order]


def test_embeddings_that_the_caller_gave_are_references_by_their_arguments():
    cond, uncond = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    references = References(Call.of(object, {"prompt_embeds": cond, "negative_prompt_embeds": uncond}))
    references.add_arguments()
    assert [(r.condition, r.image) for r in references.found] == [
        ("cond", 0),
        ("cond", 1),
        ("uncond", 0),
        ("uncond", 1),
    ]


def test_several_conditions_in_one_tensor_are_no_reference():
    call = Call(prompts=["a"])
    assert found(call, (encode_one, torch.randn(3, 2, 5), "a")) == []
