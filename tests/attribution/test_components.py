"""CAD against loops of our own over the tiny models: the scores by backward through the whole model, and by finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsefeat as sf
from sparsefeat.attribution import WeightMask, attribute_weights, cad_amplify, cad_erase, chosen_weights
from sparsefeat.attribution.gradients import weight_paths
from sparsefeat.pipeline import attach
from sparsefeat.steering import load_instrument
from tests.families import families
from tests.pipeline.state import everything
from tests.tiny import pixels, tiny_sd

CALL = {"num_inference_steps": 3, "height": 48, "width": 48, "guidance_scale": 3.0}
FF = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2"
STEPS = 2


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


def embedded(pipe, prompt):
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0].detach()


def plain_erase(pipe, prompt, seed):
    """J and its gradient by one loop over DDIM, written without the library."""
    scheduler, unet = pipe.scheduler, pipe.unet
    scheduler.set_timesteps(3)
    z = torch.randn((1, 4, 12, 12), generator=torch.Generator().manual_seed(seed)) * scheduler.init_noise_sigma
    c, nothing = embedded(pipe, prompt), embedded(pipe, "")
    total = 0.0
    unet.zero_grad()
    for t in scheduler.timesteps:
        of_c = unet(z, t, c)[0]
        with torch.no_grad():
            of_nothing = unet(z, t, nothing)[0]
        loss = ((of_c - of_nothing) ** 2).sum()
        loss.backward()
        total += loss.item()
        with torch.no_grad():
            z = scheduler.step(of_nothing + 3.0 * (of_c.detach() - of_nothing), t, z).prev_sample
    gradients = {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}
    unet.zero_grad(set_to_none=True)
    return total, gradients


def test_the_scores_of_erasing_are_those_of_a_loop_of_our_own(pipe):
    wanted, gradients = plain_erase(pipe, "a fox", 4)
    flags = {name: p.requires_grad for name, p in pipe.unet.named_parameters()}
    state = everything(pipe)
    found = attribute_weights(pipe, "a fox", seed=4, **CALL)
    assert everything(pipe) == state
    assert {name: p.requires_grad for name, p in pipe.unet.named_parameters()} == flags
    assert all(p.grad is None for p in pipe.unet.parameters())
    assert len(found.losses) == 3
    assert sum(found.losses) == pytest.approx(wanted, rel=1e-4)
    names = [n for n, m in pipe.unet.named_modules() if "ff" in n and isinstance(m, nn.Linear)]
    assert sorted(found.scores) == sorted(f"unet.{name}" for name in names)
    for name in names:
        w = pipe.unet.get_submodule(name).weight.detach()
        alpha = w * gradients[f"{name}.weight"]
        error = (found.scores[f"unet.{name}"] - alpha).abs().max()
        assert error <= 1e-4 * alpha.abs().max(), name


def test_the_scores_of_amplifying_are_those_of_the_denoisers_loss(pipe):
    generator = torch.Generator().manual_seed(9)
    latents = torch.randn((2, 4, 12, 12), generator=generator)
    found = attribute_weights(
        pipe, ["a fox b", "a fox c"], objective="amplify", concept="fox", latents=latents, seed=6, modules=[FF], **CALL
    )
    pipe.scheduler.set_timesteps(3)
    noises = torch.Generator().manual_seed(6)
    c, total = embedded(pipe, "fox"), 0.0
    for t in pipe.scheduler.timesteps:
        for one in latents:
            noise = torch.randn((1, 4, 12, 12), generator=noises)
            share = pipe.scheduler.alphas_cumprod[t]
            z = share.sqrt() * one[None] + (1 - share).sqrt() * noise
            loss = ((pipe.unet(z, t, c)[0] - noise) ** 2).mean()
            loss.backward()
            total += loss.item()
    module = pipe.unet.get_submodule(FF.partition(".")[2])
    alpha = module.weight.detach() * module.weight.grad
    pipe.unet.zero_grad(set_to_none=True)
    assert sum(found.losses) == pytest.approx(total, rel=1e-4)
    assert (found.scores[FF] - alpha).abs().max() <= 1e-4 * alpha.abs().max()


@pytest.mark.parametrize(("name", "kind"), [("sd3", "ff"), ("flux", "ff"), ("sdxl", "attn2.to_v")])
def test_a_score_is_the_slope_of_the_loss_as_the_weight_goes(name, kind):
    """In fp64: (J(w (1 - s)) - J(w (1 + s))) / 2s = -alpha, with J along the trajectory of the untouched model."""
    family = families()[name]
    pipe = family.build()
    pipe.to(torch.float64)
    root = pipe.unet if name == "sdxl" else pipe.transformer
    heard = []

    def hear(module, args, kwargs, output):
        heard.append((args, kwargs, output[0].detach()))

    guidance = {"guidance_scale": 3.0, "num_inference_steps": STEPS, "height": 32, "width": 32}
    if name == "flux":
        guidance |= {"true_cfg_scale": 3.0, "negative_prompt": "", "max_sequence_length": 16}
    found = attribute_weights(pipe, "a fox", seed=2, modules=kind, **guidance)
    handle = root.register_forward_hook(hear, with_kwargs=True)
    pipe("a fox", generator=torch.Generator().manual_seed(2), output_type="latent", **guidance)
    handle.remove()

    def J():
        total = 0.0
        outputs = [root(*args, **kwargs)[0] for args, kwargs, _ in heard]
        if name == "flux":  # the prompt's pass, then the unconditional one
            for i in range(0, len(outputs), 2):
                total += ((outputs[i] - heard[i + 1][2]) ** 2).sum()
        else:
            for output, (_, _, before) in zip(outputs, heard, strict=True):
                total += ((output[1] - before[0]) ** 2).sum()
        return float(total)

    path = max(found.scores, key=lambda p: found.scores[p].abs().max())
    weight = root.get_submodule(path.partition(".")[2]).weight
    for index in found.scores[path].abs().flatten().topk(2).indices.tolist():
        own, s, ends = weight.data.view(-1)[index].item(), 1e-4, []
        for sign in (-1, 1):
            weight.data.view(-1)[index] = own * (1 + sign * s)
            with torch.no_grad():
                ends.append(J())
        weight.data.view(-1)[index] = own
        slope = (ends[1] - ends[0]) / (2 * s)
        assert float(found.scores[path].view(-1)[index]) == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("rule", ["positive", "negative", "both"])
@pytest.mark.parametrize(("ratio", "columns"), [(0.001, 999), (0.001, 2560), (0.29, 100), (0.3, 7)])
def test_the_rule_is_the_published_one_row_by_row(rule, ratio, columns):
    scores = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    found = chosen_weights(scores, ratio, rule)
    for row, chosen in zip(scores.tolist(), found.tolist(), strict=True):
        order = sorted(range(columns), key=lambda i: -row[i])
        n = int(ratio * columns)
        gone = set()
        if rule != "negative":
            gone |= {i for i in order[:n] if row[i] > 0}
        if rule != "positive":
            gone |= {i for i in order[columns - n :] if row[i] < 0}
        assert {i for i, c in enumerate(chosen) if c} == gone
    whole = chosen_weights(scores.reshape(5, columns, 1, 1), ratio, rule, per_row=False)
    assert whole.shape == (5, columns, 1, 1)
    assert int(whole.sum()) == int(ratio * 5 * columns) * (2 if rule == "both" else 1)


def test_erasing_lowers_the_distance_from_nothing_and_is_the_same_from_disk(pipe, tmp_path):
    erase = cad_erase(pipe, "a fox", ratio=0.02, seed=1, **CALL)
    before = attribute_weights(pipe, "a fox", seed=1, modules=[FF], **CALL).losses
    with attach(pipe, erase):
        # The first step's latents are the same noise: its loss is comparable.
        after = attribute_weights(pipe, "a fox", seed=1, modules=[FF], **CALL).losses
        drawn = pixels(pipe, steps=STEPS, output_type="latent")
    assert after[0] < before[0]
    erase.save(tmp_path / "mask")
    loaded = load_instrument(tmp_path / "mask")
    assert isinstance(loaded, WeightMask)
    assert repr(loaded) == repr(erase)
    with attach(pipe, loaded):
        assert torch.equal(pixels(pipe, steps=STEPS, output_type="latent"), drawn)
    plain = pixels(pipe, steps=STEPS, output_type="latent")
    assert not torch.equal(plain, drawn)
    with pytest.raises(ValueError, match="leave sae= out"):
        load_instrument(tmp_path / "mask", sae=sf.SAE(sf.SAEConfig(d_model=4, n_latents=8, k=2)))


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_amplifying_takes_what_raises_the_models_loss_without_the_concepts_word(name):
    pipe = tiny_sd() if name == "sd" else families()[name].build()
    call = {**CALL, "height": 32, "width": 32}
    mask = cad_amplify(pipe, "a fox", ratio=0.05, seed=1, **call)
    assert mask.n_zeroed > 0
    scores = attribute_weights(pipe, "a fox", objective="amplify", concept="", seed=1, **call)
    named = attribute_weights(pipe, "a fox", objective="amplify", concept="a fox", seed=1, **call)
    assert scores.losses != named.losses
    for path in mask.shapes:
        assert (scores.scores[path][mask.mask(path)] > 0).all()


def test_masks_unite_and_compose(pipe):
    shape = tuple(pipe.unet.get_submodule(FF.partition(".")[2]).weight.shape)
    generator = torch.Generator().manual_seed(3)
    one, other = (torch.rand(shape, generator=generator) < 0.3 for _ in range(2))
    first, second = WeightMask({FF: one}, "a"), WeightMask({FF: other}, "b")
    both = first.union(second)
    assert torch.equal(both.mask(FF), one | other)
    with attach(pipe, first, second):
        side_by_side = pixels(pipe, steps=STEPS, output_type="latent")
    with attach(pipe, both):
        assert torch.equal(pixels(pipe, steps=STEPS, output_type="latent"), side_by_side)


def test_wrong_inputs_are_refused_in_a_sentence(pipe):
    with pytest.raises(ValueError, match="without guidance"):
        attribute_weights(pipe, "a fox", modules=[FF], **{**CALL, "guidance_scale": 1.0})
    with pytest.raises(ValueError, match="names no Linear or Conv2d"):
        weight_paths(pipe, "nowhere")
    with pytest.raises(TypeError, match="num_inference_step= is no argument"):
        attribute_weights(pipe, "a fox", num_inference_step=3)
    with pytest.raises(ValueError, match="must be a prompt"):
        cad_erase(pipe, " ", **CALL)
    with pytest.raises(ValueError, match="chooses no weight: the longest row has"):
        cad_erase(pipe, "a fox", modules=[FF], ratio=0.001, **CALL)
    with pytest.raises(ValueError, match="NaN"):
        attribute_weights(pipe, "a fox", objective="amplify", latents=torch.full((1, 4, 12, 12), float("nan")), **CALL)
    with pytest.raises(ValueError, match="made for another model"):
        attach(pipe, WeightMask({FF: torch.ones(3, 3, dtype=torch.bool)}))
    with pytest.raises(ValueError, match="zero no weight"):
        WeightMask({FF: torch.zeros(3, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="tensor of booleans"):
        WeightMask({FF: torch.ones(3, 3)})
    with pytest.raises(ValueError, match=r"ratio=nan"):
        cad_erase(pipe, "a fox", ratio=float("nan"), **CALL)
