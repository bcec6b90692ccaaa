"""Vectors, principal directions and discovered ones beside plain hooks and numpy."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import sparsefeat as sf
from tests.families import families
from tests.tiny import pixels, tiny_sd, tiny_sdxl

PROMPTS = ["a fox", "a cat", "a dog", "an owl", "two cats", "a red fox"]
MID = "unet.mid_block"


def conditional(pipe, path, prompts, steps):
    """[prompts, steps, d, h, w], by a plain hook."""
    found = []
    for i, prompt in enumerate(prompts):
        seen = []
        keep = lambda m, a, out, seen=seen: seen.append(out[1].detach().clone())  # noqa: E731
        hook = pipe.unet.get_submodule(path.partition(".")[2]).register_forward_hook(keep)
        pipe(prompt, num_inference_steps=steps, output_type="latent", generator=torch.Generator().manual_seed(i))
        hook.remove()
        found.append(torch.stack(seen))
    return torch.stack(found).double().numpy()


@pytest.mark.parametrize("whole", [False, True])
def test_principal_directions_are_those_of_numpy_by_part_of_the_schedule(whole):
    pipe = tiny_sd()
    found = sf.PrincipalDirections.fit(pipe, MID, PROMPTS, n=3, bins=2, whole=whole, batch=4, num_inference_steps=2)
    maps = conditional(pipe, MID, PROMPTS, 2)
    for part in range(2):
        y = maps[:, part]
        data = y.reshape(len(y), -1) if whole else np.moveaxis(y, 1, -1).reshape(-1, y.shape[1])
        centred = data - data.mean(0)
        _, values, right = np.linalg.svd(centred, full_matrices=False)
        std = values / math.sqrt(len(data) - 1)
        np.testing.assert_allclose(found.std[part], std[:3], rtol=1e-3)
        np.testing.assert_allclose(found.explained[part], values[:3] ** 2 / (values**2).sum(), rtol=1e-3)
        overlap = (found.components[part].flatten(1).double().numpy() * right[:3]).sum(1)
        np.testing.assert_allclose(np.abs(overlap), 1, atol=1e-3)
    largest = found.components.flatten(2).gather(2, found.components.flatten(2).abs().argmax(2, keepdim=True))
    assert (largest > 0).all()


def test_a_move_along_directions_is_what_a_plain_hook_adds(tmp_path):
    pipe = tiny_sd()
    found = sf.PrincipalDirections.fit(pipe, MID, PROMPTS, n=3, num_inference_steps=2)
    found.save(tmp_path / "directions")
    again = sf.PrincipalDirections.load(tmp_path / "directions")
    assert torch.equal(again.components, found.components)
    added = 2.0 * found.std[0, 0] * found.components[0, 0] - 1.5 * found.std[0, 2] * found.components[0, 2]

    def add(module, args, out):
        return out + torch.tensor([0.0, 1.0])[:, None, None, None] * added[:, None, None]  # the conditional half

    hook = pipe.unet.mid_block.register_forward_hook(add)
    expected = pixels(pipe)
    hook.remove()
    steer = again.steer({0: 2.0, 2: -1.5})
    steer.save(tmp_path / "steer")
    for one in (steer, sf.load_instrument(tmp_path / "steer")):
        with sf.attach(pipe, one):
            np.testing.assert_allclose(pixels(pipe), expected, atol=1e-4)
    before = pixels(pipe)
    assert np.abs(expected - before).max() > 1e-3
    with sf.attach(pipe, again.steer({0: 0.0})):
        assert (pixels(pipe) == before).all()


def test_parts_of_the_schedule_and_places_of_the_image_get_their_own_vector():
    pipe = tiny_sd()
    vectors = torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(1))
    seen = []

    class Watch(sf.Instrument):
        def hookpoints(self):
            return (sf.Hookpoint(MID),)

        def at_hookpoint(self, activations, context):
            seen.append(activations.tensor.clone())

    plain, moved = [], []
    for instruments, kept in (([], plain), ([sf.AddVector(MID, vectors, 0.5, condition="both")], moved)):
        seen.clear()
        with sf.attach(pipe, *instruments, Watch()):
            pixels(pipe)
        kept += seen
    torch.testing.assert_close(moved[0] - plain[0], 0.5 * vectors[:1].expand(2, -1, -1, -1), rtol=1e-3, atol=1e-5)
    with sf.attach(pipe, sf.AddVector(MID, vectors[1], 0.5, condition="both", steps=[1]), watch := Watch()):
        seen.clear()
        pixels(pipe)
    assert torch.equal(seen[0], plain[0])
    torch.testing.assert_close(seen[1] - plain[1], 0.5 * vectors[1:].expand(2, -1, -1, -1), rtol=1e-3, atol=1e-5)
    assert isinstance(watch, Watch)


def loss_by_hand(pipe, text, clean, noise, t, c):
    """The noise-prediction loss with c added by a plain hook."""
    alpha = pipe.scheduler.alphas_cumprod[t]
    noised = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    hook = pipe.unet.mid_block.register_forward_hook(lambda m, a, out: out + c)
    said = pipe.unet(noised, t, text.expand(len(clean), -1, -1)).sample
    hook.remove()
    return (said - noise).square().mean()


def test_a_discovered_direction_begins_down_the_gradient_and_lowers_the_loss():
    pipe = tiny_sd()
    prompts = ["a red fox", "a red cat", "a red dog"]
    call = {"num_inference_steps": 1}
    one = sf.discover_direction(pipe, MID, prompts, "a fox", epochs=1, batch=3, lr=0.01, **call)
    clean = torch.cat(
        [
            pipe(p, output_type="latent", generator=torch.Generator().manual_seed(i), **call).images
            for i, p in enumerate(prompts)
        ]
    )
    text = pipe.encode_prompt("a fox", "cpu", 1, False)[0]
    t = int(pipe.scheduler.timesteps[0])
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(3, generator=generator)
    torch.randint(1, (), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    c = torch.zeros(32, 4, 4, requires_grad=True)
    loss = loss_by_hand(pipe, text, clean[order], noise, t, c)
    (gradient,) = torch.autograd.grad(loss, c)
    told = gradient.abs() > 1e-3 * gradient.abs().max()
    torch.testing.assert_close(one.vectors[0][told], -0.01 * gradient.sign()[told], rtol=1e-2, atol=1e-5)
    more = sf.discover_direction(pipe, MID, prompts, "a fox", epochs=15, batch=3, lr=0.05, **call)
    fresh = torch.randn(16, *clean.shape, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        losses = [sum(loss_by_hand(pipe, text, clean, n, t, v) for n in fresh) for v in (0.0, more.vectors[0])]
    assert losses[1] < losses[0]


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_directions_of_other_families(family):
    tiny = families()[family]
    pipe = tiny.build() if family != "sdxl" else tiny_sdxl()
    at = MID if family == "sdxl" else "transformer.transformer_blocks.0"
    call = {"num_inference_steps": 2, "height": 64 if family == "sdxl" else 32, "width": 64 if family == "sdxl" else 32}
    found = sf.PrincipalDirections.fit(pipe, at, PROMPTS[:3], n=2, **call)
    learned = sf.discover_direction(pipe, at, ["a red fox"], "a fox", epochs=2, **call)
    assert learned.vectors.abs().max() > 0
    run = {**call, "output_type": "latent"}
    latents = pipe("a fox", generator=torch.Generator().manual_seed(0), **run).images
    for instrument in (found.steer({0: 3.0}), learned):
        with sf.attach(pipe, instrument):
            moved = pipe("a fox", generator=torch.Generator().manual_seed(0), **run).images
        assert (moved - latents).abs().max() > 1e-6


def test_what_is_wrong_is_said_in_a_sentence():
    pipe = tiny_sd()
    with pytest.raises(ValueError, match="vector has shape"):
        sf.AddVector(MID, torch.zeros(()))
    with pytest.raises(ValueError, match="vector holds NaN"):
        sf.AddVector(MID, torch.full((32,), torch.nan))
    with pytest.raises(ValueError, match="needs activations of width 7"):
        sf.attach(pipe, sf.AddVector(MID, torch.zeros(7)))
    with pytest.raises(ValueError, match="fewer than n=40 directions"):
        sf.PrincipalDirections.fit(pipe, MID, PROMPTS[:2], n=40, num_inference_steps=1)
    found = sf.PrincipalDirections.fit(pipe, MID, PROMPTS[:2], n=3, num_inference_steps=1)
    with pytest.raises(ValueError, match="a component=3"):
        found.steer({3: 1.0})
    with pytest.raises(ValueError, match="lr="):
        sf.discover_direction(pipe, MID, ["a fox"], "a fox", lr=0.0)


def test_directions_that_do_not_fit_each_other_are_refused():
    at, mean, std = sf.Hookpoint("unet.mid_block"), torch.zeros(1, 8), torch.ones(1, 2)
    fitting = sf.PrincipalDirections(at, mean, torch.zeros(1, 2, 8), std, std)
    with pytest.raises(ValueError, match=r"do not fit each other: mean \[1, 8\], components \[1, 1, 8\], std \[1, 2\]"):
        dataclasses.replace(fitting, components=torch.zeros(1, 1, 8))
    with pytest.raises(ValueError, match="mean holds NaN"):
        dataclasses.replace(fitting, mean=mean * torch.nan)
