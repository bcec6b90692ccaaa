"""Heat maps against DAAM's definition, re-derived from the attention modules' own projections."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from sparsefeat.attention import HeatMap, HeatMaps
from sparsefeat.pipeline import AttentionCall, attach
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
    for total, count in run[maps].sums.values():
        torch.testing.assert_close(total.sum(-1), count[:, None].expand(total.shape[:2]), rtol=1e-5, atol=1e-5)
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
    context = SimpleNamespace(
        condition=("uncond", "cond", "cond"), prompt_index=(0, 1, 0), recomputing=False, grid=(2, 3)
    )
    maps = HeatMaps()
    maps.at_attention(call, context)
    maps.at_attention(call, context)
    held = maps._now[2, 3]
    scores = torch.einsum("bhnd,bhtd->bhnt", query.double(), key.double()) * 0.3
    expected = 2 * scores.masked_fill(~kept, -torch.inf).softmax(-1).sum(1)[[2, 1]]
    assert held.total.dtype == torch.float32
    torch.testing.assert_close(held.total.double(), expected, rtol=1e-5, atol=1e-5)
    assert held.count == [8, 8]


def test_a_video_is_refused_as_one():
    tiny = families()["wan"]
    if not tiny.available:
        pytest.skip(f"this diffusers has no {tiny.pipeline}")
    wan = tiny.build()
    with attach(wan, HeatMaps()), pytest.raises(ValueError, match=r"attends from the 2 frames of a video"):
        tiny.call(wan, ["a fox"], guidance=False)
