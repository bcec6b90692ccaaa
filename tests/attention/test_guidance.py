"""Guidance by maps against diffusers' own Attend-and-Excite pipeline, and against eager derivations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor

import sparsefeat as sf
from sparsefeat.attention.guidance import AStar, AttendAndExcite
from sparsefeat.attention.losses import mean_overlap, neglect, overlap, retention, segregation, sharpened, smoothed
from sparsefeat.attention.moved_latents import rows_of_arguments
from sparsefeat.pipeline import attach
from tests.attention.test_families import PLACES
from tests.families import families
from tests.tiny import pixels, tiny_sd, tiny_sdxl

PROMPT = "a fox and a cat"  # start, a, fox, a, n, d, a, cat
FOX, CAT = 2, 7


# ------------------------------------------------------------------------------------------------------------ losses


def overlap_by_hand(a, b):
    pairs = [(x, y) for row_a, row_b in zip(a, b, strict=True) for x, y in zip(row_a, row_b, strict=True)]
    return sum(min(x, y) for x, y in pairs) / sum(x + y for x, y in pairs)


def maps(seed=0, words=3, h=4, w=5):
    return torch.rand(words, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_overlap_and_the_losses_of_a_star_are_their_formulas():
    a = maps()
    plain = a.tolist()
    pairs = [overlap_by_hand(plain[i], plain[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert float(overlap(a[0], a[1])) == pytest.approx(pairs[0])
    assert float(segregation(a)) == pytest.approx(sum(pairs))
    assert float(mean_overlap(a)) == pytest.approx(sum(pairs) / 3)
    before = maps(1) > 0.5
    kept = [1 - overlap_by_hand(x, y) for x, y in zip(plain, before.double().tolist(), strict=True)]
    assert float(retention(a, before)) == pytest.approx(sum(kept))
    assert float(overlap(a[0], a[0])) == pytest.approx(0.5)
    assert float(overlap(a[0] * 0, a[0] * 0)) == 0
    assert float(segregation(a[:1])) == 0
    assert torch.autograd.gradcheck(lambda x: segregation(x) + retention(x, before), (a.requires_grad_(),))
    with pytest.raises(ValueError, match="an overlap needs two maps"):
        mean_overlap(a[:1])


def test_maps_are_sharpened_over_tokens_and_smoothed_in_space():
    a = maps(2, words=6) / 20
    found = sharpened(a, [(1,), (2, 3)])
    e = np.exp(100 * a[1:-1].numpy())
    shares = e / e.sum(0)
    weights = np.array([[math.exp(-(y**2 + x**2)) for x in (-1, 0, 1)] for y in (-1, 0, 1)])
    weights /= weights.sum()
    for one, wanted in zip(found.numpy(), (shares[0], (shares[1] + shares[2]) / 2), strict=True):
        padded = np.pad(wanted, 1, mode="reflect")
        for y in range(4):
            for x in range(5):
                assert one[y, x] == pytest.approx((padded[y : y + 3, x : x + 3] * weights).sum())
    assert float(neglect(found)) == pytest.approx(1 - min(found[0].max(), found[1].max()))
    assert smoothed(torch.ones(1, 1, 1)).shape == (1, 1, 1)
    for outside in (0, 5, -1):
        with pytest.raises(ValueError, match="name tokens from 1 to 4, without the start and the end"):
            sharpened(a, [(outside,)])
    unended = sharpened(a, [(5,)], ended=False)
    torch.testing.assert_close(unended[0], smoothed((100 * a[1:]).softmax(0)[4:])[0])


# --------------------------------------------------------------------------------------- diffusers' own, and by hand


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_attend_and_excite_is_diffusers_own_pipeline(guidance):
    from diffusers import StableDiffusionAttendAndExcitePipeline

    pipe = tiny_sd()
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    theirs = StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    call = {"steps": 3, "guidance_scale": guidance, "output_type": "latent"}
    plain = pixels(pipe, PROMPT, **call)
    processors = pipe.unet.attn_processors
    wanted = pixels(
        theirs, PROMPT, token_indices=[FOX, CAT], max_iter_to_alter=2, thresholds={}, attn_res=(4, 4), **call
    )
    pipe.unet.set_attn_processor(processors)
    guide = AttendAndExcite(["fox", "cat"], steps=2, thresholds={})
    with attach(pipe, guide) as run:
        found = pixels(pipe, PROMPT, **call)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert (found - plain).abs().max() > 100 * (found - wanted).abs().max()
    assert set(run[guide].losses) == {(0, 0), (0, 1)}
    assert set(run[guide].moves.values()) == {1}
    assert all(
        first == last for first, last in run[guide].losses.values()
    )  # both before the one move, as is documented


def eager_maps(unet, latent, t, text, more, n_positions, grid):
    """[tokens, h, w], the mean over heads and over cross-attentions with as many positions, from their own inputs."""
    found, handles = [], []

    def keep(module, args, kwargs):
        q = module.to_q(args[0])
        k = module.to_k(kwargs["encoder_hidden_states"])
        q, k = (x.unflatten(-1, (module.heads, -1)).transpose(1, 2) for x in (q, k))
        if q.shape[2] == n_positions:
            scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
            found.extend((scores.exp() / scores.exp().sum(-1, keepdim=True))[0])

    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    unet(latent, t, encoder_hidden_states=text, **more)
    for handle in handles:
        handle.remove()
    return torch.stack(found).mean(0).T.unflatten(-1, grid)


def by_hand(pipe, loss_of, latents, texts, more, sizes, grid, refine=None, seed_factor=1.0, **call):
    """The pipeline with every latent moved before each step: the first by hand, the others in a callback."""
    kept = [None] * len(texts)
    scheduler = pipe.scheduler

    def moved(z, i, t):
        scale = float(scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), t))
        after = []
        for image, (one, text) in enumerate(zip(z.split(1), texts, strict=True)):
            for _ in range(21):
                one = one.detach().requires_grad_()
                with torch.enable_grad():
                    seen = eager_maps(pipe.unet, one * scale, t, text, more, grid[0] * grid[1], grid)
                    loss, keep = loss_of(seen, kept[image])
                done = refine is None or i != 0 or loss <= 1 - refine
                if done:
                    kept[image] = keep
                one = one - sizes[i] / scale**2 * torch.autograd.grad(loss, one)[0]  # in units of one * scale
                if done:
                    break
            after.append(one.detach())
        return torch.cat(after)

    steps = len(sizes)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.clone()
    first = latents * scheduler.init_noise_sigma
    scheduler.scale_model_input(first, timesteps[0])
    first = moved(first, 0, timesteps[0]) / scheduler.init_noise_sigma

    def at_end(pipe, i, t, kwargs):
        return {"latents": moved(kwargs["latents"], i + 1, timesteps[i + 1])} if i + 1 < steps else {}

    return pipe(
        latents=first, callback_on_step_end=at_end, num_inference_steps=steps, output_type="latent", **call
    ).images


def neglected(seen, kept):
    shares = (100 * seen[1:-1]).softmax(0)
    heights = []
    for token in (FOX, CAT):
        weights = torch.tensor([[math.exp(-(y**2 + x**2)) for x in (-1, 0, 1)] for y in (-1, 0, 1)]).to(seen)
        padded = torch.nn.functional.pad(shares[token - 1][None], (1, 1, 1, 1), mode="reflect")[0]
        smooth = padded.unfold(0, 3, 1).unfold(1, 3, 1).mul(weights / weights.sum()).sum((-2, -1))
        heights.append(1 - smooth.max())
    return max(heights), None


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_attend_and_excite_of_two_images_on_a_wide_picture_is_the_eager_derivation(scheduler):
    pipe = tiny_sd(scheduler, dtype=torch.float64)
    text, _ = pipe.encode_prompt(PROMPT, "cpu", 2, True)
    latents = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sizes = [30 * math.sqrt(x) for x in (1, 0.75, 0.5)]
    call = {"prompt": PROMPT, "num_images_per_prompt": 2, "height": 64, "width": 96}
    wanted = by_hand(pipe, neglected, latents, list(text.split(1)), {}, sizes, (8, 12), refine=0.2, **call)
    guide = AttendAndExcite(["fox", "cat"], steps=9, thresholds={0: 0.2}, resolution=(8, 12), scale=30)
    with attach(pipe, guide) as run:
        found = pipe(latents=latents, num_inference_steps=3, output_type="latent", **call).images
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert run[guide].moves[0, 0] > 1  # the threshold asked for more than the usual move
    before, after = run[guide].losses[0, 0]
    assert after < before


def a_star_loss(seen, kept):
    shares = (100 * seen[1:-1]).softmax(0)
    weights = torch.tensor([[math.exp(-(y**2 + x**2)) for x in (-1, 0, 1)] for y in (-1, 0, 1)]).to(seen)
    words = []
    for token in (FOX, CAT):
        padded = torch.nn.functional.pad(shares[token - 1][None], (1, 1, 1, 1), mode="reflect")[0]
        words.append(padded.unfold(0, 3, 1).unfold(1, 3, 1).mul(weights / weights.sum()).sum((-2, -1)))
    loss = torch.minimum(*words).sum() / (words[0] + words[1]).sum()
    if kept is not None:
        for a, b in zip(words, kept, strict=True):
            loss = loss + 1 - torch.minimum(a, b).sum() / (a + b).sum()
    return loss, [(a > a.mean()).to(a).detach() for a in words]


def test_a_star_on_sdxl_is_the_eager_derivation():
    pipe = tiny_sdxl(dtype=torch.float64)
    text, _, pooled, _ = pipe.encode_prompt(PROMPT, device="cpu", do_classifier_free_guidance=True)
    more = {
        "added_cond_kwargs": {
            "text_embeds": pooled,
            "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]], dtype=torch.float64),
        }
    }
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sizes = [20 * math.sqrt(x) for x in (1, 0.75, 0.5)]
    call = {"prompt": PROMPT, "height": 64, "width": 64}
    wanted = by_hand(pipe, a_star_loss, latents, [text], more, sizes, (4, 4), **call)
    plain = pipe(latents=latents, num_inference_steps=3, output_type="latent", **call).images
    guide = AStar(["fox", "cat"])
    with attach(pipe, guide) as run:
        found = pipe(latents=latents, num_inference_steps=3, output_type="latent", **call).images
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (found - plain).abs().max() > 1e-3
    assert sorted(run[guide].losses) == [(0, 0), (0, 1), (0, 2)]


# ------------------------------------------------------------------------------------------- any scheduler, and nothing left


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler", "heun"])
def test_latents_are_moved_once_a_step_with_every_scheduler(scheduler):
    pipe = tiny_sd(scheduler)
    drawn = []
    for scale in (0, 20):
        guide = AttendAndExcite(["fox", "cat"], thresholds={}, scale=scale)
        with attach(pipe, guide) as run:
            drawn.append(pixels(pipe, PROMPT, steps=3, guidance_scale=3.0, output_type="latent"))
        assert sorted(run[guide].losses) == [(0, step) for step in range(3)]
        assert set(run[guide].moves.values()) == {1}
    assert drawn[1].isfinite().all()
    assert not torch.equal(*drawn)


def test_a_size_of_zero_changes_no_bit_and_parameters_keep_no_gradient():
    pipe = tiny_sd()
    before = pixels(pipe, PROMPT)
    with attach(pipe, AttendAndExcite(["fox"], scale=0)):
        assert np.array_equal(pixels(pipe, PROMPT), before)
    with attach(pipe, AttendAndExcite(["fox"])):
        assert not np.array_equal(pixels(pipe, PROMPT), before)
    assert np.array_equal(pixels(pipe, PROMPT), before)
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in pipe.unet.modules())


@pytest.mark.parametrize("name", ["lumina2", "cogview4", "hidream"])
def test_a_prompts_last_word_is_guided_where_no_mark_follows_it(name):
    tiny = families()[name]
    if not tiny.available:
        pytest.skip(f"this diffusers has no {tiny.pipeline}")
    pipe = tiny.build()
    plain = tiny.call(pipe, ["a fox"], guidance=True)
    with attach(pipe, guide := AttendAndExcite(["fox"], steps=1)) as run:
        assert not torch.equal(tiny.call(pipe, ["a fox"], guidance=True), plain)
    assert run[guide].moves[0, 0] >= 1


def test_one_entry_of_a_models_arguments_is_cut_from_what_has_the_batch_second_too():
    text = torch.arange(8.0).view(2, 2, 1, 2)  # [layers, batch, tokens, width], as many layers as entries
    given = {
        "hidden_states": torch.zeros(2, 4, 8, 8),
        "encoder_hidden_states_llama3": text,
        "encoder_hidden_states_t5": text,
    }
    cut = rows_of_arguments(given, [1], 2)
    assert torch.equal(cut["encoder_hidden_states_llama3"], text[:, 1:])
    assert torch.equal(cut["encoder_hidden_states_t5"], text[1:])


def test_a_pipeline_with_cross_attention_and_another_kind_of_model_is_guided_too():
    family = families()["pixart"]
    pipe = family.build()
    guide = AStar([2, (3, 4)])
    with attach(pipe, guide) as run:
        family.call(pipe, ["a fox and a cat"], guidance=True)
    assert run[guide].losses


@pytest.mark.parametrize(("name", "first"), [("flux", 0), ("sd3", 1), ("qwen_image", 0)])
def test_a_joint_attention_is_guided_by_the_texts_share_of_it(name, first):
    """One step: the latent moved by hand, by the maps of the image's queries over the text's keys."""
    tiny = families()[name]
    pipe, place = tiny.build(), PLACES[name]
    given, seen, words = [], [], [1]
    if name == "sd3":  # CLIP's tokens are before T5's
        words = [pipe.tokenizer("red fox")["input_ids"].index(pipe.tokenizer.convert_tokens_to_ids("fox</w>")), 16 + 1]

    def call(latents, guide=None):
        return torch.as_tensor(tiny.call(pipe, ["red fox"], guidance=False, size="wide", steps=1, latents=latents))

    handle = pipe.transformer.register_forward_pre_hook(lambda m, a, k: given.append(k), with_kwargs=True)
    tiny.call(pipe, ["red fox"], guidance=False, size="wide", steps=1)
    handle.remove()
    arguments = given[0]
    start = arguments["hidden_states"].detach()
    at, maps = start.clone().requires_grad_(), sf.HeatMaps()
    with attach(pipe, maps) as run:
        plain = call(start)
    grid, original = run[maps].grid, torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, *more, **options):
        if query.shape[2] == key.shape[2] > math.prod(grid):
            (a, b), (c, d) = place.streams(query.shape[2], math.prod(grid))
            scores = query[0, :, a:b] @ key[0, :, c:d].mT / query.shape[-1] ** 0.5
            mask = options.get("attn_mask")
            if mask is not None:
                scores = scores.masked_fill(~mask[0, :, :, c:d].expand_as(scores), -torch.inf)
            seen.append(scores.softmax(-1))
        return original(query, key, *more, **options)

    torch.nn.functional.scaled_dot_product_attention = watched
    try:
        pipe.transformer(**{**arguments, "hidden_states": at})
    finally:
        torch.nn.functional.scaled_dot_product_attention = original
    mean = torch.cat(seen).mean(0).T.unflatten(-1, grid)
    share = (100 * mean[first:-1]).softmax(0)[[word - first for word in words]].mean(0)
    weights = torch.tensor([[math.exp(-(y**2 + x**2)) for x in (-1, 0, 1)] for y in (-1, 0, 1)])
    padded = torch.nn.functional.pad(share[None], (1, 1, 1, 1), mode="reflect")[0]
    height = padded.unfold(0, 3, 1).unfold(1, 3, 1).mul(weights / weights.sum()).sum((-2, -1)).max()
    gradient = torch.autograd.grad(1 - height, at)[0]
    for scale, factor in ((20, 20), (None, 0.01 * start.norm() / gradient.norm())):
        wanted = call((start - factor * gradient).detach())
        guide = AttendAndExcite(["fox"], steps=1, thresholds={}, scale=scale)
        with attach(pipe, guide) as run:
            found = call(start)
        assert run[guide].losses[0, 0][0] == pytest.approx(1 - float(height.detach()), abs=1e-5)
        assert (wanted - plain).abs().max() > 1e-6
        torch.testing.assert_close(
            found - plain, wanted - plain, rtol=2e-2, atol=2e-2 * float((wanted - plain).abs().max())
        )


def test_the_default_step_does_something_on_a_joint_model():
    tiny = families()["sd3"]

    def last(scale):
        pipe, guide = tiny.build(), AttendAndExcite(["fox"], thresholds={}, scale=scale)
        with attach(pipe, guide) as run:
            tiny.call(pipe, ["red fox"], guidance=True, steps=4)
        return run[guide].losses[0, 3][0]

    assert last(0.0) - last(None) > 0.005


def test_what_cannot_be_guided_is_refused_before_it_is_drawn():
    pipe = tiny_sd()
    for words in ("fox", [], [1.5], [[]]):
        with pytest.raises(ValueError, match="words="):
            AttendAndExcite(words)
    with pytest.raises(ValueError, match=r"thresholds\[0\]=2 must be"):
        AttendAndExcite(["fox"], thresholds={0: 2})
    with attach(pipe, AStar(["dog"])), pytest.raises(ValueError, match="its words are: a, fox, and, cat"):
        pixels(pipe, PROMPT)
    with (
        attach(pipe, AStar(["fox"], resolution=(5, 5))),
        pytest.raises(
            ValueError, match=r"resolution=\(5, 5\) has no maps here; there are \[\(4, 4\), \(8, 8\), \(16, 16\)\]"
        ),
    ):
        pixels(pipe, PROMPT)
    apart = families()["mochi"].build()
    with pytest.raises(
        ValueError, match="AStar works on the image's attention to the text, and MochiPipeline has none"
    ):
        attach(apart, AStar(["fox"]))
    embeddings, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    with attach(pipe, AStar(["fox"])), pytest.raises(ValueError, match="name token positions instead"):
        pixels(pipe, None, prompt_embeds=embeddings, negative_prompt_embeds=negative)
    with (
        attach(pipe, AStar(["fox"])),
        torch.inference_mode(),
        pytest.raises(ValueError, match="takes gradients"),
    ):
        pixels(pipe, PROMPT)
    pipe.unet.set_attn_processor(AttnProcessor())
    with pytest.raises(ValueError, match=r"cannot be read: its AttnProcessor does not call .*AttnProcessor2_0"):
        attach(pipe, AStar(["fox"]))
