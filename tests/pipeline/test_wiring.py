"""What `attach` changes in a pipeline, it changes back: normally, by any exception, in any order."""

from __future__ import annotations

import copy
import inspect
import json
import warnings

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import nn

from sparsefeat.pipeline import Delta, HookpointNotReachedError, attach, resolve
from tests.pipeline.instruments import ATTENTION, BLOCK, Edit, Watch, WatchAttention, one_of_each, push
from tests.pipeline.state import everything, hooks_of
from tests.tiny import pixels, tiny_scheduler, tiny_sd, tiny_sdxl


def test_leaving_normally_restores_everything(pipe):
    before, images = everything(pipe), pixels(pipe)
    before = everything(pipe)
    with attach(pipe, *one_of_each()):
        assert everything(pipe) != before
        pixels(pipe)
    assert everything(pipe) == before
    assert type(pipe) is StableDiffusionPipeline
    assert np.array_equal(pixels(pipe), images)


def test_leaving_normally_restores_an_sdxl_pipeline():
    pipe = tiny_sdxl()
    pixels(pipe, steps=1)
    before = everything(pipe)
    with attach(pipe, Watch(BLOCK, "text_encoder_2.encoder.layers.0"), WatchAttention(ATTENTION)):
        pixels(pipe, steps=1)
    assert everything(pipe) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit], ids=str)
@pytest.mark.parametrize(
    "where",
    [
        "unet.conv_in",
        f"{ATTENTION}.to_k",  # inside the tapped attention, where the mode is entered
        f"{BLOCK}.proj_out",
        "text_encoder.encoder.layers.0.mlp",
        "vae.decoder",
    ],
)
def test_leaving_by_an_exception_inside_a_block_restores_everything(pipe, error, where):
    images = pixels(pipe)
    before = everything(pipe)
    module = resolve(pipe, where).module

    def fail(*args):
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"), attach(pipe, *one_of_each()):  # noqa: PT012
        handle = module.register_forward_pre_hook(fail)
        try:
            pixels(pipe)
        finally:
            handle.remove()
    assert everything(pipe) == before
    assert torch.overrides._get_current_function_mode() is None
    assert np.array_equal(pixels(pipe), images)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt], ids=str)
@pytest.mark.parametrize("method", ["begin_call", "at_hookpoint", "end_step", "end_call", "active"])
def test_leaving_by_an_exception_inside_an_instrument_restores_everything(pipe, error, method):
    before = everything(pipe)
    watch = Watch(BLOCK)

    def fail(*args):
        raise error("in the instrument")

    with pytest.raises(error, match="in the instrument"), attach(pipe, *one_of_each(), watch):  # noqa: PT012
        setattr(watch, method, fail)
        pixels(pipe)
    assert everything(pipe) == before


@pytest.mark.parametrize("method", ["prepare", "hookpoints", "attentions", "expected_width"])
def test_an_attach_that_fails_changes_nothing(pipe, method):
    before = everything(pipe)
    watch = Watch(BLOCK)

    def fail(*args):
        raise KeyboardInterrupt

    setattr(watch, method, fail)
    with pytest.raises(KeyboardInterrupt):
        attach(pipe, *one_of_each(), watch)
    assert everything(pipe) == before


