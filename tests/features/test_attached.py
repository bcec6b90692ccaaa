"""The SAE of an instrument: its place and its device."""

from __future__ import annotations

import pytest
import torch

import sparsefeat as sf
from sparsefeat.features.attached import beside, hookpoint_of, reconstructing
from sparsefeat.pipeline import Activations, Context, Hookpoint
from sparsefeat.sae import SAE, SAEConfig


class Elsewhere:
    """An SAE as far as its device is concerned."""

    training = False

    def __init__(self, device):
        self.device, self.moves, self.config = torch.device(device), [], SAEConfig(4, 8, k=2)

    def to(self, device):
        self.device = device
        self.moves.append(str(device))

    def named_parameters(self, recurse):
        return iter(())

    named_buffers = named_parameters


def test_an_sae_on_another_device_is_moved_once():
    activations, sae = Activations(torch.zeros(1, 2, 3)), Elsewhere("meta")
    for _ in range(3):
        assert beside(sae, activations, Context()) is sae
    assert sae.moves == ["cpu"]


def test_batch_topk_that_is_put_in_training_mode_is_refused_when_it_is_given_and_in_a_call():
    sae = SAE(SAEConfig(d_model=3, n_latents=8, k=2, activation="batch_topk", hookpoint="unet.mid_block"))
    with pytest.raises(ValueError, match=r"sae is in training mode, .*sae\.eval\(\) first"):
        sf.Record(sae)
    activations = Activations(torch.zeros(1, 2, 3))
    beside(sae.eval(), activations, Context())
    with pytest.raises(ValueError, match="sae is in training mode"):
        beside(sae.train(), activations, Context())


def test_the_hookpoint_is_the_one_named_or_the_saes():
    sae = SAE(SAEConfig(d_model=4, n_latents=8, k=2, hookpoint="unet.mid_block.attentions.0:diff"))
    assert hookpoint_of(sae, None) == Hookpoint("unet.mid_block.attentions.0", "diff")
    assert hookpoint_of(sae, "unet.mid_block") == Hookpoint("unet.mid_block")
    assert hookpoint_of(sae, Hookpoint("transformer.x", stream="text")).stream == "text"
    with pytest.raises(ValueError, match="at is missing, and the SAE does not know its hookpoint; name one"):
        hookpoint_of(SAE(SAEConfig(d_model=4, n_latents=8, k=2)), None)


def test_a_transcoder_is_refused_where_a_code_would_be_edited_in_place():
    transcoder = SAE(SAEConfig(4, 8, k=2, normalizer="none", transcoder=True, hookpoint="unet.mid_block:input")).eval()
    with pytest.raises(ValueError, match="steer with add= at the module's output"):
        sf.Splice(transcoder)
    with pytest.raises(ValueError, match="steer with add= at the module's output"):
        sf.Steer(transcoder, scale={3: 0.0}, at="unet.mid_block")
    inside = sf.Steer(transcoder, scale={3: 0.0})  # read at the input, written at the output
    assert [str(place) for place in inside.hookpoints()] == ["unet.mid_block:input", "unet.mid_block"]
    sf.Steer(transcoder, add={3: 1.0}, at="unet.mid_block")
    plain = SAE(SAEConfig(4, 8, k=2))
    assert reconstructing(plain) is plain


@pytest.mark.parametrize("make", [lambda sae: sf.Record(sae), lambda sae: sf.Steer(sae, add={1: 2.0})])
def test_the_name_of_an_sae_is_not_one(make):
    with pytest.raises(
        TypeError, match=r"sae is 'runs/mid', not an SAE; open it first, sparsefeat.load_sae\('runs/mid'\)"
    ):
        make("runs/mid")
