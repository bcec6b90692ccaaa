"""Hooks and torch.compile: what works is right, what would be ignored is refused.

The backend is "eager": dynamo's capture, its guards and its graph breaks are what matters here, not the code generator.
Only one block of a two-level UNet is compiled where that makes no difference: capture takes a second a block.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsefeat.pipeline import HookpointNotReachedError, attach
from tests.pipeline.instruments import Edit, Watch, WatchAttention, push
from tests.tiny import pixels, tiny_sd

BLOCK = "unet.up_blocks.0.attentions.1"
CROSS = f"{BLOCK}.transformer_blocks.0.attn2"


@pytest.fixture
def pipe():
    torch.compiler.reset()
    yield tiny_sd(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    torch.compiler.reset()


@pytest.mark.parametrize("hookpoint", [BLOCK, f"{BLOCK}:input", f"{CROSS}", "unet.conv_in"])
def test_a_module_inside_a_compiled_model_is_refused_with_the_remedy(pipe, hookpoint):
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(RuntimeError, match=r"lies inside torch.compile\(unet\), compiled before `attach`") as error:
        attach(pipe, Watch(hookpoint))
    assert "attach first and compile inside the session" in str(error.value)
    assert "skip_nnmodule_hook_guards = False" in str(error.value)


def test_a_tapped_attention_inside_a_compiled_model_is_refused(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(RuntimeError, match="compiled code ignores new hooks"):
        attach(pipe, WatchAttention(CROSS))


@pytest.mark.parametrize("compiled", ["unet", "unet.up_blocks.0", BLOCK])
def test_modules_compiled_in_place_are_refused(pipe, compiled):
    pipe.unet.get_submodule(compiled.partition(".")[2]).compile(backend="eager")
    with pytest.raises(RuntimeError, match=rf"lies inside {compiled}.compile\(\)".replace(".", r"\.", 1)):
        attach(pipe, Watch(BLOCK))
    attach(pipe, Watch("unet.down_blocks.1.attentions.0" if compiled != "unet" else "vae.decoder")).close()


def test_a_compiled_forward_is_refused(pipe):
    pipe.unet.forward = torch.compile(pipe.unet.forward, backend="eager")
    with pytest.raises(RuntimeError, match=r"torch.compile\(unet\)"):
        attach(pipe, Watch(BLOCK))


def test_the_compiled_model_itself_and_what_lies_outside_it_can_be_hooked(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    whole, text = Watch("unet"), Watch("text_encoder.encoder.layers.0")
    with attach(pipe, whole, text) as run, torch.compiler.set_stance("force_eager"):
        pixels(pipe, steps=2)
    assert (run[whole], run[text]) == (2, 2)
    assert [context.step for context in whole.contexts] == [0, 1]


def test_compiled_after_attach_gives_what_eager_gives_and_nothing_after_the_session(pipe):
    plain = pixels(pipe)
    with attach(pipe, eager := Watch(BLOCK), eager_tap := WatchAttention(CROSS), Edit(push(), BLOCK)):
        edited = pixels(pipe)
    assert not np.array_equal(plain, edited)
    watch, tap = Watch(BLOCK), WatchAttention(CROSS)
    with attach(pipe, watch, tap, Edit(push(), BLOCK)) as run:
        pipe.unet.up_blocks[0] = torch.compile(pipe.unet.up_blocks[0], backend="eager")
        for _ in range(2):
            np.testing.assert_allclose(pixels(pipe), edited, atol=1e-5)
        assert [call[watch] for call in run.calls] == [2, 2]
        assert [call[tap] for call in run.calls] == [2, 2]
    for a, b in zip(eager.rows, watch.rows, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(eager_tap.seen[1][0].key, tap.seen[1][0].key)
    assert [context.grid for context in watch.contexts] == [(8, 8), (8, 8)]
    # The graph was compiled with the hook in it and is not compiled again: the hook has to know that it is gone.
    np.testing.assert_allclose(pixels(pipe), plain, atol=1e-5)


def test_with_hook_guards_on_a_compiled_model_can_be_hooked(pipe):
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        with attach(pipe, Edit(push(), BLOCK)):
            edited = pixels(pipe)
        pipe.unet.up_blocks[0] = torch.compile(pipe.unet.up_blocks[0], backend="eager")
        plain = pixels(pipe)
        for _ in range(2):
            with attach(pipe, watch := Watch(BLOCK), Edit(push(), BLOCK)) as run:
                np.testing.assert_allclose(pixels(pipe), edited, atol=1e-5)
                assert run[watch] == 2
            np.testing.assert_allclose(pixels(pipe), plain, atol=1e-5)


def test_a_hook_that_regional_compilation_swallows_is_an_error_at_the_end_of_the_call(pipe):
    # Blocks of one class share compiled code, and with it the hooks of the block that was compiled first.
    with attach(pipe, watch := Watch(BLOCK)) as run:
        for block in (pipe.unet.down_blocks[1].attentions[0], *pipe.unet.up_blocks[0].attentions):
            block.compile(backend="eager")
        try:
            pixels(pipe)
        except HookpointNotReachedError as error:
            assert "compiled before this module was hooked" in str(error)  # noqa: PT017
            assert error.result is not None  # noqa: PT017
        else:
            assert run[watch] == 2