def test_an_attach_interrupted_halfway_through_its_hooks_changes_nothing(pipe, monkeypatch):
    before = everything(pipe)
    register, count = nn.Module.register_forward_hook, iter(range(10))

    def interrupted(self, *args, **kwargs):
        if next(count) == 2:
            raise KeyboardInterrupt
        return register(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "register_forward_hook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attach(pipe, *one_of_each())
    monkeypatch.undo()
    assert everything(pipe) == before


def test_nothing_is_put_on_a_scheduler_and_its_class_is_what_it_was_after_a_call(pipe):
    step, timesteps = DDIMScheduler.step, DDIMScheduler.set_timesteps
    seen = []
    with attach(pipe, Watch(BLOCK)):
        pixels(pipe, callback_on_step_end=lambda p, i, t, k: seen.append("step" in vars(p.scheduler)) or {})
        assert (DDIMScheduler.step, DDIMScheduler.set_timesteps) == (step, timesteps)
    assert seen == [False, False]


def test_a_scheduler_that_was_already_wrapped_gets_its_wrapper_back(pipe):
    def mine(*args, **kwargs):
        return DDIMScheduler.step(pipe.scheduler, *args, **kwargs)

    pipe.scheduler.step = mine
    with attach(pipe, watch := Watch(BLOCK)):
        pixels(pipe)
    assert vars(pipe.scheduler)["step"] is mine
    assert [c.step for c in watch.contexts] == [0, 1]


def test_a_scheduler_exchanged_between_calls_or_within_one_is_followed_and_restored(pipe):
    first, second, third = pipe.scheduler, tiny_scheduler("euler"), tiny_scheduler("ddim")
    third.set_timesteps(3)
    watch = Watch(BLOCK)

    def exchange(p, step, timestep, tensors):
        p.scheduler = third
        return {}

    with attach(pipe, watch):
        pixels(pipe, steps=2)
        pipe.scheduler = second
        pixels(pipe, steps=3)
        assert [c.step for c in watch.contexts] == [0, 1, 2]
        pipe.scheduler = first
        pixels(pipe, steps=3, callback_on_step_end=exchange)
        assert [c.step for c in watch.contexts] == [0, 1, 2]
    assert not any("step" in vars(scheduler) for scheduler in (first, second, third))


def test_closing_twice_is_harmless_and_a_closed_session_refuses_calls(pipe):
    before = everything(pipe)
    run = attach(pipe, Watch(BLOCK))
    run.close()
    run.close()
    assert everything(pipe) == before
    with pytest.raises(RuntimeError, match="closed; attach again"), run.call("a fox"):
        pass


def test_attaching_again_and_again_leaves_nothing_and_gives_the_same(pipe):
    before, images = everything(pipe), pixels(pipe)
    edit = Edit(push(), BLOCK)
    edited = []
    for _ in range(3):
        with attach(pipe, edit):
            edited.append(pixels(pipe))
        assert everything(pipe) == before
    assert not np.array_equal(edited[0], images)
    assert np.array_equal(edited[0], edited[1])
    assert np.array_equal(edited[0], edited[2])


def test_nested_sessions_run_from_the_outer_to_the_inner(pipe):
    before = everything(pipe)
    first, second, third = Watch(BLOCK), Watch(BLOCK), Watch(BLOCK)
    with attach(pipe, first, Edit(push(), BLOCK)) as outer:
        with attach(pipe, second) as inner:
            pixels(pipe, steps=1)
            assert torch.equal(second.rows[0], first.rows[0] + 3 * torch.linspace(-1, 1, 32))
        with attach(pipe, third):
            pass
        pixels(pipe, steps=2)
    assert [call[first] for call in outer.calls] == [1, 2]
    assert [call[second] for call in inner.calls] == [1]
    assert everything(pipe) == before


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (2, 1, 0)])
def test_sessions_may_be_closed_in_any_order(pipe, order):
    before = everything(pipe)
    watches = [Watch(BLOCK, "unet.mid_block"), Watch(BLOCK), Watch("unet.mid_block")]
    taps = [WatchAttention(ATTENTION) for _ in watches]
    runs = [attach(pipe, watch, tap) for watch, tap in zip(watches, taps, strict=True)]
    for closed in order:
        pixels(pipe, steps=1)
        runs[closed].close()
    assert everything(pipe) == before
    for place, closed in enumerate(order):
        assert len(runs[closed].calls) == place + 1


def test_a_session_closed_by_a_callback_is_gone_from_there_on(pipe):
    before = everything(pipe)
    images = pixels(pipe)
    watch, other = Watch(BLOCK), Watch(BLOCK)
    with attach(pipe, other):
        run = attach(pipe, watch)
        seen = pixels(pipe, callback_on_step_end=lambda p, i, t, k: run.close() or {})
    assert np.array_equal(seen, images)
    assert (len(watch.contexts), len(other.contexts)) == (1, 2)
    assert everything(pipe) == before


def test_a_session_opened_by_a_callback_begins_with_the_next_call(pipe):
    watch, runs = Watch(BLOCK), []
    tap = WatchAttention(ATTENTION)

    def open_one(p, step, timestep, tensors):
        if not runs:
            runs.append(attach(p, watch, tap))
        return {}

    with attach(pipe, Watch(BLOCK)):
        pixels(pipe, callback_on_step_end=open_one)
        assert (runs[0].calls, watch.contexts) == ([], [])
        pixels(pipe)
        assert (runs[0][watch], runs[0][tap]) == (2, 2)
        runs[0].close()


def test_while_attached_the_pipeline_is_what_it_was_to_those_who_ask(pipe, tmp_path):
    signature = inspect.signature(pipe.__call__)
    with attach(pipe, Watch(BLOCK)):
        assert isinstance(pipe, StableDiffusionPipeline)
        assert type(pipe).__name__ == "StableDiffusionPipeline"
        assert inspect.signature(pipe.__call__) == signature
        pipe.save_pretrained(tmp_path)
        assert "sparsefeat" not in repr(pipe)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_nothing_is_added_to_the_models(pipe):
    parameters, modules = list(pipe.unet.state_dict()), [path for path, _ in pipe.unet.named_modules()]
    with attach(pipe, *one_of_each()):
        pixels(pipe, steps=1)
        assert list(pipe.unet.state_dict()) == parameters
        assert [path for path, _ in pipe.unet.named_modules()] == modules


