"""Stable Video Diffusion: a video from an image, in the place of a prompt; frames folded into the batch; a guidance scale for
each frame.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
import transformers
from PIL import Image

from tests.families import Block, TinyFamily
from tests.families.latents import quiet

FRAMES = 3
SIZES = {"square": (16, 16), "wide": (16, 24)}  # pixels, high and wide; 2 to a latent


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=16,
        num_attention_heads=4,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
    ).eval()
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    ).eval()
    vision = transformers.CLIPVisionConfig(
        hidden_size=16,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=224,  # what the pipeline makes of any image
        intermediate_size=16,
        patch_size=112,
    )
    return quiet(
        diffusers.StableVideoDiffusionPipeline(
            unet=unet,
            vae=vae,
            image_encoder=transformers.CLIPVisionModelWithProjection(vision).eval(),
            scheduler=diffusers.EulerDiscreteScheduler(
                prediction_type="v_prediction",
                timestep_type="continuous",
                sigma_max=700.0,
                sigma_min=0.002,
                use_karras_sigmas=True,
            ),
            feature_extractor=transformers.CLIPImageProcessor(crop_size=224, size=224),
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
    colours = [zlib.crc32(prompt.encode()).to_bytes(4, "little")[:3] for prompt in prompts]
    return pipe(
        **{
            "image": [Image.new("RGB", (width, height), tuple(colour)) for colour in colours],
            "height": height,
            "width": width,
            "num_frames": FRAMES,
            "max_guidance_scale": 2.5 if guidance else 1.0,
            "num_videos_per_prompt": 1,  # diffusers gives several videos of an image each other's images
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "latent",
            **arguments,
        }
    ).frames


FAMILY = TinyFamily(
    name="svd",
    title="Stable Video Diffusion",
    pipeline="StableVideoDiffusionPipeline",
    build=build,
    call=call,
    blocks=(
        Block("unet.down_blocks.0.attentions.0", "image", 32, (FRAMES, 8, 8), (FRAMES, 8, 12)),
        Block("unet.mid_block.attentions.0", "image", 64, (FRAMES, 4, 4), (FRAMES, 4, 6)),
        Block("unet.mid_block.attentions.0.transformer_blocks.0", "image", 64, (FRAMES, 4, 4), (FRAMES, 4, 6)),
        Block("unet.mid_block.attentions.0.temporal_transformer_blocks.0.ff", "image", 64),
    ),
)
