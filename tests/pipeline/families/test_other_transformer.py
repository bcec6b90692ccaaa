"""A transformer that has no family of its own still runs in the steps, under the pipeline's guidance."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsefeat.pipeline import attach, hookpoints
from sparsefeat.pipeline.families.other_transformer import OtherTransformer
from sparsefeat.pipeline.families.registry import family_of
from tests.pipeline.instruments import Edit, Watch, push
from tests.tiny import tiny_scheduler, tiny_vae


class NovelTransformer2DModel(nn.Module):
    config = None

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), Two()])

    def forward(self, hidden_states, timestep):
        return self.blocks[1](self.blocks[0](hidden_states))[0]


class Two(nn.Module):
    def forward(self, x):
        return x, x + 1


class Pipe:
    """The least that counts as a pipeline."""

    def __init__(self):
        torch.manual_seed(0)
        self.transformer, self.scheduler = NovelTransformer2DModel(), tiny_scheduler()

    @torch.no_grad()
    def __call__(self, prompt, guidance_scale=5.0, num_inference_steps=2):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.ones(len(prompt), 6, 4)
        for t in self.scheduler.timesteps:
            both = torch.cat([latents] * 2) if guidance_scale > 1 else latents
            noise = self.transformer(both, timestep=t).chunk(2)[-1] if guidance_scale > 1 else self.transformer(both, t)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        return latents


def test_steps_and_conditions_are_known_and_the_grid_is_not():
    pipe, watch = Pipe(), Watch("transformer.blocks.0")
    with attach(pipe, watch):
        pipe(["fox", "cat"])
    assert [(c.step, c.condition, c.grid) for c in watch.contexts] == [
        (step, ("uncond", "uncond", "cond", "cond"), None) for step in (0, 1)
    ]
    with attach(pipe, Edit(push(), "transformer.blocks.0")):
        assert not torch.equal(pipe(["fox"]), Pipe()(["fox"]))
    assert [info.hookpoint.path for info in hookpoints(pipe)] == ["transformer.blocks.0", "transformer.blocks.1"]


def test_a_block_with_two_outputs_is_refused_instead_of_guessed():
    pipe = Pipe()
    with attach(pipe, Watch("transformer.blocks.1")), pytest.raises(TypeError, match="which one is the image stream"):
        pipe(["fox"])


def test_it_does_not_claim_what_is_no_denoiser():
    assert isinstance(family_of(NovelTransformer2DModel()), OtherTransformer)
    assert not isinstance(family_of(tiny_vae()), OtherTransformer)
    assert not isinstance(
        family_of(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1, enable_nested_tensor=False)),
        OtherTransformer,
    )
