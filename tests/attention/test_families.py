"""Maps of every family's attention against a plain softmax of what the module was given, at places counted by hand.

`docs/attention.md` has its table of families from `PLACES` and `CROSS` here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparsefeat as sf
from tests.attention.eager import Ran, eager
from tests.families import families


@dataclass(frozen=True)
class Place:
    """Where image and text stand in a joint attention, (start, stop) each by the sequence's length and the image's, and at
    which of the text's keys a token is that its encoder was given at a place: by (place, attention mask). `again`: at how
    many keys after that the same token stands once more.
    """

    layers: tuple[str, ...]
    streams: Callable[[int, int], tuple[tuple[int, int], tuple[int, int]]]
    key: Callable[[int, list[int] | None], int]
    encoder: str = "text_encoder"
    again: tuple[int, ...] = ()


def text_first(length: int, image: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (length - image, length), (0, length - image)


def image_first(length: int, image: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (0, image), (image, length)


def same(place: int, mask: list[int] | None) -> int:
    return place


def after(n: int) -> Callable[[int, list[int] | None], int]:
    return lambda place, mask: place - n


def rank(place: int, mask: list[int] | None) -> int:
    assert mask is not None
    return sum(mask[:place])


DOUBLE = tuple(f"transformer.transformer_blocks.{i}.attn" for i in (0, 1))
SINGLE = tuple(f"transformer.single_transformer_blocks.{i}.attn" for i in (0, 1))

PLACES = {
    "flux": Place(DOUBLE + SINGLE, text_first, same, "text_encoder_2"),
    "flux2": Place(DOUBLE + SINGLE, text_first, same),
    "sd3": Place(DOUBLE, image_first, lambda place, mask: 16 + place, "text_encoder_3"),  # after CLIP's 16
    "qwen_image": Place(DOUBLE, text_first, after(34)),
    "lumina2": Place(("transformer.layers.0.attn", "transformer.layers.1.attn"), text_first, rank),
    "z_image": Place(
        ("transformer.layers.0.attention", "transformer.layers.1.attention"),
        lambda length, image: ((0, image), (math.ceil(image / 32) * 32, length)),
        rank,
    ),
    "aura_flow": Place(
        tuple(f"transformer.joint_transformer_blocks.{i}.attn" for i in (0, 1)) + SINGLE, text_first, after(-8)
    ),
    "cogvideox": Place(tuple(f"transformer.transformer_blocks.{i}.attn1" for i in (0, 1)), text_first, same),
    "hunyuan_video": Place((DOUBLE[0], *SINGLE), image_first, after(4)),
    "cogview3": Place(tuple(f"transformer.transformer_blocks.{i}.attn1" for i in (0, 1)), text_first, same),
    "cogview4": Place(tuple(f"transformer.transformer_blocks.{i}.attn1" for i in (0, 1)), text_first, same),
    "ovis": Place(DOUBLE + SINGLE, text_first, after(28)),
    "bria": Place(DOUBLE + SINGLE, text_first, same),
    "krea2": Place(DOUBLE, text_first, after(34)),
    # 64 places for an image that is not square; T5's 8 tokens, Llama's 8 of the last layer, and of one more
    "hidream": Place(
        tuple(f"transformer.double_stream_blocks.{i}.block.attn1" for i in (0, 1)),
        lambda length, image: ((0, image), (64, length)),
        after(-8),
        "text_encoder_4",
        again=(8,),
    ),
    "motif_video": Place((DOUBLE[0], *SINGLE), image_first, same),
}
CROSS = ("kandinsky5", "pixart", "sana", "sd", "sdxl", "wan")
# Two encoders, one of them for what stands in quotes.
QUOTING = ("hunyuan_image", "hunyuan_video15")
WORD = "fox"


def built(name: str):
    tiny = families()[name]
    if not tiny.available:
        pytest.skip(f"this diffusers has no {tiny.pipeline}")
    return tiny, tiny.build()


def rows_of(tiny, seen: list, guidance: bool, condition: str, image: int, n_images: int):
    """(call, its batch row) of one image under one condition, for every run of the model."""
    runs = tiny.runs(guidance)
    for index, call in enumerate(seen):
        chunks = runs[index % len(runs)]
        for chunk, of in enumerate(chunks):
            if of == condition:
                yield call, chunk * n_images + image


def one_map(call, row: int, place: Place, made: int, what: str):
    """[heads, positions, tokens] of one batch row of one attention."""
    (a, b), (c, d) = place.streams(call.query.shape[2], made)
    if what == "joint":
        return call.scores().softmax(-1)[row, :, a:b, c:d]
    if what == "text_renormalised":
        return call.scores()[row, :, a:b, c:d].softmax(-1)
    assert what == "text_to_image"
    return call.scores().softmax(-1)[row, :, c:d, a:b].transpose(1, 2)


def expected_map(tiny, ran: Ran, place: Place, image: int, made: int, condition="cond", guidance=True, what="joint"):
    """Mean over layers and heads, sum over steps, of [positions, tokens]."""
    total, count = 0.0, 0
    for path in place.layers:
        for call, row in rows_of(tiny, ran.of(path), guidance, condition, image, 1):
            p = one_map(call, row, place, made, what)
            total, count = total + p.sum(0), count + p.shape[0]
    runs = len(ran.of(place.layers[0])) // len(tiny.runs(guidance))
    return total / count * runs


@pytest.mark.parametrize("name", PLACES)
def test_joint_maps_are_those_of_a_plain_softmax(name):
    tiny, pipe = built(name)
    place, guidance = PLACES[name], tiny.guidance == "cfg"

    def call():
        return tiny.call(pipe, ["red fox"], guidance=guidance, size="wide")

    ran = eager(pipe, place.layers, call)
    kinds = {
        "joint": sf.HeatMaps("joint"),
        "text_renormalised": sf.HeatMaps("text_renormalised"),
        "text_to_image": sf.HeatMaps("joint", direction="text_to_image"),
    }
    words = sf.HeatMaps(words=[WORD])
    negative = sf.HeatMaps(condition="uncond") if guidance else sf.HeatMaps()
    with sf.attach(pipe, *kinds.values(), words, negative) as run:
        result = call()
    assert torch.equal(torch.as_tensor(result), torch.as_tensor(ran.result)), "reading changed the image"
    made = math.prod(run[words].grid)
    for what, maps in kinds.items():
        expected = expected_map(tiny, ran, place, 0, made, guidance=guidance, what=what)
        actual = run[maps].tensor().flatten(1).T.double()
        assert run[maps].tensor().shape[1:] == run[maps].grid
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    if guidance:
        expected = expected_map(tiny, ran, place, 0, made, "uncond")
        torch.testing.assert_close(run[negative].tensor().flatten(1).T.double(), expected, rtol=1e-4, atol=1e-6)
    ids, mask = ran.texts[place.encoder][0]  # the prompt is encoded first
    token = getattr(pipe, place.encoder.replace("text_encoder", "tokenizer")).convert_tokens_to_ids(WORD)
    keys = [place.key(at, mask) for at, one in enumerate(ids) if one == token]
    assert len(keys) == 1
    joint = run[kinds["joint"]]
    keys += [keys[0] + more for more in place.again]
    if name == "hidream":  # T5 has the word too
        keys.insert(0, ran.texts["text_encoder_3"][0][0].index(pipe.tokenizer_3.convert_tokens_to_ids(WORD)))
    if name == "sd3":  # CLIP has the word too
        keys.insert(0, ran.texts["text_encoder"][0][0].index(pipe.tokenizer.convert_tokens_to_ids("fox</w>")))
    torch.testing.assert_close(joint.word(WORD).values, joint.map(keys).values)
    assert run[words].columns == tuple(keys)
    torch.testing.assert_close(run[words].word(WORD).values, joint.word(WORD).values, rtol=1e-5, atol=1e-7)


# What their queries are made of is not turned.
UNTURNED = ("sd3", "aura_flow", "cogview3")


def still(value):
    """A rotary embedding that turns nothing, of the shape of this one; None of what is no such thing."""
    if isinstance(value, (tuple, list)) and value and all(isinstance(one, torch.Tensor) for one in value):
        if all(one.is_complex() for one in value):
            return tuple(torch.ones_like(one) for one in value)
        cos, sin = value
        return torch.ones_like(cos), torch.zeros_like(sin)
    if isinstance(value, torch.Tensor) and value.is_complex():
        return torch.ones_like(value)
    if isinstance(value, torch.Tensor) and value.shape[-2:] == (2, 2):  # matrices
        return torch.eye(2).to(value).expand_as(value)
    return None


@pytest.mark.parametrize("name", [*PLACES, *QUOTING])
def test_query_query_maps_are_those_of_queries_before_the_rotary_embedding(name):
    """Of the first layer in the first step, whose queries an embedding that turns nothing leaves as they were before it."""
    tiny, pipe = built(name)
    path = PLACES[name].layers[0] if name in PLACES else DOUBLE[0]
    guidance = tiny.guidance == "cfg"
    if name in QUOTING:
        pipe.tokenizer_2_max_length = 24

    def call():
        return tiny.call(pipe, ["red fox"], guidance=guidance, size="wide")

    with sf.attach(pipe, maps := sf.HeatMaps("query_query", layers=path, steps=[0])) as run:
        call()
    module = pipe.transformer.get_submodule(path.partition(".")[2])
    turned = []

    def stop(module, args, kwargs):
        found = {key: still(value) for key, value in kwargs.items()}
        found = {key: value for key, value in found.items() if value is not None}
        places = {i: still(value) for i, value in enumerate(args)}
        places = {i: value for i, value in places.items() if value is not None}
        turned.append(len(found) + len(places))
        return tuple(places.get(i, value) for i, value in enumerate(args)), kwargs | found

    usual = eager(pipe, (path,), call)
    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    ran = eager(pipe, (path,), call)
    handle.remove()
    made = math.prod(run[maps].grid)
    one, row = next(iter(rows_of(tiny, ran.of(path), guidance, "cond", 0, 1)))
    before, _ = next(iter(rows_of(tiny, usual.of(path), guidance, "cond", 0, 1)))
    assert set(turned) == {0 if name in UNTURNED else 1}
    assert torch.equal(one.query, before.query) == (name in UNTURNED)
    if name in PLACES:
        (a, b), (c, d) = PLACES[name].streams(one.query.shape[2], made)
    else:  # the tokens of the encoder of what is quoted, with its end, and the prompt's own behind them
        (_, mask), c = ran.texts["text_encoder"][0], made + 17
        a, b, d = 0, made, c + sum(mask) - pipe.prompt_template_encode_start_idx
    expected = one.scores(one.query)[row, :, a:b, c:d].softmax(-1).mean(0)
    torch.testing.assert_close(run[maps].tensor().flatten(1).T.double(), expected, rtol=1e-4, atol=1e-6)


def test_queries_that_nothing_normalises_are_refused_before_the_rotary_embedding():
    _, pipe = built("flux")
    pipe.transformer.transformer_blocks[1].attn.norm_q = None
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.attn cannot be seen before their rotary embedding"):
        sf.attach(pipe, sf.HeatMaps("query_query"))
    with sf.attach(pipe, sf.HeatMaps("query_query", layers="transformer_blocks.0.attn")):
        pass
    assert not pipe.transformer.transformer_blocks[0].attn.norm_q._forward_hooks


def test_words_that_cannot_be_found_are_refused_when_they_are_attached():
    _, pipe = built("flux")
    pipe.text_encoder_2 = pipe.tokenizer_2 = None
    with pytest.raises(ValueError, match=r"name token positions, HeatMaps\(words=\[2, 3\]\), in the place of 'fox'"):
        sf.attach(pipe, sf.HeatMaps(words=["fox"]))
    with sf.attach(pipe, sf.HeatMaps(words=[2, 3])):
        pass


@pytest.mark.parametrize("name", CROSS)
def test_cross_maps_are_those_of_a_plain_softmax_at_one_resolution(name):
    tiny, pipe = built(name)
    path = {"sd": "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2"}.get(name)
    path = path or {"sdxl": "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2"}.get(name)
    path = path or {"kandinsky5": "transformer.visual_transformer_blocks.1.cross_attention"}.get(name)
    path = path or f"transformer.{'blocks' if name == 'wan' else 'transformer_blocks'}.1.attn2"
    guidance = tiny.guidance == "cfg"

    def call():
        return tiny.call(pipe, ["red fox"], guidance=guidance, size="wide")

    ran = eager(pipe, (path,), call)
    maps, words = sf.HeatMaps("cross", layers=path), sf.HeatMaps(layers=path, words=[WORD])
    with sf.attach(pipe, maps, words) as run:
        call()
    recording = run[maps]
    calls = list(rows_of(tiny, ran.of(path), guidance, "cond", 0, 1))
    expected = sum(call.scores().softmax(-1)[row].mean(0) for call, row in calls)
    torch.testing.assert_close(recording.tensor().flatten(1).T.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(recording.word(WORD).values, run[words].word(WORD).values, rtol=1e-5, atol=1e-7)
    if name == "kandinsky5":  # "the photo of" is its template's: "red fox" are the first two keys
        assert run[words].columns == (1,)


@pytest.mark.parametrize("name", QUOTING)
def test_what_stands_in_quotes_comes_before_the_prompt_and_padding_behind_it(name):
    """A prompt's own tokens follow those that ByT5 made of its quotation, as many as each prompt has."""
    tiny, pipe = built(name)
    pipe.tokenizer_2_max_length = 24  # `Text "dog". ` has 13 bytes with its end, `Text "red fox". ` 17
    layer = DOUBLE[0]

    def call():
        return tiny.call(pipe, ["red fox", "dog"], guidance=True)

    ran = eager(pipe, (layer,), call)
    kinds = {what: sf.HeatMaps(what, layers=layer) for what in ("joint", "text_renormalised")}
    kinds["text_to_image"] = sf.HeatMaps(layers=layer, direction="text_to_image")
    negative, words = sf.HeatMaps(layers=layer, condition="uncond"), sf.HeatMaps(layers=layer, words=["fox", "dog"])
    with sf.attach(pipe, *kinds.values(), negative, words) as run:
        result = call()
    assert torch.equal(torch.as_tensor(result), torch.as_tensor(ran.result))
    made, cropped = math.prod(run[negative].grid), pipe.prompt_template_encode_start_idx
    for image, (word, glyphs) in enumerate((("fox", 17), ("dog", 13))):
        ids, mask = ran.texts["text_encoder"][image]
        start, own = made + glyphs, sum(mask) - cropped
        place = Place((layer,), lambda length, image, at=start, n=own: ((0, image), (at, at + n)), same)
        for what, maps in kinds.items():
            calls = [(call, row) for call, row in rows_of(tiny, ran.of(layer), True, "cond", image, 2)]
            expected = sum(one_map(call, row, place, made, what).mean(0) for call, row in calls)
            found = run[maps].tensor(image).flatten(1).T.double()
            torch.testing.assert_close(found[:, :own], expected, rtol=1e-4, atol=1e-7)
            assert not found[:, own:].any()
        keys = [at - cropped for at, one in enumerate(ids) if one == pipe.tokenizer.convert_tokens_to_ids(word)]
        assert len(keys) == 2  # what is quoted is in the prompt too
        joint = run[kinds["joint"]]
        torch.testing.assert_close(joint.word(word, image).values, joint.map(keys, image).values)
        torch.testing.assert_close(run[words].word(word, image).values, joint.word(word, image).values)
    place = Place((layer,), lambda length, image: ((0, image), (image, image + run[negative].n_tokens)), same)
    calls = rows_of(tiny, ran.of(layer), True, "uncond", 0, 2)  # without a quotation
    expected = sum(one_map(call, row, place, made, "joint").mean(0) for call, row in calls)
    torch.testing.assert_close(run[negative].tensor().flatten(1).T.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["ace_step", "stable_audio", "mochi", "omnigen", "prx"])
