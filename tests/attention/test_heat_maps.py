"""Heat maps against DAAM's definition, re-derived from the attention modules' own projections."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from PIL import Image
from torch.nn import functional as F

from sparsefeat.attention import HeatMap, HeatMaps
from sparsefeat.pipeline import AttentionCall, Context, HookpointNotReachedError, attach
from tests.families import families
from tests.tiny import MAX_TOKENS, pixels, tiny_sd, tiny_sdxl


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


class Eager:
    """Every cross-attention module's probabilities, from its own input: path -> list over steps of [B, H, N, T]."""

    def __init__(self, unet):
        self.found, self.handles = {}, []
        for path, module in unet.named_modules():
            if path.endswith("attn2"):
                self.handles.append(module.register_forward_pre_hook(self.hook(path), with_kwargs=True))

    def hook(self, path):
        def compute(module, args, kwargs):
            text = kwargs["encoder_hidden_states"].double()
            q = args[0].double() @ module.to_q.weight.double().T
            k = text @ module.to_k.weight.double().T
            q, k = (t.unflatten(-1, (module.heads, -1)).transpose(1, 2) for t in (q, k))
            scores = torch.einsum("bhnd,bhtd->bhnt", q, k) / q.shape[-1] ** 0.5
            e = (scores - scores.amax(-1, keepdim=True)).exp()
            self.found.setdefault(path, []).append(e / e.sum(-1, keepdim=True))

        return compute

    def remove(self):
        for handle in self.handles:
            handle.remove()


def daam(probabilities, batch_row, grids, clamp):
    """mean over layers and heads of clamp(bicubic(sum over steps)), every layer and head resized by itself."""
    maps, largest = [], max(grids.values(), key=lambda g: g[0] * g[1])
    for path, of_steps in probabilities.items():
        summed = sum(p[batch_row] for p in of_steps)  # [H, N, T]
        for head in summed:
            one = F.interpolate(head.T.unflatten(-1, grids[path])[None], size=largest, mode="bicubic")[0]
            maps.append(one.clamp(min=0) if clamp else one)
    return torch.stack(maps).mean(0)


def grids_of(probabilities, latent):
    """The grid of each path from its number of positions; the latent halves from level to level."""
    sizes = {}
    h, w = latent
    for _ in range(4):
        sizes[h * w] = (h, w)
        h, w = (h + 1) // 2, (w + 1) // 2
    return {path: sizes[p[0].shape[2]] for path, p in probabilities.items()}


def without_mid(probabilities):
    return {path: p for path, p in probabilities.items() if not path.startswith("mid_block")}


