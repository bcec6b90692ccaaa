"""The modular pipelines that are tried, of the parts of the tiny ones."""

from __future__ import annotations

SQUARE = {"height": 64, "width": 64}
TOKENS = {"max_sequence_length": 16}
# The blocks' class, whose components it is given, a block of its denoiser, and how it is called.
PIPELINES = {
    "sdxl": ("StableDiffusionXLAutoBlocks", "unet.mid_block.attentions.0", SQUARE),
    "sd3": ("StableDiffusion3AutoBlocks", "transformer.transformer_blocks.0", SQUARE | TOKENS),
    "qwen_image": ("QwenImageAutoBlocks", "transformer.transformer_blocks.0", SQUARE | TOKENS),
    "z_image": ("ZImageAutoBlocks", "transformer.layers.0", SQUARE),
    "ltx": ("LTXAutoBlocks", "transformer.transformer_blocks.0", SQUARE | {"num_frames": 9} | TOKENS),
    "flux": ("FluxAutoBlocks", "transformer.transformer_blocks.0", SQUARE | TOKENS),
    "flux2": (
        "Flux2KleinBaseAutoBlocks",
        "transformer.transformer_blocks.0",
        SQUARE | TOKENS | {"text_encoder_out_layers": (1, 2)},
    ),
    "wan": ("WanBlocks", "transformer.blocks.0", SQUARE | {"num_frames": 5, "max_sequence_length": 8}),
    "ltx2": ("LTX2AutoBlocks", "transformer.transformer_blocks.0", SQUARE | {"num_frames": 9}),
    "hunyuan_video15": ("HunyuanVideo15AutoBlocks", "transformer.transformer_blocks.0", SQUARE | {"num_frames": 5}),
}
