"""The concept joins the negative prompt that is there."""

from __future__ import annotations

import pytest

from sparsefeat.erasure import negative_prompt
from tests.tiny import pixels, tiny_sd


@pytest.mark.parametrize(
    ("concept", "before", "after"),
    [
        ("fox", None, "fox"),
        ("fox", "", "fox"),
        ("fox", "blurry", "blurry, fox"),
        (["fox", "tail"], "blurry", "blurry, fox, tail"),
        ("fox", ["blurry", ""], ["blurry, fox", "fox"]),
    ],
)
def test_the_concept_is_added_behind_what_is_there(concept, before, after):
    call = negative_prompt(concept, prompt="a field", negative_prompt=before, num_inference_steps=3)
    assert call == {"prompt": "a field", "negative_prompt": after, "num_inference_steps": 3}


def test_the_arguments_run_a_pipeline():
    pipe = tiny_sd()
    with_it = pixels(pipe, **negative_prompt("fox", prompt="a cat"))
    assert (with_it == pixels(pipe, "a cat", negative_prompt="fox")).all()
    assert (with_it != pixels(pipe, "a cat")).any()


def test_what_would_be_ignored_is_refused():
    with pytest.raises(ValueError, match=r"guidance_scale=1\.0 turns guidance off"):
        negative_prompt("fox", guidance_scale=1.0)
    with pytest.raises(ValueError, match="pass negative_prompt as text"):
        negative_prompt("fox", negative_prompt_embeds=object())
    with pytest.raises(ValueError, match="must be a word or a list of words"):
        negative_prompt("")
