"""The UNets of videos: frames that are folded into the batch are positions of their video."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import sparsefeat as sf
from sparsefeat.pipeline import attach
from sparsefeat.pipeline.families.family import UnknownRowsError
from tests.attention.eager import eager
from tests.families import animatediff, families
from tests.pipeline.instruments import Edit, Watch, push
from tests.tiny import tiny_sd

B, F, H, W = 2, 3, 8, 12
VIDEO = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "layers_per_block": 1,
    "sample_size": 8,
}


@dataclass(frozen=True)
class Model:
    name: str
    config: dict[str, Any]
    inputs: Callable[[torch.Tensor], dict[str, Any]]
    """From a latent [B, 4, F, H, W]."""
    temporal: str
    """A block whose rows are [B * places, F, C]."""


MODELS = [
    Model(
        "UNetMotionModel",
        {
            **VIDEO,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
        },
        lambda latent: {"sample": latent, "encoder_hidden_states": torch.zeros(B * F, 5, 8)},
        "down_blocks.0.motion_modules.0.transformer_blocks.0",
    ),
    Model(
        "UNet3DConditionModel",
        {
            **VIDEO,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "attention_head_dim": 4,
        },
        lambda latent: {"sample": latent, "encoder_hidden_states": torch.zeros(B, 5, 8)},
        "down_blocks.0.temp_attentions.0.transformer_blocks.0",
    ),
    Model(
        "UNetSpatioTemporalConditionModel",
        {
            "in_channels": 4,
            "block_out_channels": (32, 32),
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "num_attention_heads": (2, 4),
            "cross_attention_dim": 8,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "layers_per_block": 1,
            "sample_size": 8,
        },
        lambda latent: {
            "sample": latent.transpose(1, 2),
            "encoder_hidden_states": torch.zeros(B, 1, 8),
            "added_time_ids": torch.ones(B, 3),
        },
        "down_blocks.0.attentions.0.temporal_transformer_blocks.0.ff",
    ),
]
MODELS = [pytest.param(model, id=model.name) for model in MODELS]


class Pipe:
    def __init__(self, model: nn.Module):
        self.unet = model

    def __call__(self) -> None: ...


def build(model: Model) -> Pipe:
    torch.manual_seed(0)
    return Pipe(getattr(diffusers, model.name)(**model.config).eval())


def run(pipe: Pipe, model: Model, latent: torch.Tensor, *instruments: Any) -> None:
    with torch.no_grad(), attach(pipe, *instruments) as session, session.call(prompts=["a", "b"]):
        pipe.unet(timestep=3, **model.inputs(latent))


def latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(B, 4, F, H, W, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("model", MODELS)
def test_the_rows_of_a_frame_are_those_that_change_with_the_frame(model):
    pipe, plain, changed = build(model), Watch("unet.conv_in"), Watch("unet.conv_in")
    run(pipe, model, latents(), plain)
    other = latents()
    other[1, :, 2, 5, 7] += 3.0  # the last frame of the second video
    run(pipe, model, other, changed)
    (context,) = plain.contexts
    assert (context.batch, context.positions, context.grid) == (B, F * H * W, (F, H, W))
    assert context.entries == (("cond", 0), ("cond", 1))
    rows = (plain.rows[0] != changed.rows[0]).any(1).view(B, F, H, W).nonzero()
    assert rows[:, :2].unique(dim=0).tolist() == [[1, 2]]
    assert rows[:, 2].min() == 4
    assert rows[:, 3].max() == 8  # a kernel of three


@pytest.mark.parametrize("model", MODELS)
def test_blocks_attentions_and_temporal_transformers_share_their_rows_out_among_the_videos(model):
    pipe = build(model)
    paths = {
        "unet.down_blocks.0": (F, H // 2, W // 2),
        "unet.down_blocks.0.attentions.0": (F, H, W),
        "unet.down_blocks.0.attentions.0.transformer_blocks.0": (F, H, W),
        "unet.mid_block": (F, H // 2, W // 2),
        f"unet.{model.temporal}": None,  # its places come before its frames
    }
    watches = {path: Watch(path) for path in paths}
    run(pipe, model, latents(), *watches.values())
    for path, watch in watches.items():
        (context,) = watch.contexts
        assert (context.batch, context.grid) == (B, paths[path]), path
        assert context.positions * B == len(watch.rows[0]), path
        assert context.entries == (("cond", 0), ("cond", 1))
        folded = len(watch.tensors[0])  # frames, or in a temporal transformer places, are entries of the tensor
        assert context.condition == ("cond",) * folded
        assert context.prompt_index == (0,) * (folded // B) + (1,) * (folded // B)


@pytest.mark.parametrize("model", MODELS)
def test_what_is_no_feature_map_is_refused(model):
    with pytest.raises(UnknownRowsError, match="no feature map"):
        run(build(model), model, latents(), Watch("unet.time_embedding"))


def test_a_recording_holds_every_frame_of_every_step_and_steering_reaches_them_all():
    pipe = animatediff.build()
    at = "unet.mid_block.attentions.0"
    sae = sf.SAE(sf.SAEConfig(d_model=32, n_latents=48, k=4, hookpoint=at)).eval()
    given = []
    handle = pipe.unet.mid_block.attentions[0].register_forward_hook(lambda m, args, out: given.append(out[0]))
    with attach(pipe, rec := sf.Record(sae)) as session:
        plain = animatediff.call(pipe, ["a fox"], guidance=False)
    handle.remove()
    recording = session[rec]
    for step in (0, 1):
        rows = given[step].movedim(1, -1).reshape(-1, 32)
        expected = sae.encode(rows)
        code = recording.codes(step)
        assert torch.equal(code.values, expected.values)
        assert torch.equal(code.indices.long(), expected.indices.long())
    assert recording.grid == (animatediff.FRAMES, 4, 4)
    with attach(pipe, Edit(push(), at)):
        edited = animatediff.call(pipe, ["a fox"], guidance=False)
    assert (plain != edited).flatten(3).any(-1).all()  # in every frame


def test_heat_maps_of_frames_that_are_folded_into_the_batch_are_each_frames_own():
    pipe = animatediff.build()
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    ran = eager(pipe, (path,), lambda: animatediff.call(pipe, ["a fox", "cat"], guidance=True))
    with attach(pipe, maps := sf.HeatMaps(layers=path)) as run:
        animatediff.call(pipe, ["a fox", "cat"], guidance=True)
    frames = animatediff.FRAMES
    assert run[maps].grid[0] == frames
    for video, frame in ((0, 0), (1, frames - 1)):
        row = (2 + video) * frames + frame  # the conditional half of the batch comes second
        expected = sum(seen.scores().softmax(-1)[row].mean(0) for seen in ran.of(path))
        actual = run[maps].tensor(video)[:, frame].flatten(1).T
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)


def test_an_image_has_no_frames():
    watch = Watch("unet.mid_block")
    with attach(pipe := tiny_sd(), watch):
        pipe("a fox", num_inference_steps=1, output_type="latent")
    assert [(c.batch, c.grid) for c in watch.contexts] == [(2, (4, 4))]


@pytest.mark.parametrize("name", ["animatediff", "svd"])
def test_a_vae_that_decodes_frames_apart_is_refused(name):
    family = families()[name]
    watch = Watch("vae.decoder.mid_block.resnets.0")
    with (
        attach(pipe := family.build(), watch),
        pytest.raises(UnknownRowsError, match="some of the images or frames at a time"),
    ):
        family.call(pipe, ["a fox"], guidance=False, output_type="np", decode_chunk_size=2)
    assert watch.contexts == []