def test_a_module_replaced_during_a_session_is_hooked_by_the_next(pipe):
    before = Watch(BLOCK)
    with attach(pipe, before) as outer:
        pixels(pipe, steps=1)
        pipe.unet.up_blocks[1].attentions[1] = copy.deepcopy(tiny_sd(seed=5).unet.up_blocks[1].attentions[1])
        with attach(pipe, after := Watch(BLOCK)) as inner:
            with pytest.raises(HookpointNotReachedError, match="replaced after `attach`"):
                pixels(pipe, steps=1)
            assert inner[after] == 1
        assert len(outer.calls) == 2


# Offloading wraps `forward` of modules and puts it back in the middle; an accelerator is not needed to see that.


def test_offloading_hooks_of_accelerate_neither_lose_ours_nor_are_lost(pipe):
    class Offload(ModelHook):
        def __init__(self):
            self.calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    offload, inner = Offload(), Offload()
    add_hook_to_module(pipe.unet, offload)
    attention = pipe.unet.up_blocks[1].attentions[1].transformer_blocks[0].attn2
    add_hook_to_module(attention, inner)
    forward = vars(attention)["forward"]
    images = pixels(pipe)
    watch, tap = Watch(BLOCK), WatchAttention(ATTENTION)
    with attach(pipe, watch, tap) as run:
        assert np.array_equal(pixels(pipe), images)
        # What `maybe_free_model_hooks` does at the end of a call: take the hooks off the component and put them back.
        remove_hook_from_module(pipe.unet)
        add_hook_to_module(pipe.unet, offload)
        assert np.array_equal(pixels(pipe), images)
        assert [call[watch] for call in run.calls] == [2, 2]
        assert [call[tap] for call in run.calls] == [2, 2]
    assert vars(attention)["forward"] is forward
    assert (offload.calls, inner.calls) == (6, 6)
    remove_hook_from_module(pipe.unet, recurse=True)
    assert np.array_equal(pixels(pipe), images)


# Gradient checkpointing runs blocks again in the backward pass.


@pytest.mark.parametrize("io", ["output", "input", "diff"])
def test_gradient_checkpointing_gets_the_same_gradient_and_records_once(io):
    here = f"{BLOCK}.transformer_blocks.0"

    def scaled(activations, context):
        return Delta(activations.rows.square() * 0.1 * (context.step + 1))

    gradients, counts = [], []
    for checkpointing in (False, True):
        pipe = tiny_sd()
        pipe.unet.train(checkpointing)  # diffusers checkpoints in training mode; nothing here has dropout
        if checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        watch, edit = Watch(f"{here}:{io}"), Edit(scaled, f"{here}:{io}")
        with attach(pipe, watch, edit) as run, run.call("fox"):
            pipe.scheduler.set_timesteps(2)
            latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
            sample, text = latents, torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(1))
            for t in pipe.scheduler.timesteps:
                sample = pipe.scheduler.step(pipe.unet(sample, t, text).sample, t, sample).prev_sample
            sample.square().sum().backward()
        gradients.append(latents.grad)
        counts.append((len(watch.contexts), [c.recomputing for c in edit.contexts], [c.step for c in edit.contexts]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)
    assert counts[0] == (2, [False, False], [0, 1])
    assert counts[1] == (2, [False, False, True, True], [0, 1, 1, 0])


def test_a_lora_loaded_in_a_session_is_hooked_at_the_next_call(pipe):
    peft = pytest.importorskip("peft")
    path = f"{ATTENTION}.to_q"
    given = []
    with attach(pipe, watch := Watch(path), Watch(BLOCK)):
        pixels(pipe, steps=1)
        pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        layer = resolve(pipe, path).module
        layer.register_forward_hook(lambda module, args, output: given.append(output.flatten(0, 1).clone()))
        pixels(pipe, steps=1)
    assert torch.equal(watch.rows[0], given[0])
    assert [hook for hook in hooks_of(pipe.unet) if "sparsefeat" in type(hook).__module__] == []


# Instruments whose time never came


@pytest.mark.parametrize(
    ("active", "condition", "said"),
    [(False, "both", "none of the 2 steps that ran"), (True, "uncond", r"no row was 'uncond' in it, only cond")],
)
def test_an_instrument_that_had_nothing_to_do_is_told_once(pipe, active, condition, said):
    class Idle(Watch):
        def active(self, context):
            return active

    idle = Idle(BLOCK)
    idle.condition = condition
    with attach(pipe, idle, Watch(BLOCK)):
        with pytest.warns(UserWarning, match=f"this Idle did nothing in a whole call, as {said}"):
            pixels(pipe, guidance_scale=1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            pixels(pipe, guidance_scale=1.0)
