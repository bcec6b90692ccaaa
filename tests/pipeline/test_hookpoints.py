from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsefeat.pipeline import Hookpoint, UnknownHookpointError, attach, hookpoints, resolve
from tests.families import families
from tests.pipeline.instruments import Edit, Watch, push, zero
from tests.tiny import pixels, tiny_sd, tiny_sdxl, tiny_t5_encoder


@pytest.fixture(scope="module")
def sd():
    return tiny_sd()


@pytest.fixture(scope="module")
def sdxl():
    return tiny_sdxl()


def _any_version(path):
    """Names without what transformers 5 took out of `CLIPTextModel`."""
    return path.replace("text_model.", "")


@pytest.mark.parametrize("stream", ["image", "text"])
@pytest.mark.parametrize("io", ["output", "input", "diff"])
def test_a_hookpoint_reads_back_what_it_writes(io, stream):
    hookpoint = Hookpoint("transformer.transformer_blocks.3", io, stream)
    assert Hookpoint.parse(str(hookpoint)) == hookpoint
    assert Hookpoint.parse(f"transformer.transformer_blocks.3:{io}:{stream}") == hookpoint


@pytest.mark.parametrize("hookpoint", ["unet.mid_block", "unet.mid_block:diff", "x.y:text", "x.y:input:text"])
def test_the_shortest_form_is_written(hookpoint):
    assert str(Hookpoint.parse(hookpoint)) == hookpoint


def test_without_a_colon_the_output_is_meant():
    assert Hookpoint.parse("unet.mid_block") == Hookpoint("unet.mid_block", "output")


@pytest.mark.parametrize(("written", "io"), [(":text", "output"), (":output:text", "output"), (":diff:text", "diff")])
def test_a_written_hookpoint_can_mean_a_joint_blocks_text(written, io):
    assert Hookpoint.parse(f"transformer.transformer_blocks.3{written}") == Hookpoint(
        "transformer.transformer_blocks.3", io, "text"
    )


def test_a_transformer_lens_name_is_called_one(sd):
    with pytest.raises(UnknownHookpointError, match=r"'blocks.5.hook_resid_post': it is TransformerLens's name"):
        resolve(sd, "blocks.5.hook_resid_post")


def test_what_a_hookpoint_cannot_be_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"io='residual' of hookpoint 'unet.mid_block' is not one of output, input"):
        Hookpoint.parse("unet.mid_block:residual")
    with pytest.raises(ValueError, match=r"stream='depth'"):
        Hookpoint("unet.mid_block", stream="depth")


def test_the_listing_names_the_published_blocks_with_their_widths(sd):
    listing = {_any_version(str(info.hookpoint)): info for info in hookpoints(sd)}
    assert listing["unet.up_blocks.1.attentions.1"].width == 32
    assert listing["unet.down_blocks.0.attentions.0"].width == 16
    assert listing["unet.mid_block.attentions.0.transformer_blocks.0.attn2"].kind == "cross_attention"
    assert listing["unet.up_blocks.2.resnets.1"].width == 16
    assert listing["text_encoder.encoder.layers.2"].stream == "text"
    assert listing["text_encoder.encoder.layers.2"].width == 32
    assert not any(name.startswith("vae") for name in listing)


def test_a_line_of_the_listing_prints_in_one_line(sd):
    lines = [str(info) for info in hookpoints(sd)]
    assert "unet.mid_block.attentions.0: image, transformer, width 32, 4 x 4" in lines


def test_a_listed_name_alone_says_which_stream_is_meant():
    pipe = families()["sd3"].build()
    listing = hookpoints(pipe)
    assert len({str(info.hookpoint) for info in listing}) == len(listing)
    watches = [Watch(str(info.hookpoint)) for info in listing]
    with attach(pipe, *watches):
        families()["sd3"].call(pipe, ["a red fox"], guidance=False, steps=1)
    assert [watch.contexts[0].stream for watch in watches] == [info.stream for info in listing]
    names = [str(info.hookpoint) for info in listing]
    assert "transformer.transformer_blocks.0:text" in names  # a joint block's
    assert not any(name.endswith(":text") for name in names if name.startswith("text_encoder"))  # its only stream


def test_every_listed_width_is_the_width_of_what_the_block_gives(sdxl):
    listing = hookpoints(sdxl)
    watches = [Watch(str(info.hookpoint)) for info in listing]
    with attach(sdxl, *watches):
        pixels(sdxl, negative_prompt="cat", steps=1)
    for info, watch in zip(listing, watches, strict=True):
        assert info.width in (None, watch.rows[0].shape[1]), info
        assert info.stream == watch.contexts[0].stream, info
    assert sum(info.width is None for info in listing) == 0


@pytest.mark.parametrize(
    ("published", "here"),
    [
        ("text_encoder.text_model.encoder.layers.1", "text_encoder.encoder.layers.1"),
        ("text_encoder.encoder.layers.1", "text_encoder.encoder.layers.1"),
        ("text_encoder_2.encoder.layers.1", "text_encoder_2.text_model.encoder.layers.1"),
        ("text_encoder_2.text_model.encoder.layers.1", "text_encoder_2.text_model.encoder.layers.1"),
        ("unet._orig_mod.mid_block.attentions.0", "unet.mid_block.attentions.0"),
        ("mid_block.attentions.0", "unet.mid_block.attentions.0"),
        ("unet", "unet"),
    ],
)
def test_names_of_other_library_versions_and_wrappers_resolve(sdxl, published, here):
    target = resolve(sdxl, published)
    assert _any_version(target.path) == _any_version(here)
    root_name, _, inner = target.path.partition(".")
    assert target.module is getattr(sdxl, root_name).get_submodule(inner)


