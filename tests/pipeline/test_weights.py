"""Changed weights: put back to the bit, in any order, after interrupts and exceptions."""

from __future__ import annotations

import copy
import gc
import itertools
import random
import sys
import warnings

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from torch import nn

from sparsefeat.pipeline import HookpointNotReachedError, Instrument, attach
from sparsefeat.pipeline.step_window import StepWindow
from tests.families import families
from tests.pipeline.state import everything
from tests.pipeline.test_interrupts import Interrupted
from tests.tiny import pixels, tiny_sd

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2"
CONV = "unet.up_blocks.1.resnets.0.conv1"
STEPS = 2


class Times(Instrument):
    """Multiplies weights by a factor."""

    def __init__(self, factor, *paths, steps=None):
        self.factor, self.paths, self.window = factor, paths, StepWindow.parse(steps)

    def weights(self, pipe):
        return dict.fromkeys(self.paths, lambda weight: weight * self.factor)

    def active(self, context):
        return self.window.contains(context)


@pytest.fixture
def pipe():
    return tiny_sd()


def weight(pipe, path=LINEAR):
    return pipe.unet.get_submodule(path.partition(".")[2]).weight


def bits(pipe):
    return {name: p.detach().clone() for name, p in pipe.unet.named_parameters()}


def same(pipe, before):
    return all(torch.equal(p, before[name]) for name, p in pipe.unet.named_parameters())


def draw(pipe, **call):
    return pixels(pipe, steps=STEPS, output_type="latent", **call)


def test_the_pipeline_computes_with_the_changed_weights_and_gets_its_own_back(pipe):
    before, plain, state = bits(pipe), draw(pipe), everything(pipe)
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        for path in (LINEAR, CONV):
            weight(other, path).mul_(0.3)
    with attach(pipe, Times(0.3, LINEAR, CONV)):
        changed = draw(pipe)
        assert torch.equal(weight(pipe), before[LINEAR.partition(".")[2] + ".weight"] * 0.3)
    assert torch.equal(changed, draw(other))
    assert not torch.equal(changed, plain)
    assert same(pipe, before)
    assert everything(pipe) == state
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_several_changes_of_one_weight_come_off_in_any_order(pipe, order):
    before, own = bits(pipe), weight(pipe).detach().clone()
    factors = (0.1, 7.3, 3e-9)
    sessions = [attach(pipe, Times(factor, LINEAR)) for factor in factors]
    left = list(range(3))
    for i in order:
        wanted = own
        for j in left:
            wanted = wanted * factors[j]
        assert torch.equal(weight(pipe), wanted)
        sessions[i].close()
        left.remove(i)
    assert same(pipe, before)


def test_a_model_that_two_pipelines_share_has_both_changes_and_gets_its_own_back(pipe):
    twin = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    before, own = bits(pipe), weight(pipe).detach().clone()
    one, other = attach(pipe, Times(0.5, LINEAR)), attach(twin, Times(3.0, LINEAR))
    assert torch.equal(weight(pipe), own * 0.5 * 3.0)
    one.close()
    assert torch.equal(weight(pipe), own * 3.0)
    other.close()
    assert same(pipe, before)
    attach(twin, Times(3.0, LINEAR))
    del twin, other, one
    gc.collect()  # a pipeline that is forgotten with its session leaves nothing in a model that lives on
    assert same(pipe, before)


def test_an_exception_in_the_call_or_in_attach_leaves_nothing(pipe):
    before, plain = bits(pipe), draw(pipe)

    class Fails(Instrument):
        def begin_call(self, call):
            raise RuntimeError("on purpose")

    class FailsAtAttach(Instrument):
        def weights(self, pipe):
            return {LINEAR: lambda weight: weight[:1].sum(5)}

    with pytest.raises(RuntimeError, match="on purpose"), attach(pipe, Times(0.1, LINEAR), Fails()):
        draw(pipe)
    assert same(pipe, before)
    with pytest.raises(IndexError):
        attach(pipe, Times(0.1, LINEAR), FailsAtAttach())
    assert same(pipe, before)
    assert torch.equal(draw(pipe), plain)


