"""ESD's loss and its first steps against a loop of our own, and what it learns."""

from __future__ import annotations

import copy

import pytest
import torch

from sparsefeat.erasure import ESD
from sparsefeat.erasure.esd import LowRank
from sparsefeat.pipeline import attach
from sparsefeat.steering import load_instrument
from tests.families import families
from tests.pipeline.state import everything
from tests.tiny import tiny_sd

CALL = {"num_inference_steps": 3, "height": 32, "width": 32, "guidance_scale": 3.0}
VALUE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.fixture
def pipe():
    return tiny_sd()


def test_the_training_is_the_published_loss_under_adam(pipe):
    eta, lr, rank = 1.5, 0.05, 2
    weight = pipe.unet.get_submodule(VALUE.partition(".")[2]).weight
    own = weight.detach().clone()
    state = everything(pipe)
    found = ESD.fit(pipe, "a fox", eta=eta, lr=lr, rank=rank, iterations=3, modules=[VALUE], seed=4, **CALL)
    assert everything(pipe) == state
    assert torch.equal(weight, own)
    assert all(p.grad is None for p in pipe.unet.parameters())

    down = torch.randn(rank, own.shape[1], generator=torch.Generator().manual_seed(4)) / own.shape[1] ** 0.5
    down, up = down.requires_grad_(), torch.zeros(own.shape[0], rank, requires_grad=True)
    adam = torch.optim.Adam([up, down], lr=lr)
    c, nothing = (pipe.encode_prompt(text, "cpu", 1, False)[0].detach() for text in ("a fox", ""))
    pipe.scheduler.set_timesteps(3)
    z = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(4)) * pipe.scheduler.init_noise_sigma
    losses = []
    for t in pipe.scheduler.timesteps:
        with torch.no_grad():
            of_c, of_nothing = (pipe.unet(z, t, text)[0] for text in (c, nothing))
        changed = {VALUE.partition(".")[2] + ".weight": own + up @ down}
        said = torch.func.functional_call(pipe.unet, changed, (z, t, c))[0]
        loss = ((said - (of_nothing - eta * (of_c - of_nothing))) ** 2).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
        # In the first picture the pipeline draws with changes of zero.
        z = pipe.scheduler.step(of_nothing + 3.0 * (of_c - of_nothing), t, z).prev_sample
    pipe.unet.zero_grad(set_to_none=True)
    assert found.losses == pytest.approx(losses, rel=1e-3)
    change = found.changes[VALUE]
    wanted = (up @ down).detach()
    assert (change.up @ change.down - wanted).abs().max() <= 1e-3 * wanted.abs().max()


def test_the_concept_comes_nearer_to_what_it_is_trained_towards_and_is_the_same_from_disk(pipe, tmp_path):
    esd = ESD.fit(pipe, "a fox", iterations=24, lr=0.02, **CALL)
    assert len(esd.losses) == 24
    assert all("attn2" in path for path in esd.changes)
    assert sum(esd.losses[-6:]) < 0.8 * sum(esd.losses[:6])
    esd.save(tmp_path / "esd")
    loaded = load_instrument(tmp_path / "esd")

    def draw(*instruments):
        call = {**CALL, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
        if not instruments:
            return pipe("a fox", **call).images
        with attach(pipe, *instruments):
            return pipe("a fox", **call).images

    plain, drawn = draw(), draw(esd)
    assert not torch.equal(plain, drawn)
    assert torch.equal(draw(loaded), drawn)
    assert torch.equal(draw(), plain)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_other_families_train(name):
    pipe = families()[name].build()
    call = {**CALL, "num_inference_steps": 2}
    if name == "flux":
        call |= {"true_cfg_scale": 3.0, "negative_prompt": "", "max_sequence_length": 16}
    esd = ESD.fit(pipe, "a fox", iterations=16, lr=0.01, **call)
    assert len(esd.losses) == 16
    root, heard = pipe.unet if name == "sdxl" else pipe.transformer, []
    handle = root.register_forward_hook(lambda *run: heard.append(run[1:]), with_kwargs=True)
    pipe("a fox", generator=torch.Generator().manual_seed(0), output_type="latent", **call)
    handle.remove()
    with attach(pipe, esd):
        changed = copy.deepcopy(root)

    def of_first_step(model):
        """(conditional, unconditional) at the first picture's noise."""
        with torch.no_grad():
            said = [model(*args, **kwargs)[0] for args, kwargs, _ in heard[: 2 if name == "flux" else 1]]
        return (said[0], said[1]) if name == "flux" else (said[0][1:], said[0][:1])

    concept, nothing = of_first_step(root)
    aim = 2 * nothing - concept
    assert (of_first_step(changed)[0] - aim).square().mean() < 0.8 * (concept - aim).square().mean()
    plain = families()[name].call(pipe, ["a fox"], guidance=False)
    with attach(pipe, esd):
        assert not torch.equal(families()[name].call(pipe, ["a fox"], guidance=False), plain)
    assert torch.equal(families()[name].call(pipe, ["a fox"], guidance=False), plain)


def test_wrong_inputs_are_refused_in_a_sentence(pipe):
    with pytest.raises(ValueError, match="without guidance"):
        ESD.fit(pipe, "a fox", **{**CALL, "guidance_scale": 1.0})
    with pytest.raises(ValueError, match="lr=0"):
        ESD.fit(pipe, "a fox", lr=0)
    with pytest.raises(ValueError, match="concept=''"):
        ESD.fit(pipe, "")
    with pytest.raises(ValueError, match="trained on another model"):
        attach(pipe, ESD({VALUE: LowRank(torch.ones(3, 1), torch.ones(1, 3))}))
    with pytest.raises(ValueError, match="up holds NaN"):
        ESD({VALUE: LowRank(torch.full((3, 1), float("nan")), torch.ones(1, 3))})
