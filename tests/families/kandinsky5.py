"""Kandinsky 5: blocks of the text alone, then blocks of the video; two passes; Qwen2.5-VL and CLIP texts."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.text import tiny_qwen_vl, tiny_words
from tests.tiny import tiny_clip, tiny_tokenizer

SIZES = {"square": (64, 64), "wide": (48, 80)}  # pixels, high and wide; 16 to a patch
FRAMES = 5  # 2 latent frames


def build(seed: int = 0) -> Any:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        Kandinsky5T2VPipeline,
        Kandinsky5Transformer3DModel,
    )

    torch.manual_seed(seed)
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=32,
        in_text_dim2=32,
        time_dim=16,
        model_dim=24,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 4, 4),
    ).eval()
    for name, parameter in transformer.named_parameters():  # modulations begin as zeros, behind which no edit is seen
        if "modulation" in name and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    ).eval()

    class Words:
        """The processor's call: it is given images and videos too, here always None."""

        def __init__(self) -> None:
            self.tokenizer = tiny_words(padding_side="right")

        def __call__(self, text: list[str], images: None, videos: None, **options: Any) -> Any:
            return self.tokenizer(text, **options)

        def decode(self, tokens: Any) -> str:
            return self.tokenizer.decode(tokens)

    pipe = Kandinsky5T2VPipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=tiny_qwen_vl(seed=seed + 1),
        tokenizer=Words(),
        text_encoder_2=tiny_clip(seed=seed + 2, max_tokens=77),
        tokenizer_2=tiny_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    pipe.prompt_template, pipe.prompt_template_encode_start_idx = "the photo of {}", 3
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
    # diffusers 0.42 makes that many latents and does not repeat the texts for them, which works for one prompt only.
    several = images_per_prompt if len(prompts) == 1 else 1
    return pipe(
        prompt=prompts,
        **{
            "negative_prompt": ["the cat"] * len(prompts),
            "height": height,
            "width": width,
            "num_frames": FRAMES,
            "num_inference_steps": steps,
            "guidance_scale": 5.0 if guidance else 1.0,
            "num_videos_per_prompt": several,
            "generator": torch.Generator().manual_seed(seed),
            "max_sequence_length": 16,
            "output_type": "latent",
            **arguments,
        },
    ).frames


FAMILY = TinyFamily(
    name="kandinsky5",
    title="Kandinsky 5",
    pipeline="Kandinsky5T2VPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.text_transformer_blocks.0", "text", 24),
        Block("transformer.visual_transformer_blocks.0", "image", 24, square=(2, 4, 4), wide=(2, 3, 5)),
        Block("transformer.visual_transformer_blocks.0.cross_attention", "image", 24, square=(2, 4, 4), wide=(2, 3, 5)),
        Block("transformer.visual_transformer_blocks.1", "image", 24, square=(2, 4, 4), wide=(2, 3, 5)),
        Block("text_encoder_2.encoder.layers.0", "text", 32),
    ),
    layout=(("cond",), ("uncond",)),
    attentions=("transformer.visual_transformer_blocks.1.cross_attention",),
)
