"""Loops that run their text encoder themselves, or encode by a method that does not say which text is which: their rows are
told by the ids that the encoder was given.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import StableDiffusionPipeline, WanPipeline

from sparsefeat.pipeline import attach
from tests.families import families
from tests.pipeline.instruments import Edit, Watch, push
from tests.pipeline.knowing.loops import BLOCK, TEXT, build


class Bare(StableDiffusionPipeline):
    """`runs` are those of the text encoder, each a list of "prompt" and "negative_prompt"; `order` that of the rows of the
    denoiser's run.
    """

    def texts(self, texts):
        ids = self.tokenizer(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(ids)[0]

    def made(self, runs, given):
        made = {}
        for run in runs:
            texts = [text for name in run for text in given[name]]
            made |= dict(zip(run, self.texts(texts).split([len(given[name]) for name in run]), strict=True))
        return made

    @torch.no_grad()
    def __call__(self, prompt, negative_prompt, runs, order, steps=2, each=1):
        given = {"prompt": prompt, "negative_prompt": negative_prompt}
        made = self.made(runs, given)
        rows = torch.cat([made[name].repeat_interleave(each, dim=0) for name in order])
        self.scheduler.set_timesteps(steps)
        latents = torch.randn(len(rows) // len(order), 4, 16, 16)
        for t in self.scheduler.timesteps:
            noise = self.unet(torch.cat([latents] * len(order)), t, encoder_hidden_states=rows).sample
            latents = self.scheduler.step(noise.chunk(len(order))[0], t, latents).prev_sample


class Concatenated(Bare):
    """As pipelines of 2022 and many of their users' do: one method that gives the negative prompts and the prompts as one."""

    def _encode_prompt(self, prompt, negative_prompt):
        made = Bare.made(self, [["prompt"], ["negative_prompt"]], locals())
        return torch.cat([made["negative_prompt"], made["prompt"]])

    def made(self, runs, given):
        uncond, cond = self._encode_prompt(**given).chunk(2)
        return {"prompt": cond, "negative_prompt": uncond}


class CallsTheOther(Concatenated):
    """The same around `encode_prompt`."""

    def _encode_prompt(self, prompt, negative_prompt):
        cond, uncond = self.encode_prompt(prompt, "cpu", 1, True, negative_prompt)
        return torch.cat([uncond, cond])


RUNS = {
    "one after the other": (Bare, [["prompt"], ["negative_prompt"]]),
    "negatives first": (Bare, [["negative_prompt"], ["prompt"]]),
    "both in one run": (Bare, [["negative_prompt", "prompt"]]),
    "in one tensor": (Concatenated, None),
    "in one tensor of encode_prompt's": (CallsTheOther, None),
}
LABELS = {"prompt": "cond", "negative_prompt": "uncond"}


def said(pipe, *instruments, **call):
    watch = Watch(BLOCK)
    with attach(pipe, *instruments, watch):
        pipe(**call)
    return [list(context.entries) for context in watch.contexts]


@pytest.mark.parametrize("order", [["negative_prompt", "prompt"], ["prompt", "negative_prompt"]], ids=lambda o: o[0])
@pytest.mark.parametrize("name", RUNS)
def test_rows_are_told_by_the_ids_of_the_encoders_runs(name, order):
    cls, runs = RUNS[name]
    call = {"prompt": ["a fox", "red"], "negative_prompt": ["dog", "no"], "runs": runs, "order": order}
    rows = [(LABELS[name], image) for name in order for image in range(2)]
    assert said(build(cls), **call) == [rows] * 2


@pytest.mark.parametrize("name", RUNS)
def test_an_edit_of_the_text_goes_into_what_is_compared(name):
    cls, runs = RUNS[name]
    order = ["negative_prompt", "prompt"]
    call = {"prompt": ["a fox"], "negative_prompt": ["dog"], "runs": runs, "order": order}
    assert said(build(cls), Edit(push(), TEXT), **call) == [[("uncond", 0), ("cond", 0)]] * 2


@pytest.mark.parametrize("name", list(RUNS)[:4])
def test_the_same_words_for_both_are_unknown(name):
    cls, runs = RUNS[name]
    call = {"prompt": ["a fox"], "negative_prompt": ["a fox"], "runs": runs, "order": ["negative_prompt", "prompt"]}
    assert {condition for rows in said(build(cls), **call) for condition, _ in rows} == {"unknown"}


def test_other_words_than_the_calls_are_unknown():
    class Rewrites(Bare):
        def texts(self, texts):
            return super().texts([text.replace("fox", "cat") for text in texts])

    runs, order = [["prompt"], ["negative_prompt"]], ["negative_prompt", "prompt"]
    call = {"prompt": ["fox"], "negative_prompt": ["dog"], "runs": runs, "order": order}
    assert {condition for rows in said(build(Rewrites), **call) for condition, _ in rows} == {"unknown"}


def test_a_loop_around_a_t5_encoder_is_told_in_the_same_way():
    family = families()["wan"]

    class Own(WanPipeline):
        @torch.no_grad()
        def __call__(self, prompt, negative_prompt, steps=2):
            def encode(text):
                taken = self.tokenizer([text], padding="max_length", max_length=16, return_tensors="pt")
                return self.text_encoder(taken.input_ids, taken.attention_mask).last_hidden_state

            cond, uncond = encode(prompt), encode(negative_prompt)
            self.scheduler.set_timesteps(steps)
            latents = torch.randn(1, self.transformer.config.in_channels, 3, 8, 8)
            for t in self.scheduler.timesteps:
                for text in (uncond, cond):
                    noise = self.transformer(latents, t.expand(1), encoder_hidden_states=text).sample
                latents = self.scheduler.step(noise, t, latents).prev_sample

    base = family.build()
    names = inspect.signature(WanPipeline.__init__).parameters
    pipe = Own(**{n: p for n, p in base.components.items() if n in names})
    watch = Watch(next(block.path for block in family.blocks if block.path.startswith("transformer.")))
    with attach(pipe, watch):
        pipe("a fox", "red cat")
    assert [context.condition for context in watch.contexts] == [("uncond",), ("cond",)] * 2


def test_where_there_is_no_prompt_an_empty_text_is_no_negative_one():
    """As Marigold's, that makes depths of images under an empty text."""

    class Depths(Bare):
        @torch.no_grad()
        def __call__(self, image, layers):
            rows = self.texts([""]).expand(len(image), -1, -1)
            self.unet(image, 1, encoder_hidden_states=rows)

    Depths.__module__ = "diffusers.pipelines.depths"  # a loop of diffusers' own
    assert said(build(Depths), image=torch.zeros(2, 4, 16, 16), layers=1) == [[("cond", 0), ("cond", 1)]]
