"""What is set on an instrument after it was made is refused, never ignored."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle

import pytest
import torch

import sparsefeat as sf
from sparsefeat.pipeline import FrozenInstrument, Instrument
from tests.pipeline.instruments import Watch
from tests.tiny import pixels, tiny_sd

BLOCK = "unet.mid_block.attentions.0"


def public_instruments() -> list[type[Instrument]]:
    """Every instrument that the toolkit, or one of the packages its names come from, offers by name."""
    offered = [getattr(sf, name) for name in sf.__all__ if name != "presets"]
    homes = {".".join(one.__module__.split(".")[:2]) for one in offered if hasattr(one, "__module__")}
    packages = [importlib.import_module(home) for home in homes]
    offered += [getattr(package, name) for package in packages for name in getattr(package, "__all__", ())]
    found = {one for one in offered if inspect.isclass(one) and issubclass(one, Instrument)}
    return sorted(found - {Instrument, FrozenInstrument}, key=lambda cls: cls.__name__)


def test_the_list_has_those_of_every_package():
    assert len(public_instruments()) > 25
    assert {sf.Steer, sf.HeatMaps, sf.Erase, sf.Record, sf.WeightMask, sf.Splice} <= set(public_instruments())


@pytest.mark.parametrize("cls", public_instruments(), ids=lambda cls: cls.__name__)
def test_every_public_instrument_refuses_what_is_set_after_it_was_made(cls):
    class Made(cls):  # its own constructor wants an SAE, or a fit
        def __init__(self):
            self.extra = 1
            self._state = 0

    made, settings = Made(), list(inspect.signature(cls).parameters)
    assert made.extra == 1
    made._state = 2  # what is its own changes from call to call
    for name in [*settings, "extra", "strenght"]:
        with pytest.raises(AttributeError, match=rf"^Made\.{name} is .*; make a new one .* changes _{name}$"):
            setattr(made, name, 3)
    assert "strenght" not in vars(made)


def steer() -> sf.Steer:
    torch.manual_seed(0)
    sae = sf.SAE(sf.SAEConfig(d_model=32, n_latents=8, k=2, hookpoint=BLOCK))
    return sf.Steer(sae, add={1: 2.0}, steps=(0.0, 0.5))


@pytest.mark.parametrize(
    "again", [lambda one: one, copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one)), "load"]
)
def test_a_constructor_freezes_and_so_do_a_copy_and_a_saved_one(again, tmp_path):
    made = steer()
    if again == "load":
        made.save(tmp_path / "steer")
        made = sf.load_instrument(tmp_path / "steer")
    else:
        made = again(made)
    with pytest.raises(AttributeError, match=r"Steer\.steps is settled when it is made; make a new one with .* steps"):
        made.steps = range(5)
    with pytest.raises(AttributeError, match=r"Steer\.strenght is no setting of it; make a new one with .* scale"):
        made.strenght = 3
    assert made.add == {1: 2.0}


def test_one_that_is_refused_a_new_setting_goes_on_with_what_it_had():
    pipe, made = tiny_sd(), steer()
    with sf.attach(pipe, made):
        before = pixels(pipe)
        with pytest.raises(AttributeError):
            made.condition = "both"
        assert (pixels(pipe) == before).all()


def test_ones_own_instruments_and_subclasses_may_set_what_they_like_in_their_constructors():
    class Mine(sf.Steer):
        def __init__(self, sae):
            super().__init__(sae, add={1: 2.0})
            self.mine = 1

    assert Mine(steer().sae).mine == 1
    watch = Watch(BLOCK)
    watch.anything = 3
    assert watch.anything == 3


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (sf.Statistics(["fox", "owl"], 8), "concepts"),
        (sf.Examples(8), "top"),
        (sf.Examples(8), "n_drawn"),
        (sf.WordCorrelations(8, ["fox"]), "words"),
    ],
)
def test_what_is_collected_into_keeps_what_it_was_made_with(made, name):
    before = getattr(made, name)
    with pytest.raises(
        AttributeError, match=rf"{type(made).__name__}\.{name} is settled when it is made; make a new one"
    ):
        setattr(made, name, 3)
    assert getattr(made, name) == before
