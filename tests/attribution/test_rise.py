"""DF-RISE against a loop of our own."""

from __future__ import annotations

import pytest
import torch

from sparsefeat.attribution import df_rise
from tests.families import families
from tests.tiny import tiny_sd

CALL = {"num_inference_steps": 2, "height": 48, "width": 32}


def test_the_map_is_the_mean_of_the_masks_by_how_much_they_keep():
    pipe = tiny_sd()
    found = df_rise(pipe, "a fox", n_masks=5, cells=3, steps=[0], seed=7, guidance_scale=1.0, **CALL)
    assert list(found) == [0]
    text = pipe.encode_prompt("a fox", "cpu", 1, False)[0].detach()
    pipe.scheduler.set_timesteps(2)
    t = pipe.scheduler.timesteps[0]
    x = torch.randn((1, 4, 12, 8), generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    total, weight = torch.zeros(12, 8), torch.zeros(12, 8)
    with torch.no_grad():
        plain = pipe.unet(x, t, text)[0].flatten()
        for _ in range(5):
            kept = (torch.rand(1, 1, 3, 3, generator=generator) < 0.5).float()
            mask = torch.nn.functional.interpolate(kept, (12, 8), mode="bilinear")[0, 0]
            noise = torch.randn(x.shape, generator=generator) * x.std()
            said = pipe.unet(mask * x + (1 - mask) * noise, t, text)[0].flatten()
            total += mask * (said @ plain) / (said.norm() * plain.norm())
            weight += mask
    wanted = torch.where(weight > 0, total / weight, 0)
    assert (found[0] - wanted).abs().max() <= 1e-4
    assert float(found[0].std()) > 0


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_other_families_have_maps_on_their_grid(name):
    call = {"max_sequence_length": 16} if name == "flux" else {}
    found = df_rise(families()[name].build(), "a fox", n_masks=3, **CALL, **call)
    assert list(found) == [0, 1]
    height, width = found[0].shape
    assert height * 2 == width * 3
    assert all(bool(one.isfinite().all()) and float(one.abs().max()) <= 1 + 1e-5 for one in found.values())


def test_wrong_inputs_are_refused_in_a_sentence():
    pipe = tiny_sd()
    with pytest.raises(ValueError, match="share=nan"):
        df_rise(pipe, "a fox", share=float("nan"))
    with pytest.raises(ValueError, match="none of the steps"):
        df_rise(pipe, "a fox", steps=[9], **CALL)
    with pytest.raises(ValueError, match="must be a prompt"):
        df_rise(pipe, "")