def test_where_image_and_text_cannot_be_told_apart_attach_says_it(name):
    _, pipe = built(name)
    with pytest.raises(ValueError, match="finds no attention between image and text"):
        sf.attach(pipe, sf.HeatMaps())


@pytest.mark.parametrize("name", ["motif_video", "ltx2"])
def test_attentions_without_text_or_without_image_are_left_out(name):
    tiny, pipe = built(name)
    with sf.attach(pipe, maps := sf.HeatMaps(keep=["layers"])) as run:
        tiny.call(pipe, ["red fox"], guidance=tiny.guidance == "cfg")
    left = {"motif_video": "single_transformer_blocks.2", "ltx2": "audio_"}[name]
    assert run[maps].layers
    assert not any(left in layer for layer in run[maps].layers)
    assert (run[maps].tensor(normalize="steps").sum(0) <= 1 + 1e-4).all()


def test_texts_of_different_lengths_in_one_sequence_keep_their_own_words():
    tiny, pipe = built("lumina2")
    alone, both = sf.HeatMaps(), sf.HeatMaps()
    with sf.attach(pipe, alone) as run:
        tiny.call(pipe, ["red fox"], guidance=False)
    with sf.attach(pipe, both) as batch:
        tiny.call(pipe, ["red fox", "a photo of a blue dog in the snow"], guidance=False)
    torch.testing.assert_close(batch[both].word("fox").values, run[alone].word("fox").values, rtol=1e-3, atol=1e-5)
    assert batch[both].word("dog", image=1).values.shape == batch[both].grid
    with pytest.raises(ValueError, match="'fox' is not in the prompt"):
        batch[both].word("fox", image=1)


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart"])
def test_maps_are_the_same_where_torchs_kernel_gives_no_log_sum_exp(name):
    tiny, pipe = built(name)
    with sf.attach(pipe, maps := sf.HeatMaps()) as run:
        tiny.call(pipe, ["red fox"], guidance=False)
    with sdpa_kernel(SDPBackend.MATH), sf.attach(pipe, plain := sf.HeatMaps()) as again:
        tiny.call(pipe, ["red fox"], guidance=False)
    torch.testing.assert_close(run[maps].tensor(), again[plain].tensor(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sd", "sd3", "flux", "wan"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_maps_of_half_precision_are_sums_of_probabilities_in_fp32(name, dtype):
    tiny, pipe = built(name)
    pipe = pipe.to(dtype)
    maps = sf.HeatMaps() if name in CROSS else sf.HeatMaps("text_renormalised")
    whole = sf.HeatMaps(words=[WORD])
    with sf.attach(pipe, maps, whole) as run:
        tiny.call(pipe, ["red fox"], guidance=False)
    assert next(iter(run[maps].sums.values())).total.dtype == torch.float32
    every = run[maps].tensor(normalize="steps").sum(0)
    torch.testing.assert_close(every, torch.ones_like(every), rtol=1e-2, atol=1e-2)  # of bf16 the lse has 8 bits less
    assert (run[whole].word(WORD).values > 0).all()
