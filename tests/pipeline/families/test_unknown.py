"""What no family claims is refused, never guessed: models, parts of models, and tensors that are not what a part should
give; and a hookpoint that states its rows is believed.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparsefeat.pipeline import Hookpoint, attach, hookpoints
from sparsefeat.pipeline.families.family import UnknownRowsError
from sparsefeat.pipeline.families.registry import family_of
from tests.families import families
from tests.families.latents import tiny_kl
from tests.pipeline.instruments import Edit, Watch, push
from tests.tiny import pixels, tiny_scheduler, tiny_sd, tiny_vae


class NovelTransformer2DModel(nn.Module):
    """A denoiser of nobody's: 2 text tokens, then 6 of the image."""

    config = None

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Two()])

    def forward(self, hidden_states, timestep):
        text = torch.full_like(hidden_states[:, :2], 5.0)
        return self.blocks[1](self.blocks[0](torch.cat([text, hidden_states], 1)))[0][:, 2:]


class Block(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)


class Two(nn.Module):
    def forward(self, x):
        return x, x + 1


class TwoBlock(Two):
    pass


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


def test_a_denoiser_of_nobodys_is_refused_at_attach_with_the_way_to_state_its_rows():
    pipe = Pipe()
    with pytest.raises(UnknownRowsError, match=r"blocks.0 .*cannot be told.*does not know the model.*rows=\(0, 256\)"):
        attach(pipe, Watch("transformer.blocks.0"))
    assert [(info.hookpoint.path, info.stream) for info in hookpoints(pipe)] == [("transformer.blocks.0", "unknown")]


def test_rows_that_a_hookpoint_states_are_read_and_edited_and_nothing_else():
    pipe = Pipe()
    image, text = Watch("transformer.blocks.0:2-"), Watch("transformer.blocks.0:text:0-2")
    whole = []
    handle = pipe.transformer.blocks[0].register_forward_hook(lambda module, args, output: whole.append(output))
    with attach(pipe, image, text):
        pipe(["fox", "cat"])
    handle.remove()
    for step in (0, 1):
        assert torch.equal(image.rows[step].view(4, 6, 4), whole[step][:, 2:])
        assert torch.equal(text.rows[step].view(4, 2, 4), whole[step][:, :2])
    assert {(c.stream, c.grid, c.positions, c.batch) for c in image.contexts} == {("image", None, 6, 4)}
    with attach(pipe, Edit(push(), Hookpoint("transformer.blocks.0", rows=(0, 2)))):
        assert torch.equal(pipe(["fox"]), Pipe()(["fox"]))  # the text's rows are cut off at the end
    with attach(pipe, Edit(push(), Hookpoint("transformer.blocks.0", rows=(2, 8)))):
        assert not torch.equal(pipe(["fox"]), Pipe()(["fox"]))


def test_stated_rows_that_are_not_there_or_two_outputs_are_refused():
    pipe = Pipe()
    with attach(pipe, Watch("transformer.blocks.0:2-9")), pytest.raises(UnknownRowsError, match="rows 2 to 9 are not"):
        pipe(["fox"])
    with (
        attach(pipe, Watch("transformer.blocks.1:0-")),
        pytest.raises(TypeError, match="which one is meant cannot be told"),
    ):
        pipe(["fox"])
    with pytest.raises(ValueError, match=r"rows=\(4, 2\)"):
        Hookpoint("transformer.blocks.0", rows=(4, 2))


@pytest.mark.parametrize("written", ["transformer.blocks.0:2-", "a.b:text:0-77", "a.b:diff:3-4", "a.b:input:text:3-4"])
def test_stated_rows_are_written_as_they_are_read(written):
    assert str(Hookpoint.parse(written)) == written


def test_what_runs_for_a_time_is_a_denoiser_whatever_it_is_called():
    class Net(nn.Module):
        def forward(self, x, sigma):
            return x

    assert family_of(NovelTransformer2DModel()).runs_in_steps
    assert family_of(Net()).runs_in_steps
    assert not family_of(tiny_vae()).runs_in_steps
    assert not family_of(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 1, enable_nested_tensor=False)
    ).runs_in_steps


# Parts of models that are known


