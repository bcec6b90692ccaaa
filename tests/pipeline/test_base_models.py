"""An SAE of another model is told when it surely is one, and never for a fine-tune, a mirror or a name nobody knows."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import diffusers
import pytest
import torch

import sparsefeat as sf
from sparsefeat.pipeline.base_models import BASE_MODELS, difference
from tests.families import families
from tests.tiny import tiny_sd


def unet(width):
    with torch.device("meta"):
        return SimpleNamespace(unet=diffusers.UNet2DConditionModel(cross_attention_dim=width))


def flux():
    if not families()["flux"].available:
        pytest.skip("this diffusers has no FluxPipeline")
    with torch.device("meta"):
        return SimpleNamespace(transformer=diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1))


BLOCK = "unet.mid_block.attentions.0"


@pytest.mark.parametrize(
    "name",
    [
        "CompVis/stable-diffusion-v1-4",
        "runwayml/stable-diffusion-v1-5",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",  # a mirror
        "sd15",
        "Lykon/dreamshaper-8",  # a fine-tune whose name says nothing
        "/home/me/model",
        "gpt2",
        None,
    ],
)
def test_the_same_architecture_or_an_unknown_name_is_not_judged(name):
    assert difference(unet(768), name, BLOCK) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("stabilityai/stable-diffusion-2-1", "its cross_attention_dim is 1024, this pipeline's 768"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "its cross_attention_dim is 2048"),
        ("stabilityai/stable-diffusion-xl-refiner-1.0", "its cross_attention_dim is 1280"),
        (
            "stabilityai/stable-diffusion-3.5-large",
            "it has a SD3Transformer2DModel, this pipeline a UNet2DConditionModel",
        ),
        ("black-forest-labs/FLUX.1-schnell", "it has a FluxTransformer2DModel"),
        ("black-forest-labs/FLUX.2-dev", "it has a Flux2Transformer2DModel"),
        ("PixArt-alpha/PixArt-XL-2-1024-MS", "it has a PixArtTransformer2DModel"),
    ],
)
def test_another_architecture_or_another_width_of_text_is_told(name, said):
    assert said in difference(unet(768), name, BLOCK)


def test_a_name_that_may_be_of_two_models_is_not_judged():
    assert difference(unet(1024), "me/flux1-like-sd15", BLOCK) is None


def test_what_wraps_or_subclasses_the_model_is_the_model():
    class Mine(diffusers.UNet2DConditionModel):
        pass

    with torch.device("meta"):
        pipe = SimpleNamespace(unet=Mine(cross_attention_dim=768))
    assert difference(pipe, "CompVis/stable-diffusion-v1-4", BLOCK) is None
    assert difference(SimpleNamespace(unet=torch.nn.Linear(2, 2)), "CompVis/stable-diffusion-v1-4", BLOCK) is None


def test_of_a_text_encoder_only_its_own_width_is_compared():
    # CLIP-L is in Stable Diffusion 1, in SDXL and in FLUX.
    clip = SimpleNamespace(text_encoder=SimpleNamespace(config=SimpleNamespace(hidden_size=768)), unet=unet(2048).unet)
    assert difference(clip, "CompVis/stable-diffusion-v1-4", "text_encoder.encoder.layers.8") is None
    assert "is 1024 wide, this pipeline's 768" in difference(
        clip, "stabilityai/stable-diffusion-2-1", "text_encoder.encoder.layers.8"
    )
    assert difference(clip, "black-forest-labs/FLUX.1-dev", "text_encoder.encoder.layers.8") is None


def test_flux_is_flux():
    assert difference(flux(), "black-forest-labs/FLUX.1-dev", "transformer.transformer_blocks.0") is None
    assert "this pipeline a FluxTransformer2DModel" in difference(
        flux(), "sdxl-turbo", "transformer.transformer_blocks.0"
    )


def test_every_denoiser_named_is_one_of_diffusers():
    if tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 42):
        pytest.skip("older versions lack some models")
    assert all(hasattr(diffusers, base.denoiser) for base in BASE_MODELS)


def test_attach_tells_it_once_and_goes_on():
    pipe = tiny_sd()
    at = "unet.mid_block.attentions.0"
    for name, count in (("stabilityai/stable-diffusion-xl-base-1.0", 1), ("somebody/fine-tune", 0)):
        sae = sf.SAE(sf.SAEConfig(d_model=32, n_latents=64, k=4, hookpoint=at, base_model=name)).eval()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with sf.attach(pipe, rec := sf.Record(sae)) as run:
                pipe("a fox", num_inference_steps=1, output_type="latent")
        told = [str(w.message) for w in caught if "another model" in str(w.message)]
        assert len(told) == count
        assert run[rec].codes(0).rows
