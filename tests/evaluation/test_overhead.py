from __future__ import annotations

import time

import pytest

from sparsefeat.evaluation.overhead import measure_overhead
from sparsefeat.pipeline import Hookpoint, Instrument
from tests.tiny import tiny_sd

PATH = "unet.mid_block.attentions.0"


class Slow(Instrument):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def hookpoints(self):
        return (Hookpoint.parse(PATH),)

    def at_hookpoint(self, activations, context):
        time.sleep(self.seconds)


def test_the_time_an_instrument_takes_is_counted_in_the_step_it_takes_it():
    pipe = tiny_sd()
    measured = measure_overhead(pipe, PATH, Slow(0.05), lambda: pipe("a fox", num_inference_steps=5))
    assert len(measured.hook_s) == len(measured.step_s) == 3
    assert all(0.05 <= hook < step for hook, step in zip(measured.hook_s, measured.step_s, strict=True))
    assert 0 < measured.share_of_step < 1
    assert not pipe.unet._forward_pre_hooks
    assert not pipe.unet.mid_block.attentions[0]._forward_hooks


def test_a_run_too_short_to_measure_is_refused():
    pipe = tiny_sd()
    with pytest.raises(ValueError, match="more steps"):
        measure_overhead(pipe, PATH, Slow(0.0), lambda: pipe("a fox", num_inference_steps=2))
