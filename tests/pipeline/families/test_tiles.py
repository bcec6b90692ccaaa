"""A UNet that is run on tiles of the image, or on another image beside it, is refused: their rows have no place in its grid."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch

from sparsefeat.pipeline import attach
from tests.pipeline.instruments import Watch
from tests.tiny import pixels, tiny_sd

BLOCK = "unet.mid_block.attentions.0"


def made_of(cls, pipe, **options):
    names = inspect.signature(cls.__init__).parameters
    new = cls(**{n: p for n, p in pipe.components.items() if n in names}, **options)
    new.set_progress_bar_config(disable=True)
    return new


def test_the_views_of_a_panorama_are_refused_and_one_view_is_an_image():
    if not hasattr(diffusers, "StableDiffusionPanoramaPipeline"):
        pytest.skip("this diffusers has no StableDiffusionPanoramaPipeline")
    pipe = made_of(diffusers.StableDiffusionPanoramaPipeline, tiny_sd(), requires_safety_checker=False)
    asked = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    with attach(pipe, watch := Watch(BLOCK)):
        pipe("a fox", height=256, width=256, **asked)
    assert [c.grid for c in watch.contexts] == [(16, 16)]
    with (
        attach(pipe, Watch(BLOCK)),
        pytest.raises(ValueError, match=r"on a tile of \(64, 64\) where a latent of \(64, 80\)"),
    ):
        pipe("a fox", height=256, width=320, **asked)


def in_quarters(net):
    """Make a denoiser run on four tiles one after the other."""
    whole = net.forward

    def forward(sample, *args, **kwargs):
        if sample.shape[-1] < 16:
            return whole(sample, *args, **kwargs)
        halves = [torch.cat([net(t, *args, **kwargs)[0] for t in row.chunk(2, 3)], 3) for row in sample.chunk(2, 2)]
        return (torch.cat(halves, 2),)

    net.forward = forward


def test_a_loop_over_tiles_of_a_users_own_is_refused():
    pipe = tiny_sd()
    in_quarters(pipe.unet)
    with attach(pipe, Watch(BLOCK)), pytest.raises(ValueError, match="on a tile of"):
        pixels(pipe, "a fox", height=64, width=64)


def test_a_reference_beside_the_image_is_refused():
    pipe = tiny_sd()
    whole = pipe.unet.forward

    def two(sample, *args, **kwargs):
        if sample.shape[-1] > 16:
            return whole(sample, *args, **kwargs)
        return (pipe.unet(torch.cat([sample, torch.ones_like(sample)], 3), *args, **kwargs)[0][..., :16],)

    pipe.unet.forward = two
    with attach(pipe, Watch(BLOCK)), pytest.raises(ValueError, match=r"on more than the image, \(16, 32\) where"):
        pixels(pipe, "a fox", height=64, width=64)


class TwoPasses(diffusers.StableDiffusionPipeline):
    """A first pass at the size asked for, and a second one at twice that."""

    def __call__(self, prompt, height, width, **kwargs):
        super().__call__(prompt, height=height, width=width, **kwargs)
        return super().__call__(prompt, height=2 * height, width=2 * width, **kwargs)


def test_a_second_pass_at_a_higher_resolution_is_a_loop_of_its_own_with_its_own_grid():
    pipe = made_of(TwoPasses, tiny_sd(), requires_safety_checker=False)
    with attach(pipe, watch := Watch(BLOCK)):
        pixels(pipe, "a fox", height=48, width=64)
    assert [(c.loop, c.step, c.grid) for c in watch.contexts] == [
        (0, 0, (3, 4)),
        (0, 1, (3, 4)),
        (1, 0, (6, 8)),
        (1, 1, (6, 8)),
    ]


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (70, 66)])
def test_a_whole_image_of_any_size_is_none(size):
    with attach(pipe := tiny_sd(), watch := Watch(BLOCK)):
        if size == (70, 66):  # not a multiple of 8: the pipeline's own error
            with pytest.raises(ValueError, match="divisible"):
                pixels(pipe, "a fox", height=size[0], width=size[1])
            return
        pixels(pipe, "a fox", height=size[0], width=size[1])
    assert watch.contexts[0].grid == (size[0] // 16, size[1] // 16)
