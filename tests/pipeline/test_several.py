"""One session over several pipelines."""

from __future__ import annotations

import diffusers
import pytest
import torch

import sparsefeat as sf
from sparsefeat.pipeline import attach
from tests.pipeline.instruments import Edit, Watch, WatchAttention, push, zero
from tests.pipeline.state import everything
from tests.tiny import pixels, tiny_sd

BLOCK = "unet.mid_block.attentions.0"


@pytest.fixture(scope="module")
def pair():
    """A base, and an image-to-image pipeline of the same models, as for a high-resolution fix."""
    base = tiny_sd()
    parts = dict(base.components)
    fix = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    fix.set_progress_bar_config(disable=True)
    for pipe, more in ((base, {}), (fix, {"image": torch.rand(1, 3, 64, 64)})):
        pixels(pipe, steps=2, **more)
    return base, fix


def run_both(base, fix):
    image = base("a fox", num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(1)).images
    out = fix("a red cat", image=image, strength=0.5, num_inference_steps=4, output_type="latent")
    return out.images


def test_the_calls_of_all_are_in_one_session_in_order(pair):
    base, fix = pair
    before = [everything(pipe) for pipe in pair]
    sae = sf.SAE(sf.SAEConfig(d_model=32, n_latents=24, k=4, hookpoint=BLOCK)).eval()
    watch, rec = Watch(BLOCK), sf.Record(sae)
    with attach([base, fix], watch, rec) as run:
        run_both(base, fix)
        assert [c.call.pipe for c in run.calls] == [base, fix]
        run_both(base, fix)
    assert [c.call.prompts for c in run.calls] == [["a fox"], ["a red cat"]] * 2
    assert [c[rec].steps for c in run.calls] == [(0, 1), (0, 1)] * 2
    assert [c.fraction for c in watch.contexts] == [0.5, 0.75]
    assert [everything(pipe) for pipe in pair] == before


def test_heat_maps_have_the_words_of_the_pipeline_that_was_called(pair):
    base, fix = pair
    with attach(pair, maps := sf.HeatMaps()) as run:
        run_both(base, fix)
    assert run.calls[0][maps].word("fox").values.isfinite().all()
    assert run.calls[1][maps].word("cat").values.isfinite().all()
    with pytest.raises(ValueError, match="cat"):
        run.calls[0][maps].word("cat")


def test_two_pipelines_of_one_model_see_their_own_attentions(pair):
    path = f"{BLOCK}.transformer_blocks.0.attn2"
    for first, second in (pair, pair[::-1]):
        with attach(first, a := WatchAttention(path)) as one, attach(second, b := WatchAttention(path)) as two:
            run_both(*pair)
        assert {one.calls[0].call.pipe, two.calls[0].call.pipe} == set(pair)
        assert len(a.seen) == len(b.seen) == 2


def test_an_edit_is_in_both_and_a_neutral_one_changes_nothing(pair):
    torch.manual_seed(0)
    plain = run_both(*pair)
    for rule, same in ((zero, True), (push(8.0), False)):
        with attach(pair, Edit(rule, BLOCK)):
            torch.manual_seed(0)
            assert torch.equal(run_both(*pair), plain) == same
    torch.manual_seed(0)
    assert torch.equal(run_both(*pair), plain)


def test_an_instrument_at_work_in_the_outer_call_is_refused_to_the_inner(pair):
    base, fix = pair

    def inside(pipe, step, timestep, tensors):
        fix("a red cat", image=torch.rand(1, 3, 64, 64), num_inference_steps=2, output_type="latent")
        return tensors

    with (
        attach(pair, Watch(BLOCK)) as run,
        pytest.raises(RuntimeError, match="attach another one to the inner pipeline"),
    ):
        pixels(base, steps=2, callback_on_step_end=inside)
    assert run.calls == []
    with attach(base, outer := Watch(BLOCK)), attach(fix, inner := Watch(BLOCK)):
        pixels(base, steps=2, callback_on_step_end=inside)
    assert [c.step for c in outer.contexts] == [0, 1]
    assert [c.step for c in inner.contexts] == [0]


def test_a_loop_of_ones_own_says_which_pipeline_it_is(pair):
    _, fix = pair
    with attach(pair, Watch("text_encoder.encoder.layers.0")) as run:
        with torch.no_grad(), run.call(["a fox"], pipe=fix):
            fix.encode_prompt("a fox", "cpu", 1, False)
        assert run.calls[0].call.pipe is fix
        with pytest.raises(ValueError, match="not attached to; give one that is"), run.call(pipe=tiny_sd()):
            pass


@pytest.mark.parametrize(("pipes", "match"), [([], "empty list"), ("twice", "twice in its list")])
def test_what_is_no_list_of_pipelines_is_refused(pair, pipes, match):
    before = [everything(pipe) for pipe in pair]
    with pytest.raises(ValueError, match=match):
        attach([pair[0], pair[0]] if pipes == "twice" else pipes, Watch(BLOCK))
    with pytest.raises(ValueError, match="no module"):
        attach(pair, Watch("unet.mid_block.nowhere"))
    assert [everything(pipe) for pipe in pair] == before