def test_after_an_interrupt_anywhere_the_bits_come_back(pipe):
    before, state = bits(pipe), everything(pipe)

    def run(trace):
        session = None
        sys.settrace(trace)
        try:
            session = attach(pipe, Times(0.1, LINEAR, steps=[1]), Times(0.2, LINEAR, CONV))
            draw(pipe)
            session.close()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
            if session is not None:
                session.close()

    count = Interrupted()
    run(count)
    assert same(pipe, before)
    for at in random.Random(5).sample(range(1, count.lines), 25):
        run(Interrupted(at))
        assert same(pipe, before), at
    assert everything(pipe) == state


def test_a_window_of_steps_changes_them_there_alone(pipe):
    steps = 4
    plain = pixels(pipe, steps=steps, output_type="latent")
    seen = []

    def note(module, args, kwargs):
        seen.append(weight(pipe).detach().clone())

    own = weight(pipe).detach().clone()
    with attach(pipe, Times(0.5, LINEAR, steps=[1, 2])):
        handle = pipe.unet.conv_in.register_forward_pre_hook(note, with_kwargs=True)
        edited = pixels(pipe, steps=steps, output_type="latent")
        handle.remove()
    assert [torch.equal(w, own) for w in seen] == [True, False, False, True]
    assert [torch.equal(w, own * 0.5) for w in seen] == [False, True, True, False]
    assert not torch.equal(edited, plain)
    with (
        pytest.warns(UserWarning, match="none of the 4 steps"),
        attach(pipe, Times(0.5, LINEAR, steps=[9])),
    ):
        assert torch.equal(pixels(pipe, steps=steps, output_type="latent"), plain)
    assert torch.equal(weight(pipe), own)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_other_families(name):
    family = families()[name]
    pipe = family.build()
    root = pipe.unet if name == "sdxl" else pipe.transformer
    kind = "unet" if name == "sdxl" else "transformer"
    path = next(p for p, m in root.named_modules() if "ff" in p and isinstance(m, nn.Linear))
    before = {n: p.detach().clone() for n, p in root.named_parameters()}
    plain = family.call(pipe, ["a fox"], guidance=False)
    with attach(pipe, Times(0.0, f"{kind}.{path}")):
        edited = family.call(pipe, ["a fox"], guidance=False)
    assert not torch.equal(plain, edited)
    assert all(torch.equal(p, before[n]) for n, p in root.named_parameters())


def test_what_has_no_plain_weight_is_refused(pipe):
    with pytest.raises(ValueError, match="is a GroupNorm"):
        attach(pipe, Times(0.5, "unet.conv_norm_out"))
    int8 = tiny_sd()
    torch.ao.quantization.quantize_dynamic(int8.unet, {nn.Linear}, dtype=torch.qint8, inplace=True)
    with pytest.raises(ValueError, match="weights of Linear and Conv2d"):
        attach(int8, Times(0.5, LINEAR))
    packed = tiny_sd()
    packed.unet.get_submodule(LINEAR.partition(".")[2]).weight = nn.Parameter(torch.zeros(3, dtype=torch.uint8), False)
    with pytest.raises(ValueError, match="quantised or packed"):
        attach(packed, Times(0.5, LINEAR))
    peft = pytest.importorskip("peft")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["net.2"]))
    with pytest.raises(ValueError, match="carries an adapter"):
        attach(pipe, Times(0.5, LINEAR))


def test_a_weight_that_somebody_wrote_to_meanwhile_is_told(pipe):
    before = bits(pipe)
    with pytest.warns(UserWarning, match="was written to"), attach(pipe, Times(0.5, LINEAR)), torch.no_grad():
        weight(pipe).add_(1)
    assert same(pipe, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(pipe, Times(0.5, LINEAR)):
            pipe.to(torch.float16)
    wanted = before[LINEAR.partition(".")[2] + ".weight"].half()
    assert torch.equal(weight(pipe), wanted)


def test_a_component_that_did_not_run_is_an_error():
    family = families()["flux"]
    pipe = family.build()
    path = "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wo"
    given = pipe.encode_prompt("a fox", "a fox", max_sequence_length=16)
    call = {"prompt_embeds": given[0], "pooled_prompt_embeds": given[1]}
    with pytest.raises(HookpointNotReachedError, match="the weight of text_encoder_2"), attach(pipe, Times(0.5, path)):
        pipe(**call, num_inference_steps=1, height=32, width=32, output_type="latent")
