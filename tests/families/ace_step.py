"""ACE-Step: rows of music, cut into patches; a condition encoder between the text encoder and the model, which has the learned
embedding of no condition; [cond, uncond] in one batch.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import quiet, tiny_flow
from tests.families.text import tiny_decoder, tiny_words

WIDTH = 16
CHANNELS = 4


def build() -> Any:
    import diffusers
    from diffusers.pipelines.ace_step import AceStepConditionEncoder

    torch.manual_seed(0)
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    transformer = diffusers.AceStepTransformer1DModel(
        **sizes, num_hidden_layers=2, in_channels=3 * CHANNELS, audio_acoustic_hidden_dim=CHANNELS, sliding_window=4
    ).eval()
    encoder = AceStepConditionEncoder(
        **sizes,
        text_hidden_dim=32,
        timbre_hidden_dim=CHANNELS,
        num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1,
    ).eval()
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=CHANNELS,
        decoder_input_channels=CHANNELS,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    ).eval()
    return quiet(
        diffusers.AceStepPipeline(
            vae=vae,
            text_encoder=tiny_decoder("Qwen3Model", seed=1),
            tokenizer=tiny_words(eos=False),
            transformer=transformer,
            condition_encoder=encoder,
            scheduler=tiny_flow(num_train_timesteps=1, shift=1.0),
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
            "lyrics": ["the snow"] * len(prompts),
            "audio_duration": 3.5,  # 7 latents, 4 patches of which the last is padded
            "guidance_scale": 4.0 if guidance else 1.0,
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "latent",
            **arguments,
        }
    ).audios


FAMILY = TinyFamily(
    name="ace_step",
    title="ACE-Step",
    pipeline="AceStepPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.layers.0", "audio", WIDTH),
        Block("transformer.layers.0.mlp", "audio", WIDTH),
        Block("transformer.layers.1", "audio", WIDTH),
        Block("text_encoder.layers.0", "text", 32),
    ),
    layout=(("cond", "uncond"),),
)
