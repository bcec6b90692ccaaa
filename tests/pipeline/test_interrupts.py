"""Interrupts (Ctrl-C) at any line of `attach`, of a call and of `close`: a second `close()` takes off what is left.

INTERRUPTS=1000 pytest tests/pipeline/test_interrupts.py
"""

from __future__ import annotations

import os
import random
import sys

import pytest
import torch
from diffusers import DDIMScheduler

from sparsefeat import SAE, Record, SAEConfig, Steer
from sparsefeat.pipeline import attach
from sparsefeat.pipeline.knowing import watching
from sparsefeat.pipeline.running import calls_here
from tests.pipeline.instruments import WatchAttention
from tests.pipeline.state import everything
from tests.tiny import pixels, tiny_sd

N = int(os.environ.get("INTERRUPTS", "40"))
BLOCK = "unet.mid_block.attentions.0"


class Interrupted:
    """Raises KeyboardInterrupt at the `at`-th executed line of the package's pipeline, and counts the lines."""

    def __init__(self, at=None):
        self.at, self.lines = at, 0

    def __call__(self, frame, event, argument):
        if "/sparsefeat/pipeline/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_sd()
    pixels(pipe, steps=1)
    return pipe


def session_of(pipe, trace, parts, closes="close"):
    """Attach, call and close, or leave a `with`, under a trace; the session, if there came to be one."""
    session = None
    sys.settrace(trace)
    try:
        if closes == "with":
            with attach(pipe, *parts) as session:
                pixels(pipe, steps=1, output_type="latent")
        else:
            session = attach(pipe, *parts)
            pixels(pipe, steps=1, output_type="latent")
            session.close()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return session


@pytest.mark.parametrize("closes", ["close", "with"])
def test_what_an_interrupt_leaves_a_second_close_takes_off(pipe, closes):
    torch.manual_seed(0)
    sae = SAE(SAEConfig(d_model=32, n_latents=24, k=4, hookpoint=BLOCK)).eval()
    before, latents = everything(pipe), pixels(pipe, steps=1, output_type="latent")
    step, timesteps = DDIMScheduler.step, DDIMScheduler.set_timesteps

    def parts():
        tap = WatchAttention(f"{BLOCK}.transformer_blocks.0.attn2")
        return Steer(sae, add={3: 1.0}), Record(sae), tap

    counted = Interrupted()
    session_of(pipe, counted, parts(), closes)
    assert counted.lines > 1000
    for at in random.Random(5).choices(range(1, counted.lines + 1), k=N):
        session = session_of(pipe, Interrupted(at), parts(), closes)
        if session is not None:
            session.close()
        left = everything(pipe) != before or (DDIMScheduler.step, DDIMScheduler.set_timesteps) != (step, timesteps)
        if left or calls_here() or watching._listeners or watching._replaced:
            pytest.fail(f"interrupted at line {at} of {counted.lines}: something is left")
    assert torch.overrides._get_current_function_mode() is None
    assert (pixels(pipe, steps=1, output_type="latent") == latents).all()


def test_a_session_beside_the_interrupted_one_goes_on(pipe):
    torch.manual_seed(0)
    sae = SAE(SAEConfig(d_model=32, n_latents=24, k=4, hookpoint=BLOCK)).eval()
    with attach(pipe, rec := Record(sae)) as outer:
        counted = Interrupted()
        session_of(pipe, counted, (Steer(sae, add={3: 1.0}),))
        for at in random.Random(6).choices(range(1, counted.lines + 1), k=max(N // 4, 8)):
            session = session_of(pipe, Interrupted(at), (Steer(sae, add={3: 1.0}),))
            if session is not None:
                session.close()
            pixels(pipe, steps=1, output_type="latent")
            assert outer[rec].steps == (0,)
