"""An instrument that has enough of a call: what it leaves behind, and what others hear."""

from __future__ import annotations

import pytest
import torch

from sparsefeat.erasure import UCE
from sparsefeat.pipeline import Enough, Instrument, attach
from tests.tiny import tiny_sd, tiny_sdxl

AT = "unet.up_blocks.1.attentions.1"
CALL = {"num_inference_steps": 4, "output_type": "latent"}


class Until(Instrument):
    """Hears the denoiser, has enough at its run number `last`, and counts what it is told."""

    def __init__(self, last: int):
        self.last, self.heard, self.ended = last, 0, 0

    def components(self, pipe):
        return ("unet",)

    def at_component(self, name, arguments, context):
        self.heard += 1
        if self.heard == self.last:
            raise Enough

    def end_call(self, call):
        self.ended += 1
        return self.heard


class Adds(Instrument):
    """One edit, to see whether it still acts."""

    def hookpoints(self):
        return (AT,)

    def at_hookpoint(self, activations, context):
        self.ran = True


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
@pytest.mark.parametrize("last", [1, 3])
def test_the_call_ends_there_as_one_that_is_complete(build, last):
    pipe = build()
    ran = []
    handle = pipe.unet.register_forward_hook(lambda *given: ran.append(1))
    until = Until(last)
    with attach(pipe, until) as run:
        assert pipe("a fox", **CALL) is None
    handle.remove()
    assert len(ran) == last - 1
    assert until.ended == 1
    assert run[until] == last


def test_what_was_not_reached_is_no_error_and_the_next_call_is_whole():
    pipe = tiny_sd()
    adds, until = Adds(), Until(1)
    with attach(pipe, adds):
        with attach(pipe, until):
            assert pipe("a fox", **CALL) is None
        assert not hasattr(adds, "ran")
        assert pipe("a fox", **CALL).images is not None
        assert adds.ran


def test_models_that_are_offloaded_are_told_that_the_call_is_over(monkeypatch):
    pipe, freed = tiny_sd(), []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(1))
    with attach(pipe, Until(2)):
        pipe("a fox", **CALL)
    assert freed == [1]


def test_changed_weights_are_as_they_were_afterwards():
    pipe = tiny_sd()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    uce, seen = UCE.fit(pipe, "fox", guide="dog"), []

    class Compare(Until):
        def at_component(self, name, arguments, context):
            seen.append(any((value != before[name]).any() for name, value in pipe.unet.state_dict().items()))
            super().at_component(name, arguments, context)

    with attach(pipe, uce, Compare(2)):
        pipe("a fox", **CALL)
    assert seen == [True, True]
    after = pipe.unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
