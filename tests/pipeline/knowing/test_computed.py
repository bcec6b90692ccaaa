"""Blocks that a cache passes over: nothing is seen there, and no edit goes in twice."""

from __future__ import annotations

import copy

import pytest
import torch

from sparsefeat.pipeline import attach
from sparsefeat.pipeline.knowing.computed import InnerForward
from tests.families import families
from tests.pipeline.caches import STEPS, NoSuchCache, config
from tests.pipeline.instruments import Edit, Watch, push, zero
from tests.pipeline.state import everything

pytest.importorskip("diffusers.hooks")

# (cache, family, a module it may pass over, a module inside it that tells whether it computed)
CACHES = [
    ("FirstBlockCacheConfig", "flux", "transformer.transformer_blocks.0", "norm1"),
    ("FirstBlockCacheConfig", "flux", "transformer.transformer_blocks.1", "norm1"),
    ("FirstBlockCacheConfig", "flux", "transformer.single_transformer_blocks.1", "norm"),
    ("FirstBlockCacheConfig", "wan", "transformer.blocks.1", "norm1"),
    ("MagCacheConfig", "flux", "transformer.transformer_blocks.1", "norm1"),
    ("TaylorSeerCacheConfig", "flux", "transformer.transformer_blocks.1.attn", "to_q"),
    ("PyramidAttentionBroadcastConfig", "flux", "transformer.transformer_blocks.1.attn", "to_q"),
]


def the(cache):
    try:
        return config(cache)
    except NoSuchCache as reason:
        pytest.skip(str(reason))


def build(cache, family):
    if not families()[family].available:
        pytest.skip(f"{family} is not in this diffusers")
    pipe = families()[family].build()
    pipe.transformer.enable_cache(the(cache))
    return pipe


def call(pipe, family):
    return torch.as_tensor(families()[family].call(pipe, ["a fox"], guidance=False, steps=STEPS))


def inside(pipe, path, part):
    """The steps in which the module computed, listened to at a part of it."""
    module = pipe.transformer.get_submodule(path.partition(".")[2]).get_submodule(part)
    ran = []
    module.register_forward_pre_hook(lambda *_: ran.append(1))
    return ran


@pytest.mark.parametrize(("cache", "family", "path", "part"), CACHES)
def test_what_did_not_compute_is_not_seen_and_an_edit_goes_in_once(cache, family, path, part):
    pipe = build(cache, family)
    ran = inside(pipe, path, part)
    alone = call(pipe, family)
    computed = len(ran)
    assert 0 < computed <= STEPS
    if "blocks.0" not in path:
        assert computed < STEPS, "the cache passed nothing over"
    pipe = build(cache, family)
    with attach(pipe, watch := Watch(path)):
        call(pipe, family)
    assert len(watch.contexts) == computed
    # An edit of the block's own forward, where the cache calls it, by a subclass of the block: what ours has to be.
    pipe = build(cache, family)
    with attach(pipe, Edit(push(0.5), path)):
        ours = call(pipe, family)
    plain = families()[family].build()
    theirs = _edited_inside(plain, path)
    plain.transformer.enable_cache(the(cache))
    expected = call(plain, family)
    assert theirs["times"] == computed
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, alone, atol=1e-3)


def _edited_inside(pipe, path):
    """Put the edit into the module's own forward, below any cache."""
    module = pipe.transformer.get_submodule(path.partition(".")[2])
    forward, count = module.forward, {"times": 0}

    def edited(*args, **kwargs):
        output = forward(*args, **kwargs)
        count["times"] += 1
        if isinstance(output, tuple):
            image = next(i for i, name in enumerate(_order(path)) if name == "image")
            changed = output[image] + 0.5 * torch.linspace(-1, 1, output[image].shape[-1])
            return (*output[:image], changed, *output[image + 1 :])
        return output + 0.5 * torch.linspace(-1, 1, output.shape[-1])

    module.forward = edited
    return count


def _order(path):
    return ("image", "text") if path.endswith(".attn") else ("text", "image")


@pytest.mark.parametrize("cache", ["FirstBlockCacheConfig", "TaylorSeerCacheConfig"])
def test_a_neutral_edit_gives_the_same_bits_and_nothing_is_left_under_a_cache(cache):
    path = "transformer.transformer_blocks.1"
    pipe = build(cache, "flux")
    alone = call(pipe, "flux")
    before = everything(pipe)
    forwards = [hook.fn_ref.original_forward for hook in _hooks(pipe)]
    with attach(pipe, Edit(zero, path, f"{path}:input", f"{path}:diff", "transformer.transformer_blocks.0")):
        assert torch.equal(call(pipe, "flux"), alone)
    assert everything(pipe) == before
    assert [hook.fn_ref.original_forward for hook in _hooks(pipe)] == forwards


def _hooks(pipe):
    registries = [getattr(m, "_diffusers_hook", None) for m in pipe.transformer.modules()]
    return [hook for registry in registries if registry is not None for hook in registry.hooks.values()]


def test_a_cache_turned_on_or_off_during_a_session_is_noticed_at_the_next_call():
    path = "transformer.transformer_blocks.1"
    pipe = families()["flux"].build()
    with attach(pipe, watch := Watch(path)):
        call(pipe, "flux")
        assert len(watch.contexts) == STEPS
        pipe.transformer.enable_cache(the("FirstBlockCacheConfig"))
        call(pipe, "flux")
        assert len(watch.contexts) == 1
        pipe.transformer.disable_cache()
        call(pipe, "flux")
        assert len(watch.contexts) == STEPS
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())
    assert not any(type(vars(m).get("forward")).__name__ == "InnerForward" for m in pipe.transformer.modules())


def test_a_copy_of_a_cached_model_made_in_a_session_has_nothing_of_it():
    path = "transformer.transformer_blocks.1"
    pipe = build("FirstBlockCacheConfig", "flux")
    with attach(pipe, watch := Watch(path)):
        copied = copy.deepcopy(pipe.transformer)
        call(pipe, "flux")
        seen = len(watch.contexts)
        pipe.transformer, kept = copied, pipe.transformer
        assert not any(isinstance(h.fn_ref.original_forward, InnerForward) for h in _hooks(pipe))
        pipe.transformer = kept
        assert len(watch.contexts) == seen


def test_a_block_whose_forward_somebody_replaced_and_that_hands_its_input_on_is_not_seen():
    pipe = families()["wan"].build()
    pipe.transformer.blocks[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
    with attach(pipe, watch := Watch("transformer.blocks.1")):
        call(pipe, "wan")
    assert watch.contexts == []