def call(name):
    family = families()[name]
    if not family.available:
        pytest.skip(f"this diffusers has no {family.pipeline}")
    pipe = family.build()
    return pipe, lambda: family.call(pipe, ["a fox"], guidance=False, steps=1)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("flux", "time_text_embed"),
        ("flux", "transformer_blocks.0.norm1.linear"),
        ("sd3", "time_text_embed.timestep_embedder"),
        ("qwen_image", "transformer_blocks.0.img_mod"),
        ("pixart", "adaln_single"),
        ("wan", "condition_embedder.time_proj"),
        ("sana", "time_embed"),
        ("lumina2", "time_caption_embed"),
        ("flux", "transformer_blocks.0.attn.norm_q"),
        ("lumina", "layers.0.attn1"),
        ("sd", "time_embedding"),
    ],
)
def test_a_part_that_gives_no_rows_of_a_stream_is_refused(name, path):
    pipe, run = call(name)
    with (
        pytest.raises(UnknownRowsError, match="cannot be told"),
        attach(pipe, Watch(f"{'unet' if name == 'sd' else 'transformer'}.{path}")),
    ):
        run()


@pytest.mark.parametrize(
    ("name", "path", "stream"),
    [
        ("flux", "context_embedder", "text"),
        ("flux", "x_embedder", "image"),
        ("flux", "transformer_blocks.0.attn.add_k_proj", "text"),
        ("flux", "transformer_blocks.0.attn.to_k", "image"),
        ("flux", "transformer_blocks.0.ff.net.0", "image"),
        ("sd3", "transformer_blocks.0.norm1_context", "text"),
        ("sd3", "context_embedder", "text"),
        ("qwen_image", "transformer_blocks.0.txt_norm1", "text"),
        ("qwen_image", "txt_in", "text"),
        ("pixart", "transformer_blocks.0.attn2.to_k", "text"),
        ("pixart", "transformer_blocks.0.attn2.to_q", "image"),
        ("pixart", "caption_projection", "text"),
        ("wan", "blocks.0.attn2.to_v", "text"),
        ("hunyuan_video", "context_embedder", "text"),
        ("sd", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "text"),
        ("sd", "mid_block.attentions.0.transformer_blocks.0.attn2.to_q", "image"),
        ("sd", "conv_in", "image"),
    ],
)
def test_the_stream_of_a_part_is_that_of_what_it_is_made_of(name, path, stream):
    # The rows of the text change with the prompt and not with the noise, the image's the other way round, in what the
    # first block is given.
    pipe, _ = call(name)
    family = families()[name]
    path = f"{'unet' if name == 'sd' else 'transformer'}.{path}"
    seen = {}
    for said, (prompt, seed) in {"plain": ("a fox", 0), "prompt": ("a cat", 0), "noise": ("a fox", 1)}.items():
        watch = Watch(f"{path}:input")
        with attach(pipe, watch):
            family.call(pipe, [prompt], guidance=False, steps=1, seed=seed)
        assert {c.stream for c in watch.contexts} == {stream}
        seen[said] = watch.rows[0]
    if stream == "text":
        assert torch.equal(seen["plain"], seen["noise"])
        assert not torch.equal(seen["plain"], seen["prompt"])
    else:
        assert not torch.equal(seen["plain"], seen["noise"])


def test_the_text_of_a_unet_is_not_its_image():
    pipe = tiny_sd()
    with pytest.raises(ValueError, match="has no text stream"):
        attach(pipe, Watch("unet.mid_block.attentions.0:text"))


@pytest.mark.parametrize("part", ["tiling", "slicing"])
def test_a_vae_that_works_on_parts_of_the_images_is_refused(part):
    pipe = tiny_sd()
    pipe.vae = tiny_kl(4)
    watch = Watch("vae.decoder.mid_block")
    with attach(pipe, watch):
        pixels(pipe, ["a fox", "a cat"])
    assert [(c.batch, c.prompt_index) for c in watch.contexts] == [(2, (0, 1))]
    getattr(pipe.vae, f"enable_{part}")()
    with attach(pipe, Watch("vae.decoder.mid_block")), pytest.raises(UnknownRowsError, match=f"disable_{part}"):
        pixels(pipe, ["a fox", "a cat"])


def test_a_component_that_is_no_denoiser_no_text_encoder_and_no_vae_is_refused():
    pipe = tiny_sd()
    pipe.image_encoder = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UnknownRowsError, match="does not know the model"):
        attach(pipe, Watch("image_encoder.0"))


def test_a_vae_that_decodes_all_images_again_is_read_again():
    """A preview in every step, by a callback."""
    pipe = tiny_sd()
    pipe.vae = tiny_kl(4)

    def preview(pipe, step, timestep, tensors):
        pipe.vae.decode(tensors["latents"])
        return tensors

    with attach(pipe, watch := Watch("vae.decoder.mid_block")):
        pixels(pipe, steps=2, callback_on_step_end=preview)
    assert [(c.prompt_index, c.step) for c in watch.contexts] == [((0,), None)] * 3
