"""What is copied, pickled, shared or forgotten while a session is open: nothing of the session goes along, and nothing is
kept alive by it.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from sparsefeat.pipeline import attach
from tests.pipeline.instruments import BLOCK, Edit, Watch, one_of_each, push
from tests.pipeline.state import everything, hooks_of
from tests.tiny import pixels, tiny_scheduler, tiny_sd


def test_a_deepcopy_of_a_pipeline_in_a_session_is_of_its_class_and_its_hooks_go_at_its_first_run(pipe):
    images = pixels(pipe)
    before = everything(pipe)
    with attach(pipe, *one_of_each()):
        copied = copy.deepcopy(pipe)
    assert type(copied) is StableDiffusionPipeline
    assert np.array_equal(pixels(copied), images)
    own = {type(hook).__module__.partition(".")[0] for hook in hooks_of(copied.unet)}
    assert "sparsefeat" not in own
    assert everything(pipe) == before


def test_a_pipeline_and_its_models_can_be_pickled_in_a_session(pipe):
    images = pixels(pipe)
    with attach(pipe, *one_of_each()):
        unet = pickle.loads(pickle.dumps(pipe.unet))
        model = torch.load(io.BytesIO(_saved(pipe.unet)), weights_only=False)
        whole = [pickle.loads(pickle.dumps(pipe, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    for copied in whole:
        assert type(copied) is StableDiffusionPipeline
        assert np.array_equal(pixels(copied), images)
    assert not any(type(vars(module).get("forward")).__name__ == "AttentionTap" for module in unet.modules())
    for copied in (unet, model):
        pipe.unet, kept = copied, pipe.unet
        assert np.array_equal(pixels(pipe), images)
        pipe.unet = kept


def _saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return buffer.getvalue()


def test_a_pipeline_and_session_that_are_forgotten_leave_their_components_as_they_were():
    pipe = tiny_sd()
    parts, gone = dict(pipe.components), weakref.ref(pipe)
    attach(pipe, *one_of_each())
    del pipe
    gc.collect()
    assert gone() is None
    assert not any("sparsefeat" in type(hook).__module__ for hook in hooks_of(parts["unet"]))
    assert not any("forward" in vars(module) for module in parts["unet"].modules())
    again = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    pixels(again, steps=1)


def test_two_pipelines_that_share_models_have_a_session_each_in_any_order(pipe):
    second = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    second.scheduler = tiny_scheduler("euler")
    second.set_progress_bar_config(disable=True)
    before = everything(pipe)
    for first_in in (pipe, second):
        a, b = Watch(BLOCK), Watch(BLOCK)
        with attach(pipe, a) as low, attach(second, b) as high:
            pixels(first_in, steps=2)
            pixels(second, steps=3)
            pixels(pipe, steps=1)
        assert len(low.calls) + len(high.calls) == 3
        assert ([c.step for c in a.contexts], [c.step for c in b.contexts]) == ([0], [0, 1, 2])
    assert everything(pipe) == before


def test_a_pipeline_called_by_another_ones_callback_is_told_from_it(pipe):
    second = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    second.scheduler = tiny_scheduler("euler")
    second.set_progress_bar_config(disable=True)
    a, b = Watch(BLOCK), Watch(BLOCK)
    with attach(pipe, a), attach(second, b):
        pixels(pipe, steps=3, callback_on_step_end=lambda p, i, t, k: (pixels(second, steps=2), {})[1])
    assert [c.step for c in a.contexts] == [0, 1, 2]
    assert [c.step for c in b.contexts] == [0, 1]


def test_threads_with_a_pipeline_each_may_share_a_model(pipe):
    pipes = [
        StableDiffusionPipeline(
            **{**pipe.components, "scheduler": tiny_scheduler("ddim")}, requires_safety_checker=False
        )
        for _ in range(2)
    ]
    seen, lock = {}, threading.Lock()

    def work(i):
        pipes[i].set_progress_bar_config(disable=True)
        with attach(pipes[i], watch := Watch(BLOCK)):
            for _ in range(2):
                with lock:  # the model itself is one
                    pixels(pipes[i], steps=i + 2)
        seen[i] = [c.step for c in watch.contexts]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {0: [0, 1], 1: [0, 1, 2]}


def test_the_pipeline_is_freed_when_it_is_forgotten_and_recordings_are_kept():
    pipe = tiny_sd()
    with attach(pipe, watch := Watch(BLOCK)) as run:
        pixels(pipe, steps=1)
    gone = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None
    assert run[watch] == 1
    assert run.calls[0].call.pipe is None


def test_a_recording_keeps_the_text_and_numbers_of_its_call_and_nothing_large(pipe):
    latents = torch.randn(1, 4, 16, 16)
    with attach(pipe, Watch(BLOCK)) as run:
        pixels(pipe, latents=latents, negative_prompt="cat", steps=1)
    arguments = run.calls[0].call.arguments
    assert (arguments["prompt"], arguments["negative_prompt"], arguments["num_inference_steps"]) == ("a fox", "cat", 1)
    assert "latents" not in arguments
    assert "generator" not in arguments


def test_a_copy_made_during_a_session_is_an_ordinary_pipeline(pipe):
    images = pixels(pipe)
    watch = Watch(BLOCK)
    with attach(pipe, watch, Edit(push(), BLOCK)) as run:
        copied = copy.deepcopy(pipe)
        assert np.array_equal(pixels(copied), images)
        assert run.calls == []
