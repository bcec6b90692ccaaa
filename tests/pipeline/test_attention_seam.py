from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsefeat.pipeline import HookpointNotReachedError, UnknownHookpointError, attach
from tests.pipeline.instruments import Watch, WatchAttention
from tests.tiny import pixels, tiny_sd, tiny_sdxl

BLOCK = "unet.up_blocks.1.attentions.1.transformer_blocks.0"
CROSS, SELF = f"{BLOCK}.attn2", f"{BLOCK}.attn1"


@pytest.fixture
def pipe():
    return tiny_sd()


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
def test_the_queries_keys_and_values_are_those_of_the_module(build):
    pipe = build()
    module = pipe.unet.up_blocks[1].attentions[1].transformer_blocks[0].attn2
    seen, images, contexts = WatchAttention(CROSS), pixels(pipe, ["fox", "cat"]), []
    given, gives = Watch(f"{CROSS}:input"), Watch(CROSS)
    with attach(pipe, seen, given, gives) as run:
        assert np.array_equal(pixels(pipe, ["fox", "cat"]), images), "tapping changed the image"
    assert run[seen] == 2
    call, context = seen.seen[0]
    heads = module.heads
    assert call.query.shape == (4, heads, 64, 32 // heads)
    assert call.key.shape == call.value.shape == (4, heads, 16, 32 // heads)
    query = module.to_q(given.rows[0]).view(4, 64, heads, -1).transpose(1, 2)
    torch.testing.assert_close(call.query, query, rtol=1e-5, atol=1e-6)
    assert call.scale == pytest.approx((32 // heads) ** -0.5)
    # The attention's own formula, from the call alone, gives what the module gave.
    probabilities = (call.scale * call.query @ call.key.transpose(-1, -2)).softmax(-1)
    attended = (probabilities @ call.value).transpose(1, 2).flatten(2)
    expected = module.to_out[0](attended) / module.rescale_output_factor
    torch.testing.assert_close(gives.rows[0], expected.flatten(0, 1), rtol=1e-4, atol=1e-5)
    assert (call.path, call.is_cross, call.is_causal, call.index) == (CROSS, True, False, 0)
    assert context.condition == ("uncond", "uncond", "cond", "cond")
    assert context.prompt_index == (0, 1, 0, 1)
    assert context.grid == (8, 8)
    assert contexts == []


def test_every_attention_module_of_the_unet_is_seen_with_its_grid_at_any_size(pipe):
    paths = [f"unet.{path}" for path, _ in pipe.unet.named_modules() if path.endswith((".attn1", ".attn2"))]
    seen = WatchAttention(*paths)
    with attach(pipe, seen):
        pixels(pipe, width=72, height=56, steps=1)
    assert sorted({call.path for call, _ in seen.seen}) == sorted(paths)
    for call, context in seen.seen:
        height, width = context.grid
        assert call.query.shape[2] == height * width
        assert call.is_cross == call.path.endswith("attn2")
        assert call.key.shape[2] == (16 if call.is_cross else height * width)


def test_steps_are_told_apart(pipe):
    seen = WatchAttention(CROSS)
    with attach(pipe, seen):
        pixels(pipe, steps=3)
    assert [context.step for _, context in seen.seen] == [0, 1, 2]


def test_fused_projections_are_seen_like_separate_ones(pipe):
    separate = WatchAttention(SELF, CROSS)
    with attach(pipe, separate):
        pixels(pipe, steps=1)
    pipe.unet.fuse_qkv_projections()
    fused = WatchAttention(SELF, CROSS)
    with attach(pipe, fused):
        pixels(pipe, steps=1)
    assert len(fused.seen) == len(separate.seen) == 2
    for (one, _), (other, _) in zip(separate.seen, fused.seen, strict=True):
        torch.testing.assert_close(one.query, other.query, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one.key, other.key, rtol=1e-3, atol=1e-4)


class Keywords(AttnProcessor2_0):
    """A processor that passes everything by keyword, with a scale of its own, and attends twice."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projection(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projection, states in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text))
        )
        first = F.scaled_dot_product_attention(query=query, key=key, value=value, scale=0.25)
        second = F.scaled_dot_product_attention(query, key=key[:, :, :4], value=value[:, :, :4], attn_mask=None)
        return attn.to_out[0]((first + second).transpose(1, 2).flatten(2))


def test_keyword_arguments_scales_and_several_attentions_in_a_module_are_seen(pipe):
    module = pipe.unet.up_blocks[1].attentions[1].transformer_blocks[0].attn2
    processor = Keywords()
    module.set_processor(processor)
    seen = WatchAttention(CROSS)
    with attach(pipe, seen):
        pixels(pipe, steps=1)
    (first, _), (second, _) = seen.seen
    assert (first.scale, first.index, first.key.shape[2]) == (0.25, 0, 16)
    assert (second.index, second.key.shape[2]) == (1, 4)
    assert module.processor is processor


def test_a_processor_that_never_attends_through_the_seam_is_an_error_naming_it_and_the_remedy(pipe):
    pipe.unet.set_attn_processor(AttnProcessor())
    images = pixels(pipe)
    with attach(pipe, seen := WatchAttention(CROSS), beside := Watch("unet.mid_block")) as run:
        with pytest.raises(HookpointNotReachedError) as error:
            pixels(pipe)
        assert np.array_equal(error.value.result.images, images)
        assert run[beside] == 2
    assert "its AttnProcessor does not call F.scaled_dot_product_attention" in str(error.value)
    assert "pipe.unet.set_attn_processor(AttnProcessor2_0())" in str(error.value)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    with attach(pipe, seen) as run:
        pixels(pipe)
    assert run[seen] == 2


def test_attentions_outside_the_tapped_modules_are_not_seen(pipe):
    seen = WatchAttention(CROSS)
    with attach(pipe, seen):
        pixels(pipe, steps=1)
    assert {call.path for call, _ in seen.seen} == {CROSS}


def test_two_sessions_may_tap_the_same_module(pipe):
    outer, inner = WatchAttention(CROSS), WatchAttention(CROSS, SELF)
    module = pipe.unet.up_blocks[1].attentions[1].transformer_blocks[0].attn2
    with attach(pipe, outer) as first:
        with attach(pipe, inner) as second:
            pixels(pipe, steps=1)
            assert (first[outer], second[inner]) == (1, 2)
        pixels(pipe, steps=1)
        assert "forward" in vars(module)
    assert (first[outer], len(second.calls)) == (1, 1)
    assert "forward" not in vars(module)


def test_instruments_may_attend_themselves_without_being_seen(pipe):
    class Attends(WatchAttention):
        def at_attention(self, call, context):
            super().at_attention(call, context)
            F.scaled_dot_product_attention(call.query, call.key, call.value)

    with attach(pipe, attends := Attends(CROSS)) as run:
        pixels(pipe, steps=1)
    assert run[attends] == 1


def test_a_closed_window_sees_nothing_and_is_no_error(pipe):
    class Late(WatchAttention):
        def active(self, context):
            return context.step == 1

    with attach(pipe, late := Late(CROSS)) as run:
        pixels(pipe, steps=3)
    assert run[late] == 1


def test_a_wrong_attention_path_is_refused_with_the_nearest(pipe):
    with pytest.raises(UnknownHookpointError, match="attn2"):
        attach(pipe, WatchAttention(f"{BLOCK}.attn3"))


def test_the_text_encoders_attention_can_be_tapped_too(pipe):
    seen = WatchAttention("text_encoder.encoder.layers.1.self_attn")
    with attach(pipe, seen):
        pixels(pipe, steps=1)
    assert [context.condition for _, context in seen.seen] == [("cond",), ("uncond",)]
    assert seen.seen[0][0].query.shape == (1, 4, 16, 8)
    assert seen.seen[0][1].grid is None


def test_an_adapted_projection_is_in_the_queries(pipe):
    class LoRA(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer = layer

        def forward(self, x, *args, **kwargs):
            return self.base_layer(x, *args, **kwargs) + 2.0

    plain, adapted = WatchAttention(CROSS), WatchAttention(CROSS)
    with attach(pipe, plain):
        pixels(pipe, steps=1)
    module = pipe.unet.up_blocks[1].attentions[1].transformer_blocks[0].attn2
    module.to_q = LoRA(module.to_q)
    with attach(pipe, adapted):
        pixels(pipe, steps=1)
    torch.testing.assert_close(adapted.seen[0][0].query, plain.seen[0][0].query + 2.0)


@pytest.mark.parametrize("inference", [False, True])
def test_the_log_sum_exp_and_the_output_are_the_attentions_own(pipe, inference):
    seen = WatchAttention(CROSS, SELF)
    with torch.inference_mode(inference), attach(pipe, seen):
        pixels(pipe, steps=1)
    assert len(seen.seen) == 2
    for call, _ in seen.seen:
        scores = call.scale * call.query.double() @ call.key.double().transpose(-1, -2)
        torch.testing.assert_close(call.lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(call.output.double(), scores.softmax(-1) @ call.value.double(), rtol=1e-4, atol=1e-5)


def test_where_torchs_kernel_gives_no_log_sum_exp_there_is_none(pipe):
    seen = WatchAttention(CROSS)
    with sdpa_kernel(SDPBackend.MATH), attach(pipe, seen):
        pixels(pipe, steps=1)
    assert seen.seen[0][0].lse is None
