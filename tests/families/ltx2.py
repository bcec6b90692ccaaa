"""LTX-2: blocks that give (video, audio); connectors between the text encoder and the model; beside [uncond, cond] a run
without some attentions and one with the two streams apart.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask_video, quiet, tiny_flow
from tests.families.text import tiny_decoder, tiny_words

MAX_TOKENS = 8
SIZES = {"square": (32, 32), "wide": (32, 64)}  # pixels, high and wide; 8 to a latent
FRAMES = 5  # 3 latent frames
LAYERS, HIDDEN = 2, 32


def build() -> Any:
    import diffusers
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    torch.manual_seed(0)
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=HIDDEN,
        rope_double_precision=False,
        rope_type="split",
    ).eval()
    connector = {
        f"{stream}_connector_{name}": value
        for stream in ("video", "audio")
        for name, value in (
            ("num_attention_heads", 4),
            ("attention_head_dim", 8),
            ("num_layers", 1),
            ("num_learnable_registers", None),
        )
    }
    connectors = LTX2TextConnectors(
        caption_channels=HIDDEN,
        text_proj_in_factor=LAYERS + 1,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        rope_type="split",
        **connector,
    ).eval()
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=4,
        patch_size_t=1,
    ).eval()
    audio_vae = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        resolution=32,
        latent_channels=2,
        mid_block_add_attention=False,
        mel_bins=8,
    ).eval()
    vocoder = LTX2Vocoder(
        in_channels=16,
        hidden_channels=8,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
    ).eval()
    return quiet(
        diffusers.LTX2Pipeline(
            scheduler=tiny_flow(use_dynamic_shifting=True),
            vae=vae,
            audio_vae=audio_vae,
            text_encoder=tiny_decoder("Gemma2Model", hidden=HIDDEN, layers=LAYERS, seed=1),
            tokenizer=tiny_words(bos=True, eos=False, model_max_length=MAX_TOKENS),
            connectors=connectors,
            transformer=transformer,
            vocoder=vocoder,
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
    arguments = {
        "negative_prompt": ["cat"] * len(prompts),
        "num_frames": FRAMES,
        "frame_rate": 25.0,
        "guidance_scale": 3.0 if guidance else 1.0,
        "audio_guidance_scale": 3.0 if guidance else 1.0,
        "stg_scale": 1.0 if guidance else 0.0,
        "audio_stg_scale": 1.0 if guidance else 0.0,
        "modality_scale": 3.0 if guidance else 1.0,
        "audio_modality_scale": 3.0 if guidance else 1.0,
        "spatio_temporal_guidance_blocks": [1],
        "max_sequence_length": MAX_TOKENS,
        "sizes": SIZES,
        **arguments,
    }
    return ask_video(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="ltx2",
    title="LTX-2",
    pipeline="LTX2Pipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", 16, (3, 4, 4), (3, 4, 8)),
        Block("transformer.transformer_blocks.0", "audio", 8),
        Block("transformer.transformer_blocks.0.audio_ff", "audio", 8),
        Block("transformer.transformer_blocks.1", "image", 16, (3, 4, 4), (3, 4, 8)),
        Block("text_encoder.layers.0", "text", HIDDEN),
    ),
    layout=(("uncond", "cond"), ("perturbed",), ("perturbed",)),
)
