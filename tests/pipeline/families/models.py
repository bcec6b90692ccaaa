"""Tiny models of the families by themselves: what they are given, and which values of their output are which patch of the image
(or which place of the audio).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


class Pipe:
    """The least that a model needs around it."""

    def __init__(self, model: nn.Module):
        self.transformer = model

    def __call__(self) -> None: ...


@dataclass(frozen=True)
class Model:
    name: str
    """The class in diffusers."""
    config: dict[str, Any]
    inputs: Callable[[torch.Tensor, torch.Tensor], dict[str, Any]]
    """The arguments of its forward from a latent and a text."""
    latent: tuple[int, ...]
    text: tuple[int, ...]
    first: str
    last: str
    grid: tuple[int, ...] | None
    patches: Callable[[torch.Tensor], torch.Tensor]
    """[positions, values] of the output, one row a position of the image."""
    stream: str = "image"
    text_stream: bool = True
    """Whether the first block is given the text as rows of its own."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(*images: tuple[int, int, int], width: int = 3) -> torch.Tensor:
    """Position ids (which image, y, x, ...) of images (which, h, w) one after the other."""
    rows = [(which, y, x, 0) for which, h, w in images for y in range(h) for x in range(w)]
    return torch.tensor([row[:width] for row in rows], dtype=torch.float32)


def packed(output: torch.Tensor) -> torch.Tensor:
    return output[0, :12]


def video(output: torch.Tensor, time: int = 1, side: int = 2) -> torch.Tensor:
    """[1, C, f, h, w] -> [positions, C * time * side * side]."""
    cut = output.unfold(2, time, time).unfold(3, side, side).unfold(4, side, side)[0]
    return cut.permute(1, 2, 3, 0, 4, 5, 6).flatten(3).flatten(0, 2)


def image(output: torch.Tensor, side: int = 2) -> torch.Tensor:
    return video(output[:, :, None], 1, side)


T = torch.tensor([0.5])
FLUX = {
    "patch_size": 1,
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (2, 2, 4),
}


def flux_like(latent: torch.Tensor, text: torch.Tensor, **more: Any) -> dict[str, Any]:
    """The image of 3 x 4 tokens, then a reference of 2 x 2."""
    return {
        "hidden_states": latent,
        "encoder_hidden_states": text,
        "timestep": T,
        "img_ids": ids((0, 3, 4), (1, 2, 2)),
        "txt_ids": torch.zeros(text.shape[1], 3),
        **more,
    }


