"""Stable Audio: rows of audio behind one token of the prompt and the times; a T5."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import quiet
from tests.families.text import tiny_t5, tiny_words


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.StableAudioDiTModel(
        sample_size=6,
        in_channels=3,
        num_layers=2,
        attention_head_dim=4,
        num_key_value_attention_heads=2,
        num_attention_heads=4,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    ).eval()
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    ).eval()
    projection = diffusers.pipelines.stable_audio.StableAudioProjectionModel(
        text_encoder_dim=32, conditioning_dim=4, min_value=0, max_value=32
    ).eval()
    return quiet(
        diffusers.StableAudioPipeline(
            vae=vae,
            text_encoder=tiny_t5(32, seed=1),
            projection_model=projection,
            tokenizer=tiny_words(model_max_length=8),
            transformer=transformer,
            scheduler=diffusers.EulerDiscreteScheduler(),
        )
    )


def call(
    pipe: Any,
    prompts: list[str],
    *,
    guidance: bool,
    images_per_prompt: int = 1,
    size: str = "square",
    steps: int = 2,
    seed: int = 0,
    **arguments: Any,
) -> torch.Tensor:
    return pipe(
        **{
            "prompt": prompts,
            "audio_end_in_s": 3.0,
            "guidance_scale": 4.0 if guidance else 1.0,
            "num_waveforms_per_prompt": images_per_prompt,
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "latent",
            **arguments,
        }
    ).audios


FAMILY = TinyFamily(
    name="stable_audio",
    title="Stable Audio",
    pipeline="StableAudioPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "audio", 16),
        Block("transformer.transformer_blocks.0.ff", "audio", 16),
        Block("transformer.transformer_blocks.1", "audio", 16),
    ),
)