def test_a_wrapped_layer_is_meant_as_a_whole():
    class Adapted(nn.Module):  # as PEFT wraps a layer
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer

    pipe = tiny_sd()
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.to_q = Adapted(attention.to_q)
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    assert resolve(pipe, path).module is attention.to_q
    assert resolve(pipe, f"{path}.base_layer").module is attention.to_q


def test_hooks_go_to_the_wrapper_that_compile_puts_around_a_model():
    pipe = tiny_sd()
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert resolve(pipe, "unet").module is pipe.unet
    assert resolve(pipe, "unet.mid_block").module is pipe.unet._orig_mod.mid_block


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("unet.up_blocks.1.attention.1", "unet.up_blocks.1.attentions.1"),
        ("unet.up_block.1.attentions.1", "unet.up_blocks.1.attentions.1"),
        ("up_block.1.attentions.1", "unet.up_blocks.1.attentions.1"),
        ("unet.up_blocks.1.attentions.7", "unet.up_blocks.1.attentions.1"),
        ("text_encoder.encoder.layer.1", "text_encoder.encoder.layers.1"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn3", "transformer_blocks.0.attn2"),
    ],
)
def test_a_wrong_name_lists_the_nearest_real_ones(sd, wrong, nearest):
    with pytest.raises(UnknownHookpointError) as error:
        resolve(sd, wrong)
    assert wrong in str(error.value)
    assert nearest in _any_version(str(error.value))


def test_a_name_without_any_resemblance_still_shows_what_there_is(sd):
    with pytest.raises(UnknownHookpointError, match=r"the nearest are \w+\."):
        resolve(sd, "zzz")


def test_a_component_that_is_not_loaded_is_named(sd):
    with pytest.raises(UnknownHookpointError, match="its image_encoder is None"):
        resolve(sd, "image_encoder.vision_model.encoder.layers.0")


def test_a_name_that_two_denoisers_have_asks_which():
    class Two:
        def __init__(self):
            self.unet, self.unet_2 = tiny_sd().unet, tiny_sd().unet

    with pytest.raises(UnknownHookpointError, match="is in unet and in unet_2 of Two: name the component"):
        resolve(Two(), "mid_block.attentions.0")


def test_t5_blocks_are_listed_with_their_width():
    class Holder:
        def __init__(self):
            self.text_encoder = tiny_t5_encoder(d_model=24)

    listing = {str(info.hookpoint): info.width for info in hookpoints(Holder())}
    assert listing == {"text_encoder.encoder.block.0": 24, "text_encoder.encoder.block.1": 24}


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
def test_listed_grids_are_those_of_a_run_at_the_default_size(build):
    pipe = build()
    listing = [info for info in hookpoints(pipe) if info.hookpoint.path.startswith("unet.")]
    watches = [Watch(str(info.hookpoint)) for info in listing]
    with attach(pipe, *watches):
        pixels(pipe, steps=1)
    assert {info.grid for info in listing} == {(16, 16), (8, 8), (4, 4)}
    for info, watch in zip(listing, watches, strict=True):
        assert info.grid == watch.contexts[0].grid, info


def test_what_holds_its_models_as_components_alone_lists_them(sd):
    held = SimpleNamespace(components={"unet": sd.unet, "scheduler": sd.scheduler})
    assert [str(info.hookpoint) for info in hookpoints(held)] == [
        str(info.hookpoint) for info in hookpoints(sd) if info.hookpoint.path.startswith("unet.")
    ]


# A module around a denoiser, in its place


class Around(nn.Module):
    """Hands everything on, attributes too if `forwards`."""

    def __init__(self, model, forwards):
        super().__init__()
        self.inner = model
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self.add_embedding = getattr(model, "add_embedding", None)
        self.forwards = forwards

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not self.__dict__.get("forwards"):
                raise
            return getattr(super().__getattr__("inner"), name)


@pytest.mark.parametrize("forwards", [False, True])
@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
def test_a_wrapper_around_a_denoiser_is_seen_through(build, forwards):
    pipe = build()
    path = "unet.mid_block.attentions.0"
    listed = [str(info.hookpoint) for info in hookpoints(pipe)]
    plain = pixels(pipe, ["a fox", "cat"], output_type="latent")
    pipe.unet = Around(pipe.unet, forwards)
    assert [str(info.hookpoint) for info in hookpoints(pipe)] == listed
    watch = Watch(path)
    with attach(pipe, watch, Edit(zero, path)):
        assert torch.equal(pixels(pipe, ["a fox", "cat"], output_type="latent"), plain)
    assert [c.condition for c in watch.contexts] == [("uncond", "uncond", "cond", "cond")] * 2
    with attach(pipe, Edit(push(), path)):
        assert not torch.equal(pixels(pipe, ["a fox", "cat"], output_type="latent"), plain)
