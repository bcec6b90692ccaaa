"""Stable Diffusion 3: skip-layer guidance, the last block, dual attention."""

from __future__ import annotations

import pytest
import torch

from sparsefeat.pipeline import Delta, HookpointNotReachedError, attach, hookpoints
from tests.families.sd3 import TEXT_TOKENS, WIDTH, build, call
from tests.pipeline.families.test_transformer import at
from tests.pipeline.instruments import Edit, Watch, WatchAttention, zero

FIRST, LAST = "transformer.transformer_blocks.0", "transformer.transformer_blocks.1"


@pytest.fixture(scope="module")
def pipe():
    return build()


def test_skip_layer_guidance_has_a_pass_of_its_own_in_the_same_step(pipe):
    skipped, other = Watch(FIRST), Watch(LAST)
    skip = {"skip_guidance_layers": [0], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 0.5}
    with attach(pipe, skipped, other):
        call(pipe, ["red fox", "a cat"], guidance=True, steps=2, **skip)
    batched, perturbed = ("uncond", "uncond", "cond", "cond"), ("perturbed", "perturbed")
    assert [(c.step, c.condition) for c in other.contexts] == [(0, batched), (0, perturbed), (1, batched)]
    assert other.contexts[1].prompt_index == (0, 1)
    assert [(c.step, c.condition) for c in skipped.contexts] == [(0, batched), (1, batched)]


def test_an_edit_of_conditional_rows_leaves_the_perturbed_pass_alone(pipe):
    def conditional(activations, context):
        return Delta(context.row_condition()[:, None] * torch.ones(WIDTH))

    before, after = Watch(LAST), Watch(LAST)
    skip = {"skip_guidance_layers": [0], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}
    with attach(pipe, before, Edit(conditional, LAST), after):
        call(pipe, ["red fox"], guidance=True, steps=1, **skip)
    changed = [
        (a != b).any(1).view(c.batch, -1).all(1).tolist()
        for a, b, c in zip(before.rows, after.rows, before.contexts, strict=True)
    ]
    assert changed == [[False, True], [False]]


def test_the_last_block_has_no_text_stream(pipe):
    listed = {(info.hookpoint.path, info.stream) for info in hookpoints(pipe)}
    assert (FIRST, "text") in listed
    assert {(path, stream) for path, stream in listed if path in (LAST, f"{LAST}.attn")} == {
        (LAST, "image"),
        (f"{LAST}.attn", "image"),
    }
    with pytest.raises(ValueError, match=r"transformer_blocks.1 has no text stream in this StableDiffusion3Pipeline"):
        attach(pipe, at(Watch(), (LAST, "text")))


def test_the_second_attention_of_a_dual_block_is_the_image_alone():
    pipe = build(dual=True)
    text = at(Watch(), (f"{FIRST}.attn", "text"))
    image, tap = Watch(f"{FIRST}.attn2"), WatchAttention(f"{FIRST}.attn2", f"{FIRST}.attn")
    plain = call(pipe, ["red fox"], guidance=True, size="wide")
    with attach(pipe, image, text, tap, Edit(zero, f"{FIRST}.attn2")):
        assert torch.equal(call(pipe, ["red fox"], guidance=True, size="wide"), plain)
    assert image.contexts[0].grid == (4, 8)
    assert text.contexts[0].positions == TEXT_TOKENS
    seen = {c.path: c.streams for c, _ in tap.seen}
    assert seen[f"{FIRST}.attn2"] == {}
    assert seen[f"{FIRST}.attn"] == {"image": (0, 32), "text": (32, 32 + TEXT_TOKENS)}


def test_the_streams_are_those_that_the_embedders_made(pipe):
    # Seen from the model: what enters the first block is what its two embedders gave.
    image, text = (at(Watch(), (FIRST, stream, "input")) for stream in ("image", "text"))
    made = {}
    with attach(pipe, image, text):
        handles = [
            getattr(pipe.transformer, name).register_forward_hook(
                lambda module, args, output, name=name: made.setdefault(name, output)
            )
            for name in ("pos_embed", "context_embedder")
        ]
        call(pipe, ["red fox"], guidance=True, steps=1)
        for handle in handles:
            handle.remove()
    assert torch.equal(image.rows[0], made["pos_embed"].flatten(0, 1))
    assert torch.equal(text.rows[0], made["context_embedder"].flatten(0, 1))


def test_a_block_that_never_runs_is_named_with_the_likely_reason(pipe):
    block = pipe.transformer.transformer_blocks[0]
    with attach(pipe, Watch(FIRST)):
        pipe.transformer.transformer_blocks[0] = _Passing()  # what a cache makes of a block
        with pytest.raises(HookpointNotReachedError, match="skip_layers"):
            call(pipe, ["red fox"], guidance=False, steps=1)
        pipe.transformer.transformer_blocks[0] = block


class _Passing(torch.nn.Module):
    context_pre_only = False

    def forward(self, hidden_states, encoder_hidden_states, **other):
        return encoder_hidden_states, hidden_states
