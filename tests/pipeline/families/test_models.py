"""Models by themselves, without the encoders and the scheduler of their pipelines: which rows are which patch of the image
(or which place of the audio), and which are the text's.

What is expected is what changes: with a row of the last block edited one patch of the output changes, that of the row's
place; what the first block is given of the image changes with the noise and not with the text, and the other way round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from sparsefeat.pipeline import Delta, Hookpoint, attach
from tests.pipeline.instruments import Edit, Watch


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
MODELS = [pytest.param(model, id=model.name) for model in MODELS]


def build(model: Model) -> Pipe:
    if not hasattr(diffusers, model.name):
        pytest.skip(f"this diffusers has no {model.name}")
    torch.manual_seed(0)
    net = getattr(diffusers, model.name)(**model.config).eval()
    for parameter in net.parameters():  # gates and last layers that begin at zero let nothing through
        torch.nn.init.normal_(parameter, std=0.2)
    return Pipe(net)


def run(pipe: Pipe, model: Model, *instruments: Any, noise: int = 1, words: int = 2) -> torch.Tensor:
    latent, text = (
        torch.randn(model.latent, generator=generator(noise)),
        torch.randn(model.text, generator=generator(words)),
    )
    with torch.no_grad():
        if not instruments:
            return pipe.transformer(**model.inputs(latent, text), return_dict=False)[0]
        with attach(pipe, *instruments) as session, session.call(prompts=["a fox"]):
            return pipe.transformer(**model.inputs(latent, text), return_dict=False)[0]


@pytest.mark.parametrize("model", MODELS)
def test_an_edit_of_one_row_of_the_last_block_changes_its_patch_and_nothing_else(model):
    pipe = build(model)
    plain = model.patches(run(pipe, model))
    for row in (0, len(plain) - 1):

        def one_row(activations, context, row=row):
            assert (context.stream, context.grid, context.batch) == (model.stream, model.grid, 1)
            assert context.positions == len(plain)
            rows = torch.zeros_like(activations.rows)
            rows[row] = torch.linspace(-30, 30, rows.shape[-1])
            return Delta(rows)

        edited = model.patches(run(pipe, model, Edit(one_row, f"transformer.{model.last}")))
        assert (plain != edited).any(-1).nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("model", MODELS)
def test_the_rows_of_the_image_are_those_that_change_with_the_noise_and_the_texts_those_that_change_with_the_text(
    model,
):
    pipe = build(model)
    seen = {}
    for stream in (model.stream, *(["text"] if model.text_stream else [])):
        for said, options in {"plain": {}, "noise": {"noise": 3}, "words": {"words": 4}}.items():
            watch = Watch(Hookpoint(f"transformer.{model.first}", "input", stream))
            run(pipe, model, watch, **options)
            assert {context.stream for context in watch.contexts} == {stream}
            (seen[said, stream],) = watch.rows
    moves, stays = ("noise", "words")
    assert (seen["plain", model.stream] != seen[moves, model.stream]).any(1).all()
    assert torch.equal(seen["plain", model.stream], seen[stays, model.stream])
    if model.text_stream:
        # A token that the model adds (a register, an image's) changes with neither.
        assert (seen["plain", "text"] != seen["words", "text"]).any()
        assert torch.equal(seen["plain", "text"], seen["noise", "text"])


def test_of_a_video_with_sound_the_second_stream_is_the_audios():
    model = next(p.values[0] for p in MODELS if p.id == "LTX2VideoTransformer3DModel")
    pipe = build(model)
    block = "transformer.transformer_blocks.1"
    given = []
    handle = pipe.transformer.transformer_blocks[1].register_forward_hook(lambda m, args, output: given.append(output))
    watches = {path: Watch(path) for path in (block, f"{block}:audio", f"{block}.audio_ff", f"{block}.attn2.to_k")}
    run(pipe, model, *watches.values())
    handle.remove()
    assert torch.equal(watches[block].rows[0], given[0][0][0])
    assert torch.equal(watches[f"{block}:audio"].rows[0], given[0][1][0])
    assert [w.contexts[0].stream for w in watches.values()] == ["image", "audio", "audio", "text"]
    assert [w.contexts[0].grid for w in watches.values()] == [(2, 3, 4), None, None, None]


def test_the_decoder_of_motif_video_has_no_text():
    model = next(p.values[0] for p in MODELS if p.id == "MotifVideoTransformer3DModel")
    pipe = build(model)
    text = Watch("transformer.single_transformer_blocks.1:text")
    run(pipe, model, text)
    assert text.rows[0].shape[0] == 5
    with pytest.raises(ValueError, match="this block of the decoder has no text"):
        run(pipe, model, Watch("transformer.single_transformer_blocks.2:text"))
