"""Cones' passes against a loop of our own."""

from __future__ import annotations

import pytest
import torch

from sparsefeat.attribution import cones
from sparsefeat.pipeline import attach
from tests.families import families
from tests.tiny import tiny_sd

CALL = {"num_inference_steps": 3, "height": 32, "width": 32, "guidance_scale": 1.0}
KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.mark.parametrize("rho", [0.0, 50.0])
def test_the_neurons_are_those_of_the_published_passes(pipe, rho):
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(9))
    before = {n: p.detach().clone() for n, p in pipe.unet.named_parameters()}
    text = pipe.encode_prompt("a fox", "cpu", 1, False)[0].detach()
    weight = pipe.unet.get_submodule(KEY.partition(".")[2]).weight
    own, sums = weight.detach().clone(), torch.zeros_like(weight)
    pipe.scheduler.set_timesteps(3)
    noises = torch.Generator().manual_seed(6)
    for t in pipe.scheduler.timesteps:
        weight.grad = None
        for one in latents:
            noise = torch.randn((1, 4, 8, 8), generator=noises)
            share = pipe.scheduler.alphas_cumprod[t]
            z = share.sqrt() * one[None] + (1 - share).sqrt() * noise
            (((pipe.unet(z, t, text)[0] - noise) ** 2).mean() / 2).backward()
        with torch.no_grad():
            term = weight * weight.grad
            sums += term
            weight.mul_(1 - rho * term)
    moved = not torch.equal(weight, own)
    with torch.no_grad():
        weight.copy_(own)
    pipe.unet.zero_grad(set_to_none=True)
    assert moved == (rho > 0)
    threshold = float(sums.flatten().quantile(0.9))
    found = cones(pipe, "a fox", latents=latents, modules=[KEY], threshold=threshold, rho=rho, seed=6, **CALL)
    wanted = sums > threshold
    unsure = (sums - threshold).abs() <= 1e-3 * sums.abs().max()
    assert bool(((found.mask(KEY) == wanted) | unsure).all())
    assert int(wanted.sum()) > 10
    assert all(torch.equal(p, before[n]) for n, p in pipe.unet.named_parameters())


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_the_keys_and_values_of_the_text_are_found(name):
    pipe = families()[name].build()
    call = {**CALL, "num_inference_steps": 1}
    call |= {"max_sequence_length": 16, "guidance_scale": 3.5} if name == "flux" else {}
    mask = cones(pipe, "a fox", prior="a dog", images=1, threshold=0.0, **call)
    part = {"sdxl": "attn2.to_", "sd3": ".add_", "flux": ".add_"}[name]
    assert all(part in path for path in mask.shapes)
    plain = families()[name].call(pipe, ["a fox"], guidance=False)
    with attach(pipe, mask):
        assert not torch.equal(families()[name].call(pipe, ["a fox"], guidance=False), plain)


def test_masks_of_several_concepts_unite_and_wrong_inputs_are_refused(pipe):
    one, other = (cones(pipe, text, images=1, threshold=0.0, modules=[KEY], **CALL) for text in ("a fox", "a dog"))
    both = one.union(other)
    assert both.n_zeroed >= max(one.n_zeroed, other.n_zeroed)
    with pytest.raises(ValueError, match="of which the highest is"):
        cones(pipe, "a fox", images=1, threshold=1e9, modules=[KEY], **CALL)
    with pytest.raises(ValueError, match="rho=nan"):
        cones(pipe, "a fox", rho=float("nan"), **CALL)
    with pytest.raises(ValueError, match="must be a prompt"):
        cones(pipe, " ", **CALL)
