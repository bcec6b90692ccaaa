"""Wan-Animate: Wan with a reference image for a first frame, in segments of a video that follows a pose and a face."""

from __future__ import annotations

import types
from typing import Any

import torch
import transformers
from PIL import Image

from tests.families import Block, TinyFamily
from tests.families.latents import quiet, tiny_flow
from tests.families.text import tiny_t5, tiny_words
from tests.families.wan import FRAMES, MAX_TOKENS, SIZES, tiny_wan_vae

FACE = 16


def build() -> Any:
    import diffusers
    from diffusers.pipelines.wan import pipeline_wan_animate

    if not hasattr(pipeline_wan_animate, "ftfy"):  # not installed, and used all the same
        pipeline_wan_animate.ftfy = types.SimpleNamespace(fix_text=str)
    torch.manual_seed(0)
    transformer = diffusers.WanAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=12,
        latent_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        image_dim=4,
        rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=FACE,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    ).eval()
    vision = transformers.CLIPVisionConfig(
        hidden_size=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=4,
        intermediate_size=16,
        patch_size=1,
    )
    return quiet(
        diffusers.WanAnimatePipeline(
            tokenizer=tiny_words(model_max_length=MAX_TOKENS),
            text_encoder=tiny_t5(24, seed=1, kind="UMT5"),
            vae=tiny_wan_vae(),
            scheduler=tiny_flow(),
            image_processor=transformers.CLIPImageProcessor(crop_size=4, size=4),
            image_encoder=transformers.CLIPVisionModel(vision).eval(),
            transformer=transformer,
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
    height, width = SIZES[size]
    return pipe(
        **{
            "prompt": prompts,
            "negative_prompt": ["cat"] * len(prompts),
            "image": Image.new("RGB", (width, height), (90, 40, 10)),
            "pose_video": [Image.new("RGB", (width, height), (i, 2 * i, 90)) for i in range(FRAMES)],
            "face_video": [Image.new("RGB", (FACE, FACE), (90, 3 * i, i)) for i in range(FRAMES)],
            "height": height,
            "width": width,
            "segment_frame_length": FRAMES,
            "num_inference_steps": steps,
            "guidance_scale": 5.0 if guidance else 1.0,
            "num_videos_per_prompt": images_per_prompt,
            "generator": torch.Generator().manual_seed(seed),
            "max_sequence_length": MAX_TOKENS,
            "output_type": "latent",
            **arguments,
        }
    ).frames


FAMILY = TinyFamily(
    name="wan_animate",
    title="Wan-Animate",
    pipeline="WanAnimatePipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.blocks.0", "image", 24, square=(2, 4, 4), wide=(2, 3, 5)),
        Block("transformer.blocks.0.ffn", "image", 24, square=(2, 4, 4), wide=(2, 3, 5)),
        Block("transformer.blocks.1", "image", 24, square=(2, 4, 4), wide=(2, 3, 5)),
        Block("text_encoder.encoder.block.0", "text", 24),
    ),
    layout=(("cond",), ("uncond",)),
)
