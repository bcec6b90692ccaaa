"""What video pipelines have of their own: frames in the grid, two models in one schedule, arguments that are ignored."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import diffusers
import pytest
import torch

from sparsefeat.pipeline import Hookpoint, HookpointNotReachedError, attach, hookpoints
from sparsefeat.pipeline.families.video import video_grid
from tests.families import cogvideox, families, hunyuan_video, kandinsky5, ltx, wan
from tests.pipeline.instruments import Watch

pytestmark = pytest.mark.skipif(not wan.FAMILY.available, reason="WanPipeline is not in this diffusers")

two_models = pytest.mark.skipif(
    not wan.FAMILY.available or "transformer_2" not in inspect.signature(diffusers.WanPipeline.__init__).parameters,
    reason="the WanPipeline of this diffusers has one model",
)
FIRST, SECOND = "transformer.blocks.1", "transformer_2.blocks.1"


@two_models
def test_of_wan_22s_two_models_each_sees_its_own_steps_and_both_conditions():
    pipe = wan.build(two_models=True)
    first, second = Watch(FIRST), Watch(SECOND)
    switched = []

    def note(p, step, timestep, tensors):
        switched.append(float(timestep) < 600)  # boundary_ratio 0.6 of 1000 training steps
        return {}

    with attach(pipe, first, second):
        wan.call(pipe, ["a fox", "red cat"], guidance=True, steps=4, callback_on_step_end=note)
    assert switched.count(True) == 2
    assert [c.step for c in first.contexts] == [0, 0, 1, 1]
    assert [c.step for c in second.contexts] == [2, 2, 3, 3]
    for watch in (first, second):
        assert [c.condition for c in watch.contexts] == [("cond",) * 2, ("uncond",) * 2] * 2
        assert {c.n_steps for c in watch.contexts} == {4}
        assert {c.prompt_index for c in watch.contexts} == {(0, 1)}


@two_models
def test_a_model_that_the_schedule_never_came_to_is_an_error_that_says_so():
    pipe = wan.build(two_models=True)
    with attach(pipe, Watch(SECOND)), pytest.raises(HookpointNotReachedError, match="two models only one may have run"):
        wan.call(pipe, ["a fox"], guidance=False, steps=1)


@two_models
def test_a_name_without_the_component_is_ambiguous_where_there_are_two_models():
    pipe = wan.build(two_models=True)
    with pytest.raises(ValueError, match="in transformer and in transformer_2"):
        attach(pipe, Watch("blocks.1"))


@pytest.mark.parametrize("guidance", [True, False])
def test_cogvideox_makes_one_video_a_prompt_whatever_it_is_asked_for(guidance):
    pipe = cogvideox.build()
    watch = Watch("transformer.transformer_blocks.0")
    with attach(pipe, watch) as run:
        latents = cogvideox.call(pipe, ["a fox"], guidance=guidance, images_per_prompt=2)
    assert len(latents) == run.calls[0].call.n_images == 1
    assert watch.contexts[0].condition == (("uncond", "cond") if guidance else ("cond",))


@pytest.mark.parametrize(
    ("config", "shape", "time_first", "expected"),
    [
        ({"patch_size": 2, "patch_size_t": None}, (1, 3, 4, 6, 10), True, (3, 3, 5)),
        ({"patch_size": 2, "patch_size_t": 2}, (1, 4, 4, 6, 10), True, (2, 3, 5)),  # CogVideoX 1.5
        ({"patch_size": (1, 2, 2)}, (1, 4, 3, 6, 10), False, (3, 3, 5)),
        ({"patch_size": 2, "patch_size_t": 1}, (1, 4, 3, 6, 10), False, (3, 3, 5)),
        ({"patch_size": 2}, (1, 4, 6, 10), False, None),
    ],
)
def test_the_grid_of_a_video_is_its_latent_in_patches(config, shape, time_first, expected):
    model = SimpleNamespace(config=SimpleNamespace(**config))
    assert video_grid(model, torch.zeros(shape), time_first) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cogvideox", (2, 4, 4)),  # of the tiny model's config: 5 frames, 8 x 8 latents
        ("wan", (21, 30, 52)),  # 81 frames of 480 x 832, 4 frames and 8 pixels a latent, 2 latents a patch
        ("hunyuan_video", (33, 45, 80)),  # 129 frames of 720 x 1280
        ("ltx", (21, 16, 22)),  # 161 frames of 512 x 704, 8 frames and 32 pixels a latent
        ("kandinsky5", (31, 32, 48)),  # 121 frames of 512 x 768
    ],
)
def test_the_grid_at_the_default_size_is_told_without_a_run(name, expected):
    family = families()[name]
    if not family.available:
        pytest.skip(f"{family.pipeline} is not in this diffusers")
    path = next(block.path for block in family.blocks if block.stream == "image")
    infos = hookpoints(family.build())
    assert [info.grid for info in infos if info.hookpoint.path == path and info.stream == "image"] == [expected]


def test_the_rows_of_cogvideoxs_feed_forward_are_the_text_then_the_video():
    pipe = cogvideox.build()
    path = "transformer.transformer_blocks.0.ff"
    watches = {stream: Watch(Hookpoint(path, stream=stream)) for stream in ("image", "text")}
    whole = []
    handle = pipe.transformer.transformer_blocks[0].ff.register_forward_hook(lambda m, args, out: whole.append(out))
    with attach(pipe, *watches.values()):
        cogvideox.call(pipe, ["a fox"], guidance=False, steps=1)
    handle.remove()
    assert torch.equal(watches["text"].rows[0], whole[0][0, : cogvideox.MAX_TOKENS])
    assert torch.equal(watches["image"].rows[0], whole[0][0, cogvideox.MAX_TOKENS :])
    assert watches["image"].contexts[0].grid == (2, 4, 4)


def test_the_single_blocks_of_hunyuan_video_give_the_video_and_the_text():
    pipe = hunyuan_video.build()
    path = "transformer.single_transformer_blocks.1"
    watches = {stream: Watch(Hookpoint(path, stream=stream)) for stream in ("image", "text")}
    given = []
    block = pipe.transformer.single_transformer_blocks[1]
    handle = block.register_forward_hook(lambda m, args, out: given.append(out))
    with attach(pipe, *watches.values()):
        hunyuan_video.call(pipe, ["a fox"], guidance=False, steps=1)
    handle.remove()
    assert torch.equal(watches["image"].rows[0], given[0][0][0])
    assert torch.equal(watches["text"].rows[0], given[0][1][0])
    assert (watches["image"].contexts[0].grid, watches["text"].contexts[0].grid) == ((2, 4, 4), None)


def test_the_token_refiner_of_hunyuan_video_is_no_block_to_hook():
    names = [info.hookpoint.path for info in hookpoints(hunyuan_video.build())]
    assert "transformer.transformer_blocks.0" in names
    assert not any("refiner" in name for name in names)


def test_ltxs_grid_is_told_by_the_arguments_of_the_model_and_not_by_their_product():
    pipe = ltx.build()
    watch = Watch("transformer.transformer_blocks.0")
    with attach(pipe, watch):
        ltx.call(pipe, ["a fox"], guidance=False, steps=1, height=64, width=96, num_frames=17)
    assert watch.contexts[0].grid == (3, 2, 3)


@pytest.mark.skipif(not kandinsky5.FAMILY.available, reason="Kandinsky5T2VPipeline is not in this diffusers")
def test_kandinsky_5s_blocks_of_the_text_are_text():
    pipe = kandinsky5.build()
    text = Watch("transformer.text_transformer_blocks.0")
    with attach(pipe, text):
        kandinsky5.call(pipe, ["a fox"], guidance=True, steps=1)
    assert [(c.stream, c.grid, c.condition) for c in text.contexts] == [
        ("text", None, (c,)) for c in ("cond", "uncond")
    ]


@pytest.mark.skipif(not kandinsky5.FAMILY.available, reason="Kandinsky5T2VPipeline is not in this diffusers")
def test_kandinsky_5s_text_comes_once_for_all_videos_of_a_prompt():
    pipe = kandinsky5.build()
    text, video = Watch("transformer.text_transformer_blocks.0:input"), Watch("transformer.visual_transformer_blocks.0")
    with attach(pipe, text, video):
        kandinsky5.call(pipe, ["a fox"], guidance=True, images_per_prompt=2, steps=1)
    assert [(c.condition, c.prompt_index) for c in text.contexts] == [(("cond",), (0,)), (("uncond",), (0,))]
    assert [(c.condition, c.prompt_index) for c in video.contexts] == [
        (("cond",) * 2, (0, 1)),
        (("uncond",) * 2, (0, 1)),
    ]


@pytest.mark.parametrize("name", ["cogvideox", "wan", "ltx", "hunyuan_video", "kandinsky5"])
def test_the_hookpoints_listed_have_the_widths_that_a_run_shows(name):
    family = families()[name]
    if not family.available:
        pytest.skip(f"{family.pipeline} is not in this diffusers")
    pipe = family.build()
    infos = [info for info in hookpoints(pipe) if info.hookpoint.path.startswith("transformer")]
    assert infos
    watches = [Watch(Hookpoint(info.hookpoint.path, stream=info.stream)) for info in infos]
    with attach(pipe, *watches):
        family.call(pipe, ["a fox"], guidance=False, steps=1)
    for info, watch in zip(infos, watches, strict=True):
        assert info.width == watch.rows[0].shape[1], info
        assert watch.contexts[0].stream == info.stream
