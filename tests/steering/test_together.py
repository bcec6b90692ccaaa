"""Several instruments as one: attached, saved, read back."""

from __future__ import annotations

import shutil

import pytest
import torch

from sparsefeat.features import Record
from sparsefeat.pipeline import Instrument, attach
from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.steering import Steer, Together, load_instrument
from tests.tiny import pixels, tiny_sd

UP, MID = "unet.up_blocks.1.attentions.1", "unet.mid_block.attentions.0"


def make_sae(at: str, seed: int) -> SAE:
    torch.manual_seed(seed)
    return SAE(SAEConfig(d_model=32, n_latents=48, k=5, hookpoint=at)).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.fixture
def steers():
    one, other = make_sae(UP, 1), make_sae(MID, 2)
    return Steer(one, add={3: 20.0}), Steer(other, add={4: 9.0}, steps=[0]), Steer(one, scale={5: -3.0})


def test_together_is_the_instruments_in_their_order(pipe, steers):
    with attach(pipe, *steers):
        expected = pixels(pipe)
    nested = Together(Together(*steers[:2]), steers[2])
    with attach(pipe, nested):
        assert (pixels(pipe) == expected).all()
    record = Record(steers[0].sae)
    with attach(pipe, Together(record, steers[0])) as run:
        pixels(pipe)
    assert run[record].top(1)


def test_it_is_saved_with_every_sae_once_and_reads_back_to_the_bit(pipe, steers, tmp_path):
    with attach(pipe, *steers):
        expected = pixels(pipe)
    Together(*steers).save(tmp_path / "edit")
    assert len(list((tmp_path / "edit").rglob("sae.safetensors"))) == 2
    read = load_instrument(tmp_path / "edit")
    assert isinstance(read, Together)
    assert read.instruments[0].sae is read.instruments[2].sae
    with attach(pipe, read):
        assert (pixels(pipe) == expected).all()
    with pytest.raises(FileExistsError, match="exists already"):
        Together(*steers).save(tmp_path / "edit")
    Together(steers[0]).save(tmp_path / "edit", overwrite=True)
    assert len(load_instrument(tmp_path / "edit").instruments) == 1


@pytest.mark.parametrize("gone", ["part-1", "sae-0"])
def test_a_damaged_folder_is_refused(steers, tmp_path, gone):
    Together(*steers).save(tmp_path / "edit")
    shutil.rmtree(tmp_path / "edit" / gone)
    with pytest.raises((ValueError, FileNotFoundError), match=gone):
        load_instrument(tmp_path / "edit")


def test_what_cannot_be_together_is_refused(pipe, steers, tmp_path):
    for wrong in ((), (steers[0], "a steer")):
        with pytest.raises(ValueError, match="Together takes one or more instruments"):
            Together(*wrong)
    with pytest.raises(ValueError, match="given twice"):
        attach(pipe, steers[0], Together(steers[1], steers[0]))
    with pytest.raises(ValueError, match="Instrument cannot be saved"):
        Together(steers[0], Instrument()).save(tmp_path / "new")
    with pytest.raises(ValueError, match="include_sae=False"):
        Together(steers[0]).save(tmp_path / "new", include_sae=False)
    assert not (tmp_path / "new").exists()
