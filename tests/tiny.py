"""Tiny, randomly initialised pipelines made of diffusers' own classes: nothing is downloaded, a call takes a fraction
of a second, and the module names are those of the real models (`unet.up_blocks.1.attentions.1` exists in each).

`AutoencoderTiny` with three block widths makes `vae_scale_factor` 4, so `sample_size=16` gives 64 x 64 pixels.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

MAX_TOKENS = 16  # the tokenizer's and the text encoder's limit; the tokenizer's must not be larger
PIXELS = 64  # the default image side: sample_size 16 times the VAE's 4

_SCHEDULERS = {
    "ddim": (DDIMScheduler, {"steps_offset": 1, "clip_sample": False}),
    "pndm": (PNDMScheduler, {"steps_offset": 1, "skip_prk_steps": True}),
    "euler": (EulerDiscreteScheduler, {"steps_offset": 1}),
    "heun": (HeunDiscreteScheduler, {"steps_offset": 1}),
}


def tiny_scheduler(name: str = "ddim", **options: Any) -> Any:
    """A scheduler with Stable Diffusion's betas: "ddim", "pndm", "euler" or "heun"."""
    scheduler, defaults = _SCHEDULERS[name]
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return scheduler(**{**betas, **defaults, **options})


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer over single letters and a few merges ("fox" and "cat" are one token each)."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789.,")
    merges = [("f", "o"), ("fo", "x</w>"), ("c", "a"), ("ca", "t</w>")]
    words = letters + [f"{letter}</w>" for letter in letters] + ["fo", "fox</w>", "ca", "cat</w>"]
    vocab = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    if "vocab" in inspect.signature(CLIPTokenizer.__init__).parameters:
        return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)
    with tempfile.TemporaryDirectory() as folder:  # transformers before 5 reads them from files
        files = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        files[0].write_text(json.dumps(vocab))
        files[1].write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
        return CLIPTokenizer(*map(str, files), model_max_length=MAX_TOKENS)


def tiny_clip(
    hidden_size: int = 32,
    layers: int = 3,
    projection: int | None = None,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
) -> Any:
    """A CLIP text encoder; with `projection` the variant SDXL uses as its second one."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=max_tokens,
        projection_dim=projection or hidden_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def tiny_t5_encoder(d_model: int = 24, layers: int = 2, seed: int = 0) -> T5EncoderModel:
    """A T5 encoder: its blocks return tuples where CLIP's layers return tensors."""
    torch.manual_seed(seed)
    config = T5Config(vocab_size=64, d_model=d_model, d_kv=8, d_ff=2 * d_model, num_layers=layers, num_heads=3)
    return T5EncoderModel(config).eval()


def tiny_vae(seed: int = 0) -> AutoencoderTiny:
    torch.manual_seed(seed)
    widths = (8, 8, 8)
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    ).eval()


def _quiet(pipe: Any, dtype: torch.dtype) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe if dtype == torch.float32 else pipe.to(dtype)  # diffusers logs two lines at every `.to(dtype)`


def tiny_sd(scheduler: str = "ddim", *, seed: int = 0, dtype: torch.dtype = torch.float32, **unet_options: Any) -> Any:
    """A StableDiffusionPipeline shaped like SD 1.5: three levels of widths 16, 32, 32, two layers a block.

    `up_blocks.1.attentions.1` works on 32 channels at half the latent's resolution. `unet_options` go to the UNet.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        **{
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (16, 32, 32),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 4,
            "cross_attention_dim": 32,
            "norm_num_groups": 8,
            **unet_options,
        }
    ).eval()
    pipe = StableDiffusionPipeline(
        vae=tiny_vae(seed + 1),
        text_encoder=tiny_clip(seed=seed + 2),
        tokenizer=tiny_tokenizer(),
        unet=unet,
        scheduler=tiny_scheduler(scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _quiet(pipe, dtype)


def tiny_sdxl(scheduler: str = "euler", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A StableDiffusionXLPipeline: two text encoders (32 and 24 wide, the second with a projection), transformers of
    one and two blocks, linear projections, text and size embeddings.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=32 + 24,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
        norm_num_groups=8,
    ).eval()
    pipe = StableDiffusionXLPipeline(
        vae=tiny_vae(seed + 1),
        text_encoder=tiny_clip(seed=seed + 2),
        text_encoder_2=tiny_clip(24, projection=20, seed=seed + 3),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=tiny_scheduler(scheduler),
        add_watermarker=False,
    )
    return _quiet(pipe, dtype)


def pixels(pipe: Any, prompt: str | list[str] | None = "a fox", *, steps: int = 2, seed: int = 7, **call: Any) -> Any:
    """Run the pipeline from a fixed seed; the images as a numpy array [images, height, width, 3]."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, **{"num_inference_steps": steps, "generator": generator, "output_type": "np", **call}).images