MODELS = [
    Model(
        "FluxTransformer2DModel",  # with a reference of 2 x 2 before the image and one behind it
        {**FLUX, "pooled_projection_dim": 16},
        lambda latent, text: flux_like(
            latent, text, img_ids=ids((1, 2, 2), (0, 3, 4), (2, 1, 2)), pooled_projections=text[:, 0]
        ),
        (1, 18, 8),
        (1, 5, 16),
        "transformer_blocks.0",
        "single_transformer_blocks.1",
        (3, 4),
        lambda output: output[0, 4:16],
    ),
    *(
        Model(
            "Flux3Transformer2DModel",
            {
                "in_channels": 8,
                "cond_in_channels": 8,
                "num_layers": 1,
                "num_single_layers": 2,
                "attention_head_dim": 8,
                "num_attention_heads": 2,
                "joint_attention_dim": 16,
                "axes_dims_rope": (2, 2, 2, 2),
            },
            lambda latent, text, references=references: {
                "hidden_states": latent,
                "encoder_hidden_states": text,
                "timestep": T,
                "img_ids": torch.tensor([1, 0.5, 0.5, 1]) * ids((0, 3, 4), width=4),
                "txt_ids": torch.zeros(5, 4),
                "image_cond_hidden_states": torch.randn(1, references, 8, generator=generator(9))
                if references
                else None,
                "image_cond_ids": ids((0, 1, references), width=4) if references else None,
            },
            (1, 12, 8),
            (1, 5, 16),
            first,
            "single_transformer_blocks.1",
            (3, 4),
            packed,
            text_stream="single" in first,
        )
        for first, references in (
            ("single_transformer_blocks.0", 0),
            ("single_transformer_blocks.0", 4),
            ("mode_blocks.image.0", 4),
        )
    ),
    Model(
        "QwenImageTransformer2DModel",  # as Qwen-Image-Layered: two images that are made, then the one that was given
        {
            "patch_size": 2,
            "in_channels": 8,
            "out_channels": 2,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (2, 2, 4),
            "use_layer3d_rope": True,
        },
        lambda latent, text: {
            "hidden_states": latent,
            "encoder_hidden_states": text,
            "encoder_hidden_states_mask": torch.ones(1, 5).long(),
            "timestep": T,
            "img_shapes": [[(1, 3, 4), (1, 3, 4), (1, 2, 2)]],
        },
        (1, 28, 8),
        (1, 5, 16),
        "transformer_blocks.0",
        "transformer_blocks.1",
        (2, 3, 4),
        lambda output: output[0, :24],
    ),
    Model(
        "LongCatImageTransformer2DModel",
        {**FLUX, "pooled_projection_dim": 16},
        lambda latent, text: flux_like(latent, text, img_ids=ids((1, 3, 4), (2, 2, 2))),
        (1, 16, 8),
        (1, 5, 16),
        "transformer_blocks.0",
        "single_transformer_blocks.1",
        (3, 4),
        packed,
    ),
    Model(
        "BriaFiboTransformer2DModel",
        {**FLUX, "text_encoder_dim": 16, "pooled_projection_dim": None},
        lambda latent, text: flux_like(latent, text, text_encoder_layers=[text] * 3),
        (1, 16, 8),
        (1, 5, 16),
        "transformer_blocks.0",
        "single_transformer_blocks.1",
        (3, 4),
        packed,
    ),
    Model(
        "OvisImageTransformer2DModel",
        FLUX,
        flux_like,
        (1, 16, 8),
        (1, 5, 16),
        "transformer_blocks.0",
        "single_transformer_blocks.1",
        (3, 4),
        packed,
    ),
    Model(
        "Krea2Transformer2DModel",
        {
            "in_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 16,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 16,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        lambda latent, text: {
            "hidden_states": latent,
            "encoder_hidden_states": text,
            "timestep": T,
            "position_ids": torch.cat([torch.zeros(5, 3), ids((0, 3, 4), (1, 2, 2))]),
        },
        (1, 16, 8),
        (1, 5, 2, 16),
        "transformer_blocks.0",
        "transformer_blocks.1",
        (3, 4),
        packed,
    ),
    Model(
        "HunyuanImageTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "patch_size": (1, 1),
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "rope_axes_dim": (4, 4),
        },
        lambda latent, text: {
            "hidden_states": latent,
            "timestep": T,
            "encoder_hidden_states": text,
            "encoder_attention_mask": torch.ones(1, 5),
            "encoder_hidden_states_2": text[:, :3, :8],
            "encoder_attention_mask_2": torch.ones(1, 3),
        },
        (1, 4, 3, 4),
        (1, 5, 16),
        "transformer_blocks.0",
        "single_transformer_blocks.1",
        (3, 4),
        lambda output: image(output, 1),
    ),
    Model(
        "HunyuanVideo15Transformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "image_embed_dim": 8,
            "rope_axes_dim": (2, 2, 4),
        },
        lambda latent, text: {
            "hidden_states": latent,
            "timestep": T,
            "encoder_hidden_states": text,
            "encoder_attention_mask": torch.ones(1, 5),
            "encoder_hidden_states_2": text[:, :3, :8],
            "encoder_attention_mask_2": torch.ones(1, 3),
            "image_embeds": torch.zeros(1, 2, 8),
        },
        (1, 4, 2, 3, 4),
        (1, 5, 16),
        "transformer_blocks.0",
        "transformer_blocks.1",
        (2, 3, 4),
        lambda output: video(output, 1, 1),
    ),
    Model(
        "MotifVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_single_layers": 3,
            "num_decoder_layers": 1,
            "patch_size": 2,
            "patch_size_t": 1,
            "text_embed_dim": 16,
            "rope_axes_dim": (2, 2, 4),
        },
        lambda latent, text: {
            "hidden_states": latent,
            "timestep": T,
            "encoder_hidden_states": text,
            "encoder_attention_mask": torch.ones(1, 5),
        },
        (1, 4, 2, 6, 8),
        (1, 5, 16),
        "transformer_blocks.0",
        "single_transformer_blocks.2",
        (2, 3, 4),
        video,
    ),
    Model(
        "OmniGenTransformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 16,
            "num_layers": 2,
            "vocab_size": 32,
            "pad_token_id": 0,
            "time_step_dim": 8,
            "pos_embed_max_size": 16,
            "rope_scaling": {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
        },
        lambda latent, text: {
            "hidden_states": latent,
            "timestep": T,
            "input_ids": (text[0, :, :1].abs() * 10).long().clamp(1, 31).T,
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(1, 18, 18),
            "position_ids": torch.arange(18)[None],
        },
        (1, 4, 6, 8),
        (1, 5, 16),
        "layers.0",
        "layers.1",
        (3, 4),
        image,
        text_stream=False,
    ),
    Model(
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "context_in_dim": 16,
            "hidden_size": 16,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [4, 4],
        },
        lambda latent, text: {"hidden_states": latent, "timestep": T, "encoder_hidden_states": text},
        (1, 4, 6, 8),
        (1, 5, 16),
        "blocks.0",
        "blocks.1",
        (3, 4),
        image,
        text_stream=False,
    ),
    Model(
        "LTX2VideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
            "num_layers": 2,
            "caption_channels": 16,
            "qk_norm": "rms_norm_across_heads",
            "rope_double_precision": False,
        },
        lambda latent, text: {
            "hidden_states": latent,
            "audio_hidden_states": torch.full((1, 5, 4), 0.3),
            "encoder_hidden_states": text,
            "audio_encoder_hidden_states": text,
            "timestep": T,
            "num_frames": 2,
            "height": 3,
            "width": 4,
            "audio_num_frames": 5,
        },
        (1, 24, 4),
        (1, 5, 16),
        "transformer_blocks.0",
        "transformer_blocks.1",
        (2, 3, 4),
        lambda output: output[0],
        text_stream=False,
    ),
    Model(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "patch_size": 2,
            "encoder_hidden_size": 16,
        },
        lambda latent, text: {
            "hidden_states": latent,
            "timestep": T,
            "timestep_r": T,
            "encoder_hidden_states": text,
            "context_latents": torch.zeros(1, 7, 8),
        },
        (1, 7, 4),
        (1, 5, 16),
        "layers.0",
        "layers.1",
        None,
        lambda output: torch.nn.functional.pad(output[0], (0, 0, 0, 1)).unflatten(0, (4, 2)).flatten(1),
        stream="audio",
        text_stream=False,
    ),
    Model(
        "WanAnimateTransformer3DModel",
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 12,
            "latent_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 16,
            "num_layers": 2,
            "rope_max_seq_len": 32,
            "image_dim": 8,
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        lambda latent, text: {
            "hidden_states": latent,
            "timestep": T,
            "encoder_hidden_states": text,
            "encoder_hidden_states_image": torch.zeros(1, 2, 8),
            "pose_hidden_states": torch.zeros(1, 4, 2, 6, 8),
            "face_pixel_values": torch.zeros(1, 3, 5, 16, 16),
        },
        (1, 12, 3, 6, 8),
        (1, 5, 16),
        "blocks.0",
        "blocks.1",
        (2, 3, 4),
        lambda output: video(output)[12:],  # the first frame is the reference's
        text_stream=False,
    ),
]
