"""Published SAEs are listed at their hookpoints in a pipeline of their base model, and nowhere else."""

from __future__ import annotations

import diffusers
import pytest
import torch
import transformers

from sparsefeat.pipeline import hookpoints
from tests.families import families
from tests.families.latents import tiny_flow, tiny_kl
from tests.tiny import tiny_scheduler, tiny_sd, tiny_sdxl, tiny_tokenizer, tiny_vae


def at(pipe):
    """{(path, stream): names} of the hookpoints that have any."""
    return {(info.hookpoint.path, info.stream): info.published for info in hookpoints(pipe) if info.published}


def clip(width, layers, kind="CLIPTextModel"):
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=8, vocab_size=64
    )
    return getattr(transformers, kind)(config)


def sd(cross_attention_dim):
    with torch.device("meta"):  # the real shapes, without their memory
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=cross_attention_dim, layers_per_block=2)
        text_encoder = clip(768, 12)
    return diffusers.StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=text_encoder,
        tokenizer=tiny_tokenizer(),
        unet=unet,
        scheduler=tiny_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def test_stable_diffusion_1():
    found = {path.replace("text_model.", ""): names for (path, _), names in at(sd(768)).items()}
    assert found == {
        "unet.up_blocks.1.attentions.1": ("SAeUron objects",),
        "unet.up_blocks.1.attentions.2": ("SAeUron styles",),
        "text_encoder.encoder.layers.8": ("ItD",),
        "text_encoder.encoder.layers.9": ("Concept Steerers nudity",),
        "text_encoder.encoder.layers.10": ("Concept Steerers styles",),
    }


def test_a_model_of_other_sizes_has_none():
    assert at(sd(1024)) == {}  # Stable Diffusion 2
    assert at(tiny_sd()) == {}
    assert at(tiny_sdxl()) == {}


def test_sdxl_has_them_at_the_difference():
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 2),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        text_encoders = clip(768, 12), clip(1280, 32, "CLIPTextModelWithProjection")
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=text_encoders[0],
        text_encoder_2=text_encoders[1],
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=tiny_scheduler(),
        add_watermarker=False,
    )
    found = at(pipe)
    assert {path: names for (path, stream), names in found.items() if stream == "image"} == {
        "unet.down_blocks.2.attentions.1": ("sdxl-unbox composition (:diff)",),
        "unet.mid_block.attentions.0": ("sdxl-unbox mid block (:diff)",),
        "unet.up_blocks.0.attentions.0": ("sdxl-unbox details (:diff)",),
        "unet.up_blocks.0.attentions.1": ("sdxl-unbox style (:diff)",),
    }
    texts = sorted(path.replace("text_model.", "") for path, stream in found if stream == "text")
    assert texts == ["text_encoder.encoder.layers.10", "text_encoder_2.encoder.layers.28"]
    grids = {info.hookpoint.path: info.grid for info in hookpoints(pipe)}
    assert grids["unet.mid_block.attentions.0"] == grids["unet.up_blocks.0.attentions.0"] == (32, 32)


@pytest.mark.skipif(not families()["flux"].available, reason="this diffusers has no FluxPipeline")
def test_flux_has_its_at_the_image_stream_of_the_last_double_block():
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(num_layers=19, num_single_layers=1)
        t5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=32, d_model=4096, d_ff=32, num_layers=24))
    pipe = diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=tiny_flow(),
        vae=tiny_kl(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=t5,
        tokenizer_2=None,
    )
    assert at(pipe) == {
        ("transformer.transformer_blocks.18", "image"): ("FLUX SAE",),
        ("text_encoder_2.encoder.block.22", "text"): ("Concept Steerers",),
    }


@pytest.mark.skipif(not families()["pixart"].available, reason="this diffusers has no PixArtSigmaPipeline")
def test_pixart_has_its_at_the_last_block_but_one():
    with torch.device("meta"):
        transformer = diffusers.PixArtTransformer2DModel(num_layers=28)
    parts = {"text_encoder": None, "tokenizer": None, "vae": tiny_kl(4), "scheduler": tiny_scheduler()}
    pipe = diffusers.PixArtSigmaPipeline(transformer=transformer, **parts)
    assert at(pipe) == {("transformer.transformer_blocks.26", "image"): ("TIDE",)}
