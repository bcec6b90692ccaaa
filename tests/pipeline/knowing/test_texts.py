"""Which rows of a text encoder are a prompt's: by the ids it is given, in whatever order and batches they come."""

from __future__ import annotations

import pytest
from diffusers import StableDiffusionPipeline

from sparsefeat.pipeline import attach
from tests.pipeline.instruments import Watch
from tests.pipeline.knowing.loops import TEXT, Encodes, build
from tests.tiny import pixels, tiny_sd

PROMPTS, NEGATIVES = ["a fox", "red cat"], ["dog", "no"]
WHOSE = {"a fox": ("cond", 0), "red cat": ("cond", 1), "dog": ("uncond", 0), "no": ("uncond", 1)}
BATCHES = {
    "prompts first": [PROMPTS, NEGATIVES],
    "negatives first": [NEGATIVES, PROMPTS],
    "both in one run": [NEGATIVES + PROMPTS],
    "one by one, mixed": [[text] for text in ("dog", "a fox", "no", "red cat")],
    "the prompts twice": [PROMPTS, PROMPTS, NEGATIVES],
    "in another order": [["red cat", "a fox"], ["no", "dog"]],
}


@pytest.fixture(scope="module")
def own():
    return build(Encodes)


def rows(pipe, *args, **kwargs):
    with attach(pipe, watch := Watch(TEXT)):
        pipe(*args, **kwargs)
    return [row for c in watch.contexts for row in zip(c.condition, c.prompt_index, strict=True)]


@pytest.mark.parametrize("name", BATCHES)
def test_rows_are_told_by_the_ids_in_them(own, name):
    batches = BATCHES[name]
    assert rows(own, PROMPTS, NEGATIVES, batches) == [WHOSE[text] for batch in batches for text in batch]


def test_rewritten_prompts_and_empty_negatives_are_told(own):
    assert rows(own, ["a fox"], [""], [[""], ["a fox on a red cat"]]) == [("uncond", 0), ("cond", 0)]


def test_a_long_prompt_in_chunks_is_its_prompts_and_a_short_negative_in_it_is_not(own):
    prompt = "a fox and a red cat"
    assert rows(own, [prompt], ["cat"], [["a fox"], ["and a red cat"], ["cat"]]) == [
        ("cond", 0),
        ("cond", 0),
        ("uncond", 0),
    ]


@pytest.mark.parametrize(
    ("prompt", "negative", "template"),
    [
        ("fox", "", "a fox: {} cat"),  # the negative's row has the prompt's word
        ("cat", "a fox", "a fox: {}"),  # the prompt's row has more of the negative's words than of its own
    ],
)
def test_the_words_of_a_template_are_nobodys(own, prompt, negative, template):
    batches = [[template.format(prompt)], [template.format(negative)]]
    assert rows(own, [prompt], [negative], batches) == [("cond", 0), ("uncond", 0)]


def test_words_that_are_nobodys_are_unknown_in_a_loop_of_somebodys_own(own):
    assert rows(own, ["a fox"], ["dog"], [["zebra"]]) == [("unknown", 0)]


def test_the_same_words_for_both_go_by_order():
    with attach(pipe := tiny_sd(), watch := Watch(TEXT)):
        pixels(pipe, "a fox", negative_prompt="a fox", steps=1)
    assert [c.condition for c in watch.contexts] == [("cond",), ("uncond",)]


def test_a_prompt_under_another_name_is_known_from_what_is_encoded():
    class Renamed(StableDiffusionPipeline):
        def __call__(self, text, how_many, **kwargs):
            return super().__call__(prompt=text, num_images_per_prompt=how_many, num_inference_steps=2, **kwargs)

    pipe = build(Renamed)
    text, image = Watch(TEXT), Watch("unet.mid_block")
    with attach(pipe, text, image) as run:
        pipe(["a fox", "red cat"], 2, output_type="latent", guidance_scale=3.0)
    assert [c.condition for c in text.contexts] == [("cond", "cond"), ("uncond", "uncond")]
    assert {c.condition for c in image.contexts} == {("uncond",) * 4 + ("cond",) * 4}
    assert {c.prompt_index for c in image.contexts} == {(0, 1, 2, 3) * 2}
    assert run.calls[0].call.prompts == ["a fox", "red cat"]


def test_a_method_that_writes_the_prompt_anew_and_hands_it_on_encodes_both():
    class Styled(StableDiffusionPipeline):
        def encode_prompt(self, prompt, *args, **kwargs):
            return super().encode_prompt([f"a cat, {p.upper()}, noto" for p in prompt], *args, **kwargs)

    text, image = Watch(TEXT), Watch("unet.mid_block")
    with attach(pipe := build(Styled), text, image):
        pixels(pipe, ["a fox", "red dog"], steps=1)
    assert [c.condition for c in text.contexts] == [("cond", "cond"), ("uncond", "uncond")]
    assert image.contexts[0].condition == ("uncond", "uncond", "cond", "cond")
