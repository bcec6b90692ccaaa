"""Instruments after a call: they keep no pipeline alive, and are copied and pickled like new ones."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch

import sparsefeat as sf
from sparsefeat.pipeline import Instrument
from sparsefeat.steering import Overwrite
from tests.families import families
from tests.tiny import pixels, tiny_sd

AT, LAYER = "unet.up_blocks.1.attentions.1", "text_encoder.encoder.layers.0"


def sae(at: str) -> sf.SAE:
    torch.manual_seed(1)
    return sf.SAE(sf.SAEConfig(d_model=32, n_latents=96, k=6, hookpoint=at)).requires_grad_(False).eval()


VECTOR = torch.linspace(-1, 1, 32)
MADE: dict[str, Callable[[], Instrument]] = {
    "Steer": lambda: sf.Steer(sae(AT), add={3: 2.0}, scale={5: 0.5}),
    "Overwrite": lambda: Overwrite(sae(AT), {3: 1.0}),
    "Splice": lambda: sf.Splice(sae(AT)),
    "AddVector": lambda: sf.AddVector(AT, VECTOR),
    "Together": lambda: sf.Together(sf.AddVector(AT, VECTOR), sf.Steer(sae(AT), add={3: 2.0})),
    "ScoreEdit": lambda: sf.ScoreEdit(sf.Slider("old", "young")),
    "TokenDirection": lambda: sf.TokenDirection(["fox"], VECTOR),
    "PromptVector": lambda: sf.PromptVector(sae(LAYER), "a cat", 1.0),
    "CrossTokenNMS": lambda: sf.CrossTokenNMS(["a", "fox"]),
    "CorrectionBySimilarities": lambda: sf.CorrectionBySimilarities(["a", "fox"]),
    "AttendAndExcite": lambda: sf.AttendAndExcite(["fox"]),
    "AStar": lambda: sf.AStar(["a", "fox"]),
    "HeatMaps": lambda: sf.HeatMaps(words=["fox"]),
    "SelfAttention": lambda: sf.SelfAttention(),
    "Record": lambda: sf.Record(sae(AT)),
    "CollectActivations": lambda: sf.CollectActivations(AT),
    "CollectExamples": lambda: sf.CollectExamples(sae(AT), sf.Examples(96)),
}


@pytest.mark.parametrize("name", MADE)
def test_a_used_instrument_keeps_no_pipeline_and_its_copies_do_as_it_did(name):
    pipe, made = tiny_sd(), MADE[name]()
    with sf.attach(pipe, made):
        image = pixels(pipe)
    gone = weakref.ref(pipe), weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert [one() for one in gone] == [None, None]
    pipe = tiny_sd()
    for again in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), made):
        with sf.attach(pipe, again):
            assert np.array_equal(pixels(pipe), image)


@pytest.mark.parametrize("name", MADE)
def test_an_instrument_works_where_the_pipeline_runs_in_autocast(name):
    pipe = tiny_sd()
    with sf.attach(pipe, MADE[name]()), torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.isfinite(pixels(pipe)).all()


def test_a_recordings_call_is_pickled_without_its_pipeline():
    pipe, maps = tiny_sd(), sf.HeatMaps()
    with sf.attach(pipe, maps) as run:
        pixels(pipe)
    call = pickle.loads(pickle.dumps(run.calls[0].call))
    assert (call.prompts, call.n_steps, call.pipe) == (["a fox"], 2, None)
    assert run.calls[0].call.pipe is pipe


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_maps_and_guidance_of_joint_attention_work_in_autocast_and_are_the_same_but_for_its_rounding(name):
    tiny = families()[name]
    pipe = tiny.build()
    maps = sf.HeatMaps(concepts=["fox", "snow"])

    def drawn() -> torch.Tensor:
        with sf.attach(pipe, maps) as run:
            tiny.call(pipe, ["a fox"], guidance=False)
        return run[maps].tensor()

    plain = drawn()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = drawn()
        with sf.attach(pipe, sf.AttendAndExcite(["fox"])):
            tiny.call(pipe, ["a fox"], guidance=False)
    assert not torch.equal(plain, rounded)
    torch.testing.assert_close(rounded, plain, atol=0.05, rtol=0.05)
