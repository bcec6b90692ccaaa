"""A misspelt argument of a pipeline's call is refused with the nearest name, also where the pipeline would swallow it."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

import sparsefeat as sf
from sparsefeat.features import collect_statistics
from sparsefeat.pipeline.call_arguments import check_arguments
from tests.tiny import tiny_sd


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.fixture(scope="module")
def sae():
    return sf.SAE(sf.SAEConfig(d_model=32, n_latents=40, k=4, hookpoint="text_encoder.encoder.layers.0")).eval()


NEAREST = [("num_infrence_steps", "num_inference_steps"), ("guidence_scale", "guidance_scale")]


@pytest.mark.parametrize(("wrong", "right"), NEAREST)
def test_a_call_with_instruments_refuses_it(pipe, wrong, right):
    with sf.attach(pipe, sf.HeatMaps()), pytest.raises(TypeError, match=rf"^{wrong}= is no argument .*mean {right}\?$"):
        pipe("fox", **{wrong: 1})


@pytest.mark.parametrize(
    ("wrong", "right"), [*NEAREST, ("gama", "gamma"), ("n_latent", "n_latents"), ("batchsize", "batch_size")]
)
def test_a_fit_refuses_it_and_knows_its_own_names(pipe, sae, wrong, right):
    with pytest.raises(TypeError, match=rf"^{wrong}= is no argument .*mean {right}\?$"):
        sf.Erase.fit(pipe, sae, "fox", {"fox": ["fox"], "cat": ["cat"]}, **{wrong: 1})


def test_the_other_functions_that_call_a_pipeline_refuse_it(pipe, sae):
    for call in (
        lambda **wrong: sf.check(sae, pipe, ["fox"], **wrong),
        lambda **wrong: sf.InterpretThenDeactivate.fit(pipe, sae, ["fox"], **wrong),
    ):
        with pytest.raises(TypeError, match=r"mean num_inference_steps\?"):
            call(num_infrence_steps=1)


def test_fits_of_several_prompts_take_one_negative_prompt_for_all(pipe):
    sae = sf.SAE(sf.SAEConfig(d_model=32, n_latents=40, k=4, hookpoint="unet.mid_block.attentions.0")).eval()
    prompts = {"fox": ["fox", "a fox"], "cat": ["cat", "a cat", "one cat"]}
    call = {"negative_prompt": "a tree", "num_inference_steps": 1}
    statistics = collect_statistics(pipe, sae, prompts, **call)
    record, scores = sf.Record(sae), []
    for seed, prompt in enumerate(prompts["fox"]):
        with sf.attach(pipe, record) as run:
            pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="latent", **call)
        scores.append(run[record].scores()[0].double())
    torch.testing.assert_close(statistics.mean("fox"), torch.stack(scores).mean(0), rtol=1e-5, atol=1e-6)
    sf.PrincipalDirections.fit(pipe, "unet.mid_block", prompts["cat"], n=1, bins=1, **call)
    sf.LinearAcT.fit(pipe, ["unet.mid_block"], prompts["fox"], prompts["cat"][:2], **call)
    sf.cones(pipe, "fox", prior="cat", images=2, threshold=1e-12, **call)


@pytest.mark.parametrize("schedule", ["timesteps", "sigmas"])
def test_a_schedule_takes_the_place_of_the_number_of_steps(schedule):
    pipe = tiny_sd("euler")
    record = sf.Record(
        sf.SAE(sf.SAEConfig(d_model=32, n_latents=40, k=4, hookpoint="unet.mid_block.attentions.0")).eval()
    )
    given = {"timesteps": [900, 500, 100], "sigmas": [9.0, 3.0, 1.0, 0.0]}[schedule]  # the last is where it ends
    with sf.attach(pipe, record) as run:
        pipe("fox", num_inference_steps=None, output_type="latent", **{schedule: given})
    assert run[record].steps == (0, 1, 2)


def test_what_a_pipeline_reads_from_its_kwargs_is_let_through(pipe):
    check_arguments(pipe, ["callback", "callback_steps", "guidance_scale"])


def test_somebodys_own_pipeline_may_hand_its_kwargs_on():
    class Own(DiffusionPipeline):
        def __call__(self, prompt, num_inference_steps=2, **kwargs):
            return super().__call__(prompt, **kwargs)

    check_arguments(Own(), ["zoom"])
    with pytest.raises(TypeError, match="did you mean num_inference_steps"):
        check_arguments(Own(), ["num_infrence_steps"])


def test_one_that_is_like_no_name_is_refused_with_the_names(pipe):
    with pytest.raises(TypeError, match="it takes prompt, height, width"):
        check_arguments(pipe, ["foo_bar_baz"])
