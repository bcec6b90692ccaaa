"""LTX-Video with conditioning frames: their tokens come before those of the video, and are none of it."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch

from sparsefeat.pipeline import attach
from sparsefeat.pipeline.families.ltx import last_video
from tests.families import families
from tests.pipeline.instruments import Edit, Watch, push

PATH = "transformer.transformer_blocks.1"  # the last


def positions(frames: int, height: int, width: int, first: float = 0.0) -> torch.Tensor:
    """[1, 3, tokens], as the pipeline makes them: the first latent frame is one frame, the others are eight."""
    axes = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    time, y, x = (axis.flatten().float() for axis in axes)
    return torch.stack([(8 * time - 7).clamp(min=0) / 25 + first, 32 * y, 32 * x])[None]


@pytest.mark.parametrize("grid", [(3, 4, 5), (1, 2, 7), (4, 1, 1), (2, 3, 1), (5, 1, 3), (1, 1, 1)])
@pytest.mark.parametrize(
    "before", [[], [(1, 16 / 25)], [(2, 8 / 25), (1, 0.0)], [(1, 0.0), (1, 0.0)]], ids=["none", "late", "two", "early"]
)
def test_the_video_that_is_made_is_the_last_of_the_positions(grid, before):
    conditions = [positions(frames, *grid[1:], first) for frames, first in before]
    assert last_video(torch.cat([*conditions, positions(*grid)], dim=2)) == grid


def test_positions_in_another_order_or_without_a_beginning_tell_nothing():
    made = positions(2, 3, 4)
    assert last_video(made.flip(2)) is None
    assert last_video(made + 1) is None
    assert last_video(made[..., torch.randperm(24, generator=torch.Generator().manual_seed(1))]) is None


@pytest.fixture
def pipe():
    cls = getattr(diffusers, "LTXConditionPipeline", None)
    if cls is None:
        pytest.skip("this diffusers has no LTXConditionPipeline")
    base = families()["ltx"].build()
    names = inspect.signature(cls.__init__).parameters
    parts = {name: part for name, part in base.components.items() if name in names}
    pipe = cls(**{**parts, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, frame_index):
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    return pipe(
        conditions=[LTXVideoCondition(video=image, frame_index=frame_index)],
        prompt="a fox",
        negative_prompt="red cat",
        height=64,
        width=96,
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        max_sequence_length=16,
    ).frames


@pytest.mark.parametrize("frame_index", [0, 8])
def test_a_row_of_the_video_is_its_place_beside_conditioning_frames(pipe, frame_index):
    watch = Watch(PATH)
    with attach(pipe, watch):
        plain = call(pipe, frame_index)
    _, _, *grid = plain.shape  # [B, C, frames, h, w]
    grid = tuple(grid)
    assert {context.grid for context in watch.contexts} == {grid}
    assert [context.condition for context in watch.contexts] == [("uncond", "cond")] * 2
    assert [context.step for context in watch.contexts] == [0, 1]

    def one_row(activations, context):
        delta = push(8.0)(activations, context)
        rows = delta.rows.expand(activations.rows.shape).clone().view(2, *grid, -1)
        keep = torch.zeros_like(rows)
        keep[1, grid[0] - 1, 1, 2] = rows[1, grid[0] - 1, 1, 2]
        return type(delta)(keep.flatten(0, -2)) if context.step == 1 else None

    with attach(pipe, Edit(one_row, PATH)):
        edited = call(pipe, frame_index)
    changed = (plain != edited)[0].any(dim=0).nonzero().tolist()
    assert changed == [[grid[0] - 1, 1, 2]]