@pytest.mark.parametrize(
    ("guidance", "n", "height", "width"), [(7.5, 1, 64, 64), (7.5, 2, 48, 80), (1.0, 1, 64, 96), (1.0, 2, 64, 64)]
)
def test_maps_are_those_of_daam(pipe, guidance, n, height, width):
    prompts = ["a fox", "cat, a dog"]
    maps, eager = HeatMaps(), Eager(pipe.unet)
    with attach(pipe, maps) as run:
        pixels(pipe, prompts, guidance_scale=guidance, num_images_per_prompt=n, height=height, width=width)
    eager.remove()
    recording = run[maps]
    probabilities = without_mid(eager.found)
    grids = grids_of(probabilities, (height // 4, width // 4))
    assert recording.n_images == len(prompts) * n
    for image in range(recording.n_images):
        row = image + (len(prompts) * n if guidance > 1 else 0)  # the conditional half comes second
        expected = daam(probabilities, row, grids, clamp=False).clamp(min=0)
        actual = recording.tensor(image)
        assert actual.shape == (MAX_TOKENS, height // 4, width // 4)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
        # With DAAM's clamp of every resized map as well, the difference is the overshoot of the bicubic kernel.
        clamped = daam(probabilities, row, grids, clamp=True)
        assert (actual - clamped).abs().max() < 0.05 * clamped.max()


def test_layers_on_the_largest_grid_alone_agree_with_daams_clamp_exactly(pipe):
    maps, eager = HeatMaps(layers="down_blocks.0"), Eager(pipe.unet)
    with attach(pipe, maps) as run:
        pixels(pipe)
    eager.remove()
    probabilities = {path: p for path, p in eager.found.items() if path.startswith("down_blocks.0")}
    expected = daam(probabilities, 1, grids_of(probabilities, (16, 16)), clamp=True)
    torch.testing.assert_close(run[maps].tensor().double(), expected, rtol=1e-5, atol=1e-5)


def test_probabilities_of_a_pixel_sum_to_one(pipe):
    maps = HeatMaps()
    with attach(pipe, maps) as run:
        pixels(pipe, ["a fox", "cat"], steps=3, height=48, width=80)
    for held in run[maps].sums.values():
        summed = held.total.sum(-1)[:, 0]
        torch.testing.assert_close(summed, torch.tensor(held.count)[:, None].expand_as(summed), rtol=1e-5, atol=1e-5)
    assert run[maps].evaluations == 3
    one = run[maps].tensor(1, "steps").sum(0)
    torch.testing.assert_close(one, torch.ones(12, 20), rtol=1e-4, atol=1e-4)
    # "tokens": over the prompt's own tokens, of which "cat" has one
    tokens = run[maps].tensor(1, "tokens")
    torch.testing.assert_close(tokens[1], torch.ones(12, 20), rtol=1e-4, atol=1e-4)


def test_words_tokens_and_overlays(pipe):
    maps = HeatMaps()
    with attach(pipe, maps) as run:
        image = pipe("a fox, a dog", num_inference_steps=1, height=48, width=80).images[0]
    recording = run[maps]
    everything = recording.tensor()
    torch.testing.assert_close(recording.word("dog").values, everything[[5, 6, 7]].mean(0))
    torch.testing.assert_close(recording.word("a", occurrence=1).values, everything[4])
    torch.testing.assert_close(recording.map([2]).values, recording.word("fox").values)
    assert [heat.label for heat in recording.tokens()][1:4] == ["a</w>", "fox</w>", ",</w>"]
    painted = recording.word("fox").overlay(image)
    assert painted.size == image.size == (80, 48)
    with pytest.raises(ValueError, match="its words are: a, fox, dog"):
        recording.word("cat")
    with pytest.raises(ValueError, match=r"image=1 is out of range; the call made 1 image"):
        recording.word("fox", image=1)
    with pytest.raises(ValueError, match="token positions"):
        recording.map([99])
    with pytest.raises(ValueError, match='use "none", "steps" or "tokens"'):
        recording.tensor(normalize="max")


def test_a_heat_map_scales_thresholds_and_resizes():
    heat = HeatMap(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), "fox")
    torch.testing.assert_close(heat.scaled(), torch.tensor([[0.0, 0.25], [0.5, 1.0]]))
    assert heat.mask(0.4).tolist() == [[False, False], [True, True]]
    assert heat.resized((4, 6)).shape == (4, 6)
    assert heat.resized((2, 2)) is heat.values
    constant = HeatMap(torch.full((2, 2), 3.0), "flat")
    assert not constant.scaled().any()
    black = constant.overlay(Image.new("RGB", (6, 4)), strength=0)
    assert black.getextrema() == ((0, 0), (0, 0), (0, 0))


def test_prompts_given_as_embeddings_still_have_maps_of_positions(pipe):
    maps = HeatMaps()
    embeds, negative = pipe.encode_prompt("a fox", "cpu", 1, True)
    with attach(pipe, maps) as run:
        pixels(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=negative)
    assert run[maps].map([2]).values.shape == (16, 16)
    with pytest.raises(ValueError, match="was given embeddings"):
        run[maps].word("fox")


def test_reading_the_attention_does_not_change_the_image(pipe):
    before = pixels(pipe)
    with attach(pipe, HeatMaps()):
        during = pixels(pipe)
    assert (before == during).all()


def test_sdxl_has_maps_of_its_own_layers():
    pipe = tiny_sdxl()
    maps = HeatMaps()
    with attach(pipe, maps) as run:
        pixels(pipe, "a fox")
    assert run[maps].word("fox").values.shape == run[maps].grid
    with pytest.raises(ValueError, match=r"layers=\('nowhere',\) match no cross-attention module; there are: unet\."):
        attach(pipe, HeatMaps(layers="nowhere"))


@pytest.mark.parametrize("dimensions", [2, 3, 4])
def test_the_mask_of_the_call_is_honoured_and_only_conditional_rows_count(dimensions):
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(3, 4, 6, 5, generator=generator).half()  # rows: uncond, image 1, image 0
    key = torch.randn(3, 4, 7, 5, generator=generator).half()
    kept = torch.rand(3, 4, 6, 7, generator=generator)[(0,) * (4 - dimensions)] > 0.3
    kept[..., 0] = True
    call = AttentionCall("unet.attn2", query, key, key, 0.3, kept, is_cross=True)
    context = Context(condition=("uncond", "cond", "cond"), prompt_index=(0, 1, 0), grid=(2, 3))
    maps = HeatMaps()
    maps.at_attention(call, context)
    maps.at_attention(call, context)
    (held,) = maps._now.values()
    scores = torch.einsum("bhnd,bhtd->bhnt", query.double(), key.double()) * 0.3
    expected = 2 * scores.masked_fill(~kept, -torch.inf).softmax(-1).sum(1)[[2, 1]]
    assert held.total.dtype == torch.float32
    torch.testing.assert_close(held.total[:, 0].double(), expected, rtol=1e-5, atol=1e-5)
    assert held.count == [8, 8]


@pytest.fixture(scope="module")
def sharp():
    """Of random weights attention is nearly even, and nothing overshoots: here it is not."""
    pipe = tiny_sd(seed=3)
    for path, module in pipe.unet.named_modules():
        if path.endswith("attn2.to_q"):
            module.weight.data *= 40
    return pipe


@pytest.mark.parametrize(("guidance", "height", "width"), [(7.5, 48, 80), (1.0, 64, 64)])
def test_the_clamp_of_every_layer_and_head_is_daams(sharp, guidance, height, width):
    pipe = sharp
    exact, linear, eager = HeatMaps(daam_exact=True), HeatMaps(), Eager(pipe.unet)
    with attach(pipe, exact, linear) as run:
        pixels(pipe, ["a fox", "cat, a dog"], height=height, width=width, steps=3, guidance_scale=guidance)
    eager.remove()
    probabilities = without_mid(eager.found)
    grids = grids_of(probabilities, (height // 4, width // 4))
    for image in (0, 1):
        expected = daam(probabilities, (2 if guidance > 1 else 0) + image, grids, clamp=True)
        torch.testing.assert_close(run[exact].tensor(image).double(), expected, rtol=1e-4, atol=1e-5)
        difference = (run[linear].tensor(image) - expected).abs().max() / expected.max()
        print(f"linear beside DAAM's clamp: {difference:.4f} of the largest value")
        assert difference > 1e-3  # the clamp acts here


@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_prompts_of_other_lengths_than_the_tokenizers_have_maps(pipe, guidance):
    """What DAAM 0.2.0 has no maps of: texts that are not 77 tokens."""
    embeds = torch.randn(1, 23, 32, generator=torch.Generator().manual_seed(5))
    exact, eager = HeatMaps(daam_exact=True), Eager(pipe.unet)
    with attach(pipe, exact) as run:
        pixels(
            pipe,
            None,
            prompt_embeds=embeds,
            negative_prompt_embeds=embeds.flip(0) * 0.5,
            guidance_scale=guidance,
            height=64,
            width=96,
        )
    eager.remove()
    probabilities = without_mid(eager.found)
    expected = daam(probabilities, int(guidance > 1), grids_of(probabilities, (16, 24)), clamp=True)
    assert run[exact].tensor().shape == (23, 16, 24)
    torch.testing.assert_close(run[exact].tensor().double(), expected, rtol=1e-5, atol=1e-6)


def test_layers_heads_and_steps_are_kept_apart_on_request_and_weighted(pipe):
    eager = Eager(pipe.unet)
    whole, apart = HeatMaps(), HeatMaps(keep=["layers", "heads", "steps"])
    ups = HeatMaps(layer_weights={"up_blocks": 3.0, "down_blocks.0": [0.0, 0.0, 2.0, 0.0]}, step_weights=[1.0, 0.25])
    half = HeatMaps(steps=(0.5, 1.0))
    with attach(pipe, whole, apart, ups, half) as run:
        pixels(pipe, height=48, width=80)
    eager.remove()
    found = without_mid(eager.found)
    grids = grids_of(found, (12, 20))
    layer = "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    one = run[apart].tensor(layer=layer, step=1, head=2).flatten(1).T
    resized = F.interpolate(
        found[layer[5:]][1][1][2].T.unflatten(-1, grids[layer[5:]])[None], size=(12, 20), mode="bicubic"
    )[0]
    torch.testing.assert_close(one.double(), resized.clamp(min=0).flatten(1).T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run[apart].tensor(), run[whole].tensor(), rtol=1e-4, atol=1e-6)
    last = daam({p: of[1:] for p, of in found.items()}, 1, grids, clamp=False).clamp(min=0)
    torch.testing.assert_close(run[half].tensor().double(), last, rtol=1e-4, atol=1e-6)

    def weight(path, head):
        return 3.0 if path.startswith("up") else float(2 * (head == 2)) if path.startswith("down_blocks.0") else 1.0

    total = weights = 0.0
    for path, of_steps in found.items():
        for step, p in enumerate(of_steps):
            for head, one in enumerate(p[1]):
                w = weight(path, head) * (1.0, 0.25)[step]
                total = (
                    total + w * F.interpolate(one.T.unflatten(-1, grids[path])[None], size=(12, 20), mode="bicubic")[0]
                )
                weights += w
    expected = (total / weights).clamp(min=0) * 2
    torch.testing.assert_close(run[ups].tensor().double(), expected, rtol=1e-4, atol=1e-6)
    assert run[apart].steps == (0, 1)
    assert layer in run[apart].layers
    with pytest.raises(ValueError, match=r"step=4 was not kept apart; there is 0, 1"):
        run[apart].tensor(step=4)
    with pytest.raises(
        ValueError, match=r"layer='x' was not kept apart; there is nothing \(HeatMaps\(keep=\['layers'\]\)"
    ):
        run[whole].tensor(layer="x")


def test_what_the_maps_take_is_said_before_and_bounded(pipe, capsys, monkeypatch):
    monkeypatch.setattr("sparsefeat.attention.heat_maps.SAID_FROM_BYTES", 1)
    maps = HeatMaps()
    with attach(pipe, maps) as run:
        pixels(pipe, ["a fox", "cat"], height=64, width=96)
    # 16 tokens of 2 images at 16 x 24 and 8 x 12, four bytes each: counted by hand
    assert run[maps].bytes == 4 * 16 * 2 * (16 * 24 + 8 * 12) == 61440
    assert "HeatMaps: the maps of 16 tokens of 2 image(s) take 0.1 MiB." in capsys.readouterr().err
    with (
        attach(pipe, HeatMaps(max_bytes=61439)),
        pytest.raises(ValueError, match=r"more than max_bytes=61439: name words="),
    ):
        pixels(pipe, ["a fox", "cat"], height=64, width=96)
    few = HeatMaps(words=["fox", "cat"], max_bytes=61439)
    with attach(pipe, few) as run:
        pixels(pipe, ["a fox", "cat"], height=64, width=96)
    assert run[few].columns == (1, 2)
    assert run[few].bytes == 61440 // 8


@pytest.mark.parametrize(("words", "given", "weight"), [(["fox", "dog"], {}, 0.5), (["dog"], {"background": 2.0}, 2.0)])
def test_words_share_the_attention_with_the_mark_before_the_prompt(pipe, words, given, weight):
    maps, places = HeatMaps(keep=["steps"]), {"fox": [2], "dog": [5, 6, 7]}  # of the start token 0; counted by hand
    with attach(pipe, maps) as run:
        pixels(pipe, ["cat", "a fox, a dog"], steps=2, height=48, width=80)
    for step in (None, 1):
        all_of = run[maps].tensor(1, step=step).double()
        of_words = torch.stack([all_of[places[word]].mean(0) for word in words])
        expected = of_words / (of_words.sum(0) + weight * of_words.max() * all_of[0] / all_of[0].max())
        found = run[maps].shares(words, 1, **given, step=step)
        assert [heat.label for heat in found] == words
        torch.testing.assert_close(
            torch.stack([heat.values for heat in found]).double(), expected, rtol=1e-5, atol=1e-6
        )


def test_shares_are_refused_where_nothing_tells_the_background(pipe):
    with attach(pipe, only := HeatMaps(words=["fox"]), both := HeatMaps(words=["fox", 0])) as run:
        pixels(pipe, "a fox", steps=1)
    with pytest.raises(ValueError, match=r"the mark before the prompt has no map: .* HeatMaps\(words=\['fox', 0\]\)"):
        run[only].shares(["fox"])
    assert run[both].shares(["fox"])[0].values.max() > 0
    for wrong, said in (({"words": []}, "words="), ({"words": ["cat"]}, "its words are: a, fox")):
        with pytest.raises(ValueError, match=said):
            run[both].shares(**wrong)
    with pytest.raises(ValueError, match=r"background=-1 must be a finite number of at least 0"):
        run[both].shares(["fox"], background=-1)
    tiny = families()["pixart"]
    t5 = tiny.build()  # its text encoder, a T5, puts no mark before the prompt
    with attach(t5, of_t5 := HeatMaps()) as run:
        tiny.call(t5, ["red fox"], guidance=1.0, steps=1)
    with pytest.raises(ValueError, match=r"no attention to a mark before the prompt, .*: take each word's own map"):
        run[of_t5].shares(["fox"])


def test_maps_of_the_negative_prompt(pipe):
    maps, eager = HeatMaps(condition="uncond"), Eager(pipe.unet)
    with attach(pipe, maps) as run:
        pixels(pipe, "a fox", negative_prompt="cat, a dog")
    eager.remove()
    probabilities = without_mid(eager.found)
    expected = daam(probabilities, 0, grids_of(probabilities, (16, 16)), clamp=False).clamp(min=0)
    torch.testing.assert_close(run[maps].tensor().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run[maps].word("cat").values, run[maps].map([1]).values)
    with pytest.raises(ValueError, match="its words are: cat, a, dog"):
        run[maps].word("fox")


@pytest.mark.parametrize(
    ("build", "options", "said"),
    [
        ("sd", {"kind": "joint"}, "take kind='cross'"),
        ("sd", {"kind": "joint", "layers": "up_blocks"}, "take kind='cross'"),
        ("sd", {"direction": "text_to_image"}, "leave direction= out"),
        ("sd", {"layer_weights": {"nowhere": 1.0}}, "layer_weights names 'nowhere'"),
        ("flux", {"kind": "cross"}, "take kind='joint' or kind='text_renormalised'"),
        ("kandinsky3", {}, "finds no attention between image and text in Kandinsky3Pipeline"),
        ("latte", {"kind": "joint"}, "take kind='cross'"),
    ],
)
def test_what_cannot_be_read_is_refused_at_attach(build, options, said):
    tiny = families()[build]
    if not tiny.available:
        pytest.skip(f"this diffusers has no {tiny.pipeline}")
    pipe = tiny.build()
    with pytest.raises(ValueError, match=re.escape(said)):
        attach(pipe, HeatMaps(**options))


def test_processors_and_backends_that_bypass_the_seam_are_named_with_what_works(pipe):
    pipe = tiny_sd()
    pipe.unet.set_attn_processor(AttnProcessor())
    with pytest.raises(ValueError, match=r"its AttnProcessor does not call .*: pipe\.unet\.(.*)\.") as error:
        attach(pipe, HeatMaps())
    remedy = str(error.value).rpartition(": ")[2].rstrip(".")
    exec(remedy, {"pipe": pipe, "AttnProcessor2_0": AttnProcessor2_0})
    with attach(pipe, maps := HeatMaps()) as run:
        pixels(pipe)
    assert run[maps].word("fox").values.any()

    tiny = families()["flux"]
    flux = tiny.build()
    flux.transformer.set_attention_backend("flex")
    with pytest.raises(ValueError, match=r"runs the attention backend 'flex'.*: take the native one, (.*)\.$") as error:
        attach(flux, HeatMaps())
    exec(str(error.value).rpartition("take the native one, ")[2].rstrip("."), {"pipe": flux})
    with attach(flux, maps := HeatMaps()) as run:
        tiny.call(flux, ["red fox"], guidance=False)
    assert run[maps].word("fox").values.any()

    with attach(pipe, maps := HeatMaps()):  # after attach: the call says it
        pipe.unet.set_attn_processor(AttnProcessor())
        with pytest.raises(HookpointNotReachedError, match=r"its AttnProcessor does not call"):
            pixels(pipe)


def test_a_backend_that_is_active_for_every_model_is_named_too_and_its_remedy_works():
    attention_dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    tiny = families()["flux"]
    pipe = tiny.build()
    with attention_dispatch.attention_backend("flex"):
        with pytest.raises(
            ValueError, match=r"runs the attention backend 'flex'.*: take the native one, (.*)\.$"
        ) as error:
            attach(pipe, HeatMaps())
        eval(str(error.value).split("take the native one, ")[1].rstrip("."), {"pipe": pipe})
        with attach(pipe, maps := HeatMaps()) as run:
            tiny.call(pipe, ["red fox"], guidance=False)
        assert run[maps].word("fox").values.max() > 0


def test_the_frames_of_a_video_have_maps_of_their_own():
    tiny = families()["wan"]
    if not tiny.available:
        pytest.skip(f"this diffusers has no {tiny.pipeline}")
    wan = tiny.build()
    with attach(wan, maps := HeatMaps()) as run:
        tiny.call(wan, ["a fox"], guidance=False, size="wide")
    heat = run[maps].word("fox")
    assert heat.values.shape == run[maps].grid
    assert len(run[maps].grid) == 3
    torch.testing.assert_close(heat.frame(1).values, heat.values[1])
    with pytest.raises(ValueError, match=r"has 2 frames; take one, heat.frame\(0\)"):
        heat.overlay(Image.new("RGB", (8, 8)))
    assert heat.resized((6, 10)).shape == (2, 6, 10)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "self"}, "kind='self' is not known; use one of 'cross', 'joint'"),
        ({"direction": "both"}, "direction='both' is not known"),
        ({"condition": "both"}, "condition='both' is not known"),
        ({"words": []}, r"words=\[\] must be a word or a list of them"),
        ({"keep": ["heads"]}, "keep 'layers' too"),
        ({"keep": "layers"}, "keep='layers' must be a list"),
        ({"step_weights": [1.0, -1.0]}, r"step_weights\[1\]=-1.0 must be"),
        ({"layer_weights": {"up": float("nan")}}, r"layer_weights\['up'\]=nan must be"),
        ({"max_bytes": 0}, "max_bytes=0 must be"),
        ({"steps": (0.5, 0.2)}, r"steps=\(0.5, 0.2\) must be"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_name(options, said):
    with pytest.raises(ValueError, match=said):
        HeatMaps(**options)
