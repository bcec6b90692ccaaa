"""HunyuanVideo 1.5: double blocks that give (video, text), where the text is that of two encoders and the tokens of an image;
a guider runs the model once for each condition.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.families import Block, TinyFamily
from tests.families.latents import ask_video, quiet, tiny_flow
from tests.families.text import tiny_qwen_vl, tiny_words

WIDTH = 16
SIZES = {"square": (16, 16), "wide": (12, 20)}  # pixels, high and wide; 4 to a latent
FRAMES = 5  # 3 latent frames


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    ).eval()
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,  # the latent, that of a first frame and its mask
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        target_size=16,
        text_embed_dim=32,
        text_embed_2_dim=8,
        image_embed_dim=12,
        rope_axes_dim=(2, 2, 4),
    ).eval()
    tokenizer = tiny_words(eos=False)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    byt5 = transformers.T5Config(vocab_size=384, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    pipe = quiet(
        diffusers.HunyuanVideo15Pipeline(
            text_encoder=tiny_qwen_vl(32, layers=3, seed=1).model.language_model,
            tokenizer=tokenizer,
            transformer=transformer,
            vae=vae,
            scheduler=tiny_flow(shift=7.0),
            text_encoder_2=transformers.T5EncoderModel(byt5).eval(),
            tokenizer_2=transformers.ByT5Tokenizer(),
            guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
        )
    )
    pipe.system_message, pipe.prompt_template_encode_start_idx = "photo of the", 3
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 12, 8, 3
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
    (pipe.guider.enable if guidance else pipe.guider.disable)()
    arguments = {"negative_prompt": ["cat"] * len(prompts), "num_frames": FRAMES, "sizes": SIZES, **arguments}
    prompts = [f'{prompt} "{prompt}"' for prompt in prompts]  # ByT5 reads what stands in quotes
    # Several videos a prompt are none in diffusers: the tokens of the image stay as many as there are prompts.
    return ask_video(pipe, prompts, images_per_prompt=1, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="hunyuan_video15",
    title="HunyuanVideo 1.5",
    pipeline="HunyuanVideo15Pipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", WIDTH, (3, 4, 4), (3, 3, 5)),
        Block("transformer.transformer_blocks.0", "text", WIDTH),
        Block("transformer.transformer_blocks.0.ff", "image", WIDTH, (3, 4, 4), (3, 3, 5)),
        Block("transformer.transformer_blocks.1", "image", WIDTH, (3, 4, 4), (3, 3, 5)),
    ),
    layout=(("cond",), ("uncond",)),
    attentions=("transformer.transformer_blocks.0.attn",),
)
